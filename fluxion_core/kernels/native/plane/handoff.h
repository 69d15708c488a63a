// What both ends of a hand-off have in common: its connections, and the first thing that went wrong.
//
// Layer l goes over connection l mod the number of connections. Each connection is driven by one of the
// plane's threads; an error of one ends all.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "plane/event_signal.h"
#include "plane/io_threads.h"
#include "plane/plane_error.h"
#include "plane/transport.h"

namespace fluxion {

class Handoff {
 public:
  // Connection `connection` of `of`, the same for all. Takes the descriptor over, also where it throws:
  // std::invalid_argument (no such connection, one that was there, options), std::runtime_error (closed).
  void add(int fd, const TransportOptions& options, int64_t connection, int64_t of);
  // Waits for the turns under way. Afterwards no thread touches what the hand-off moves, or event_fd.
  // Idempotent; whoever derives from this calls it before its own members go.
  void close();

 protected:
  // event_fd must stay until `close` has returned.
  Handoff(IoThreads& threads, int event_fd) : threads_(threads), event_(event_fd) {}
  ~Handoff() = default;

  // With `lock_` held, as are the next two. The first connection is added: there will be `of`.
  virtual void begin(int64_t of) { (void)of; }
  virtual std::shared_ptr<Connection> make_connection(std::unique_ptr<Transport> transport,
                                                      int64_t connection, int64_t of) = 0;
  void note_error_locked(const PlaneError& error);
  void note_error(const PlaneError& error);

  IoThreads& threads_;
  const EventSignal event_;
  mutable std::mutex lock_;
  bool is_closed_ = false;
  std::optional<PlaneError> error_;                       // the first one; nothing moves afterwards
  std::vector<std::shared_ptr<Connection>> connections_;  // [of]; null: not yet there

 private:
  friend class HandoffConnection;

  std::atomic<bool> has_error_{false};
};

// One connection of a hand-off. What goes wrong in a turn is the hand-off's error.
class HandoffConnection : public Connection {
 protected:
  HandoffConnection(Handoff& handoff, std::unique_ptr<Transport> transport)
      : Connection(std::move(transport)), handoff_(handoff) {}

  Turn take_turn() final;
  // A turn; may throw.
  virtual Turn go_on() = 0;

 private:
  Handoff& handoff_;
};

}  // namespace fluxion
