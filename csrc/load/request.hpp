// A request on its way and the reply to it, and the book that is kept of all of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "load/reply.hpp"
#include "wire/clock.hpp"
#include "wire/grpc.hpp"

namespace narsil::load {

using wire::Nanos;  // of the monotonic clock

// A request's message with its gRPC prefix: framed once, sent from where it lies, any number of times.
struct Body {
  wire::Prefix prefix;
  std::string_view message;  // owned by whoever made the client, and outlives it

  explicit Body(std::string_view content) : prefix(wire::prefix_of(content.size())), message(content) {}
  size_t size() const { return prefix.size() + message.size(); }
};

class Connection;

// One request. Belongs to Calls; lives until it is both settled (counted) and closed (HTTP/2 has let go of it).
struct Request {
  const Body* body = nullptr;
  size_t body_number = 0;
  size_t slot = 0;  // the connection it was meant for
  Nanos since = 0;  // latency counts from here: when it was sent, or in an open loop when it was due
  Nanos deadline = 0;
  Nanos ended_at = 0;
  Connection* connection = nullptr;  // that carries it: valid until it is closed
  int32_t stream = -1;
  size_t position = 0;  // in its connection's list
  size_t sent = 0;      // bytes of the body handed to the socket's queue
  bool reset_by_peer = false;
  bool ended = false;
  bool settled = false;
  bool closed = false;
  std::string problem;  // once ended: what went wrong; empty if nothing did
  Reply reply;
  Request* older = nullptr;  // by deadline
  Request* newer = nullptr;
};

// Owns every call. All have the same timeout, so the order in which they begin is the order of their deadlines.
class Requests {
 public:
  Request& begin(Nanos deadline);
  void end(Request& request, std::string problem);   // the first end counts; the call waits in ended()
  void close(Request& request);                      // HTTP/2 has let go of it
  void settle(Request& request);                     // it has been counted
  Request* oldest() const { return oldest_; }        // of those not ended, the next to time out
  std::vector<Request*>& ended() { return ended_; }  // in the order in which they ended, not yet settled

 private:
  Request& vacant();
  void unwatch(Request& request);
  void free_if_done(Request& request);

  std::deque<Request> all_;  // addresses stay
  std::vector<Request*> free_;
  std::vector<Request*> ended_;
  Request* oldest_ = nullptr;
  Request* newest_ = nullptr;
};

}  // namespace narsil::load
