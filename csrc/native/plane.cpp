#include "native/plane.hpp"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <system_error>

namespace narsil {
namespace {

constexpr uint64_t WAKE = 0, LISTENERS = 1 << 10;  // ids below this are of listeners, by number from 1
constexpr size_t READ_BLOCK = 256u << 10;
constexpr size_t READ_TURN = 1u << 20;  // bytes of one connection before the others have their turn
constexpr size_t WRITE_BLOCK = 64u << 10;
constexpr double TEND_S = 0.25;  // between two looks at the connections' timeouts

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

// A socket that listens there; -1 and errno where it cannot.
int listening(const addrinfo& where, int port, bool reuse_port) {
  const int fd = socket(where.ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  sockaddr_storage address{};
  std::memcpy(&address, where.ai_addr, where.ai_addrlen);
  auto& place = where.ai_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(address).sin6_port
                                            : reinterpret_cast<sockaddr_in&>(address).sin_port;
  place = htons(static_cast<uint16_t>(port));
  const int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (reuse_port) setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof on);
  if (!bind(fd, reinterpret_cast<sockaddr*>(&address), where.ai_addrlen) && !listen(fd, 1024)) return fd;
  const int problem = errno;
  close(fd);
  errno = problem;
  return -1;
}

int port_of(int fd) {
  sockaddr_storage bound{};
  socklen_t size = sizeof bound;
  getsockname(fd, reinterpret_cast<sockaddr*>(&bound), &size);
  return ntohs(bound.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(bound).sin6_port
                                           : reinterpret_cast<sockaddr_in&>(bound).sin_port);
}

// Outside the mutex: what has been taken belongs to whoever took it.
void decode(Arrivals& arrivals) {
  for (Arrival& arrival : arrivals.calls) {
    const uint8_t* const data = arrival.message->data();
    const size_t size = arrival.message->size();
    const ModelName& named = arrival.call->model;
    const Kind kind = arrival.call->method->kind;
    if (kind == Kind::predictor) arrival.decoded = decode_predictor(data, size, *arrivals.models, named);
    if (kind == Kind::narsil) arrival.decoded = decode_narsil(data, size, *arrivals.models, named);
  }
}

}  // namespace

double monotonic_seconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

struct Plane::Connection {
  Connection(uint64_t id, int fd, Shared& shared)
      : id(id),
        fd(fd),
        session(shared),
        born(shared.now),
        read_at(shared.now),
        written_at(shared.now),
        used_at(shared.now) {
    session.owner = this;
  }
  ~Connection() { close(fd); }

  const uint64_t id;
  const int fd;
  Session session;
  std::string out;
  size_t sent = 0;
  double born, read_at, written_at, used_at, asked_at = 0;
  bool closing = false;  // the peer has closed; bytes may still wait before the end
  bool dirty = false;    // has something to send
  bool unread = false, doomed = false;
};

Plane::Plane(Config config) : next_id_(LISTENERS), scratch_(READ_BLOCK) {
  shared_.config = std::move(config);
  shared_.now = monotonic_seconds();
  epoll_ = epoll_create1(EPOLL_CLOEXEC);
  if (epoll_ < 0) fail("epoll_create1");
  event_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE);
  spare_ = open("/dev/null", O_RDONLY | O_CLOEXEC);
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = WAKE;
  if (event_ < 0 || epoll_ctl(epoll_, EPOLL_CTL_ADD, event_, &event)) {
    const int problem = errno;
    close(epoll_);
    if (event_ >= 0) close(event_);
    errno = problem;
    fail("eventfd");
  }
}

Plane::~Plane() {
  stop(0);
  close(epoll_);
  close(event_);
  if (spare_ >= 0) close(spare_);
}

int Plane::listen_tcp(const std::string& host, int port, bool reuse_port) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int problem = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
  if (problem) throw std::system_error(EADDRNOTAVAIL, std::generic_category(), gai_strerror(problem));
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> guard(found, freeaddrinfo);
  // Every address that the name has here, on one port: localhost is of two families, and one may be switched off.
  std::vector<int> sockets;
  std::vector<std::string> seen;
  int error = EADDRNOTAVAIL;
  for (const addrinfo* at = found; at; at = at->ai_next) {
    if (at->ai_family != AF_INET && at->ai_family != AF_INET6) continue;
    std::string address(reinterpret_cast<const char*>(at->ai_addr), at->ai_addrlen);
    if (std::find(seen.begin(), seen.end(), address) != seen.end()) continue;
    seen.push_back(std::move(address));
    const int fd = listening(*at, port, reuse_port);
    if (fd >= 0) {
      sockets.push_back(fd);
      if (!port) port = port_of(fd);
      continue;
    }
    error = errno;
    if (error == EAFNOSUPPORT || error == EADDRNOTAVAIL) continue;
    std::for_each(sockets.begin(), sockets.end(), close);
    throw std::system_error(error, std::generic_category());
  }
  if (sockets.empty()) throw std::system_error(error, std::generic_category());
  for (const int fd : sockets) add_listener(fd);
  return port;
}

void Plane::listen_unix(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) {
    errno = ENAMETOOLONG;
    fail("unix socket path");
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  const auto* const where = reinterpret_cast<const sockaddr*>(&address);
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) fail("socket");
  // A socket file on which nobody listens is left over from a server that was killed.
  if (connect(fd, where, sizeof address) == 0 || errno == EAGAIN) {
    close(fd);
    errno = EADDRINUSE;
    fail("bind");
  }
  // Any other kind of file refuses connections likewise, and is not to be touched.
  struct stat found;
  const bool stale = errno == ECONNREFUSED && !lstat(path.c_str(), &found) && S_ISSOCK(found.st_mode);
  close(fd);
  const int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (listener < 0) fail("socket");
  if (stale) unlink(path.c_str());
  if (bind(listener, where, sizeof address) || listen(listener, 1024)) {
    const int problem = errno;
    close(listener);
    errno = problem;
    fail("bind");
  }
  unix_path_ = path;
  add_listener(listener);
}

void Plane::add_listener(int fd) {
  const std::lock_guard<std::mutex> lock(mutex_);
  listeners_.push_back(fd);
  epoll_event event{};
  event.events = EPOLLIN | EPOLLEXCLUSIVE;
  event.data.u64 = listeners_.size();
  if (epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event)) fail("epoll_ctl");
}

int Plane::wait(double timeout, epoll_event* events, int most) {
#ifdef SYS_epoll_pwait2
  // Microseconds matter to a batch timeout; older kernels know milliseconds only.
  static std::atomic<bool> fine{true};
  if (fine && std::isfinite(timeout) && timeout > 0) {
    const double whole = std::floor(timeout);
    timespec time{static_cast<time_t>(whole), static_cast<long>((timeout - whole) * 1e9)};
    const long count = syscall(SYS_epoll_pwait2, epoll_, events, most, &time, nullptr, size_t{0});
    if (count >= 0 || errno != ENOSYS) return static_cast<int>(count);
    fine = false;
  }
#endif
  return epoll_wait(epoll_, events, most, std::isfinite(timeout) ? static_cast<int>(std::ceil(timeout * 1e3)) : -1);
}

Arrivals Plane::poll(double timeout) {
  constexpr int MOST = 64;
  epoll_event events[MOST];
  Arrivals arrivals;
  bool woken = false;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    shared_.now = monotonic_seconds();
    const double until = shared_.now + timeout;
    for (bool looked = false; !stopped_; looked = true) {
      send_posted();
      if (looked && (arrived() || woken || shared_.now >= until)) break;
      // What came while nobody waited, or is left of a long read, is gone on with at once.
      const bool pending = arrived() || !unread_.empty();
      const double left = pending ? 0 : std::max(0.0, until - shared_.now);
      int count;
      if (left > 0) {
        ++waiting_;
        lock.unlock();
        count = wait(left, events, MOST);
        lock.lock();
        --waiting_;
      } else {
        count = epoll_wait(epoll_, events, MOST, 0);
      }
      shared_.now = polled_ = monotonic_seconds();
      handle(events, count, woken);
    }
    arrivals = take();
    if (!unread_.empty() && waiting_) signal();
  }
  decode(arrivals);
  return arrivals;
}

bool Plane::arrived() const { return !shared_.ready.empty() || !shared_.gone.empty(); }

Arrivals Plane::take() {
  Arrivals arrivals;
  arrivals.gone.swap(shared_.gone);
  for (CallPtr& call : shared_.ready) {
    if (call->cancelled) continue;                                       // and nothing of it is counted any more
    const size_t size = std::min(call->charged, call->request->size());  // a stream's other messages stay counted
    shared_.buffered -= size;
    call->charged -= size;
    call->taken = true;
    std::shared_ptr<Buffer> message = std::move(call->request);
    arrivals.calls.push_back({std::move(call), std::move(message), {}});
  }
  shared_.ready.clear();
  if (!arrivals.calls.empty()) arrivals.models = models_;
  return arrivals;
}

std::shared_ptr<const ModelSet> Plane::serve(std::shared_ptr<const ModelSet> models) {
  const std::lock_guard<std::mutex> lock(mutex_);
  models_.swap(models);
  return models;
}

void Plane::wake() { signal(); }

void Plane::signal() {
  const uint64_t one = 1;
  // Full means that it is readable already.
  [[maybe_unused]] const ssize_t written = ::write(event_, &one, sizeof one);
}

void Plane::handle(const epoll_event* events, int count, bool& woken) {
  for (int i = 0; i < count; ++i) {
    const uint64_t id = events[i].data.u64;
    if (id == WAKE) {
      uint64_t value;
      // Another thread may have been quicker: the wake was meant for one.
      if (::read(event_, &value, sizeof value) > 0) woken = true;
      continue;
    }
    if (id < LISTENERS) {
      accept_all();
      continue;
    }
    const auto found = connections_.find(id);
    if (found == connections_.end() || found->second->doomed) continue;
    Connection& connection = *found->second;
    if (events[i].events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) connection.closing = true;
    if (events[i].events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) read_later(connection);
    if (events[i].events & EPOLLOUT && !connection.out.empty() && !write(connection)) doom(connection);
  }
  std::vector<uint64_t> turn;
  turn.swap(unread_);
  for (const uint64_t id : turn) {
    const auto found = connections_.find(id);
    if (found == connections_.end() || found->second->doomed) continue;
    found->second->unread = false;
    read(*found->second);
  }
  bury();
}

void Plane::accept_all() {
  for (const int listener : listeners_) {
    for (;;) {
      const int fd = accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
      if (fd >= 0) {
        if (connections_.size() < shared_.config.max_connections) {
          add_connection(fd);
        } else {
          close(fd);
          ++shared_.statistics.connections_refused;
        }
        continue;
      }
      if ((errno == EMFILE || errno == ENFILE) && spare_ >= 0) {
        // Out of descriptors: one that is kept for this lets the connection be taken and closed, where leaving it
        // would have the listener wake every poll.
        close(spare_);
        const int refused = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
        if (refused >= 0) close(refused);
        spare_ = open("/dev/null", O_RDONLY | O_CLOEXEC);
        if (refused < 0) break;  // there was none
        ++shared_.statistics.connections_refused;
        continue;
      }
      if (errno == ECONNABORTED || errno == EINTR) continue;
      break;
    }
  }
}

void Plane::add_connection(int fd) {
  const int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);  // of no meaning, and no harm, on a Unix socket
  const uint64_t id = next_id_++;
  std::unique_ptr<Connection> connection;
  try {
    connection = std::make_unique<Connection>(id, fd, shared_);
  } catch (const std::bad_alloc&) {
    close(fd);
    return;
  }
  epoll_event event{};
  event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
  event.data.u64 = id;
  if (epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event)) return;  // closes it
  ++shared_.statistics.connections;
  Connection& added = *connections_.emplace(id, std::move(connection)).first->second;
  if (!write(added)) doom(added);  // the settings frame
}

void Plane::read_later(Connection& connection) {
  if (connection.unread) return;
  connection.unread = true;
  unread_.push_back(connection.id);
}

void Plane::read(Connection& connection) {
  for (size_t taken = 0;;) {
    const ssize_t size = recv(connection.fd, scratch_.data(), scratch_.size(), 0);
    if (size < 0 && errno == EINTR) continue;
    if (size < 0 && errno == EAGAIN) break;
    if (size <= 0) {
      doom(connection);  // a peer that has closed takes no answers
      return;
    }
    shared_.statistics.bytes_in += static_cast<uint64_t>(size);
    connection.read_at = shared_.now;
    connection.asked_at = 0;
    if (!connection.session.feed(scratch_.data(), static_cast<size_t>(size))) {
      write(connection);  // what says why
      doom(connection);
      return;
    }
    taken += static_cast<size_t>(size);
    if (static_cast<size_t>(size) < scratch_.size() && !connection.closing) break;  // that was all
    if (taken >= READ_TURN) {
      read_later(connection);
      break;
    }
  }
  if (connection.session.calls()) connection.used_at = shared_.now;
  if (!write(connection)) doom(connection);
}

// Sends what the session has, as far as the socket takes it. False when the connection is over.
bool Plane::write(Connection& connection) {
  connection.dirty = false;
  for (;;) {
    if (connection.out.empty()) {
      if (!connection.session.pull(connection.out, WRITE_BLOCK)) return false;
      if (connection.out.empty()) return !connection.session.done();
      connection.written_at = shared_.now;
    }
    const ssize_t size = send(connection.fd, connection.out.data() + connection.sent,
                              connection.out.size() - connection.sent, MSG_NOSIGNAL);
    if (size < 0) {
      if (errno == EINTR) continue;
      return errno == EAGAIN;  // the socket tells when it takes more
    }
    shared_.statistics.bytes_out += static_cast<uint64_t>(size);
    connection.written_at = shared_.now;
    connection.sent += static_cast<size_t>(size);
    if (connection.sent < connection.out.size()) continue;
    connection.out.clear();
    connection.sent = 0;
  }
}

void Plane::doom(Connection& connection) {
  if (connection.doomed) return;
  connection.doomed = true;
  doomed_.push_back(connection.id);
}

void Plane::bury() {
  for (const uint64_t id : doomed_) connections_.erase(id);
  doomed_.clear();
}

void Plane::post(CallPtr call) {
  const std::lock_guard<std::mutex> lock(outbox_mutex_);
  outbox_.push_back(std::move(call));
}

void Plane::flush() {
  const std::lock_guard<std::mutex> lock(mutex_);
  shared_.now = monotonic_seconds();
  send_posted();
  bury();
  // A stream's next message may be ready now.
  if (arrived() && waiting_) signal();
}

void Plane::send_posted() {
  std::vector<CallPtr> posted;
  {
    const std::lock_guard<std::mutex> lock(outbox_mutex_);
    posted.swap(outbox_);
  }
  if (posted.empty()) return;
  std::vector<Connection*> dirty;
  for (const CallPtr& call : posted) {
    if (!call->session) continue;
    call->session->answer(call);
    auto* const connection = static_cast<Connection*>(call->session->owner);
    if (!connection->dirty) dirty.push_back(connection);
    connection->dirty = true;
  }
  for (Connection* const connection : dirty)
    if (!connection->doomed && !write(*connection)) doom(*connection);
}

// Timeouts, four times a second.
void Plane::tend() {
  const Config& config = shared_.config;
  const double now = shared_.now;
  tended_ = now;
  if (spare_ < 0) spare_ = open("/dev/null", O_RDONLY | O_CLOEXEC);
  for (const auto& entry : connections_) {
    Connection& connection = *entry.second;
    if (connection.doomed) continue;
    const bool late = !connection.session.established() && now - connection.born > config.handshake_s;
    const bool stuck = !connection.out.empty() && now - connection.written_at > config.stall_s;
    const bool gone = connection.asked_at > 0 && now - connection.asked_at > config.keepalive_timeout_s;
    if (connection.session.calls()) connection.used_at = now;
    if (connection.out.empty() && now - connection.written_at > 1)
      std::string().swap(connection.out);  // see WRITE_BLOCK
    const bool unused = now - connection.used_at > config.idle_s;
    if (late || stuck || gone || unused) {
      ++shared_.statistics.connections_timed_out;
      if (unused) {
        connection.session.go_away(true);
        write(connection);
      }
      doom(connection);
      continue;
    }
    if (connection.asked_at == 0 && now - connection.read_at > config.keepalive_s) {
      connection.asked_at = now;
      connection.session.ping();
    }
    connection.session.expire_stalled();
    if (!write(connection)) doom(connection);
  }
  bury();
}

Arrivals Plane::attend() {
  Arrivals arrivals;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    const std::chrono::duration<double> pause(shared_.config.helper_s);
    while (!stopped_ && arrivals.calls.empty() && arrivals.gone.empty()) {
      attendant_.wait_for(lock, pause);
      if (stopped_) break;
      shared_.now = monotonic_seconds();
      if (shared_.now - tended_ >= TEND_S) tend();
      // What has arrived already is taken in any case: while the plane stops, it is polled and nobody takes.
      if (!arrived() && (waiting_ || shared_.now - polled_ < shared_.config.helper_s)) continue;
      epoll_event events[64];
      bool woken = false;
      const int count = epoll_wait(epoll_, events, 64, 0);
      ++shared_.statistics.helper_polls;
      send_posted();
      handle(events, count, woken);
      if (woken) signal();  // it was meant for a lane
      arrivals = take();
    }
  }
  decode(arrivals);
  return arrivals;
}

void Plane::retire() {
  const std::lock_guard<std::mutex> lock(mutex_);
  shared_.now = monotonic_seconds();
  shared_.serving = false;
  for (const auto& entry : connections_) {
    Connection& connection = *entry.second;
    if (connection.doomed) continue;
    connection.session.tell_watchers();
    if (!write(connection)) doom(connection);
  }
  bury();
}

void Plane::refuse(const std::string& why) {
  const std::lock_guard<std::mutex> lock(mutex_);
  shared_.refusal = why;
}

void Plane::stop(double grace) {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    if (stopped_) return;
    shared_.now = monotonic_seconds();
    // The file goes before its listener: the other way round it might be one that a successor has just made.
    if (!unix_path_.empty()) unlink(unix_path_.c_str());
    unix_path_.clear();
    for (const int listener : listeners_) close(listener);
    listeners_.clear();
    shared_.serving = false;
    for (const auto& entry : connections_) entry.second->session.tell_watchers();  // they have nothing to wait for
    const auto all = [this](bool last_word) {
      for (const auto& entry : connections_) {
        Connection& connection = *entry.second;
        if (connection.doomed) continue;
        connection.session.go_away(last_word);
        if (!write(connection)) doom(connection);
      }
      bury();
    };
    const auto busy = [this] {
      return std::any_of(connections_.begin(), connections_.end(),
                         [](const auto& entry) { return entry.second->session.calls() || !entry.second->out.empty(); });
    };
    all(false);
    const double until = shared_.now + grace;
    while (busy() && shared_.now < until) {
      epoll_event events[64];
      bool woken = false;
      const double left = std::min(0.02, until - shared_.now);
      lock.unlock();
      const int count = wait(left, events, 64);
      lock.lock();
      shared_.now = polled_ = monotonic_seconds();
      send_posted();
      handle(events, count, woken);
    }
    all(true);
    stopped_ = true;
    connections_.clear();
    attendant_.notify_all();
  }
  signal();  // whoever waits finds that it is over
}

Statistics Plane::statistics() {
  const std::lock_guard<std::mutex> lock(mutex_);
  Statistics found = shared_.statistics;
  found.open_connections = connections_.size();
  for (const auto& entry : connections_) found.open_calls += entry.second->session.calls();
  return found;
}

}  // namespace narsil
