// One HTTP/2 connection's protocol, without its socket: bytes in, calls out; answers in, bytes out.
#pragma once

#include <nghttp2/nghttp2.h>

#include <unordered_map>

#include "native/call.hpp"

namespace narsil {

struct Config {
  std::unordered_map<std::string, Method> methods;
  size_t max_message = 16u << 20;    // bytes of one message
  size_t max_buffered = 512u << 20;  // bytes of messages that are still arriving or that no lane has taken, and of
                                     // answers that clients do not let through
  size_t max_streams = 1024;         // calls in flight on one connection
  size_t max_connections = 8192;
  size_t max_watchers = 256;            // calls that watch the server's health
  size_t max_header_bytes = 16u << 10;  // names, values and 32 a field, as HTTP/2 counts them
  size_t max_resets = 1000;             // streams a client may have reset in one burst; a fifth of it more each second
  // Seconds.
  double handshake_s = 10;  // from the connection to its first whole frame
  double stall_s = 60;      // without a byte moving: a request half sent, or an answer half read
  double idle_s = 3600;     // without a call
  double keepalive_s = 60;  // without a byte: the peer is asked whether it is there
  double keepalive_timeout_s = 20;
  double helper_s = 0.005;  // how long the network may wait while nobody polls
};

struct Statistics {
  uint64_t connections = 0, connections_refused = 0, connections_timed_out = 0, calls = 0, answered = 0, refused = 0,
           cancelled = 0, reset_floods = 0, messages = 0, bytes_in = 0, bytes_out = 0, helper_polls = 0;
  uint64_t open_connections = 0, open_calls = 0;  // now, rather than since the start; see Plane::statistics
};

// What the sessions of one plane share. All of it belongs to the plane's mutex.
struct Shared {
  Config config;
  Statistics statistics;
  double now = 0;
  size_t buffered = 0;
  uint64_t last_id = 0;
  size_t watchers = 0;         // of health
  std::vector<CallPtr> ready;  // whole messages that nobody has taken yet
  std::vector<uint64_t> gone;  // calls whose clients went away after they had been taken
  bool serving = true;         // what health checks are told
  std::string refusal;         // not empty: scoring calls are refused with it
};

class Session {
 public:
  explicit Session(Shared& shared);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Takes bytes from the peer. False when the connection is beyond help; what is pulled afterwards says why to the
  // peer.
  bool feed(const uint8_t* data, size_t size);

  // Appends frames until `out` holds `most` bytes or nothing is left to send. False on a failure of the library.
  bool pull(std::string& out, size_t most);

  // Sends what the call's answer holds, and ends the call if it is the last.
  void answer(const CallPtr& call);

  // Tells health watchers of a change.
  void tell_watchers();

  // Ends calls on which no byte has moved for too long.
  void expire_stalled();

  void ping();
  void go_away(bool last_word);

  bool done() const { return !nghttp2_session_want_read(session_) && !nghttp2_session_want_write(session_); }
  bool established() const { return established_; }
  size_t calls() const { return calls_.size(); }

  void* owner = nullptr;  // whose socket it is

 private:
  struct Callbacks;

  Call* find(int32_t stream);
  void begin(int32_t stream);
  int header(Call& call, const uint8_t* name, size_t name_size, const uint8_t* value, size_t value_size);
  void headers_done(Call& call);
  void take(Call& call, const uint8_t* data, size_t size);
  bool prefix_done(Call& call);
  void message_done(Call& call);
  bool over_budget(Call& call);
  void half_closed(Call& call);
  void enqueue(const CallPtr& call);
  void refuse(Call& call, int status, const std::string& message);
  void refuse_http(Call& call, const char* status);
  void release(Call& call);
  void answer_health(Call& call, const uint8_t* message, size_t size);
  void respond(Call& call);
  void submit_trailers(Call& call);
  void closed(int32_t stream);
  bool reset_allowed();
  bool continuation_allowed(const nghttp2_frame_hd& frame);

  Shared& shared_;
  nghttp2_session* session_ = nullptr;
  std::unordered_map<int32_t, CallPtr> calls_;
  double resets_ = 0, resets_at_ = 0;
  int continuations_ = 0;
  bool established_ = false, flooded_ = false;
};

}  // namespace narsil
