// A request on its way and the reply to it, and the book that is kept of all of them.

#pragma once

#include <time.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "load/reply.hpp"

namespace narsil::load {

using Nanos = std::int64_t;  // of the monotonic clock

inline Nanos clock_now() {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<Nanos>(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

// A request's message with its gRPC prefix: framed once, sent from where it lies, any number of times.
struct Body {
  std::array<std::uint8_t, kPrefix> prefix{};
  std::string_view message;  // owned by whoever made the client, and outlives it

  explicit Body(std::string_view content) : message(content) {
    for (std::size_t at = 0; at < 4; ++at) prefix[at + 1] = static_cast<std::uint8_t>(content.size() >> (24 - 8 * at));
  }
  std::size_t size() const { return kPrefix + message.size(); }
};

class Connection;

// One request. Belongs to Calls; lives until it is both settled (counted) and closed (HTTP/2 has let go of it).
struct Call {
  const Body* body = nullptr;
  std::size_t body_number = 0;
  std::size_t slot = 0;  // the connection it was meant for
  Nanos since = 0;       // latency counts from here: when it was sent, or in an open loop when it was due
  Nanos deadline = 0;
  Nanos ended_at = 0;
  Connection* connection = nullptr;  // that carries it: valid until it is closed
  std::int32_t stream = -1;
  std::size_t position = 0;  // in its connection's list
  std::size_t sent = 0;      // bytes of the body handed to the socket's queue
  bool reset_by_peer = false;
  bool ended = false;
  bool settled = false;
  bool closed = false;
  std::string problem;  // once ended: what went wrong; empty if nothing did
  Reply reply;
  Call* older = nullptr;  // by deadline
  Call* newer = nullptr;
};

// Owns every call. All have the same timeout, so the order in which they begin is the order of their deadlines.
class Calls {
 public:
  Call& begin(Nanos deadline);
  void end(Call& call, std::string problem);      // the first end counts; the call waits in ended()
  void close(Call& call);                         // HTTP/2 has let go of it
  void settle(Call& call);                        // it has been counted
  Call* oldest() const { return oldest_; }        // of those not ended, the next to time out
  std::vector<Call*>& ended() { return ended_; }  // in the order in which they ended, not yet settled

 private:
  Call& vacant();
  void unwatch(Call& call);
  void free_if_done(Call& call);

  std::deque<Call> all_;  // addresses stay
  std::vector<Call*> free_;
  std::vector<Call*> ended_;
  Call* oldest_ = nullptr;
  Call* newest_ = nullptr;
};

}  // namespace narsil::load
