#include "native/plane.hpp"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "native/sockets.hpp"
#include "wire/clock.hpp"

namespace narsil::native {
namespace {

constexpr uint64_t LISTENER = Poller::WAKE + 1, FIRST_CONNECTION = LISTENER + 1;  // what events come with
constexpr size_t READ_BLOCK = 256u << 10;
constexpr size_t READ_TURN = 1u << 20;  // bytes of one connection before the others have their turn
constexpr size_t WRITE_BLOCK = 64u << 10;
constexpr double TEND_S = 0.25;  // between two looks at the connections' timeouts

// A descriptor that is kept for when there are no more; none where there are none even now.
wire::Descriptor spare() { return wire::Descriptor(open("/dev/null", O_RDONLY | O_CLOEXEC)); }

// Outside the mutex: what has been taken belongs to whoever took it. Returns how many were right.
uint64_t decode(Arrivals& arrivals) {
  uint64_t right = 0;
  for (Arrival& arrival : arrivals.calls) {
    const uint8_t* const data = arrival.message->data();
    const size_t size = arrival.message->size();
    const ModelName& named = arrival.rpc->model;
    const Kind kind = arrival.rpc->method->kind;
    if (kind == Kind::PREDICTOR) arrival.decoded = decode_predictor(data, size, *arrivals.models, named);
    if (kind == Kind::NARSIL) arrival.decoded = decode_narsil(data, size, *arrivals.models, named);
    if (kind == Kind::OIP) arrival.decoded = decode_oip(data, size, *arrivals.models, named);
    if (arrival.decoded.model) ++right;
  }
  return right;
}

}  // namespace

struct Plane::Connection {
  Connection(uint64_t id, wire::Descriptor socket, Shared& shared)
      : id(id),
        socket(std::move(socket)),
        session(shared),
        born(shared.now),
        read_at(shared.now),
        written_at(shared.now),
        used_at(shared.now) {
    session.owner = this;
  }

  const uint64_t id;
  const wire::Descriptor socket;
  Session session;
  std::string out;
  size_t sent = 0;
  double born, read_at, written_at, used_at, asked_at = 0;
  bool closing = false;  // the peer has closed; bytes may still wait before the end
  bool dirty = false;    // has something to send
  bool unread = false, doomed = false;
};

Plane::Plane(Config config) : next_id_(FIRST_CONNECTION), scratch_(READ_BLOCK) {
  shared_.config = std::move(config);
  shared_.now = wire::monotonic_seconds();
  spare_ = spare();
}

Plane::~Plane() { stop(0); }

int Plane::listen_tcp(const std::string& host, int port, bool reuse_port) {
  add_listeners(native::listen_tcp(host, port, reuse_port));
  return port;
}

void Plane::listen_unix(const std::string& path) {
  std::vector<wire::Descriptor> one;
  one.push_back(native::listen_unix(path));
  try {
    add_listeners(std::move(one));
  } catch (...) {
    unlink(path.c_str());
    throw;
  }
  unix_path_ = path;
}

// All of them or, where that throws, none: a listener that is closed is watched no longer.
void Plane::add_listeners(std::vector<wire::Descriptor> added) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const wire::Descriptor& listener : added)
    if (!poller_.add(listener, EPOLLIN | EPOLLEXCLUSIVE, LISTENER)) wire::fail("epoll_ctl");
  for (wire::Descriptor& listener : added) listeners_.push_back(std::move(listener));
}

Arrivals Plane::poll(double timeout) {
  constexpr int MOST = 64;
  epoll_event events[MOST];
  Arrivals arrivals;
  bool woken = false;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    shared_.now = wire::monotonic_seconds();
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
        count = poller_.wait(left, events, MOST);
        lock.lock();
        --waiting_;
      } else {
        count = poller_.wait(0, events, MOST);
      }
      shared_.now = polled_ = wire::monotonic_seconds();
      handle(events, count, woken);
    }
    arrivals = take();
    if (!unread_.empty() && waiting_) poller_.wake();
  }
  decoded_ += decode(arrivals);
  return arrivals;
}

bool Plane::arrived() const { return !shared_.ready.empty() || !shared_.gone.empty(); }

Arrivals Plane::take() {
  Arrivals arrivals;
  arrivals.gone.swap(shared_.gone);
  for (RpcPtr& rpc : shared_.ready) {
    if (rpc->cancelled) continue;                                      // and nothing of it is counted any more
    const size_t size = std::min(rpc->charged, rpc->request->size());  // a stream's other messages stay counted
    shared_.buffered -= size;
    rpc->charged -= size;
    rpc->custody = Custody::TAKEN;
    std::shared_ptr<Buffer> message = std::move(rpc->request);
    arrivals.calls.push_back({std::move(rpc), std::move(message), {}});
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

void Plane::handle(const epoll_event* events, int count, bool& woken) {
  for (int i = 0; i < count; ++i) {
    const uint64_t id = events[i].data.u64;
    if (id == Poller::WAKE) {
      if (poller_.woken()) woken = true;
      continue;
    }
    if (id == LISTENER) {
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
  for (const wire::Descriptor& listener : listeners_) {
    for (;;) {
      wire::Descriptor accepted(accept4(listener.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
      if (accepted) {
        if (connections_.size() < shared_.config.max_connections) {
          add_connection(std::move(accepted));
        } else {
          ++shared_.statistics.connections_refused;
        }
        continue;
      }
      if ((errno == EMFILE || errno == ENFILE) && spare_) {
        // Out of descriptors: one that is kept for this lets the connection be taken and closed, where leaving it
        // would have the listener wake every poll.
        spare_.close();
        wire::Descriptor refused(accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
        const bool there = static_cast<bool>(refused);
        refused.close();
        spare_ = spare();
        if (!there) break;
        ++shared_.statistics.connections_refused;
        continue;
      }
      if (errno == ECONNABORTED || errno == EINTR) continue;
      break;
    }
  }
}

void Plane::add_connection(wire::Descriptor socket) {
  const int on = 1;
  setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);  // of no meaning, and no harm, on a Unix socket
  const uint64_t id = next_id_++;
  std::unique_ptr<Connection> connection;
  try {
    connection = std::make_unique<Connection>(id, std::move(socket), shared_);
  } catch (const std::bad_alloc&) {
    return;
  }
  if (!poller_.add(connection->socket, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, id)) return;
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
    const ssize_t size = recv(connection.socket.get(), scratch_.data(), scratch_.size(), 0);
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
    const ssize_t size = send(connection.socket.get(), connection.out.data() + connection.sent,
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

void Plane::post(RpcPtr rpc) {
  const std::lock_guard<std::mutex> lock(outbox_mutex_);
  outbox_.push_back(std::move(rpc));
}

void Plane::flush() {
  const std::lock_guard<std::mutex> lock(mutex_);
  shared_.now = wire::monotonic_seconds();
  send_posted();
  bury();
  // A stream's next message may be ready now.
  if (arrived() && waiting_) poller_.wake();
}

void Plane::send_posted() {
  std::vector<RpcPtr> posted;
  {
    const std::lock_guard<std::mutex> lock(outbox_mutex_);
    posted.swap(outbox_);
  }
  if (posted.empty()) return;
  std::vector<Connection*> dirty;
  for (const RpcPtr& rpc : posted) {
    if (!rpc->session) continue;
    rpc->session->answer(rpc);
    auto* const connection = static_cast<Connection*>(rpc->session->owner);
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
  if (!spare_) spare_ = spare();
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
    const bool drained = now - connection.session.drained_at() > config.drain_s;
    if (late || stuck || gone || unused || drained) {
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
      shared_.now = wire::monotonic_seconds();
      if (shared_.now - tended_ >= TEND_S) tend();
      // What has arrived already is taken in any case: while the plane stops, it is polled and nobody takes.
      if (!arrived() && (waiting_ || shared_.now - polled_ < shared_.config.helper_s)) continue;
      epoll_event events[64];
      bool woken = false;
      const int count = poller_.wait(0, events, 64);
      ++shared_.statistics.helper_polls;
      send_posted();
      handle(events, count, woken);
      if (woken) poller_.wake();  // it was meant for a lane
      arrivals = take();
    }
  }
  decoded_ += decode(arrivals);
  return arrivals;
}

void Plane::retire() {
  const std::lock_guard<std::mutex> lock(mutex_);
  shared_.now = wire::monotonic_seconds();
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

// Tells every peer to open no more streams or, as the last word, that this is the end.
void Plane::send_away(bool last_word) {
  for (const auto& entry : connections_) {
    Connection& connection = *entry.second;
    if (connection.doomed) continue;
    connection.session.go_away(last_word);
    if (!write(connection)) doom(connection);
  }
  bury();
}

// Whether a call has not ended, or its end has not left.
bool Plane::busy() const {
  return std::any_of(connections_.begin(), connections_.end(),
                     [](const auto& entry) { return entry.second->session.calls() || !entry.second->out.empty(); });
}

void Plane::stop(double grace) {
  {
    std::unique_lock<std::mutex> lock(mutex_);
    if (stopped_) return;
    shared_.now = wire::monotonic_seconds();
    // The file goes before its listener: the other way round it might be one that a successor has just made.
    if (!unix_path_.empty()) unlink(unix_path_.c_str());
    unix_path_.clear();
    listeners_.clear();
    shared_.serving = false;
    for (const auto& entry : connections_) entry.second->session.tell_watchers();  // they have nothing to wait for
    send_away(false);
    const double until = shared_.now + grace;
    while (busy() && shared_.now < until) {
      epoll_event events[64];
      bool woken = false;
      const double left = std::min(0.02, until - shared_.now);
      lock.unlock();
      const int count = poller_.wait(left, events, 64);
      lock.lock();
      shared_.now = polled_ = wire::monotonic_seconds();
      send_posted();
      handle(events, count, woken);
    }
    send_away(true);
    stopped_ = true;
    connections_.clear();
    attendant_.notify_all();
  }
  poller_.wake();  // whoever waits finds that it is over
}

Statistics Plane::statistics() {
  const std::lock_guard<std::mutex> lock(mutex_);
  Statistics found = shared_.statistics;
  found.decoded = decoded_;
  found.open_connections = connections_.size();
  found.buffered = shared_.buffered;
  for (const auto& entry : connections_) {
    found.open_calls += entry.second->session.calls();
    found.watchers += entry.second->session.watchers();
  }
  return found;
}

}  // namespace narsil::native
