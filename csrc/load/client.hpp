// The load generator: sends a closed or an open loop of requests and takes the replies, on the thread that calls it.
//
// Receives request bodies and how to send them, produces latencies, errors by name and the replies that are to be kept.
// Owns the connections and the epoll descriptor. Every request that is begun ends exactly once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "load/connection.hpp"
#include "load/reply.hpp"
#include "load/request.hpp"
#include "load/target.hpp"
#include "wire/descriptor.hpp"

namespace narsil::load {

// There is no server to load at all.
struct ConnectFailed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Settings {
  std::string target;
  std::string method;  // /package.Service/Method
  std::string user_agent;
  Expected expected;
  size_t connections = 1;
  Nanos timeout = 30'000'000'000;  // of a request, and of connecting
  size_t reconnects = 20;          // lost connections that are replaced, over the client's life
};

// What came of one loop.
struct Outcome {
  std::vector<double> latencies;           // seconds, in order of completion; failed requests have none
  std::map<std::string, uint64_t> errors;  // by name; at most MOST_KINDS names
  std::map<size_t, std::string> replies;   // body number -> its last right reply, for the bodies to keep
  double late = 0;                         // seconds, open loop: the furthest that sending fell behind
  size_t reconnects = 0;
};

// Called at least every 100 ms or so with the number of requests that have ended. May throw: the client is then closed.
using Tick = std::function<void(uint64_t)>;

class Client {
 public:
  // Throws std::invalid_argument. `bodies` outlives the client and is not empty.
  Client(Settings settings, std::vector<Body> bodies);
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  // Until every connection has the server's SETTINGS; tries again until the timeout. Throws ConnectFailed.
  void connect(const Tick& tick);

  // `concurrency` requests in flight until `requests` have ended.
  Outcome closed_loop(uint64_t requests, size_t concurrency, size_t keep, const Tick& tick);

  // Request n is sent due[n] seconds from now (ascending), whatever has become of those before it.
  Outcome open_loop(const std::vector<double>& due, size_t keep, const Tick& tick);

  void close();

 private:
  struct Slot {  // one place among the connections, and whoever holds it
    std::unique_ptr<Connection> connection;
    unsigned failures = 0;  // in a row, without SETTINGS
    size_t address = 0;     // of those of the name, the one that is tried: after a failure the next
    std::string reason;     // of the last failure to connect
  };
  struct Loop {  // one closed or open loop under way
    uint64_t requests = 0;
    size_t keep = 0;
    const std::vector<double>* due = nullptr;  // null: a closed loop
    Nanos start = 0;
    uint64_t begun = 0;
    uint64_t ended = 0;
    Outcome outcome;
  };

  Outcome run(Loop& loop, size_t concurrency, const Tick& tick);
  void begin(Loop& loop, size_t slot, Nanos since, Nanos now);
  void begin_due(Loop& loop);
  void settle(Loop& loop);
  void count(Loop& loop, const Request& request);
  void turn(Nanos until);
  int wait_ms(Nanos until) const;
  void arm(Nanos due);
  void expire();
  Connection* usable(size_t slot);
  bool replace(Slot& slot);
  void open(Slot& slot, Nanos not_before);
  void check_connecting(Nanos deadline);
  template <class Work>
  void each_connection(const Work& work) const;

  const Settings settings_;
  const std::vector<Body> bodies_;
  const Target target_;
  const Http2 http2_;
  std::vector<Address> addresses_;
  wire::Descriptor epoll_;
  wire::Descriptor timer_;  // wakes the open loop to the microsecond
  Nanos armed_ = 0;
  size_t reconnects_ = 0;
  bool closed_ = false;
  Requests requests_;  // outlives the connections below, which end their calls in it
  std::vector<Slot> slots_;
  std::vector<std::unique_ptr<Connection>> retired_;  // replaced, with calls still under way
};

}  // namespace narsil::load
