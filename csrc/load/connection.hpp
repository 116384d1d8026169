// One HTTP/2 connection: a socket, nghttp2's session on it, and the calls that it carries.
//
// Receives calls (submit) and epoll's events (handle); ends each of its calls through Calls, at the latest when it
// closes. Owns its socket and session. Request bodies go from where they lie to the socket without a copy.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <string>
#include <vector>

#include "load/http2.hpp"
#include "load/request.hpp"
#include "load/target.hpp"
#include "wire/descriptor.hpp"
#include "wire/http2.hpp"

namespace narsil::load {

class Connection {
 public:
  // Begins to connect when start() is called, and no earlier than `not_before`.
  Connection(const Http2& http2, const Expected& expected, Requests& requests, int epoll, const Address& address,
             Nanos not_before);
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  bool waiting() const { return state_ == State::WAITING; }
  bool ready() const { return ready_; }  // the server's SETTINGS have come
  bool closed() const { return state_ == State::CLOSED; }
  bool accepts() const { return state_ != State::CLOSED && !draining_; }
  bool not_http2() const { return broken_; }             // closed because the server does not speak it
  const std::string& reason() const { return reason_; }  // why it was closed
  Nanos not_before() const { return not_before_; }

  void start();
  bool submit(Request& request);  // from now on it ends the call; false if it takes no more
  void cancel(Request& request);  // ended elsewhere (timeout): the server is told
  void handle(uint32_t events);
  void flush();    // writes what the socket takes
  void goodbye();  // tells the server, and closes
  void close(const std::string& reason);

  // Has nghttp2 call the connections.
  static void install(nghttp2_session_callbacks* callbacks);

 private:
  struct Callbacks;
  enum class State { WAITING, CONNECTING, OPEN, CLOSED };

  // Bytes to send: a piece of a body, or (base null) of small_ from `offset`.
  struct Chunk {
    const uint8_t* base;
    size_t offset;
    size_t size;
  };

  bool connected();
  void receive();
  bool fill();
  bool write_out();
  void advance(size_t sent);
  void append_small(const uint8_t* bytes, size_t size);
  void append_data(Request& request, const uint8_t* frame_header, size_t size);
  void end_reply(Request& request);
  void stream_closed(Request& request, uint32_t code);
  void watch(bool write);
  void close_if_finished();

  const Http2& http2_;
  const Expected& expected_;
  Requests& requests_;
  const int epoll_;
  const Address address_;
  const Nanos not_before_;
  State state_ = State::WAITING;
  wire::Descriptor socket_;
  wire::SessionPtr session_;
  bool ready_ = false;
  bool draining_ = false;  // GOAWAY, or out of stream ids: no new calls
  bool broken_ = false;
  bool writable_ = false;  // the socket took all that it was given
  int32_t goaway_last_ = 0;
  std::string goaway_;  // the code's name, once GOAWAY has come
  std::string reason_;
  std::vector<Request*> active_;
  std::vector<uint8_t> small_;  // frame headers, control frames: what nghttp2 writes itself
  std::vector<Chunk> chunks_;
  size_t next_chunk_ = 0;
};

}  // namespace narsil::load
