// Threads that move the bytes of hand-offs, and what one of them drives: a connection.
//
// A connection belongs to one thread. It has a turn when its descriptor has had an edge, or when it was
// woken; after each turn (a frame, as a rule) the next connection has its own. No thread here takes the
// interpreter's lock.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "plane/hot_buffers.h"
#include "plane/transport.h"

namespace fluxion {

class IoThread;

class Connection {
 public:
  virtual ~Connection() = default;
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  // From any thread but its own, at any time: waits for the turn under way, then ends the connection.
  // Afterwards no thread touches what `take_turn` does. Idempotent.
  void close();
  // From any thread: it is to have a turn.
  void wake();

 protected:
  enum class Turn { kWaits, kGoesOn, kIsOver };

  explicit Connection(std::unique_ptr<Transport> transport) : transport_(std::move(transport)) {}

  // Move what can be moved, one frame at most. May not throw.
  virtual Turn take_turn() = 0;
  // The connection is over: give back what it holds.
  virtual void let_go() {}

  Transport& transport() { return *transport_; }

 private:
  friend class IoThread;

  Turn drive();
  void end();

  std::mutex lock_;  // held during a turn
  std::unique_ptr<Transport> transport_;
  std::atomic<IoThread*> thread_{nullptr};
  uint64_t id_ = 0;
  bool is_ready_ = false;  // its thread's own
  bool is_woken_ = false;  // under the thread's lock
};

class IoThreads {
 public:
  // cpus: that each thread may run on; empty leaves it to the system. niceness: how far threads give
  // way to others of this process, 0 to 19. Throws std::invalid_argument, also without a thread, and
  // std::system_error where the system has none left.
  IoThreads(int count, std::vector<int> cpus, int niceness = 0);
  ~IoThreads();

  // End all threads; connections that are left are closed. Idempotent.
  void close();
  // Processor time of all threads so far, as long as they live and afterwards.
  double cpu_seconds() const;

  // Give a connection to the next thread in turn. Throws std::runtime_error after `close`.
  void add(const std::shared_ptr<Connection>& connection);
  HotBuffers& buffers() { return buffers_; }

 private:
  HotBuffers buffers_;
  std::vector<std::unique_ptr<IoThread>> threads_;
  mutable std::mutex lock_;
  bool is_closed_ = false;
  size_t next_ = 0;
};

}  // namespace fluxion
