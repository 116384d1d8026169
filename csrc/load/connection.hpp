// One HTTP/2 connection: a socket, nghttp2's session on it, and the calls that it carries.
//
// Receives calls (submit) and epoll's events (handle); ends each of its calls through Calls, at the latest when it
// closes. Owns its socket and session. Request bodies go from where they lie to the socket without a copy.

#pragma once

#include <nghttp2/nghttp2.h>
#include <sys/uio.h>

#include <cstdint>
#include <string>
#include <vector>

#include "load/call.hpp"
#include "load/http2.hpp"
#include "load/target.hpp"

namespace narsil::load {

class Connection {
 public:
  // Begins to connect when start() is called, and no earlier than `not_before`.
  Connection(const Http2& http2, const Expected& expected, Calls& calls, int epoll, const Address& address,
             Nanos not_before);
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  bool waiting() const { return state_ == State::waiting; }
  bool ready() const { return ready_; }  // the server's SETTINGS have come
  bool closed() const { return state_ == State::closed; }
  bool accepts() const { return state_ != State::closed && !draining_; }
  bool not_http2() const { return broken_; }             // closed because the server does not speak it
  const std::string& reason() const { return reason_; }  // why it was closed
  Nanos not_before() const { return not_before_; }

  void start();
  bool submit(Call& call);  // from now on it ends the call; false if it takes no more
  void cancel(Call& call);  // ended elsewhere (timeout): the server is told
  void handle(std::uint32_t events);
  void flush();    // writes what the socket takes
  void goodbye();  // tells the server, and closes
  void close(const std::string& reason);

  // Has nghttp2 call the connections.
  static void install(nghttp2_session_callbacks* callbacks);

 private:
  struct Callbacks;
  enum class State { waiting, connecting, open, closed };

  // Bytes to send: a piece of a body, or (base null) of small_ from `offset`.
  struct Chunk {
    const std::uint8_t* base;
    std::size_t offset;
    std::size_t size;
  };

  bool connected();
  void receive();
  bool fill();
  bool write_out();
  void advance(std::size_t sent);
  void append_small(const std::uint8_t* bytes, std::size_t size);
  void append_data(Call& call, const std::uint8_t* frame_header, std::size_t size);
  void end_reply(Call& call);
  void stream_closed(Call& call, std::uint32_t code);
  void watch(bool write);
  void close_if_finished();

  const Http2& http2_;
  const Expected& expected_;
  Calls& calls_;
  const int epoll_;
  const Address address_;
  const Nanos not_before_;
  State state_ = State::waiting;
  int socket_ = -1;
  nghttp2_session* session_ = nullptr;
  bool ready_ = false;
  bool draining_ = false;  // GOAWAY, or out of stream ids: no new calls
  bool broken_ = false;
  bool writable_ = false;  // the socket took all that it was given
  std::int32_t goaway_last_ = 0;
  std::string goaway_;  // the code's name, once GOAWAY has come
  std::string reason_;
  std::vector<Call*> active_;
  std::vector<std::uint8_t> small_;  // frame headers, control frames: what nghttp2 writes itself
  std::vector<Chunk> chunks_;
  std::size_t next_chunk_ = 0;
};

}  // namespace narsil::load
