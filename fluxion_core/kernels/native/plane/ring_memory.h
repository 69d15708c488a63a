// Slots for payloads in memory that two processes share. The sender makes it, as a file in memory that
// can neither shrink nor grow, and hands its descriptor to the receiver over a Unix socket; each maps
// it, the receiver to read only. Both run as one user: the other end of the socket is asked who it is.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fluxion {

constexpr uint32_t kMostSlots = 256;

class RingMemory {
 public:
  RingMemory() = default;
  ~RingMemory();
  RingMemory(const RingMemory&) = delete;
  RingMemory& operator=(const RingMemory&) = delete;

  bool is_mapped() const { return memory_ != nullptr; }
  uint32_t slots() const { return slots_; }
  uint32_t slot_bytes() const { return slot_bytes_; }
  uint8_t* slot(uint32_t number) const { return memory_ + size_t(number) * slot_bytes_; }

  // Sender: make it, and say so on `socket`. False: would block. Throws PlaneError (kPeer): the other
  // end is another user's or gone, or the system has no memory or descriptors left.
  //   slots       1 to kMostSlots
  //   slot_bytes  1 to kMaxPayloadBytes, a multiple of 64
  bool announce(int socket, uint32_t slots, uint32_t slot_bytes);

  // Receiver: take in what the other end has announced. False: nothing has come yet. Throws
  // PlaneError: kPeer as above, kTruncated at the stream's end, kFormat of what is no such
  // announcement, or of memory that could change its size or has another than it says.
  bool receive(int socket);

 private:
  void map(int file, int protection);

  uint8_t* memory_ = nullptr;
  uint32_t slots_ = 0, slot_bytes_ = 0;
};

}  // namespace fluxion
