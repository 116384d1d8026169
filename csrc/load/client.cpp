#include "load/client.hpp"

#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <system_error>
#include <utility>

namespace narsil::load {
namespace {

constexpr Nanos MILLISECOND = 1'000'000;
constexpr Nanos SECOND = wire::NANOS_PER_SECOND;
constexpr Nanos TICK = 100 * MILLISECOND;
constexpr Nanos FIRST_PAUSE = 10 * MILLISECOND;  // before a second attempt to connect, and doubled for each further one
constexpr Nanos LONGEST_PAUSE = 500 * MILLISECOND;
constexpr size_t MOST_KINDS = 64;         // of errors: a server may not make up any number of names
constexpr size_t MOST_DUE_PER_TURN = 64;  // so that a sender behind its schedule still takes replies
constexpr size_t MOST_EVENTS = 64;        // per epoll_wait

double seconds(Nanos nanos) { return static_cast<double>(nanos) * 1e-9; }

Nanos pause_after(unsigned failures) {
  if (failures == 0) return 0;
  return std::min(LONGEST_PAUSE, FIRST_PAUSE << std::min(failures - 1, 10u));
}

}  // namespace

template <class Work>
void Client::each_connection(const Work& work) const {
  for (const Slot& slot : slots_) {
    if (slot.connection) work(*slot.connection);
  }
  for (const auto& connection : retired_) work(*connection);
}

Client::Client(Settings settings, std::vector<Body> bodies)
    : settings_(std::move(settings)),
      bodies_(std::move(bodies)),
      target_(parse_target(settings_.target)),
      http2_(target_.authority, settings_.method, settings_.timeout, settings_.user_agent),
      epoll_(wire::owned(epoll_create1(EPOLL_CLOEXEC), "epoll_create1")),
      timer_(wire::owned(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC), "timerfd_create")),
      slots_(settings_.connections) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.ptr = nullptr;  // the timer; connections have their own address here
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, timer_.get(), &event)) wire::fail("epoll_ctl");
}

Client::~Client() { close(); }

void Client::close() {
  closed_ = true;
  each_connection([](Connection& connection) { connection.goodbye(); });
  retired_.clear();
  for (Slot& slot : slots_) slot.connection.reset();
  for (Request* request : requests_.ended()) requests_.settle(*request);
  requests_.ended().clear();
}

void Client::connect(const Tick& tick) {
  if (closed_) throw std::logic_error("the client is closed");
  if (!addresses_.empty()) throw std::logic_error("the client is connected already");
  const Nanos deadline = wire::monotonic_nanos() + settings_.timeout;
  try {
    addresses_ = resolve(target_);
    for (Slot& slot : slots_) open(slot, 0);
    const auto ready = [](const Slot& slot) { return slot.connection->ready() && slot.connection->accepts(); };
    while (!std::all_of(slots_.begin(), slots_.end(), ready)) {
      turn(std::min(deadline, wire::monotonic_nanos() + TICK));
      check_connecting(deadline);
      tick(0);
    }
  } catch (...) {
    close();
    throw;
  }
}

// Tries again where a connection has been lost before it was ready; throws where that is of no use.
void Client::check_connecting(Nanos deadline) {
  const Nanos now = wire::monotonic_nanos();
  for (Slot& slot : slots_) {
    const Connection& connection = *slot.connection;
    if (connection.ready() && connection.accepts()) continue;
    if (connection.not_http2()) throw ConnectFailed(target_.text + ": " + connection.reason());
    if (!connection.reason().empty()) slot.reason = connection.reason();
    if (now >= deadline) {
      throw ConnectFailed("no server answers at " + target_.text + (slot.reason.empty() ? "" : ": " + slot.reason));
    }
    if (connection.accepts()) continue;
    ++slot.address;
    open(slot, now + pause_after(++slot.failures));
  }
}

Outcome Client::closed_loop(uint64_t requests, size_t concurrency, size_t keep, const Tick& tick) {
  Loop loop;
  loop.requests = requests;
  loop.keep = keep;
  return run(loop, concurrency, tick);
}

Outcome Client::open_loop(const std::vector<double>& due, size_t keep, const Tick& tick) {
  Loop loop;
  loop.requests = due.size();
  loop.keep = keep;
  loop.due = &due;
  return run(loop, 0, tick);
}

Outcome Client::run(Loop& loop, size_t concurrency, const Tick& tick) {
  if (closed_ || addresses_.empty()) throw std::logic_error("the client is not connected");
  const size_t reconnects_before = reconnects_;
  try {
    loop.outcome.latencies.reserve(std::min<uint64_t>(loop.requests, 1u << 24));
    loop.start = wire::monotonic_nanos();
    Nanos next_tick = loop.start + TICK;
    for (size_t number = 0; number < concurrency && loop.begun < loop.requests; ++number) {
      const Nanos now = wire::monotonic_nanos();
      begin(loop, number % slots_.size(), now, now);
    }
    while (true) {
      if (loop.due) begin_due(loop);
      settle(loop);
      if (loop.ended == loop.requests) break;
      turn(next_tick);
      if (wire::monotonic_nanos() < next_tick) continue;
      tick(loop.ended);
      next_tick = wire::monotonic_nanos() + TICK;
    }
  } catch (...) {
    close();
    throw;
  }
  each_connection([](Connection& connection) { connection.flush(); });  // the server hears of what was cancelled
  loop.outcome.reconnects = reconnects_ - reconnects_before;
  return std::move(loop.outcome);
}

// Sends the next request on a slot's connection, or on any other where that one is lost for good.
void Client::begin(Loop& loop, size_t slot, Nanos since, Nanos now) {
  Request& request = requests_.begin(now + settings_.timeout);
  request.body_number = loop.begun++ % bodies_.size();
  request.body = &bodies_[request.body_number];
  request.slot = slot;
  request.since = since;
  std::string reason = "there is no connection";
  for (size_t tries = 0; tries <= slots_.size(); ++tries) {
    Connection* connection = usable((slot + tries) % slots_.size());
    if (!connection) continue;
    if (connection->submit(request)) return;
    reason = connection->reason();
  }
  const auto& last = slots_[slot].connection;
  if (last && !last->reason().empty()) reason = last->reason();
  requests_.end(request, "UNAVAILABLE: " + reason);
  requests_.close(request);
}

// What is due by now. The timer is left to wake the loop for the next one.
void Client::begin_due(Loop& loop) {
  for (size_t sent = 0; loop.begun < loop.requests; ++sent) {
    const Nanos due = loop.start + std::llround((*loop.due)[loop.begun] * 1e9);
    const Nanos now = wire::monotonic_nanos();
    if (due > now || sent == MOST_DUE_PER_TURN) return arm(due);
    loop.outcome.late = std::max(loop.outcome.late, seconds(now - due));
    begin(loop, loop.begun % slots_.size(), due, now);
  }
}

// Counts what has ended; in a closed loop each end begins the next. That one may end at once, and is then counted too.
void Client::settle(Loop& loop) {
  std::vector<Request*>& ended = requests_.ended();
  for (size_t at = 0; at < ended.size(); ++at) {
    Request& request = *ended[at];
    const size_t slot = request.slot;
    count(loop, request);
    requests_.settle(request);
    if (loop.due || loop.begun == loop.requests) continue;
    const Nanos now = wire::monotonic_nanos();
    begin(loop, slot, now, now);
  }
  ended.clear();
}

void Client::count(Loop& loop, const Request& request) {
  Outcome& outcome = loop.outcome;
  ++loop.ended;
  if (request.problem.empty()) {
    outcome.latencies.push_back(seconds(request.ended_at - request.since));
    if (request.body_number < loop.keep) outcome.replies[request.body_number] = request.reply.message();
    return;
  }
  const bool room = outcome.errors.size() < MOST_KINDS || outcome.errors.count(request.problem) != 0;
  ++outcome.errors[room ? request.problem : "other errors"];
}

// One round of waiting and working: writes what is queued, then waits for events, at most until `until`.
void Client::turn(Nanos until) {
  each_connection([](Connection& connection) { connection.flush(); });
  std::array<epoll_event, MOST_EVENTS> events;
  const int wait = requests_.ended().empty() ? wait_ms(until) : 0;
  const int count = epoll_wait(epoll_.get(), events.data(), events.size(), wait);
  if (count < 0 && errno != EINTR) wire::fail("epoll_wait");
  for (int at = 0; at < count; ++at) {
    if (auto* connection = static_cast<Connection*>(events[at].data.ptr)) {
      connection->handle(events[at].events);
    } else {
      uint64_t expirations = 0;
      if (read(timer_.get(), &expirations, sizeof expirations) > 0) armed_ = 0;
    }
  }
  const Nanos now = wire::monotonic_nanos();
  each_connection([now](Connection& connection) {
    if (connection.waiting() && connection.not_before() <= now) connection.start();
  });
  expire();
  const auto done = [](const std::unique_ptr<Connection>& one) { return one->closed(); };
  retired_.erase(std::remove_if(retired_.begin(), retired_.end(), done), retired_.end());
}

// Milliseconds until something is to be done without an event.
int Client::wait_ms(Nanos until) const {
  if (const Request* oldest = requests_.oldest()) until = std::min(until, oldest->deadline);
  each_connection([&until](const Connection& connection) {
    if (connection.waiting()) until = std::min(until, connection.not_before());
  });
  const Nanos left = until - wire::monotonic_nanos();
  return left <= 0 ? 0 : static_cast<int>((std::min(left, SECOND) + MILLISECOND - 1) / MILLISECOND);
}

void Client::arm(Nanos due) {
  if (armed_ == due) return;
  itimerspec time{};
  time.it_value.tv_sec = due / SECOND;
  time.it_value.tv_nsec = due % SECOND;
  if (timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &time, nullptr)) wire::fail("timerfd_settime");
  armed_ = due;
}

void Client::expire() {
  if (!requests_.oldest()) return;
  const Nanos now = wire::monotonic_nanos();
  while (Request* request = requests_.oldest()) {
    if (request->deadline > now) return;
    requests_.end(*request, "DEADLINE_EXCEEDED");
    request->connection->cancel(*request);
  }
}

// The slot's connection, or a new one where that takes no more calls; null where none may be opened any more.
Connection* Client::usable(size_t number) {
  Slot& slot = slots_[number];
  if (!slot.connection->accepts() && !replace(slot)) return nullptr;
  return slot.connection.get();
}

bool Client::replace(Slot& slot) {
  if (reconnects_ == settings_.reconnects) return false;
  ++reconnects_;
  if (slot.connection->ready()) {
    slot.failures = 0;
  } else {
    ++slot.failures;
    ++slot.address;
  }
  std::unique_ptr<Connection> before = std::move(slot.connection);
  open(slot, wire::monotonic_nanos() + pause_after(slot.failures));
  if (!before->closed()) retired_.push_back(std::move(before));
  return true;
}

void Client::open(Slot& slot, Nanos not_before) {
  const Address& address = addresses_[slot.address % addresses_.size()];
  slot.connection =
      std::make_unique<Connection>(http2_, settings_.expected, requests_, epoll_.get(), address, not_before);
}

}  // namespace narsil::load
