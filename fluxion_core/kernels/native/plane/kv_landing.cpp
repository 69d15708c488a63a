#include "plane/kv_landing.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "attention/kv_ingest.h"
#include "plane/frame_check.h"
#include "pool/clock.h"

namespace fluxion {

// One connection of a landing. All but its construction is in turns.
class LandingConnection : public HandoffConnection {
 public:
  LandingConnection(KvLanding& owner, std::unique_ptr<Transport> transport, int64_t connection,
                    int64_t of)
      : HandoffConnection(owner, std::move(transport)),
        owner_(owner),
        rules_{owner.layout_, owner.num_tokens_, connection, of,
               this->transport().has_payloads_beside()},
        num_layers_((owner.layout_.layers - connection + of - 1) / of),
        layers_left_(num_layers_) {}

 protected:
  Turn go_on() override;
  void let_go() override;

 private:
  // What of a frame is read at once: what the kernel has just copied is checked while it is in L2.
  static constexpr size_t kReadBytes = 256 << 10;

  bool read_prefix();
  bool read_payload();
  void take_prefix();
  void take_frame(const uint8_t* payload, uint32_t crc32c);
  void write_slabs(const uint8_t* payload);
  void refuse_more();
  ssize_t read(void* to, size_t bytes);
  [[noreturn]] void throw_truncated() const;

  KvLanding& owner_;
  const ChunkRules rules_;
  const int64_t num_layers_;
  int64_t layers_left_;  // that are not whole
  bool has_started_ = false;
  FramePrefix prefix_;
  size_t prefix_filled_ = 0;
  bool in_payload_ = false;
  uint8_t* buffer_ = nullptr;  // [payload | what was read of the next prefix]
  size_t filled_ = 0, checked_ = 0;
  uint32_t crc32c_ = 0;
};

Connection::Turn LandingConnection::go_on() {
  if (!has_started_ && !transport().start()) return Turn::kWaits;
  has_started_ = true;
  if (!transport().flush()) return Turn::kWaits;
  if (layers_left_) {
    if (!in_payload_ && !read_prefix()) return Turn::kWaits;
    if (rules_.has_slots) {
      const uint8_t* payload = transport().payload(prefix_);
      take_frame(payload, kernels().crc32c(0, payload, prefix_.payload_bytes));
      transport().release(prefix_);
    } else {
      if (!read_payload()) return Turn::kWaits;
      take_frame(buffer_, crc32c_);
      prefix_filled_ = filled_ - prefix_.payload_bytes;
      std::memcpy(&prefix_, buffer_ + filled_ - prefix_filled_, prefix_filled_);
    }
    in_payload_ = false;
    if (layers_left_) return Turn::kGoesOn;
  }
  refuse_more();
  owner_.note_whole(num_layers_);
  return Turn::kIsOver;
}

void LandingConnection::let_go() {
  if (buffer_) owner_.threads_.buffers().give_back(buffer_);
  buffer_ = nullptr;
}

// False: would block.
bool LandingConnection::read_prefix() {
  auto* to = reinterpret_cast<uint8_t*>(&prefix_);
  while (prefix_filled_ < sizeof prefix_) {
    const ssize_t count = read(to + prefix_filled_, sizeof prefix_ - prefix_filled_);
    if (count == Transport::kWouldBlock) return false;
    if (count == 0) throw_truncated();
    prefix_filled_ += size_t(count);
  }
  take_prefix();
  return true;
}

void LandingConnection::take_prefix() {
  rules_.check_prefix(prefix_);
  rules_.check_extent(prefix_, owner_.next_token_[prefix_.layer]);
  prefix_filled_ = 0;
  in_payload_ = true;
  filled_ = checked_ = 0;
  crc32c_ = 0;
}

// With its end, up to a prefix that follows is read, which saves a call of the kernel. False: would
// block.
bool LandingConnection::read_payload() {
  if (!buffer_) buffer_ = owner_.threads_.buffers().take();
  const size_t bytes = prefix_.payload_bytes;
  while (filled_ < bytes) {
    const size_t wanted = std::min(bytes + sizeof(FramePrefix) - filled_, kReadBytes);
    const ssize_t count = read(buffer_ + filled_, wanted);
    if (count == Transport::kWouldBlock) return false;
    if (count == 0) throw_truncated();
    filled_ += size_t(count);
    const size_t end = std::min(filled_, bytes);
    crc32c_ = kernels().crc32c(crc32c_, buffer_ + checked_, int64_t(end - checked_));
    checked_ = end;
  }
  return true;
}

void LandingConnection::take_frame(const uint8_t* payload, uint32_t crc32c) {
  const int64_t layer = prefix_.layer, first = prefix_.first_token;
  if (crc32c != prefix_.crc32c) {
    throw PlaneError(PlaneFault::kChecksum, layer, first, prefix_.crc32c, crc32c);
  }
  write_slabs(payload);
  const int64_t end = first + prefix_.num_tokens;
  if (end == owner_.num_tokens_) --layers_left_;
  owner_.note_taken(layer, end, prefix_.payload_bytes);
}

void LandingConnection::write_slabs(const uint8_t* payload) {
  const SlabLayout& layout = owner_.layout_;
  const int64_t layer = prefix_.layer, first = prefix_.first_token;
  const int64_t end = first + prefix_.num_tokens;
  const int64_t slab_tokens = layout.slab_blocks * kBlockTokens;
  const int64_t head_stride = rules_.payload_bytes(prefix_.num_tokens) / layout.kv_heads;
  bool is_finite = true;
  for (int64_t token = first; token < end;) {
    const int64_t inside = token % slab_tokens;
    const int64_t count = std::min(slab_tokens - inside, end - token);
    is_finite &= write_blocks(
        layout, uintptr_t(owner_.slabs_[size_t(token / slab_tokens)]), layer, inside, count,
        payload + (token - first) / kBlockTokens * layout.block_bytes, head_stride);
    token += count;
  }
  if (!is_finite) {
    const int64_t before = first_not_finite(layout, payload, prefix_.num_tokens);
    throw PlaneError(PlaneFault::kNonFinite, layer, first + before, 0, 0);
  }
}

// After the last frame of a connection nothing may come; what has come already is looked at.
void LandingConnection::refuse_more() {
  auto* to = reinterpret_cast<uint8_t*>(&prefix_);
  while (prefix_filled_ < sizeof prefix_) {
    const ssize_t count = read(to + prefix_filled_, sizeof prefix_ - prefix_filled_);
    if (count <= 0) break;
    prefix_filled_ += size_t(count);
  }
  // No frame is right, for no layer has a next token.
  if (prefix_filled_ == sizeof prefix_) take_prefix();
  if (prefix_filled_) {
    throw PlaneError(PlaneFault::kFormat, std::to_string(prefix_filled_) +
                                              " B after the last frame of connection " +
                                              std::to_string(rules_.connection));
  }
}

ssize_t LandingConnection::read(void* to, size_t bytes) {
  const ssize_t count = transport().read(to, bytes);
  if (count > 0) owner_.note_received(count);
  return count;
}

void LandingConnection::throw_truncated() const {
  throw PlaneError(PlaneFault::kTruncated,
                   "connection " + std::to_string(rules_.connection) + " of " +
                       std::to_string(rules_.of) + " ended " +
                       (in_payload_ || prefix_filled_ ? "inside a frame, " : "") + "with " +
                       std::to_string(num_layers_ - layers_left_) + " of its " +
                       std::to_string(num_layers_) + " layers whole");
}

KvLanding::KvLanding(IoThreads& threads, const SlabLayout& layout, const int64_t* slabs,
                     int64_t num_slabs, int64_t num_tokens, int64_t kv_from_token, int event_fd)
    : Handoff(threads, event_fd),
      layout_(layout),
      slabs_(slabs, slabs + num_slabs),
      num_tokens_(num_tokens),
      next_token_(size_t(layout.layers)),
      layers_left_(layout.layers) {
  if (kv_from_token < 0 || kv_from_token % kBlockTokens || kv_from_token >= num_tokens ||
      num_tokens > UINT32_MAX) {
    throw std::invalid_argument("kv_from_token: a multiple of 16 below num_tokens");
  }
  const int64_t slab_tokens = layout.slab_blocks * kBlockTokens;
  for (int64_t i = kv_from_token / slab_tokens; i * slab_tokens < num_tokens; ++i) {
    if (i >= num_slabs || !slabs[i]) {
      throw std::invalid_argument("slabs: one address for each slab that tokens go to");
    }
  }
  for (auto& next : next_token_) next = kv_from_token;
}

KvLanding::~KvLanding() { close(); }

std::shared_ptr<Connection> KvLanding::make_connection(std::unique_ptr<Transport> transport,
                                                       int64_t connection, int64_t of) {
  return std::make_shared<LandingConnection>(*this, std::move(transport), connection, of);
}

KvLanding::State KvLanding::state() const {
  State state;
  // Wholeness before what it is made of: whoever reads that it is whole reads whole counts.
  state.is_whole = layers_left_ == 0;
  state.payload_bytes = payload_bytes_;
  state.chunks = chunks_;
  state.received_bytes = received_bytes_;
  int64_t tokens = 0;
  for (const auto& next : next_token_) tokens += next;
  state.tokens_taken = tokens / layout_.layers;
  std::lock_guard<std::mutex> guard(lock_);
  state.error = error_;
  return state;
}

int64_t KvLanding::whole_tokens() const {
  int64_t tokens = num_tokens_;
  for (const auto& next : next_token_) tokens = std::min(tokens, next.load());
  return tokens;
}

void KvLanding::note_received(int64_t bytes) { received_bytes_ += bytes; }

void KvLanding::note_taken(int64_t layer, int64_t next_token, int64_t payload_bytes) {
  constexpr int64_t kRaisedEveryNs = 50'000'000;
  next_token_[size_t(layer)] = next_token;
  payload_bytes_ += payload_bytes;
  ++chunks_;
  const int64_t now = now_ns();
  int64_t raised = raised_ns_;
  if (now - raised >= kRaisedEveryNs && raised_ns_.compare_exchange_strong(raised, now)) {
    event_.raise();
  }
}

void KvLanding::note_whole(int64_t layers) {
  if (!layers) return;
  if ((layers_left_ -= layers) == 0) event_.raise();
}

}  // namespace fluxion
