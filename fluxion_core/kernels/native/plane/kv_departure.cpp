#include "plane/kv_departure.h"

#include <sys/uio.h>

#include <stdexcept>
#include <string>

#include "pool/clock.h"

namespace fluxion {

// One connection of a departure. All but its construction is in turns.
class DepartureConnection : public HandoffConnection {
 public:
  DepartureConnection(KvDeparture& owner, std::unique_ptr<Transport> transport, int64_t connection)
      : HandoffConnection(owner, std::move(transport)), owner_(owner), connection_(connection) {}

 protected:
  Turn go_on() override;

 private:
  bool is_ended();
  bool write_frame();

  KvDeparture& owner_;
  const int64_t connection_;
  bool has_started_ = false;
  bool has_frame_ = false, is_placed_ = false;
  KvDeparture::Frame frame_;
  FramePrefix prefix_;
  size_t written_ = 0;
};

Connection::Turn DepartureConnection::go_on() {
  if (!has_started_ && !transport().start()) return Turn::kWaits;
  has_started_ = true;
  if (is_ended()) return Turn::kIsOver;
  if (!has_frame_) {
    if (!owner_.next_frame(connection_, frame_)) return Turn::kWaits;
    has_frame_ = true;
    is_placed_ = false;
    written_ = 0;
    prefix_ = {kFrameMagic,
               kFrameVersion,
               kChunkFrame,
               frame_.layer,
               frame_.first_token,
               frame_.num_tokens,
               frame_.payload_bytes,
               0,
               0};
  }
  if (!is_placed_ && !transport().place(prefix_, frame_.payload)) return Turn::kWaits;
  is_placed_ = true;
  if (!write_frame()) return Turn::kWaits;
  has_frame_ = false;
  owner_.note_finished(frame_);
  return Turn::kGoesOn;
}

// The receiver closes a connection that has brought all it should; what is left then has no taker.
bool DepartureConnection::is_ended() {
  try {
    if (transport().take_answers()) return false;
  } catch (const PlaneError& error) {
    if (error.fault != PlaneFault::kPeer || has_frame_ || owner_.note_ended(connection_)) throw;
    return true;
  }
  if (has_frame_ || owner_.note_ended(connection_)) throw KvDeparture::no_taker(connection_);
  return true;
}

// False: would block.
bool DepartureConnection::write_frame() {
  const bool on_stream = !transport().has_payloads_beside();
  const size_t total = sizeof prefix_ + (on_stream ? prefix_.payload_bytes : 0);
  while (written_ < total) {
    iovec parts[2];
    int count = 0;
    if (written_ < sizeof prefix_) {
      parts[count++] = {reinterpret_cast<uint8_t*>(&prefix_) + written_, sizeof prefix_ - written_};
    }
    if (on_stream) {
      const size_t done = written_ < sizeof prefix_ ? 0 : written_ - sizeof prefix_;
      parts[count++] = {const_cast<uint8_t*>(frame_.payload) + done, prefix_.payload_bytes - done};
    }
    const ssize_t moved = transport().write(parts, count);
    if (moved == Transport::kWouldBlock) return false;
    written_ += size_t(moved);
    owner_.note_moved();
  }
  return true;
}

void KvDeparture::begin(int64_t of) {
  queues_.resize(size_t(of));
  has_ended_.resize(size_t(of));
  for (const Frame& frame : early_) queues_[frame.layer % size_t(of)].push_back(frame);
  early_.clear();
}

std::shared_ptr<Connection> KvDeparture::make_connection(std::unique_ptr<Transport> transport,
                                                         int64_t connection, int64_t) {
  return std::make_shared<DepartureConnection>(*this, std::move(transport), connection);
}

int64_t KvDeparture::put(int64_t layer, int64_t first_token, int64_t num_tokens,
                         const uint8_t* payload, int64_t payload_bytes) {
  if (layer < 0 || layer > UINT32_MAX || first_token < 0 || first_token > UINT32_MAX ||
      num_tokens < 1 || num_tokens > UINT32_MAX) {
    throw std::invalid_argument("layer, first_token and num_tokens have 32 bits in a frame");
  }
  if (!payload || payload_bytes < 1 || payload_bytes > int64_t(kMaxPayloadBytes)) {
    throw std::invalid_argument("payload: 1 B to 4 MiB");
  }
  std::lock_guard<std::mutex> guard(lock_);
  if (is_closed_) throw std::runtime_error("the departure has been closed");
  if (num_put_ == num_finished_) moved_ns_ = now_ns();
  const Frame frame{num_put_,
                    uint32_t(layer),
                    uint32_t(first_token),
                    uint32_t(num_tokens),
                    uint32_t(payload_bytes),
                    payload};
  ++num_put_;
  if (queues_.empty()) {
    early_.push_back(frame);
    return frame.number;
  }
  const size_t connection = size_t(layer) % queues_.size();
  queues_[connection].push_back(frame);
  if (has_ended_[connection]) note_error_locked(no_taker(int64_t(connection)));
  if (connections_[connection]) connections_[connection]->wake();
  return frame.number;
}

KvDeparture::State KvDeparture::state() {
  State state;
  std::lock_guard<std::mutex> guard(lock_);
  state.finished.swap(finished_);
  state.payload_bytes = payload_bytes_;
  state.waiting_seconds = num_put_ == num_finished_ ? 0.0 : double(now_ns() - moved_ns_) * 1e-9;
  state.error = error_;
  return state;
}

bool KvDeparture::next_frame(int64_t connection, Frame& frame) {
  std::lock_guard<std::mutex> guard(lock_);
  auto& queue = queues_[size_t(connection)];
  if (queue.empty()) return false;
  frame = queue.front();
  queue.pop_front();
  return true;
}

// Returns whether frames were to go over it.
bool KvDeparture::note_ended(int64_t connection) {
  std::lock_guard<std::mutex> guard(lock_);
  has_ended_[size_t(connection)] = true;
  return !queues_[size_t(connection)].empty();
}

PlaneError KvDeparture::no_taker(int64_t connection) {
  return {PlaneFault::kPeer, "the receiver closed connection " + std::to_string(connection) +
                                 " while frames were to go over it"};
}

void KvDeparture::note_moved() { moved_ns_ = now_ns(); }

void KvDeparture::note_finished(const Frame& frame) {
  bool is_first;
  {
    std::lock_guard<std::mutex> guard(lock_);
    is_first = finished_.empty();
    finished_.push_back(frame.number);
    ++num_finished_;
    payload_bytes_ += frame.payload_bytes;
    moved_ns_ = now_ns();
  }
  // Further ones are found with the first.
  if (is_first) event_.raise();
}

}  // namespace fluxion
