#include "bindings/arrays.h"

#include <cstdarg>
#include <cstdio>
#include <string>

namespace fluxion {
namespace arrays {
namespace {

std::string shape_text(const int64_t* lengths, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i) {
    if (i) text += ", ";
    text += lengths[i] == kAnyLength ? "any" : std::to_string(lengths[i]);
  }
  return text + "]";
}

std::string dtype_text(nb::dlpack::dtype dtype) {
  using Code = nb::dlpack::dtype_code;
  const char* name = "type ";
  switch (Code(dtype.code)) {
    case Code::Int:
      name = "int";
      break;
    case Code::UInt:
      name = "uint";
      break;
    case Code::Float:
      name = "float";
      break;
    case Code::Bfloat:
      name = "bfloat";
      break;
    case Code::Bool:
      name = "bool";
      break;
    default:
      break;
  }
  return name + std::to_string(dtype.bits);
}

bool fits(const View& view, std::initializer_list<int64_t> shape) {
  if (view.ndim != shape.size()) return false;
  size_t i = 0;
  for (const int64_t length : shape) {
    if (length != kAnyLength && length != view.shape[i]) return false;
    ++i;
  }
  return true;
}

bool is_contiguous(const View& view, bool rows_apart) {
  int64_t expected = 1;
  for (size_t i = view.ndim; i-- > 0;) {
    const bool free = view.shape[i] == 1 || (rows_apart && i == 0 && view.strides[i] >= expected);
    if (!free && view.strides[i] != expected) return false;
    expected *= view.shape[i];
  }
  return true;
}

bool is_empty(const View& view) {
  for (size_t i = 0; i < view.ndim; ++i) {
    if (view.shape[i] == 0) return true;
  }
  return false;
}

}  // namespace

void check(const View& view, const char* name, const Kind& kind,
           std::initializer_list<int64_t> shape, bool rows_apart) {
  if (view.device != nb::device::cpu::value) {
    raise_shape_error("%s is not in the CPU's memory", name);
  }
  if (view.dtype != kind.dtype) {
    raise_shape_error("%s is %s; need %s", name, dtype_text(view.dtype).c_str(), kind.name);
  }
  if (!fits(view, shape)) {
    raise_shape_error("%s has shape %s; need %s", name, shape_text(view.shape, view.ndim).c_str(),
                      shape_text(shape.begin(), shape.size()).c_str());
  }
  if (!is_empty(view) && !is_contiguous(view, rows_apart)) {
    raise_shape_error("%s has strides %s for shape %s; %s", name,
                      shape_text(view.strides, view.ndim).c_str(),
                      shape_text(view.shape, view.ndim).c_str(),
                      rows_apart ? "each row must be contiguous" : "it must be contiguous");
  }
}

}  // namespace arrays

void check_index(const char* name, int64_t index, int64_t count) {
  if (index < 0 || index >= count) {
    raise_shape_error("%s %lld of %lld", name, (long long)index, (long long)count);
  }
}

void raise_shape_error(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const nb::object type = nb::module_::import_("fluxion_core.errors").attr("ShapeError");
  PyErr_SetString(type.ptr(), text);
  throw nb::python_error();
}

}  // namespace fluxion
