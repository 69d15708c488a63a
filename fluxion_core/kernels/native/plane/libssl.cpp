#include "plane/libssl.h"

#include <dlfcn.h>

namespace fluxion::openssl {
namespace {

struct Library {
  Functions functions;
  std::string missing;

  Library() {
    // Never closed: OpenSSL's own threads and exit handlers may still be in it.
    void* handle = dlopen("libssl.so.3", RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
      const char* reason = dlerror();
      missing = reason ? reason : "libssl.so.3 cannot be opened";
      return;
    }
    // Those of libcrypto.so.3 are found too: libssl depends on it.
#define FLUXION_OPENSSL_LOOK_UP(result, name, arguments)                        \
  functions.name = reinterpret_cast<result(*) arguments>(dlsym(handle, #name)); \
  if (!functions.name && missing.empty()) missing = "libssl.so.3 has no " #name;
    FLUXION_OPENSSL_FUNCTIONS(FLUXION_OPENSSL_LOOK_UP)
#undef FLUXION_OPENSSL_LOOK_UP
  }
};

const Library& library() {
  static const Library found;
  return found;
}

}  // namespace

const std::string& missing() { return library().missing; }

const Functions& functions() { return library().functions; }

}  // namespace fluxion::openssl
