#include "plane/hot_buffers.h"

#include <sys/mman.h>

#include <new>

namespace fluxion {
namespace {

constexpr size_t kAlignment = 2u << 20;
constexpr size_t kMapped = (HotBuffers::kBytes + kAlignment - 1) / kAlignment * kAlignment;

uint8_t* map_buffer() {
  void* mapped = ::mmap(nullptr, kMapped + kAlignment, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  const uintptr_t begin = uintptr_t(mapped);
  const uintptr_t aligned = (begin + kAlignment - 1) / kAlignment * kAlignment;
  if (aligned > begin) ::munmap(mapped, aligned - begin);
  const uintptr_t behind = begin + kAlignment - aligned;
  if (behind) ::munmap(reinterpret_cast<void*>(aligned + kMapped), behind);
  // Without huge pages it is slower, no more.
  ::madvise(reinterpret_cast<void*>(aligned), kMapped, MADV_HUGEPAGE);
  return reinterpret_cast<uint8_t*>(aligned);
}

}  // namespace

HotBuffers::~HotBuffers() {
  for (uint8_t* buffer : free_) ::munmap(buffer, kMapped);
}

uint8_t* HotBuffers::take() {
  {
    std::lock_guard<std::mutex> guard(lock_);
    if (!free_.empty()) {
      uint8_t* buffer = free_.back();
      free_.pop_back();
      return buffer;
    }
  }
  return map_buffer();
}

void HotBuffers::give_back(uint8_t* buffer) {
  {
    std::lock_guard<std::mutex> guard(lock_);
    if (free_.size() < kMaxKept) {
      free_.push_back(buffer);
      return;
    }
  }
  ::munmap(buffer, kMapped);
}

}  // namespace fluxion
