#include "plane/handoff.h"

#include <exception>
#include <stdexcept>

namespace fluxion {

void Handoff::add(int fd, const TransportOptions& options, int64_t connection, int64_t of) {
  std::unique_ptr<Transport> transport = make_transport(fd, options);
  std::shared_ptr<Connection> added;
  {
    std::lock_guard<std::mutex> guard(lock_);
    if (is_closed_) throw std::runtime_error("the hand-off has been closed");
    if (connections_.empty()) {
      if (of < 1 || of > kMaxConnections) {
        throw std::invalid_argument("connections of a hand-off: 1 to 64");
      }
      connections_.resize(size_t(of));
      begin(of);
    }
    if (of != int64_t(connections_.size()) || connection < 0 || connection >= of) {
      throw std::invalid_argument("connection: 0 to of - 1, of the same number of connections");
    }
    auto& place = connections_[size_t(connection)];
    if (place) throw std::invalid_argument("the connection is there already");
    place = make_connection(std::move(transport), connection, of);
    added = place;
  }
  threads_.add(added);
}

void Handoff::close() {
  std::vector<std::shared_ptr<Connection>> connections;
  {
    std::lock_guard<std::mutex> guard(lock_);
    is_closed_ = true;
    connections = connections_;
  }
  for (const auto& connection : connections) {
    if (connection) connection->close();
  }
}

void Handoff::note_error_locked(const PlaneError& error) {
  if (error_) return;
  error_ = error;
  has_error_ = true;
  event_.raise();
}

void Handoff::note_error(const PlaneError& error) {
  std::lock_guard<std::mutex> guard(lock_);
  note_error_locked(error);
}

Connection::Turn HandoffConnection::take_turn() {
  if (handoff_.has_error_) return Turn::kIsOver;
  try {
    return go_on();
  } catch (const PlaneError& error) {
    handoff_.note_error(error);
  } catch (const std::exception& error) {
    handoff_.note_error(PlaneError(PlaneFault::kSystem, error.what()));
  }
  return Turn::kIsOver;
}

}  // namespace fluxion
