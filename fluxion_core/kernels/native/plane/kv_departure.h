// A prompt's KV on its way out: frames of memory that somebody else keeps, over a hand-off's connections.
//
// Frames of layer l go over connection l mod the number of connections, in the order in which they were
// put. A thread makes the checksum just before the frame leaves.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "plane/handoff.h"

namespace fluxion {

class KvDeparture : public Handoff {
 public:
  struct Frame {
    int64_t number;
    uint32_t layer, first_token, num_tokens, payload_bytes;
    const uint8_t* payload;
  };
  struct State {
    std::vector<int64_t> finished;    // since the last call: their payloads are not looked at again
    int64_t payload_bytes;            // of all that are finished
    double waiting_seconds;           // since anything last moved, while a frame waits; else 0
    std::optional<PlaneError> error;  // the first one; nothing moves afterwards
  };

  KvDeparture(IoThreads& threads, int event_fd) : Handoff(threads, event_fd) {}
  ~KvDeparture() { close(); }

  // Returns the frame's number, from 0. Its payload must stay until `state` names it, or `close` has
  // returned. Never waits; frames may come before their connection. Throws std::invalid_argument,
  // std::runtime_error (closed).
  int64_t put(int64_t layer, int64_t first_token, int64_t num_tokens, const uint8_t* payload,
              int64_t payload_bytes);
  State state();

 private:
  friend class DepartureConnection;

  bool next_frame(int64_t connection, Frame& frame);
  bool note_ended(int64_t connection);
  void note_moved();
  void note_finished(const Frame& frame);
  static PlaneError no_taker(int64_t connection);
  void begin(int64_t of) override;
  std::shared_ptr<Connection> make_connection(std::unique_ptr<Transport> transport,
                                              int64_t connection, int64_t of) override;

  std::atomic<int64_t> moved_ns_{0};
  // Under `lock_`.
  int64_t num_put_ = 0, num_finished_ = 0, payload_bytes_ = 0;
  std::vector<int64_t> finished_;
  std::deque<Frame> early_;                // before the first connection
  std::vector<std::deque<Frame>> queues_;  // [of]
  std::vector<bool> has_ended_;            // [of]
};

}  // namespace fluxion
