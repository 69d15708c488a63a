#include "plane/ring_memory.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

#include "plane/frame_prefix.h"
#include "plane/transport.h"

namespace fluxion {
namespace {

constexpr uint32_t kAnnouncementMagic = 0x4d585546;  // F U X M
constexpr int kSizeSeals = F_SEAL_SHRINK | F_SEAL_GROW;
constexpr int kMostDescriptors =
    8;  // that are looked at, so as to close them; the kernel drops more

struct Announcement {
  uint32_t magic, slots, slot_bytes, zero;
};
static_assert(sizeof(Announcement) == 16);

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(Descriptor&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  Descriptor& operator=(Descriptor&&) = delete;
  int fd() const { return fd_; }

 private:
  int fd_;
};

[[noreturn]] void throw_format(const std::string& text) {
  throw PlaneError(PlaneFault::kFormat, text);
}

[[noreturn]] void throw_system(const char* doing) {
  throw PlaneError(PlaneFault::kSystem,
                   std::string("shared memory: ") + doing + ": " + std::strerror(errno));
}

void check_same_user(int socket) {
  ucred peer{};
  socklen_t bytes = sizeof peer;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &bytes)) throw_system("who asks for it");
  if (peer.uid != ::geteuid()) {
    throw PlaneError(PlaneFault::kPeer, "shared memory is for processes of user " +
                                            std::to_string(::geteuid()) + "; the peer is " +
                                            std::to_string(peer.uid));
  }
}

Descriptor make_sealed_file(size_t bytes) {
  Descriptor file(::memfd_create("fluxion-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (file.fd() < 0 || ::ftruncate(file.fd(), off_t(bytes)) ||
      ::fcntl(file.fd(), F_ADD_SEALS, kSizeSeals | F_SEAL_SEAL)) {
    throw_system("making it");
  }
  return file;
}

union ControlBuffer {
  cmsghdr header;  // for its alignment
  char bytes[CMSG_SPACE(sizeof(int) * kMostDescriptors)];
};

std::vector<Descriptor> descriptors_of(msghdr& message) {
  std::vector<Descriptor> found;
  for (cmsghdr* part = CMSG_FIRSTHDR(&message); part; part = CMSG_NXTHDR(&message, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
      found.emplace_back(fd);
    }
  }
  return found;
}

void check_announcement(const Announcement& said, ssize_t came, size_t descriptors, bool is_cut) {
  if (size_t(came) != sizeof said || said.magic != kAnnouncementMagic || said.zero) {
    throw_format("what came in place of shared memory's announcement is none");
  }
  if (descriptors != 1 || is_cut) {
    throw_format("shared memory was announced with " + std::to_string(descriptors) +
                 " descriptors, or this process has none left; need 1");
  }
  if (!said.slots || said.slots > kMostSlots || !said.slot_bytes ||
      said.slot_bytes > kMaxPayloadBytes || said.slot_bytes % 64) {
    throw_format("shared memory has " + std::to_string(said.slots) + " slots of " +
                 std::to_string(said.slot_bytes) + " B; need 1 to " + std::to_string(kMostSlots) +
                 " of at most " + std::to_string(kMaxPayloadBytes) + " B, a multiple of 64");
  }
}

// A file whose pages are there as long as it is mapped: reading it can never be a bus error.
void check_file(int file, size_t bytes) {
  struct stat status{};
  struct statfs system{};
  if (::fstat(file, &status) || ::fstatfs(file, &system)) throw_system("looking at it");
  const int seals = ::fcntl(file, F_GET_SEALS);
  if (system.f_type != TMPFS_MAGIC || seals < 0 || (seals & kSizeSeals) != kSizeSeals) {
    throw_format("shared memory is not sealed against shrinking and growing");
  }
  if (size_t(status.st_size) != bytes) {
    throw_format("shared memory has " + std::to_string(status.st_size) + " B; its slots need " +
                 std::to_string(bytes));
  }
}

}  // namespace

RingMemory::~RingMemory() {
  if (memory_) ::munmap(memory_, size_t(slots_) * slot_bytes_);
}

void RingMemory::map(int file, int protection) {
  void* mapped = ::mmap(nullptr, size_t(slots_) * slot_bytes_, protection, MAP_SHARED, file, 0);
  if (mapped == MAP_FAILED) throw_system("mapping it");
  memory_ = static_cast<uint8_t*>(mapped);
}

bool RingMemory::announce(int socket, uint32_t slots, uint32_t slot_bytes) {
  check_same_user(socket);
  const Descriptor file = make_sealed_file(size_t(slots) * slot_bytes);
  Announcement said{kAnnouncementMagic, slots, slot_bytes, 0};
  iovec part{&said, sizeof said};
  ControlBuffer control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.bytes;
  message.msg_controllen = CMSG_SPACE(sizeof(int));
  cmsghdr* rights = CMSG_FIRSTHDR(&message);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(sizeof(int));
  const int fd = file.fd();
  std::memcpy(CMSG_DATA(rights), &fd, sizeof fd);
  ssize_t sent;
  do {
    sent = ::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  } while (sent < 0 && errno == EINTR);
  if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return false;
  if (sent != ssize_t(sizeof said)) throw_peer_gone("announcing shared memory", errno);
  slots_ = slots;
  slot_bytes_ = slot_bytes;
  map(fd, PROT_READ | PROT_WRITE);
  return true;
}

bool RingMemory::receive(int socket) {
  check_same_user(socket);
  Announcement said{};
  iovec part{&said, sizeof said};
  ControlBuffer control{};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.bytes;
  message.msg_controllen = sizeof control.bytes;
  ssize_t came;
  do {
    came = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
  } while (came < 0 && errno == EINTR);
  if (came < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return false;
  if (came < 0) throw_peer_gone("waiting for shared memory", errno);
  const std::vector<Descriptor> files = descriptors_of(message);
  if (!came) {
    throw PlaneError(PlaneFault::kTruncated, "the connection ended before its shared memory came");
  }
  check_announcement(said, came, files.size(), message.msg_flags & MSG_CTRUNC);
  check_file(files[0].fd(), size_t(said.slots) * said.slot_bytes);
  slots_ = said.slots;
  slot_bytes_ = said.slot_bytes;
  map(files[0].fd(), PROT_READ);
  return true;
}

}  // namespace fluxion
