#include "plane/ring_transport.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

#include "operations/kernel_table.h"

namespace fluxion {
namespace {

// What is checked and then copied at a time: it still lies in the cache for the copy.
constexpr size_t kPieceBytes = 64 << 10;
constexpr size_t kAnswersAtATime = 64;

// Copy a payload, not past the cache: a ring is small enough to stay there until it is read. Returns its
// CRC32C.
uint32_t copy_and_check(uint8_t* to, const uint8_t* from, size_t bytes) {
  uint32_t crc = 0;
  for (size_t done = 0; done < bytes;) {
    const size_t piece = std::min(kPieceBytes, bytes - done);
    crc = kernels().crc32c(crc, from + done, int64_t(piece));
    std::memcpy(to + done, from + done, piece);
    done += piece;
  }
  return crc;
}

}  // namespace

bool RingReceiver::start() { return memory_.is_mapped() || memory_.receive(fd()); }

const uint8_t* RingReceiver::payload(const FramePrefix& prefix) {
  const uint32_t slot = prefix.reserved;
  if (slot >= memory_.slots()) {
    throw PlaneError(PlaneFault::kFormat, "frame names slot " + std::to_string(slot) + " of " +
                                              std::to_string(memory_.slots()));
  }
  if (prefix.payload_bytes > memory_.slot_bytes()) {
    throw PlaneError(PlaneFault::kFormat, "frame of " + std::to_string(prefix.payload_bytes) +
                                              " B in a slot of " +
                                              std::to_string(memory_.slot_bytes()));
  }
  return memory_.slot(slot);
}

// A sender that leaves answers unread when it goes resets the connection, after what it has sent.
ssize_t RingReceiver::read(void* to, size_t bytes) {
  for (;;) {
    const ssize_t count = ::recv(fd(), to, bytes, MSG_DONTWAIT);
    if (count >= 0) return count;
    if (errno == EAGAIN || errno == EWOULDBLOCK) return kWouldBlock;
    if (errno == ECONNRESET) return 0;
    if (errno != EINTR) throw_peer_gone("reading", errno);
  }
}

void RingReceiver::release(const FramePrefix& prefix) {
  answer_ = prefix.reserved;
  answer_left_ = sizeof answer_;
  flush();
}

bool RingReceiver::flush() {
  while (answer_left_) {
    const char* from = reinterpret_cast<const char*>(&answer_) + sizeof answer_ - answer_left_;
    const ssize_t sent = ::send(fd(), from, answer_left_, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent >= 0) {
      answer_left_ -= size_t(sent);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      return false;
    } else if (errno != EINTR) {
      // A sender that is gone wants no slots; whether it had sent everything shows in what is left.
      answer_left_ = 0;
    }
  }
  return true;
}

RingSender::RingSender(int fd, uint32_t slots, uint32_t slot_bytes)
    : PlainTransport(fd), slots_(slots), slot_bytes_((slot_bytes + 4095) / 4096 * 4096) {
  if (!slots || slots > kMostSlots || !slot_bytes || slot_bytes > kMaxPayloadBytes) {
    throw std::invalid_argument("a ring has 1 to " + std::to_string(kMostSlots) +
                                " slots of at most " + std::to_string(kMaxPayloadBytes) +
                                " B; not " + std::to_string(slots) + " of " +
                                std::to_string(slot_bytes));
  }
  is_free_.assign(slots, true);
  for (uint32_t slot = slots; slot > 0; --slot) free_.push_back(slot - 1);
}

bool RingSender::start() {
  return memory_.is_mapped() || memory_.announce(fd(), slots_, slot_bytes_);
}

bool RingSender::place(FramePrefix& prefix, const uint8_t* payload) {
  if (free_.empty()) return false;
  const uint32_t slot = free_.back();
  if (prefix.payload_bytes > slot_bytes_) {
    throw std::logic_error("payload of " + std::to_string(prefix.payload_bytes) +
                           " B for a slot of " + std::to_string(slot_bytes_));
  }
  free_.pop_back();
  is_free_[slot] = false;
  prefix.crc32c = copy_and_check(memory_.slot(slot), payload, prefix.payload_bytes);
  prefix.reserved = slot;
  return true;
}

bool RingSender::take_answers() {
  uint8_t came[kAnswersAtATime * sizeof answer_];
  for (;;) {
    const ssize_t count = read(came, sizeof came);
    if (count == kWouldBlock) return true;
    if (count == 0) return false;
    for (ssize_t i = 0; i < count; ++i) {
      answer_[answer_bytes_++] = came[i];
      if (answer_bytes_ < sizeof answer_) continue;
      uint32_t slot;
      std::memcpy(&slot, answer_, sizeof slot);
      answer_bytes_ = 0;
      give_back(slot);
    }
  }
}

void RingSender::give_back(uint32_t slot) {
  if (slot >= slots_ || is_free_[slot]) {
    throw PlaneError(PlaneFault::kFormat, "the receiver answers slot " + std::to_string(slot) +
                                              ", which it has not been given");
  }
  is_free_[slot] = true;
  free_.push_back(slot);
}

}  // namespace fluxion
