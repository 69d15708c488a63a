#include "plane/transport.h"

#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "operations/kernel_table.h"
#include "plane/ring_transport.h"
#include "plane/tls_transport.h"

namespace fluxion {
namespace {

// Of a sender's socket; the kernel makes it twice that, at most twice net.core.wmem_max. What it would let
// wait by itself, up to 4 MiB for each connection, has left the cache when it is received: with four
// connections over loopback that is 0.35 CPU s/GB in place of 0.25. What is under way is bounded with it:
// at a round trip of 1 ms a connection moves 1 GB/s.
constexpr int kSendBufferBytes = 512 << 10;

void bound_send_buffer(int fd) {
  // Where it cannot be, the socket works as it is.
  ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &kSendBufferBytes, sizeof kSendBufferBytes);
}

}  // namespace

Transport::~Transport() { ::close(fd_); }

const uint8_t* Transport::payload(const FramePrefix&) {
  throw std::logic_error("payloads of this transport are on its stream");
}

void Transport::release(const FramePrefix&) {}

bool Transport::place(FramePrefix& prefix, const uint8_t* payload) {
  prefix.crc32c = kernels().crc32c(0, payload, prefix.payload_bytes);
  return true;
}

bool Transport::take_answers() {
  uint8_t byte;
  const ssize_t count = read(&byte, 1);
  if (count > 0) {
    throw PlaneError(PlaneFault::kFormat, "the receiver wrote to a stream that it only reads");
  }
  return count != 0;
}

void throw_peer_gone(const char* doing, int error) {
  throw PlaneError(PlaneFault::kPeer, std::string("the connection broke while ") + doing + ": " +
                                          std::strerror(error));
}

ssize_t PlainTransport::read(void* to, size_t bytes) {
  for (;;) {
    const ssize_t count = ::recv(fd(), to, bytes, MSG_DONTWAIT);
    if (count >= 0) return count;
    if (errno == EAGAIN || errno == EWOULDBLOCK) return kWouldBlock;
    if (errno != EINTR) throw_peer_gone("reading", errno);
  }
}

ssize_t PlainTransport::write(const iovec* parts, int count) {
  msghdr message{};
  message.msg_iov = const_cast<iovec*>(parts);
  message.msg_iovlen = size_t(count);
  for (;;) {
    const ssize_t written = ::sendmsg(fd(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (written >= 0) return written;
    if (errno == EAGAIN || errno == EWOULDBLOCK) return kWouldBlock;
    if (errno != EINTR) throw_peer_gone("writing", errno);
  }
}

std::unique_ptr<Transport> make_transport(int fd, const TransportOptions& options) {
  const bool is_receiver = options.role == PlaneRole::kReceiver;
  if (!is_receiver && options.kind != "ring") bound_send_buffer(fd);
  if (options.kind == "plain") return std::make_unique<PlainTransport>(fd);
  if (options.kind == "tls") {
    return std::make_unique<TlsTransport>(fd, options.role, options.psk, options.identity);
  }
  if (options.kind == "ring" && is_receiver) return std::make_unique<RingReceiver>(fd);
  if (options.kind == "ring") {
    return std::make_unique<RingSender>(fd, options.slots, options.slot_bytes);
  }
  ::close(fd);
  throw std::invalid_argument("transport '" + options.kind + "': plain, tls or ring");
}

}  // namespace fluxion
