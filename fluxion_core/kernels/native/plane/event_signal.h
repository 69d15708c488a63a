// An eventfd of Python's, written where its loop is to look at a state.
#pragma once

#include <unistd.h>

#include <cstdint>

namespace fluxion {

class EventSignal {
 public:
  explicit EventSignal(int fd) : fd_(fd) {}

  void raise() const {
    const uint64_t one = 1;
    // It can only fail where the counter is full, and then the loop will look.
    if (::write(fd_, &one, sizeof one) < 0) return;
  }

 private:
  int fd_;
};

}  // namespace fluxion
