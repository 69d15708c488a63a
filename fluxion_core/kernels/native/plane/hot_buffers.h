// Buffers that frames are received into. One that has just been given back is given out next, for its
// lines may still be in a cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace fluxion {

class HotBuffers {
 public:
  // A buffer holds the largest payload, and what was read with its end.
  static constexpr size_t kBytes = (4u << 20) + 4096;
  // Kept when nobody has them; memory is there for what was once written, 2 MiB at a time.
  static constexpr size_t kMaxKept = 32;

  HotBuffers() = default;
  ~HotBuffers();
  HotBuffers(const HotBuffers&) = delete;
  HotBuffers& operator=(const HotBuffers&) = delete;

  // kBytes at a multiple of 2 MiB. Throws std::bad_alloc.
  uint8_t* take();
  void give_back(uint8_t* buffer);

 private:
  std::mutex lock_;
  std::vector<uint8_t*> free_;
};

}  // namespace fluxion
