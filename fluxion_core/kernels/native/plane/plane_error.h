// What can be wrong with a hand-off's connection, as Python will raise it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fluxion {

enum class PlaneFault {
  kFormat,     // FrameFormatError
  kChecksum,   // FrameChecksumError: expected, found
  kOrder,      // FrameOrderError: expected, found, as tokens
  kNonFinite,  // NonFiniteKvError: first_token is the token
  kTruncated,  // StreamTruncatedError
  kPeer,       // PeerUnavailableError: gone, unreachable, or not who it should be
  kSystem,     // FluxionError: this node lacks something, such as memory for a buffer
};

// `text` is for faults whose Python class makes none of its own from the numbers.
struct PlaneError : std::runtime_error {
  PlaneFault fault;
  int64_t layer = 0, first_token = 0, expected = 0, found = 0;

  PlaneError(PlaneFault kind, const std::string& text) : std::runtime_error(text), fault(kind) {}
  PlaneError(PlaneFault kind, int64_t of_layer, int64_t at_token, int64_t wanted, int64_t came)
      : std::runtime_error(""),
        fault(kind),
        layer(of_layer),
        first_token(at_token),
        expected(wanted),
        found(came) {}
};

}  // namespace fluxion
