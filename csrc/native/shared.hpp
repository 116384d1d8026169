// What the sessions of one plane share: its limits, its counts and the calls that are on their way out of them.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "native/rpc.hpp"

namespace narsil::native {

constexpr double RESETS_S = 5;

struct Config {
  std::unordered_map<std::string, Method> methods;
  size_t max_message = 16u << 20;    // bytes of one message
  size_t max_buffered = 512u << 20;  // bytes of messages that are still arriving or that no lane has taken, and of
                                     // answers that clients do not let through
  size_t max_streams = 1024;         // calls in flight on one connection
  size_t max_connections = 8192;
  size_t max_watchers = 256;           // calls of one connection that watch the server's health
  size_t max_metadata = 16u << 10;     // names, values and 32 a field of one call, as HTTP/2 counts them
  size_t max_resets_per_second = 200;  // streams that one connection may have reset, as a mean over RESETS_S
  // Seconds.
  double handshake_s = 10;  // from the connection to its first whole frame
  double stall_s = 60;      // without a byte moving: a request half sent, or an answer half read
  double idle_s = 3600;     // without a call
  double keepalive_s = 60;  // without a byte: the peer is asked whether it is there
  double keepalive_timeout_s = 20;
  double drain_s = 30;      // that calls may go on for on a connection which has been told to go
  double helper_s = 0.005;  // how long the network may wait while nobody polls
};

struct Statistics {
  uint64_t connections = 0, connections_refused = 0, connections_timed_out = 0, calls = 0, answered = 0, refused = 0,
           cancelled = 0, reset_floods = 0, header_floods = 0, messages = 0, bytes_in = 0, bytes_out = 0,
           helper_polls = 0;
  uint64_t decoded = 0;  // see Plane::statistics
  // Now, rather than since the start; likewise.
  uint64_t open_connections = 0, open_calls = 0, watchers = 0, buffered = 0;
};

// All of it belongs to the plane's mutex.
struct Shared {
  Config config;
  Statistics statistics;
  double now = 0;
  size_t buffered = 0;
  uint64_t last_id = 0;
  std::vector<RpcPtr> ready;   // whole messages that nobody has taken yet
  std::vector<uint64_t> gone;  // calls whose clients went away after they had been taken
  bool serving = true;         // what health checks are told
  std::string refusal;         // not empty: scoring calls are refused with it
};

}  // namespace narsil::native
