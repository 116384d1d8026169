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

constexpr Nanos kMillisecond = 1'000'000;
constexpr Nanos kSecond = 1'000 * kMillisecond;
constexpr Nanos kTick = 100 * kMillisecond;
constexpr Nanos kFirstPause = 10 * kMillisecond;  // before a second attempt to connect; doubled for each further one
constexpr Nanos kLongestPause = 500 * kMillisecond;
constexpr std::size_t kMostKinds = 64;       // of errors: a server may not make up any number of names
constexpr std::size_t kMostDuePerTurn = 64;  // so that a sender behind its schedule still takes replies
constexpr std::size_t kMostEvents = 64;      // per epoll_wait

double seconds(Nanos nanos) { return static_cast<double>(nanos) * 1e-9; }

Nanos pause_after(unsigned failures) {
  if (failures == 0) return 0;
  return std::min(kLongestPause, kFirstPause << std::min(failures - 1, 10u));
}

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

}  // namespace

template <typename Work>
void Client::each_connection(const Work& work) const {
  for (const Slot& slot : slots_) {
    if (slot.connection != nullptr) work(*slot.connection);
  }
  for (const auto& connection : retired_) work(*connection);
}

Client::Client(Settings settings, std::vector<Body> bodies)
    : settings_(std::move(settings)),
      bodies_(std::move(bodies)),
      target_(parse_target(settings_.target)),
      http2_(target_.authority, settings_.method, settings_.timeout, settings_.user_agent),
      slots_(settings_.connections) {
  epoll_ = epoll_create1(EPOLL_CLOEXEC);
  timer_ = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.ptr = nullptr;  // the timer; connections have their own address here
  if (epoll_ < 0 || timer_ < 0 || epoll_ctl(epoll_, EPOLL_CTL_ADD, timer_, &event) != 0) {
    const int error = errno;
    if (timer_ >= 0) ::close(timer_);
    if (epoll_ >= 0) ::close(epoll_);
    errno = error;
    fail("epoll");
  }
}

Client::~Client() {
  close();
  ::close(timer_);
  ::close(epoll_);
}

void Client::close() {
  closed_ = true;
  each_connection([](Connection& connection) { connection.goodbye(); });
  retired_.clear();
  for (Slot& slot : slots_) slot.connection.reset();
  for (Call* call : calls_.ended()) calls_.settle(*call);
  calls_.ended().clear();
}

void Client::connect(const Tick& tick) {
  if (closed_) throw std::logic_error("the client is closed");
  if (!addresses_.empty()) throw std::logic_error("the client is connected already");
  const Nanos deadline = clock_now() + settings_.timeout;
  try {
    addresses_ = resolve(target_);
    for (Slot& slot : slots_) open(slot, 0);
    const auto ready = [](const Slot& slot) { return slot.connection->ready() && slot.connection->accepts(); };
    while (!std::all_of(slots_.begin(), slots_.end(), ready)) {
      turn(std::min(deadline, clock_now() + kTick));
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
  const Nanos now = clock_now();
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

Outcome Client::closed_loop(std::uint64_t requests, std::size_t concurrency, std::size_t keep, const Tick& tick) {
  Loop loop;
  loop.requests = requests;
  loop.keep = keep;
  return run(loop, concurrency, tick);
}

Outcome Client::open_loop(const std::vector<double>& due, std::size_t keep, const Tick& tick) {
  Loop loop;
  loop.requests = due.size();
  loop.keep = keep;
  loop.due = &due;
  return run(loop, 0, tick);
}

Outcome Client::run(Loop& loop, std::size_t concurrency, const Tick& tick) {
  if (closed_ || addresses_.empty()) throw std::logic_error("the client is not connected");
  const std::size_t reconnects_before = reconnects_;
  try {
    loop.outcome.latencies.reserve(std::min<std::uint64_t>(loop.requests, 1u << 24));
    loop.start = clock_now();
    Nanos next_tick = loop.start + kTick;
    for (std::size_t number = 0; number < concurrency && loop.begun < loop.requests; ++number) {
      const Nanos now = clock_now();
      begin(loop, number % slots_.size(), now, now);
    }
    while (true) {
      if (loop.due != nullptr) begin_due(loop);
      settle(loop);
      if (loop.ended == loop.requests) break;
      turn(next_tick);
      if (clock_now() < next_tick) continue;
      tick(loop.ended);
      next_tick = clock_now() + kTick;
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
void Client::begin(Loop& loop, std::size_t slot, Nanos since, Nanos now) {
  Call& call = calls_.begin(now + settings_.timeout);
  call.body_number = loop.begun++ % bodies_.size();
  call.body = &bodies_[call.body_number];
  call.slot = slot;
  call.since = since;
  std::string reason = "there is no connection";
  for (std::size_t tries = 0; tries <= slots_.size(); ++tries) {
    Connection* connection = usable((slot + tries) % slots_.size());
    if (connection == nullptr) continue;
    if (connection->submit(call)) return;
    reason = connection->reason();
  }
  const auto& last = slots_[slot].connection;
  if (last != nullptr && !last->reason().empty()) reason = last->reason();
  calls_.end(call, "UNAVAILABLE: " + reason);
  calls_.close(call);
}

// What is due by now. The timer is left to wake the loop for the next one.
void Client::begin_due(Loop& loop) {
  for (std::size_t sent = 0; loop.begun < loop.requests; ++sent) {
    const Nanos due = loop.start + std::llround((*loop.due)[loop.begun] * 1e9);
    const Nanos now = clock_now();
    if (due > now || sent == kMostDuePerTurn) return arm(due);
    loop.outcome.late = std::max(loop.outcome.late, seconds(now - due));
    begin(loop, loop.begun % slots_.size(), due, now);
  }
}

// Counts what has ended; in a closed loop each end begins the next. That one may end at once, and is then counted too.
void Client::settle(Loop& loop) {
  std::vector<Call*>& ended = calls_.ended();
  for (std::size_t at = 0; at < ended.size(); ++at) {
    Call& call = *ended[at];
    const std::size_t slot = call.slot;
    count(loop, call);
    calls_.settle(call);
    if (loop.due != nullptr || loop.begun == loop.requests) continue;
    const Nanos now = clock_now();
    begin(loop, slot, now, now);
  }
  ended.clear();
}

void Client::count(Loop& loop, const Call& call) {
  Outcome& outcome = loop.outcome;
  ++loop.ended;
  if (call.problem.empty()) {
    outcome.latencies.push_back(seconds(call.ended_at - call.since));
    if (call.body_number < loop.keep) outcome.replies[call.body_number] = call.reply.message();
    return;
  }
  const bool room = outcome.errors.size() < kMostKinds || outcome.errors.count(call.problem) != 0;
  ++outcome.errors[room ? call.problem : "other errors"];
}

// One round of waiting and working: writes what is queued, then waits for events, at most until `until`.
void Client::turn(Nanos until) {
  each_connection([](Connection& connection) { connection.flush(); });
  std::array<epoll_event, kMostEvents> events;
  const int wait = calls_.ended().empty() ? wait_ms(until) : 0;
  const int count = epoll_wait(epoll_, events.data(), events.size(), wait);
  if (count < 0 && errno != EINTR) fail("epoll_wait");
  for (int at = 0; at < count; ++at) {
    if (auto* connection = static_cast<Connection*>(events[at].data.ptr)) {
      connection->handle(events[at].events);
    } else {
      std::uint64_t expirations = 0;
      if (read(timer_, &expirations, sizeof expirations) > 0) armed_ = 0;
    }
  }
  const Nanos now = clock_now();
  each_connection([now](Connection& connection) {
    if (connection.waiting() && connection.not_before() <= now) connection.start();
  });
  expire();
  const auto done = [](const std::unique_ptr<Connection>& one) { return one->closed(); };
  retired_.erase(std::remove_if(retired_.begin(), retired_.end(), done), retired_.end());
}

// Milliseconds until something is to be done without an event.
int Client::wait_ms(Nanos until) const {
  if (const Call* oldest = calls_.oldest()) until = std::min(until, oldest->deadline);
  each_connection([&until](const Connection& connection) {
    if (connection.waiting()) until = std::min(until, connection.not_before());
  });
  const Nanos left = until - clock_now();
  return left <= 0 ? 0 : static_cast<int>((std::min(left, kSecond) + kMillisecond - 1) / kMillisecond);
}

void Client::arm(Nanos due) {
  if (armed_ == due) return;
  itimerspec time{};
  time.it_value.tv_sec = due / kSecond;
  time.it_value.tv_nsec = due % kSecond;
  if (timerfd_settime(timer_, TFD_TIMER_ABSTIME, &time, nullptr) != 0) fail("timerfd_settime");
  armed_ = due;
}

void Client::expire() {
  if (calls_.oldest() == nullptr) return;
  const Nanos now = clock_now();
  while (Call* call = calls_.oldest()) {
    if (call->deadline > now) return;
    calls_.end(*call, "DEADLINE_EXCEEDED");
    call->connection->cancel(*call);
  }
}

// The slot's connection, or a new one where that takes no more calls; null where none may be opened any more.
Connection* Client::usable(std::size_t number) {
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
  open(slot, clock_now() + pause_after(slot.failures));
  if (!before->closed()) retired_.push_back(std::move(before));
  return true;
}

void Client::open(Slot& slot, Nanos not_before) {
  const Address& address = addresses_[slot.address % addresses_.size()];
  slot.connection = std::make_unique<Connection>(http2_, settings_.expected, calls_, epoll_, address, not_before);
}

}  // namespace narsil::load
