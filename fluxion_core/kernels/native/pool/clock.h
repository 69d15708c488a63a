// The host's monotonic clock, and what a thread does between two looks at a flag. Not for operations/targets/.
#pragma once

#include <chrono>
#include <cstdint>

namespace fluxion {

inline int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace fluxion
