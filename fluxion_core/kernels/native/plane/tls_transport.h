// Bytes of a connection under TLS 1.3, both peers holding one key of the call that they belong to: a
// pre-shared key with a fresh Diffie-Hellman exchange (psk_dhe_ke), AES-128-GCM, and nothing else.
// There are no certificates, tickets or early data: who cannot prove the key is not spoken to.
#pragma once

#include <memory>
#include <string>

#include "plane/libssl.h"
#include "plane/transport.h"

namespace fluxion {

class TlsTransport final : public Transport {
 public:
  // The receiver of KV is the client.
  //   key       32 random bytes
  //   identity  1 to 128 bytes that name the key, and are sent in the clear
  // Throws std::invalid_argument: TLS is not possible here, or key or identity have another length.
  TlsTransport(int fd, PlaneRole role, const std::string& key, const std::string& identity);
  ~TlsTransport() override;

  // The handshake. Throws PlaneError (kPeer) if the peer does not hold the key of this identity.
  bool start() override;
  // Throw PlaneError (kPeer) of bytes that are not the peer's.
  ssize_t read(void* to, size_t bytes) override;
  ssize_t write(const iovec* parts, int count) override;

 private:
  struct Batch;
  struct Wire;
  struct Callbacks;
  struct Free {
    void operator()(openssl::Connection* connection) const;
  };

  ssize_t settle(int result, const char* doing);
  void encrypt(const void* from, size_t bytes);
  bool send_encrypted();

  std::unique_ptr<Wire> wire_;
  std::string key_, identity_;
  std::unique_ptr<openssl::Connection, Free> connection_;
  bool is_ready_ = false;
  bool is_stranger_ = false;    // the client has named another identity
  size_t encrypted_bytes_ = 0;  // of what the next `write` will offer again
  uint64_t bytes_of_key_ = 0;   // encrypted since keys were last changed
};

}  // namespace fluxion
