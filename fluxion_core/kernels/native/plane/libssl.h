// The functions of OpenSSL 3 that connections with TLS use, looked up in libssl.so.3 when one is first
// wanted: nothing links to it, and no header of it is needed to build. OpenSSL keeps these functions,
// and the numbers that tls_transport.cpp passes to them, as they are for all of its version 3.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace fluxion::openssl {

// OpenSSL's own, which nobody looks into.
struct Context;
struct Connection;
struct Session;
struct Cipher;
struct Digest;
struct Method;
struct Bio;
struct BioMethod;

using UseSession = int (*)(Connection*, const Digest*, const unsigned char** identity,
                           size_t* identity_bytes, Session**);
using FindSession = int (*)(Connection*, const unsigned char* identity, size_t identity_bytes,
                            Session**);
using BioWrite = int (*)(Bio*, const char* from, int bytes);
using BioRead = int (*)(Bio*, char* to, int bytes);
using BioControl = long (*)(Bio*, int command, long number, void* pointer);

// result, name, arguments
#define FLUXION_OPENSSL_FUNCTIONS(F)                                                  \
  F(BioMethod*, BIO_meth_new, (int type, const char* name))                           \
  F(int, BIO_meth_set_ctrl, (BioMethod*, BioControl))                                 \
  F(int, BIO_meth_set_read, (BioMethod*, BioRead))                                    \
  F(int, BIO_meth_set_write, (BioMethod*, BioWrite))                                  \
  F(Bio*, BIO_new, (const BioMethod*))                                                \
  F(void*, BIO_get_data, (Bio*))                                                      \
  F(void, BIO_set_data, (Bio*, void*))                                                \
  F(void, BIO_set_init, (Bio*, int))                                                  \
  F(void, BIO_set_flags, (Bio*, int))                                                 \
  F(void, BIO_clear_flags, (Bio*, int))                                               \
  F(void, ERR_clear_error, ())                                                        \
  F(unsigned long, ERR_get_error, ())                                                 \
  F(const char*, ERR_reason_error_string, (unsigned long))                            \
  F(const Cipher*, SSL_CIPHER_find, (Connection*, const unsigned char* two_bytes))    \
  F(Context*, SSL_CTX_new, (const Method*))                                           \
  F(void, SSL_CTX_free, (Context*))                                                   \
  F(long, SSL_CTX_ctrl, (Context*, int command, long number, void* pointer))          \
  F(int, SSL_CTX_set_ciphersuites, (Context*, const char*))                           \
  F(int, SSL_CTX_set_num_tickets, (Context*, size_t))                                 \
  F(void, SSL_CTX_set_psk_find_session_callback, (Context*, FindSession))             \
  F(void, SSL_CTX_set_psk_use_session_callback, (Context*, UseSession))               \
  F(void, SSL_CTX_set_verify, (Context*, int mode, int (*)(int, void*)))              \
  F(Session*, SSL_SESSION_new, ())                                                    \
  F(void, SSL_SESSION_free, (Session*))                                               \
  F(int, SSL_SESSION_set1_master_key, (Session*, const unsigned char*, size_t bytes)) \
  F(int, SSL_SESSION_set_cipher, (Session*, const Cipher*))                           \
  F(int, SSL_SESSION_set_protocol_version, (Session*, int))                           \
  F(Connection*, SSL_new, (Context*))                                                 \
  F(void, SSL_free, (Connection*))                                                    \
  F(int, SSL_do_handshake, (Connection*))                                             \
  F(int, SSL_get_error, (const Connection*, int result))                              \
  F(void*, SSL_get_ex_data, (const Connection*, int index))                           \
  F(int, SSL_key_update, (Connection*, int kind))                                     \
  F(int, SSL_read_ex, (Connection*, void* to, size_t bytes, size_t* done))            \
  F(int, SSL_session_reused, (const Connection*))                                     \
  F(void, SSL_set_accept_state, (Connection*))                                        \
  F(void, SSL_set_bio, (Connection*, Bio * from, Bio * to))                           \
  F(void, SSL_set_connect_state, (Connection*))                                       \
  F(int, SSL_set_ex_data, (Connection*, int index, void*))                            \
  F(int, SSL_write_ex, (Connection*, const void* from, size_t bytes, size_t* done))   \
  F(const Method*, TLS_client_method, ())                                             \
  F(const Method*, TLS_server_method, ())

struct Functions {
#define FLUXION_OPENSSL_MEMBER(result, name, arguments) result(*name) arguments = nullptr;
  FLUXION_OPENSSL_FUNCTIONS(FLUXION_OPENSSL_MEMBER)
#undef FLUXION_OPENSSL_MEMBER
};

// Why there is no TLS on this machine; empty if there is. From any thread; looks once.
const std::string& missing();
// Only where nothing is missing.
const Functions& functions();

}  // namespace fluxion::openssl
