// One HTTP/2 connection's protocol, without its socket: bytes in, calls out; answers in, bytes out.
#pragma once

#include <unordered_map>

#include "native/header_guard.hpp"
#include "native/shared.hpp"
#include "wire/http2.hpp"

namespace narsil::native {

class Session {
 public:
  explicit Session(Shared& shared);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Takes bytes from the peer. False when the connection is beyond help; what is pulled afterwards says why to the
  // peer. One that asks too much is told to go, and its calls go on.
  bool feed(const uint8_t* data, size_t size);

  // Appends frames until `out` holds `most` bytes or nothing is left to send. False on a failure of the library.
  bool pull(std::string& out, size_t most);

  // Sends what the call's answer holds, and ends the call if it is the last.
  void answer(const RpcPtr& rpc);

  // Tells health watchers of a change.
  void tell_watchers();

  // Ends calls on which no byte has moved for too long.
  void expire_stalled();

  void ping();
  void go_away(bool last_word);

  bool done() const {
    return !nghttp2_session_want_read(session_.get()) && !nghttp2_session_want_write(session_.get());
  }
  bool draining() const { return drained_at_ < NEVER; }
  double drained_at() const { return drained_at_; }  // when the peer was told to go
  bool established() const { return established_; }
  size_t calls() const { return calls_.size(); }
  size_t watchers() const { return watchers_; }

  void* owner = nullptr;  // whose socket it is

 private:
  struct Callbacks;

  Rpc* find(int32_t stream);
  void begin(int32_t stream);
  bool pass(const uint8_t* data, size_t size);
  void charge_held();
  void give_up_block();
  void header(Rpc& rpc, std::string_view name, std::string_view value);
  void headers_done(Rpc& rpc);
  void take(Rpc& rpc, const uint8_t* data, size_t size);
  bool prefix_done(Rpc& rpc);
  void message_done(Rpc& rpc);
  bool over_budget(Rpc& rpc);
  void half_closed(Rpc& rpc);
  void enqueue(const RpcPtr& rpc);
  void refuse(Rpc& rpc, int status, const std::string& message);
  void refuse_http(Rpc& rpc, const char* status);
  void release(Rpc& rpc);
  void end_watchers();
  void answer_health(Rpc& rpc, const uint8_t* message, size_t size);
  void respond(Rpc& rpc, Reply reply);
  static ssize_t read_answer(nghttp2_session*, int32_t stream, uint8_t* to, size_t room, uint32_t* flags,
                             nghttp2_data_source* source, void* user);
  void submit_trailers(Rpc& rpc);
  void closed(int32_t stream);
  double resets_left() const;
  void count_reset(size_t more);
  void drain();

  Shared& shared_;
  wire::SessionPtr session_;
  std::unordered_map<int32_t, RpcPtr> calls_;
  size_t watchers_ = 0;  // of health
  HeaderGuard guard_;
  double held_at_ = 0;         // when bytes last came while it held some
  size_t held_ = 0;            // bytes of the guard's counted against the plane's budget
  double resets_, resets_at_;  // that were left, and when
  double drained_at_ = NEVER;
  bool established_ = false, broken_ = false;
};

}  // namespace narsil::native
