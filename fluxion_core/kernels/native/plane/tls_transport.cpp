#include "plane/tls_transport.h"

#include <string.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

namespace fluxion {

using namespace openssl;

namespace {

constexpr size_t kKeyBytes = 32, kMostIdentityBytes = 128;
constexpr size_t kRecordBytes = 16 << 10;  // the most that one record of TLS carries
// Records are sent and received many at a time, for a call of the kernel costs as much as a record's
// encryption; so many bytes still lie in the cache. OpenSSL's own reading ahead moves all that is left
// to the front of its buffer with every record.
constexpr size_t kBatchBytes = 8 * kRecordBytes;
constexpr size_t kSendBufferBytes = kBatchBytes + (8 << 10);  // with what each record adds
// A key of AES-GCM is good for 2^24.5 full records (RFC 8446, 5.5), 380 GiB; it is changed long before.
constexpr uint64_t kMostBytesOfKey = uint64_t(64) << 30;

// OpenSSL's numbers.
constexpr int kTls13 = 0x0304;
constexpr int kSetMode = 33, kSetSessionCacheMode = 44;
constexpr int kSetLowestVersion = 123, kSetHighestVersion = 124;
constexpr long kPartialWrites = 1, kMovingWriteBuffer = 2;
constexpr int kVerifyPeer = 1;
constexpr int kWantRead = 2, kWantWrite = 3, kSystemCall = 5, kPeerClosed = 6;
constexpr int kUpdateNotRequested = 0;
constexpr int kBioType = 0x0400 | 0x80;  // a source and sink, of no kind that OpenSSL has
constexpr int kBioFlush = 11;
constexpr int kBioRead = 1, kBioWrite = 2, kBioRetry = 8;
const unsigned char kAes128GcmSha256[2] = {0x13, 0x01};

// The oldest of this thread's errors, in OpenSSL's words.
std::string oldest_error() {
  const unsigned long code = functions().ERR_get_error();
  const char* reason = code ? functions().ERR_reason_error_string(code) : nullptr;
  return reason ? reason : "error " + std::to_string(code);
}

[[noreturn]] void throw_tls_fault(const char* doing) {
  throw PlaneError(PlaneFault::kPeer, std::string(doing) + ": " + oldest_error());
}

}  // namespace

// Bytes on their way, encrypted.
struct TlsTransport::Batch {
  explicit Batch(size_t bytes) : size(bytes), buffer(new char[bytes]) {}

  size_t left() const { return end - first; }
  size_t room() const { return size - end; }

  size_t put(const void* from, size_t bytes) {
    const size_t count = std::min(bytes, room());
    std::memcpy(&buffer[end], from, count);
    end += count;
    return count;
  }

  size_t take(void* to, size_t bytes) {
    const size_t count = std::min(bytes, left());
    std::memcpy(to, &buffer[first], count);
    first += count;
    return count;
  }

  const size_t size;
  const std::unique_ptr<char[]> buffer;
  size_t first = 0, end = 0;
};

// The socket, which is read and written by batches.
struct TlsTransport::Wire {
  explicit Wire(int socket) : fd(socket), in(kBatchBytes), out(kSendBufferBytes) {}

  // False: the kernel has no room for more, or `error` is set.
  bool send_all() {
    while (out.left()) {
      const ssize_t sent =
          ::send(fd, &out.buffer[out.first], out.left(), MSG_NOSIGNAL | MSG_DONTWAIT);
      if (sent >= 0) {
        out.first += size_t(sent);
      } else if (!is_interrupted()) {
        return false;
      }
    }
    out.first = out.end = 0;
    return true;
  }

  // Of an empty batch. False: nothing has come, or `error` is set. An empty batch is the stream's end.
  bool receive() {
    in.first = in.end = 0;
    for (;;) {
      const ssize_t came = ::recv(fd, &in.buffer[0], in.size, MSG_DONTWAIT);
      if (came >= 0) {
        in.end = size_t(came);
        return true;
      }
      if (!is_interrupted()) return false;
    }
  }

  // Of a call that failed; keeps errno where that broke the connection.
  bool is_interrupted() {
    if (errno == EINTR) return true;
    if (errno != EAGAIN && errno != EWOULDBLOCK) error = errno;
    return false;
  }

  const int fd;
  Batch in, out;
  int error = 0;
};

// What OpenSSL calls.
struct TlsTransport::Callbacks {
  static Wire& wire(Bio* bio) { return *static_cast<Wire*>(functions().BIO_get_data(bio)); }

  static TlsTransport& transport(const Connection* connection) {
    return *static_cast<TlsTransport*>(functions().SSL_get_ex_data(connection, 0));
  }

  static int retry(Bio* bio, int direction) {
    if (!wire(bio).error) functions().BIO_set_flags(bio, direction | kBioRetry);
    return -1;
  }

  static int read(Bio* bio, char* to, int bytes) {
    functions().BIO_clear_flags(bio, kBioRead | kBioWrite | kBioRetry);
    Wire& from = wire(bio);
    if (!from.in.left() && !from.receive()) return retry(bio, kBioRead);
    return int(from.in.take(to, size_t(bytes)));
  }

  static int write(Bio* bio, const char* from, int bytes) {
    functions().BIO_clear_flags(bio, kBioRead | kBioWrite | kBioRetry);
    Wire& to = wire(bio);
    if (size_t(bytes) > to.out.room() && !to.send_all()) return retry(bio, kBioWrite);
    return int(to.out.put(from, size_t(bytes)));
  }

  static long control(Bio* bio, int command, long, void*) {
    if (command != kBioFlush) return 0;
    functions().BIO_clear_flags(bio, kBioRead | kBioWrite | kBioRetry);
    return wire(bio).send_all() ? 1 : retry(bio, kBioWrite);
  }

  // The key, as OpenSSL wants it: a session that can be taken up. Null if it has no memory.
  static Session* session(Connection* connection) {
    const Functions& f = functions();
    const std::string& key = transport(connection).key_;
    const auto* bytes = reinterpret_cast<const unsigned char*>(key.data());
    const Cipher* cipher = f.SSL_CIPHER_find(connection, kAes128GcmSha256);
    Session* made = f.SSL_SESSION_new();
    if (made && cipher && f.SSL_SESSION_set1_master_key(made, bytes, key.size()) &&
        f.SSL_SESSION_set_cipher(made, cipher) &&
        f.SSL_SESSION_set_protocol_version(made, kTls13)) {
      return made;
    }
    f.SSL_SESSION_free(made);
    return nullptr;
  }

  // What a client offers.
  static int use(Connection* connection, const Digest*, const unsigned char** identity,
                 size_t* identity_bytes, Session** offered) {
    const std::string& own = transport(connection).identity_;
    *identity = reinterpret_cast<const unsigned char*>(own.data());
    *identity_bytes = own.size();
    *offered = session(connection);
    return *offered != nullptr;
  }

  // What a server has for the identity that a client names. Nothing: the handshake fails, for there is
  // no certificate to go on with.
  static int find(Connection* connection, const unsigned char* identity, size_t identity_bytes,
                  Session** found) {
    const std::string& own = transport(connection).identity_;
    const bool is_own =
        own.size() == identity_bytes && !std::memcmp(own.data(), identity, identity_bytes);
    transport(connection).is_stranger_ = !is_own;
    *found = is_own ? session(connection) : nullptr;
    return !is_own || *found;
  }

  static BioMethod* make_bio_method() {
    const Functions& f = functions();
    BioMethod* made = f.BIO_meth_new(kBioType, "a hand-off's socket");
    if (!made || !f.BIO_meth_set_read(made, &read) || !f.BIO_meth_set_write(made, &write) ||
        !f.BIO_meth_set_ctrl(made, &control)) {
      throw std::bad_alloc();
    }
    return made;
  }

  static Bio* make_bio(Wire* wire) {
    const Functions& f = functions();
    static BioMethod* const method = make_bio_method();
    Bio* made = f.BIO_new(method);
    if (!made) throw std::bad_alloc();
    f.BIO_set_data(made, wire);
    f.BIO_set_init(made, 1);
    return made;
  }

  static Context* make_context(PlaneRole role) {
    const Functions& f = functions();
    const bool is_client = role == PlaneRole::kReceiver;
    f.ERR_clear_error();
    Context* made = f.SSL_CTX_new(is_client ? f.TLS_client_method() : f.TLS_server_method());
    if (!made || !f.SSL_CTX_ctrl(made, kSetLowestVersion, kTls13, nullptr) ||
        !f.SSL_CTX_ctrl(made, kSetHighestVersion, kTls13, nullptr) ||
        !f.SSL_CTX_set_ciphersuites(made, "TLS_AES_128_GCM_SHA256") ||
        !f.SSL_CTX_set_num_tickets(made, 0)) {
      const std::string reason = oldest_error();
      f.SSL_CTX_free(made);
      throw std::invalid_argument("OpenSSL does no TLS 1.3 with AES-128-GCM here: " + reason);
    }
    f.SSL_CTX_ctrl(made, kSetSessionCacheMode, 0, nullptr);
    f.SSL_CTX_ctrl(made, kSetMode, kPartialWrites | kMovingWriteBuffer, nullptr);
    if (!is_client) {
      f.SSL_CTX_set_psk_find_session_callback(made, &find);
      return made;
    }
    // A server that comes with a certificate in place of the key is nobody that we know.
    f.SSL_CTX_set_verify(made, kVerifyPeer, nullptr);
    f.SSL_CTX_set_psk_use_session_callback(made, &use);
    return made;
  }

  // Shared by all connections, and never freed.
  static Context* context(PlaneRole role) {
    static Context* const client = make_context(PlaneRole::kReceiver);
    static Context* const server = make_context(PlaneRole::kSender);
    return role == PlaneRole::kReceiver ? client : server;
  }
};

void TlsTransport::Free::operator()(Connection* connection) const {
  functions().SSL_free(connection);
}

TlsTransport::TlsTransport(int fd, PlaneRole role, const std::string& key,
                           const std::string& identity)
    : Transport(fd), wire_(new Wire(fd)), key_(key), identity_(identity) {
  if (key.size() != kKeyBytes || identity.empty() || identity.size() > kMostIdentityBytes) {
    throw std::invalid_argument("TLS wants a key of 32 B and an identity of 1 to 128 B; got " +
                                std::to_string(key.size()) + " and " +
                                std::to_string(identity.size()) + " B");
  }
  if (!missing().empty()) throw std::invalid_argument("no TLS here: " + missing());
  const Functions& f = functions();
  connection_.reset(f.SSL_new(Callbacks::context(role)));
  if (!connection_) throw std::bad_alloc();
  Bio* bio = Callbacks::make_bio(wire_.get());
  f.SSL_set_bio(connection_.get(), bio, bio);
  if (!f.SSL_set_ex_data(connection_.get(), 0, this)) throw std::bad_alloc();
  if (role == PlaneRole::kReceiver) {
    f.SSL_set_connect_state(connection_.get());
  } else {
    f.SSL_set_accept_state(connection_.get());
  }
}

TlsTransport::~TlsTransport() { explicit_bzero(key_.data(), key_.size()); }

// After a call that did not succeed: kWouldBlock, or 0 at the stream's end.
ssize_t TlsTransport::settle(int result, const char* doing) {
  const int code = functions().SSL_get_error(connection_.get(), result);
  if (code == kWantRead || code == kWantWrite) return kWouldBlock;
  if (code == kPeerClosed) return 0;
  if (is_stranger_) {
    throw PlaneError(PlaneFault::kPeer, "the TLS handshake: the peer names another key");
  }
  if (code != kSystemCall) throw_tls_fault(doing);
  if (wire_->error) throw_peer_gone(doing, wire_->error);
  return 0;
}

bool TlsTransport::start() {
  if (is_ready_) return true;
  const Functions& f = functions();
  f.ERR_clear_error();
  const int result = f.SSL_do_handshake(connection_.get());
  if (result != 1) {
    if (settle(result, "the TLS handshake") == kWouldBlock) return false;
    throw PlaneError(PlaneFault::kPeer, "the peer closed the connection in the TLS handshake");
  }
  if (!f.SSL_session_reused(connection_.get())) {
    throw PlaneError(PlaneFault::kPeer, "the TLS handshake went without the call's key");
  }
  explicit_bzero(key_.data(), key_.size());
  is_ready_ = true;
  return true;
}

ssize_t TlsTransport::read(void* to, size_t bytes) {
  if (!start()) return kWouldBlock;
  const Functions& f = functions();
  f.ERR_clear_error();
  for (size_t done = 0;;) {
    size_t came = 0;
    const int result =
        f.SSL_read_ex(connection_.get(), static_cast<char*>(to) + done, bytes - done, &came);
    done += came;
    if (done == bytes) return ssize_t(done);
    if (result == 1) continue;
    const ssize_t settled = settle(result, "reading under TLS");
    return done ? ssize_t(done) : settled;
  }
}

// At most what the buffer, which is empty, has room for: so there is nothing to wait for.
void TlsTransport::encrypt(const void* from, size_t bytes) {
  const Functions& f = functions();
  for (size_t done = 0; done < bytes;) {
    size_t taken = 0;
    if (f.SSL_write_ex(connection_.get(), static_cast<const char*>(from) + done, bytes - done,
                       &taken) != 1) {
      throw_tls_fault("encrypting");
    }
    done += taken;
  }
  encrypted_bytes_ += bytes;
  bytes_of_key_ += bytes;
}

// False: would block.
bool TlsTransport::send_encrypted() {
  if (wire_->send_all()) return true;
  if (wire_->error) throw_peer_gone("writing under TLS", wire_->error);
  return false;
}

// Bytes count as written once their records are the kernel's. Until then they are encrypted already,
// and what is offered again is only counted.
ssize_t TlsTransport::write(const iovec* parts, int count) {
  if (!start() || !send_encrypted()) return kWouldBlock;
  if (!encrypted_bytes_) {
    functions().ERR_clear_error();
    if (bytes_of_key_ >= kMostBytesOfKey) {
      if (!functions().SSL_key_update(connection_.get(), kUpdateNotRequested)) {
        throw_tls_fault("changing TLS keys");
      }
      bytes_of_key_ = 0;
    }
    for (int i = 0; i < count && encrypted_bytes_ < kBatchBytes; ++i) {
      encrypt(parts[i].iov_base, std::min(parts[i].iov_len, kBatchBytes - encrypted_bytes_));
    }
    if (!send_encrypted()) return kWouldBlock;
  }
  return ssize_t(std::exchange(encrypted_bytes_, 0));
}

}  // namespace fluxion
