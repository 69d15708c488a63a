// Frames between two processes of one machine: prefixes over a Unix socket, payloads in slots of shared
// memory. A slot is the sender's until it has named it in a prefix, and again once the receiver has
// answered with its number.
#pragma once

#include <vector>

#include "plane/ring_memory.h"
#include "plane/transport.h"

namespace fluxion {

class RingReceiver final : public PlainTransport {
 public:
  using PlainTransport::PlainTransport;

  bool start() override;
  ssize_t read(void* to, size_t bytes) override;
  bool has_payloads_beside() const override { return true; }
  const uint8_t* payload(const FramePrefix& prefix) override;
  void release(const FramePrefix& prefix) override;
  bool flush() override;

 private:
  RingMemory memory_;
  uint32_t answer_ = 0;     // the last one: the next prefix is not read before it is written
  size_t answer_left_ = 0;  // bytes of it that are not
};

class RingSender final : public PlainTransport {
 public:
  // Throws std::invalid_argument of slots or bytes that a ring cannot have.
  //   slots       1 to kMostSlots
  //   slot_bytes  1 to kMaxPayloadBytes
  RingSender(int fd, uint32_t slots, uint32_t slot_bytes);

  bool start() override;
  bool has_payloads_beside() const override { return true; }
  bool place(FramePrefix& prefix, const uint8_t* payload) override;
  bool take_answers() override;

 private:
  void give_back(uint32_t slot);

  RingMemory memory_;
  uint32_t slots_, slot_bytes_;
  std::vector<uint32_t> free_;  // the one that was given back last is used next
  std::vector<bool> is_free_;
  uint8_t answer_[4] = {};  // the one that has come in part
  size_t answer_bytes_ = 0;
};

}  // namespace fluxion
