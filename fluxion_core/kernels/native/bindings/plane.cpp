// What Python sees of the data plane: threads, and KV of one prompt on its way in or out.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>

#include "bindings/arrays.h"
#include "bindings/bindings.h"
#include "plane/io_threads.h"
#include "plane/kv_departure.h"
#include "plane/kv_landing.h"
#include "plane/libssl.h"

namespace fluxion {
namespace {

const char* fault_name(PlaneFault fault) {
  switch (fault) {
    case PlaneFault::kFormat:
      return "format";
    case PlaneFault::kChecksum:
      return "checksum";
    case PlaneFault::kOrder:
      return "order";
    case PlaneFault::kNonFinite:
      return "non_finite";
    case PlaneFault::kTruncated:
      return "truncated";
    case PlaneFault::kPeer:
      return "peer";
    case PlaneFault::kSystem:
      break;
  }
  return "system";
}

// (kind, text, layer, first_token, expected, found), or None.
nb::object error_tuple(const std::optional<PlaneError>& error) {
  if (!error) return nb::none();
  return nb::make_tuple(fault_name(error->fault), error->what(), error->layer, error->first_token,
                        error->expected, error->found);
}

std::string string_of(const nb::bytes& bytes) { return {bytes.c_str(), bytes.size()}; }

TransportOptions options_of(PlaneRole role, const std::string& kind, const nb::bytes& psk,
                            const nb::bytes& identity, uint32_t slots = 0,
                            uint32_t slot_bytes = 0) {
  return {role, kind, string_of(psk), string_of(identity), slots, slot_bytes};
}

// slabs: [slabs] int64, the address of each slab in token order.
void make_landing(KvLanding* self, IoThreads& threads, const SlabLayout& layout, const Array& slabs,
                  int64_t num_tokens, int64_t kv_from_token, int event_fd) {
  const int64_t* addresses = values<int64_t>(slabs, "slabs", {kAnyLength});
  new (self) KvLanding(threads, layout, addresses, int64_t(slabs.shape(0)), num_tokens,
                       kv_from_token, event_fd);
}

void add_landing(KvLanding& landing, int fd, const std::string& transport, int64_t connection,
                 int64_t of, const nb::bytes& psk, const nb::bytes& identity) {
  const auto options = options_of(PlaneRole::kReceiver, transport, psk, identity);
  nb::gil_scoped_release unlocked;
  landing.add(fd, options, connection, of);
}

nb::tuple landing_state(const KvLanding& landing) {
  const KvLanding::State state = landing.state();
  return nb::make_tuple(state.payload_bytes, state.chunks, state.tokens_taken, state.received_bytes,
                        state.is_whole, error_tuple(state.error));
}

// A departure, and what its rings are to be.
struct Departure {
  KvDeparture departure;
  uint32_t slots, slot_bytes;

  Departure(IoThreads& threads, int event_fd, uint32_t ring_slots, uint32_t ring_slot_bytes)
      : departure(threads, event_fd), slots(ring_slots), slot_bytes(ring_slot_bytes) {}
};

void add_departure(Departure& self, int fd, const std::string& transport, int64_t connection,
                   int64_t of, const nb::bytes& psk, const nb::bytes& identity) {
  const auto options =
      options_of(PlaneRole::kSender, transport, psk, identity, self.slots, self.slot_bytes);
  nb::gil_scoped_release unlocked;
  self.departure.add(fd, options, connection, of);
}

int64_t put_array(Departure& self, int64_t layer, int64_t first_token, int64_t num_tokens,
                  const Array& payload, int64_t num_bytes) {
  const uint8_t* from = values<uint8_t>(payload, "payload", {kAnyLength});
  if (num_bytes > int64_t(payload.shape(0))) {
    raise_shape_error("payload has %zu bytes; %lld are to leave", payload.shape(0),
                      (long long)num_bytes);
  }
  return self.departure.put(layer, first_token, num_tokens, from, num_bytes);
}

int64_t put_address(Departure& self, int64_t layer, int64_t first_token, int64_t num_tokens,
                    uintptr_t payload, int64_t num_bytes) {
  return self.departure.put(layer, first_token, num_tokens,
                            reinterpret_cast<const uint8_t*>(payload), num_bytes);
}

nb::tuple departure_state(Departure& self) {
  const KvDeparture::State state = self.departure.state();
  return nb::make_tuple(state.finished, state.payload_bytes, state.waiting_seconds,
                        error_tuple(state.error));
}

}  // namespace

void bind_plane(nb::module_& m) {
  m.def("tls_missing", [] { return openssl::missing(); });
  nb::class_<IoThreads>(m, "IoThreads")
      .def(nb::init<int, std::vector<int>, int>(), nb::arg("threads"),
           nb::arg("cpus") = std::vector<int>(), nb::arg("niceness") = 0)
      .def("close", &IoThreads::close, nb::call_guard<nb::gil_scoped_release>())
      .def("cpu_seconds", &IoThreads::cpu_seconds);
  nb::class_<KvLanding>(m, "KvLanding")
      .def("__init__", &make_landing, nb::arg("threads"), nb::arg("layout"), nb::kw_only(),
           nb::arg("slabs"), nb::arg("num_tokens"), nb::arg("kv_from_token"), nb::arg("event_fd"),
           nb::keep_alive<1, 2>())
      .def("add", &add_landing, nb::arg("fd"), nb::arg("transport"), nb::arg("connection"),
           nb::arg("of"), nb::arg("psk") = nb::bytes("", 0), nb::arg("identity") = nb::bytes("", 0))
      .def("state", &landing_state)
      .def_prop_ro("whole_tokens", &KvLanding::whole_tokens)
      .def("close", &KvLanding::close, nb::call_guard<nb::gil_scoped_release>());
  nb::class_<Departure>(m, "KvDeparture")
      .def(nb::init<IoThreads&, int, uint32_t, uint32_t>(), nb::arg("threads"), nb::kw_only(),
           nb::arg("event_fd"), nb::arg("slots") = 0, nb::arg("slot_bytes") = 0,
           nb::keep_alive<1, 2>())
      .def("add", &add_departure, nb::arg("fd"), nb::arg("transport"), nb::arg("connection"),
           nb::arg("of"), nb::arg("psk") = nb::bytes("", 0), nb::arg("identity") = nb::bytes("", 0))
      .def("put", &put_address, nb::arg("layer"), nb::arg("first_token"), nb::arg("num_tokens"),
           nb::arg("payload"), nb::arg("num_bytes"))
      .def("put", &put_array, nb::arg("layer"), nb::arg("first_token"), nb::arg("num_tokens"),
           nb::arg("payload"), nb::arg("num_bytes"))
      .def("state", &departure_state)
      .def(
          "close", [](Departure& self) { self.departure.close(); },
          nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace fluxion
