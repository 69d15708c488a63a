#include "plane/io_threads.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <deque>
#include <future>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <unordered_map>

namespace fluxion {
namespace {

double seconds_of(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return double(time.tv_sec) + double(time.tv_nsec) * 1e-9;
}

[[noreturn]] void throw_system(const char* what) {
  throw std::system_error(errno, std::generic_category(), what);
}

// Of the calling thread alone, as Linux has it: POSIX would have it of the process.
void give_way(int niceness) {
  // Not to be refused, for it is less than before; and nothing but speed depends on it.
  ::setpriority(PRIO_PROCESS, 0, ::getpriority(PRIO_PROCESS, 0) + niceness);
}

struct Descriptor {
  const int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

}  // namespace

class IoThread {
 public:
  IoThread(int number, const std::vector<int>& cpus, int niceness);
  ~IoThread();

  void add(const std::shared_ptr<Connection>& connection);
  void wake(Connection& connection);
  void forget(const Connection& connection);
  void unwatch(int fd) { ::epoll_ctl(epoll_.fd, EPOLL_CTL_DEL, fd, nullptr); }
  void stop();
  double cpu_seconds() const;

 private:
  static constexpr uint64_t kWakeUp = 0;  // no connection's id

  void run();
  bool gather(int timeout_ms);
  void make_ready(uint64_t id);
  void signal();

  const Descriptor epoll_, wake_up_;
  std::mutex lock_;
  bool is_stopped_ = false;
  uint64_t last_id_ = kWakeUp;
  std::unordered_map<uint64_t, std::shared_ptr<Connection>> connections_;
  std::vector<uint64_t> woken_;
  std::deque<std::shared_ptr<Connection>> ready_;  // the thread's own
  std::atomic<double> ended_seconds_{-1.0};
  std::thread thread_;
};

IoThread::IoThread(int number, const std::vector<int>& cpus, int niceness)
    : epoll_{::epoll_create1(EPOLL_CLOEXEC)}, wake_up_{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)} {
  epoll_event event{};
  event.events = EPOLLIN | EPOLLET;
  event.data.u64 = kWakeUp;
  if (epoll_.fd < 0 || wake_up_.fd < 0 ||
      ::epoll_ctl(epoll_.fd, EPOLL_CTL_ADD, wake_up_.fd, &event)) {
    throw_system("epoll");
  }
  std::promise<void> promise;
  const std::future<void> has_given_way = promise.get_future();
  thread_ = std::thread([this, niceness, promise = std::move(promise)]() mutable {
    give_way(niceness);
    promise.set_value();
    run();
  });
  has_given_way.wait();
  char name[16];
  std::snprintf(name, sizeof name, "fluxion-kv-%d", number);
  pthread_setname_np(thread_.native_handle(), name);
  if (cpus.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) CPU_SET(size_t(cpu), &set);
  // CPUs that are not ours leave the thread where it is: nothing but speed depends on it.
  pthread_setaffinity_np(thread_.native_handle(), sizeof set, &set);
}

IoThread::~IoThread() { stop(); }

void IoThread::add(const std::shared_ptr<Connection>& connection) {
  std::lock_guard<std::mutex> turn(connection->lock_);
  if (!connection->transport_) return;
  const int fd = connection->transport_->fd();
  {
    std::lock_guard<std::mutex> guard(lock_);
    connection->thread_ = this;
    connection->id_ = ++last_id_;
    connections_.emplace(connection->id_, connection);
  }
  epoll_event event{};
  event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
  event.data.u64 = connection->id_;
  if (::epoll_ctl(epoll_.fd, EPOLL_CTL_ADD, fd, &event)) {
    const int error = errno;
    forget(*connection);
    throw std::system_error(error, std::generic_category(), "epoll");
  }
  wake(*connection);
}

void IoThread::wake(Connection& connection) {
  std::lock_guard<std::mutex> guard(lock_);
  if (connection.is_woken_) return;
  connection.is_woken_ = true;
  woken_.push_back(connection.id_);
  if (woken_.size() == 1) signal();
}

void IoThread::forget(const Connection& connection) {
  std::lock_guard<std::mutex> guard(lock_);
  connections_.erase(connection.id_);
}

void IoThread::signal() {
  const uint64_t one = 1;
  // It can only fail where the counter is full, and then the thread will wake up.
  if (::write(wake_up_.fd, &one, sizeof one) < 0) return;
}

void IoThread::stop() {
  if (!thread_.joinable()) return;
  {
    std::lock_guard<std::mutex> guard(lock_);
    is_stopped_ = true;
    signal();
  }
  thread_.join();
  ready_.clear();
  std::unordered_map<uint64_t, std::shared_ptr<Connection>> left;
  {
    std::lock_guard<std::mutex> guard(lock_);
    left.swap(connections_);
  }
  for (auto& [id, connection] : left) connection->close();
}

double IoThread::cpu_seconds() const {
  const double ended = ended_seconds_;
  if (ended >= 0.0) return ended;
  clockid_t clock;
  auto& thread = const_cast<std::thread&>(thread_);
  return pthread_getcpuclockid(thread.native_handle(), &clock) ? 0.0 : seconds_of(clock);
}

void IoThread::run() {
  // Signals are for threads that know what to do with them.
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
  while (gather(ready_.empty() ? -1 : 0)) {
    for (size_t left = ready_.size(); left > 0; --left) {
      const std::shared_ptr<Connection> connection = std::move(ready_.front());
      ready_.pop_front();
      switch (connection->drive()) {
        case Connection::Turn::kGoesOn:
          ready_.push_back(connection);
          break;
        case Connection::Turn::kWaits:
          connection->is_ready_ = false;
          break;
        case Connection::Turn::kIsOver:
          forget(*connection);
          break;
      }
    }
  }
  ended_seconds_ = seconds_of(CLOCK_THREAD_CPUTIME_ID);
}

// Add connections that have had an edge, or were woken, to those that are ready. False: stop.
bool IoThread::gather(int timeout_ms) {
  constexpr int kMostEvents = 64;
  epoll_event events[kMostEvents];
  const int count = ::epoll_wait(epoll_.fd, events, kMostEvents, timeout_ms);
  std::lock_guard<std::mutex> guard(lock_);
  if (is_stopped_) return false;
  for (int i = 0; i < count; ++i) {
    if (events[i].data.u64 != kWakeUp) {
      make_ready(events[i].data.u64);
      continue;
    }
    uint64_t counter;
    while (::read(wake_up_.fd, &counter, sizeof counter) > 0) continue;
  }
  for (const uint64_t id : woken_) make_ready(id);
  woken_.clear();
  return true;
}

void IoThread::make_ready(uint64_t id) {
  const auto found = connections_.find(id);
  if (found == connections_.end()) return;
  Connection& connection = *found->second;
  connection.is_woken_ = false;
  if (connection.is_ready_) return;
  connection.is_ready_ = true;
  ready_.push_back(found->second);
}

Connection::Turn Connection::drive() {
  std::lock_guard<std::mutex> guard(lock_);
  if (!transport_) return Turn::kIsOver;
  const Turn turn = take_turn();
  if (turn == Turn::kIsOver) end();
  return turn;
}

void Connection::end() {
  if (IoThread* thread = thread_) thread->unwatch(transport_->fd());
  let_go();
  transport_.reset();
}

void Connection::close() {
  {
    std::lock_guard<std::mutex> guard(lock_);
    if (!transport_) return;
    end();
  }
  if (IoThread* thread = thread_) thread->forget(*this);
}

void Connection::wake() {
  if (IoThread* thread = thread_) thread->wake(*this);
}

IoThreads::IoThreads(int count, std::vector<int> cpus, int niceness) {
  if (count < 1) throw std::invalid_argument("threads: 1 or more");
  if (niceness < 0 || niceness > 19) throw std::invalid_argument("niceness: 0 to 19");
  for (const int cpu : cpus) {
    if (cpu < 0 || cpu >= CPU_SETSIZE) throw std::invalid_argument("cpus: 0 to 1023");
  }
  for (int i = 0; i < count; ++i) {
    threads_.push_back(std::make_unique<IoThread>(i, cpus, niceness));
  }
}

IoThreads::~IoThreads() { close(); }

void IoThreads::close() {
  std::lock_guard<std::mutex> guard(lock_);
  is_closed_ = true;
  for (auto& thread : threads_) thread->stop();
}

double IoThreads::cpu_seconds() const {
  std::lock_guard<std::mutex> guard(lock_);
  double seconds = 0.0;
  for (const auto& thread : threads_) seconds += thread->cpu_seconds();
  return seconds;
}

void IoThreads::add(const std::shared_ptr<Connection>& connection) {
  std::lock_guard<std::mutex> guard(lock_);
  if (is_closed_) throw std::runtime_error("the plane's threads have been closed");
  threads_[next_++ % threads_.size()]->add(connection);
}

}  // namespace fluxion
