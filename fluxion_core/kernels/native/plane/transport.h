// How bytes of one connection move, and where its payloads lie.
//
// A transport owns its descriptor, which does not block, and is used by one thread at a time. That
// thread waits for any edge of the descriptor (epoll, edge-triggered, both directions) and then goes on
// until a call would block: so a call may wait for either direction without saying for which.
//
// Two shapes. On a stream (plain, tls), a frame is its prefix and then its payload. Beside a stream
// (ring), the stream carries prefixes alone, `reserved` says in which slot the payload lies, and the
// receiver answers each slot that it has taken in.
//
// All calls throw PlaneError where the peer breaks a rule or is gone; the connection is then over.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "plane/frame_prefix.h"
#include "plane/plane_error.h"

namespace fluxion {

constexpr int64_t kMaxConnections = 64;  // of a hand-off

class Transport {
 public:
  static constexpr ssize_t kWouldBlock = -1;

  // Takes the descriptor over; it must not block.
  explicit Transport(int fd) : fd_(fd) {}
  virtual ~Transport();
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;

  int fd() const { return fd_; }

  // What comes before frames (a handshake, a ring's announcement). False: would block, call again.
  virtual bool start() { return true; }

  // Bytes read into `to`, at least one; 0 at the stream's end; kWouldBlock.
  virtual ssize_t read(void* to, size_t bytes) = 0;

  // Bytes of `parts` written, at least one; kWouldBlock. After kWouldBlock, the next call must offer the
  // same bytes again (others may follow them).
  virtual ssize_t write(const iovec* parts, int count) = 0;

  virtual bool has_payloads_beside() const { return false; }

  // Receiver, payloads beside the stream. Where this frame's payload lies, until `release`. Checks slot
  // and length (kFormat); all else in the prefix has been checked. The peer can still write there.
  virtual const uint8_t* payload(const FramePrefix& prefix);
  // The payload has been taken in: answer so, now or, where that would block, by `flush`.
  virtual void release(const FramePrefix& prefix);
  // Write answers that are left. False: would block. Called before reading, in every turn.
  virtual bool flush() { return true; }

  // Sender. Complete the prefix (crc32c; beside the stream also reserved) of this payload of
  // prefix.payload_bytes; beside the stream the payload is copied, and what `payload` points to is not
  // looked at again. False: no slot is free; called again once the descriptor has had an edge.
  virtual bool place(FramePrefix& prefix, const uint8_t* payload);
  // Sender. Read what the receiver answers; called first in every turn. False at the stream's end.
  // On a stream nothing may come (kFormat).
  virtual bool take_answers();

 private:
  int fd_;
};

enum class PlaneRole { kReceiver, kSender };  // decode node, which has dialled; prefill node

struct TransportOptions {
  PlaneRole role;
  std::string kind;           // plain, tls or ring
  std::string psk, identity;  // tls
  // ring: of the sender. The receiver is told by it, and refuses slots of more than kMaxPayloadBytes.
  uint32_t slots = 0, slot_bytes = 0;
};

// Takes the descriptor over, also where it throws: std::invalid_argument of options that make no sense or
// a kind that cannot be had here.
std::unique_ptr<Transport> make_transport(int fd, const TransportOptions& options);

// The peer has gone: what errno says of a read or write on `fd`.
[[noreturn]] void throw_peer_gone(const char* doing, int error);

class PlainTransport : public Transport {
 public:
  using Transport::Transport;
  ssize_t read(void* to, size_t bytes) override;
  ssize_t write(const iovec* parts, int count) override;
};

}  // namespace fluxion
