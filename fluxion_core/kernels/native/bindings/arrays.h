// Arrays of Python's, checked before their addresses are taken: dtype, shape, order, device. What is
// no array, or may not be written, is a TypeError before a function is entered.
//
// A NumPy array costs a call 0.1 us more than an address would, a torch tensor 3 us: what is called in
// every layer is given NumPy views of its tensors.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>

namespace fluxion {

namespace nb = nanobind;

// What is read, and what is written; NumPy, torch, or anything else that speaks DLPack.
using Array = nb::ndarray<nb::ro>;
using WritableArray = nb::ndarray<>;

// A length that the caller chooses.
constexpr int64_t kAnyLength = -1;

// 16 bits of a bfloat16, of which C++17 has no type.
struct BFloat16 {
  uint16_t bits;
};

namespace arrays {

struct Kind {
  nb::dlpack::dtype dtype;
  const char* name;
};

template <typename T>
Kind kind_of() {
  return {nb::dtype<T>(), "?"};
}
template <>
inline Kind kind_of<float>() {
  return {nb::dtype<float>(), "float32"};
}
template <>
inline Kind kind_of<int32_t>() {
  return {nb::dtype<int32_t>(), "int32"};
}
template <>
inline Kind kind_of<int64_t>() {
  return {nb::dtype<int64_t>(), "int64"};
}
template <>
inline Kind kind_of<uint8_t>() {
  return {nb::dtype<uint8_t>(), "uint8"};
}
template <>
inline Kind kind_of<BFloat16>() {
  return {{uint8_t(nb::dlpack::dtype_code::Bfloat), 16, 1}, "bfloat16"};
}

// An array as the checks see it.
struct View {
  nb::dlpack::dtype dtype;
  int device;
  size_t ndim;
  const int64_t* shape;
  const int64_t* strides;
};

// rows_apart: the first dimension's stride may be larger than what lies in a row.
// Raises ShapeError, which says what is wrong with what.
void check(const View& view, const char* name, const Kind& kind,
           std::initializer_list<int64_t> shape, bool rows_apart);

template <typename A>
View view_of(const A& array) {
  return {array.dtype(), array.device_type(), array.ndim(), array.shape_ptr(), array.stride_ptr()};
}

}  // namespace arrays

[[noreturn]] void raise_shape_error(const char* format, ...);

// Raises ShapeError unless 0 <= index < count.
void check_index(const char* name, int64_t index, int64_t count);

// The values of a contiguous array on the CPU.
template <typename T>
const T* values(const Array& array, const char* name, std::initializer_list<int64_t> shape) {
  arrays::check(arrays::view_of(array), name, arrays::kind_of<T>(), shape, false);
  return static_cast<const T*>(array.data());
}

template <typename T>
T* results(const WritableArray& array, const char* name, std::initializer_list<int64_t> shape) {
  arrays::check(arrays::view_of(array), name, arrays::kind_of<T>(), shape, false);
  return static_cast<T*>(array.data());
}

// Rows, each contiguous, `stride` elements apart.
template <typename T>
struct Rows {
  const T* first;
  int64_t stride;
};

template <typename T>
Rows<T> rows(const Array& array, const char* name, std::initializer_list<int64_t> shape) {
  arrays::check(arrays::view_of(array), name, arrays::kind_of<T>(), shape, true);
  return {static_cast<const T*>(array.data()), array.stride(0)};
}

}  // namespace fluxion
