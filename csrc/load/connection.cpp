#include "load/connection.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <new>

namespace narsil::load {
namespace {

constexpr uint32_t STREAM_WINDOW = 8u << 20;     // bytes of a reply that may be under way
constexpr int32_t CONNECTION_WINDOW = 64 << 20;  // of all replies of a connection
constexpr size_t MOST_CHUNKS = 256;              // queued for the socket; then they are written first
constexpr size_t VECTORS = 64;                   // pieces per sendmsg
constexpr size_t READ_BYTES = 65536;             // per recv
constexpr int READS_PER_TURN = 4;                // so that no connection starves the others
constexpr size_t MOST_REQUESTS = 1u << 18;       // under way on one connection: bounds memory
constexpr size_t FRAME_HEADER = 9;

std::string text_of(int error) {
  std::array<char, 128> buffer{};
  return strerror_r(error, buffer.data(), buffer.size());
}

}  // namespace

struct Connection::Callbacks {
  static Request* request_of(nghttp2_session* session, int32_t stream) {
    return static_cast<Request*>(nghttp2_session_get_stream_user_data(session, stream));
  }

  static int on_begin_headers(nghttp2_session* session, const nghttp2_frame* frame, void*) {
    if (Request* request = request_of(session, frame->hd.stream_id)) request->reply.forget_status();
    return 0;
  }

  static int on_header(nghttp2_session* session, const nghttp2_frame* frame, const uint8_t* name, size_t name_size,
                       const uint8_t* value, size_t value_size, uint8_t, void* user) {
    auto& self = *static_cast<Connection*>(user);
    return wire::guarded([&] {
      Request* request = request_of(session, frame->hd.stream_id);
      if (!request || request->ended) return 0;
      if (request->reply.header(wire::text_of(name, name_size), wire::text_of(value, value_size), self.expected_))
        return 0;
      self.requests_.end(*request, request->reply.verdict(self.expected_));
      return static_cast<int>(NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE);  // resets the stream
    });
  }

  static int on_data(nghttp2_session* session, uint8_t, int32_t stream, const uint8_t* bytes, size_t size, void* user) {
    auto& self = *static_cast<Connection*>(user);
    return wire::guarded([&] {
      Request* request = request_of(session, stream);
      if (!request || request->ended || request->reply.data(bytes, size, self.expected_)) return 0;
      self.requests_.end(*request, request->reply.verdict(self.expected_));
      self.cancel(*request);
      return 0;
    });
  }

  static int on_frame(nghttp2_session* session, const nghttp2_frame* frame, void* user) {
    auto& self = *static_cast<Connection*>(user);
    return wire::guarded([&] {
      Request* request = request_of(session, frame->hd.stream_id);
      switch (frame->hd.type) {
        case NGHTTP2_SETTINGS:
          self.ready_ = self.ready_ || !(frame->hd.flags & NGHTTP2_FLAG_ACK);
          break;
        case NGHTTP2_GOAWAY:
          self.draining_ = true;
          self.goaway_last_ = frame->goaway.last_stream_id;
          self.goaway_ = nghttp2_http2_strerror(frame->goaway.error_code);
          break;
        case NGHTTP2_RST_STREAM:
          if (request) request->reset_by_peer = true;
          break;
        case NGHTTP2_HEADERS:
        case NGHTTP2_DATA:
          if (!request || !(frame->hd.flags & NGHTTP2_FLAG_END_STREAM)) break;
          if (frame->hd.type == NGHTTP2_DATA) request->reply.forget_status();
          self.end_reply(*request);
          break;
        default:
          break;
      }
      return 0;
    });
  }

  static int on_stream_close(nghttp2_session* session, int32_t stream, uint32_t code, void* user) {
    auto& self = *static_cast<Connection*>(user);
    return wire::guarded([&] {
      if (Request* request = request_of(session, stream)) self.stream_closed(*request, code);
      return 0;
    });
  }

  // The longest DATA frame that the server takes, as gRPC's own clients send; nghttp2 holds it to the windows.
  static ssize_t data_size(nghttp2_session*, uint8_t, int32_t, int32_t, int32_t, uint32_t remote_max_frame_size,
                           void*) {
    return static_cast<ssize_t>(remote_max_frame_size);
  }

  static ssize_t read_body(nghttp2_session*, int32_t, uint8_t*, size_t size, uint32_t* flags,
                           nghttp2_data_source* source, void*) {
    const Request& request = *static_cast<const Request*>(source->ptr);
    const size_t left = request.body->size() - request.sent;
    *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
    if (left <= size) *flags |= NGHTTP2_DATA_FLAG_EOF;
    return static_cast<ssize_t>(std::min(left, size));
  }

  static int send_body(nghttp2_session*, nghttp2_frame*, const uint8_t* frame_header, size_t size,
                       nghttp2_data_source* source, void* user) {
    auto& self = *static_cast<Connection*>(user);
    return wire::guarded([&] {
      self.append_data(*static_cast<Request*>(source->ptr), frame_header, size);
      return self.chunks_.size() < MOST_CHUNKS ? 0 : static_cast<int>(NGHTTP2_ERR_PAUSE);
    });
  }
};

void Connection::install(nghttp2_session_callbacks* callbacks) {
  nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, Callbacks::on_begin_headers);
  nghttp2_session_callbacks_set_on_header_callback(callbacks, Callbacks::on_header);
  nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, Callbacks::on_data);
  nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, Callbacks::on_frame);
  nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, Callbacks::on_stream_close);
  nghttp2_session_callbacks_set_send_data_callback(callbacks, Callbacks::send_body);
  nghttp2_session_callbacks_set_data_source_read_length_callback(callbacks, Callbacks::data_size);
}

Connection::Connection(const Http2& http2, const Expected& expected, Requests& requests, int epoll,
                       const Address& address, Nanos not_before)
    : http2_(http2),
      expected_(expected),
      requests_(requests),
      epoll_(epoll),
      address_(address),
      not_before_(not_before) {
  nghttp2_session* made = nullptr;
  if (nghttp2_session_client_new2(&made, http2.callbacks(), this, http2.option())) throw std::bad_alloc();
  session_.reset(made);
  const std::array<nghttp2_settings_entry, 3> settings = {{
      {NGHTTP2_SETTINGS_ENABLE_PUSH, 0},
      {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, STREAM_WINDOW},
      {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, static_cast<uint32_t>(expected.max_header_bytes)},
  }};
  if (nghttp2_submit_settings(session_.get(), NGHTTP2_FLAG_NONE, settings.data(), settings.size()) ||
      nghttp2_session_set_local_window_size(session_.get(), NGHTTP2_FLAG_NONE, 0, CONNECTION_WINDOW)) {
    throw std::bad_alloc();
  }
}

Connection::~Connection() { close("the client was closed"); }

void Connection::start() {
  socket_ = wire::Descriptor(::socket(address_.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket_) return close(text_of(errno));
  if (address_.family() != AF_UNIX) {
    const int on = 1;
    setsockopt(socket_.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  }
  if (::connect(socket_.get(), address_.get(), address_.size) && errno != EINPROGRESS) return close(text_of(errno));
  state_ = State::CONNECTING;
  epoll_event event{};
  event.events = EPOLLIN | EPOLLOUT;
  event.data.ptr = this;
  if (epoll_ctl(epoll_, EPOLL_CTL_ADD, socket_.get(), &event)) close(text_of(errno));
}

bool Connection::submit(Request& request) {
  if (!accepts()) return false;
  if (active_.size() == MOST_REQUESTS) {
    close("the server left " + std::to_string(MOST_REQUESTS) + " requests unanswered");
    return false;
  }
  nghttp2_data_provider provider{};
  provider.source.ptr = &request;
  provider.read_callback = Callbacks::read_body;
  request.position = active_.size();
  active_.push_back(&request);
  const int32_t stream = nghttp2_submit_request(session_.get(), nullptr, http2_.headers().data(),
                                                http2_.headers().size(), &provider, &request);
  if (stream < 0) {
    active_.pop_back();
    draining_ = true;
    return false;
  }
  request.stream = stream;
  request.connection = this;
  return true;
}

void Connection::cancel(Request& request) {
  if (request.closed || closed()) return;
  nghttp2_submit_rst_stream(session_.get(), NGHTTP2_FLAG_NONE, request.stream, NGHTTP2_CANCEL);
}

void Connection::handle(uint32_t events) {
  if (state_ == State::CONNECTING && !connected()) return;
  if (state_ == State::OPEN && (events & EPOLLOUT)) {
    writable_ = true;
    watch(false);
  }
  if (state_ == State::OPEN && (events & (EPOLLIN | EPOLLHUP | EPOLLERR))) receive();
}

// Whether the socket has been connected; closes where that failed.
bool Connection::connected() {
  int error = 0;
  socklen_t size = sizeof error;
  getsockopt(socket_.get(), SOL_SOCKET, SO_ERROR, &error, &size);
  if (error) {
    close(text_of(error));
    return false;
  }
  state_ = State::OPEN;
  return true;
}

void Connection::receive() {
  std::array<uint8_t, READ_BYTES> buffer;
  for (int reads = 0; reads < READS_PER_TURN; ++reads) {
    const ssize_t got = recv(socket_.get(), buffer.data(), buffer.size(), 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got < 0) return close(text_of(errno));
    if (got == 0) return close("the server closed the connection");
    const ssize_t taken = nghttp2_session_mem_recv(session_.get(), buffer.data(), static_cast<size_t>(got));
    if (taken < 0) {
      broken_ = true;
      return close(std::string("HTTP/2 failed: ") + nghttp2_strerror(static_cast<int>(taken)));
    }
    if (static_cast<size_t>(got) < buffer.size()) break;
  }
  close_if_finished();
}

// nghttp2 neither reads nor writes any more: after GOAWAY, or because the server broke the protocol.
void Connection::close_if_finished() {
  if (closed() || nghttp2_session_want_read(session_.get())) return;
  if (nghttp2_session_want_write(session_.get()) || next_chunk_ < chunks_.size()) return;
  broken_ = goaway_.empty();
  close(broken_ ? "the server broke HTTP/2" : "no stream is left");
}

void Connection::flush() {
  if (state_ != State::OPEN || !writable_) return;
  do {
    if (!write_out()) return;
  } while (fill());
  close_if_finished();
}

// Takes frames from nghttp2; whether there were any. Only when everything before has been written.
bool Connection::fill() {
  small_.clear();
  chunks_.clear();
  next_chunk_ = 0;
  while (chunks_.size() < MOST_CHUNKS) {
    const uint8_t* bytes = nullptr;
    const ssize_t size = nghttp2_session_mem_send(session_.get(), &bytes);
    if (size < 0) {
      close(std::string("HTTP/2 failed: ") + nghttp2_strerror(static_cast<int>(size)));
      return false;
    }
    if (size == 0) break;
    append_small(bytes, static_cast<size_t>(size));
  }
  return !chunks_.empty();
}

// Whether all that was queued is written; otherwise epoll says when to go on, or the connection is closed.
bool Connection::write_out() {
  while (next_chunk_ < chunks_.size()) {
    std::array<iovec, VECTORS> pieces;
    size_t count = 0;
    for (size_t at = next_chunk_; at < chunks_.size() && count < VECTORS; ++at, ++count) {
      const Chunk& chunk = chunks_[at];
      const uint8_t* base = chunk.base ? chunk.base : small_.data() + chunk.offset;
      pieces[count] = {const_cast<uint8_t*>(base), chunk.size};
    }
    msghdr message{};
    message.msg_iov = pieces.data();
    message.msg_iovlen = count;
    const ssize_t sent = sendmsg(socket_.get(), &message, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && errno == EAGAIN) {
      writable_ = false;
      watch(true);
      return false;
    }
    if (sent < 0) {
      const std::string error = text_of(errno);
      receive();  // what the server said before it went away tells more
      close(error);
      return false;
    }
    advance(static_cast<size_t>(sent));
  }
  return true;
}

void Connection::advance(size_t sent) {
  while (sent > 0) {
    Chunk& chunk = chunks_[next_chunk_];
    const size_t part = std::min(sent, chunk.size);
    if (chunk.base) {
      chunk.base += part;
    } else {
      chunk.offset += part;
    }
    chunk.size -= part;
    sent -= part;
    if (chunk.size == 0) ++next_chunk_;
  }
}

void Connection::append_small(const uint8_t* bytes, size_t size) {
  const size_t offset = small_.size();
  small_.insert(small_.end(), bytes, bytes + size);
  if (!chunks_.empty() && !chunks_.back().base) {  // it ends where this begins
    chunks_.back().size += size;
  } else {
    chunks_.push_back({nullptr, offset, size});
  }
}

// A DATA frame: its header and what falls into the gRPC prefix are copied, the body is not.
void Connection::append_data(Request& request, const uint8_t* frame_header, size_t size) {
  append_small(frame_header, FRAME_HEADER);
  if (request.sent < wire::PREFIX_SIZE) {
    const size_t part = std::min(size, wire::PREFIX_SIZE - request.sent);
    append_small(request.body->prefix.data() + request.sent, part);
    request.sent += part;
    size -= part;
  }
  if (size == 0) return;
  const auto* message = reinterpret_cast<const uint8_t*>(request.body->message.data());
  chunks_.push_back({message + (request.sent - wire::PREFIX_SIZE), 0, size});
  request.sent += size;
}

void Connection::end_reply(Request& request) {
  requests_.end(request, request.reply.verdict(expected_));
  if (request.sent < request.body->size()) cancel(request);  // answered before it was sent: the rest is of no use
}

void Connection::stream_closed(Request& request, uint32_t code) {
  if (!request.ended) {
    const std::string name = nghttp2_http2_strerror(code);
    if (!goaway_.empty() && request.stream > goaway_last_) {
      requests_.end(request, "UNAVAILABLE: GOAWAY (" + goaway_ + ")");
    } else {
      requests_.end(request, (request.reset_by_peer ? "RST_STREAM: " : "the stream broke HTTP/2: ") + name);
    }
  }
  active_[request.position] = active_.back();
  active_[request.position]->position = request.position;
  active_.pop_back();
  requests_.close(request);
}

// Whether epoll is to say when the socket takes more.
void Connection::watch(bool write) {
  epoll_event event{};
  event.events = EPOLLIN | (write ? EPOLLOUT : 0u);
  event.data.ptr = this;
  epoll_ctl(epoll_, EPOLL_CTL_MOD, socket_.get(), &event);
}

void Connection::goodbye() {
  if (state_ == State::OPEN) {
    nghttp2_session_terminate_session(session_.get(), NGHTTP2_NO_ERROR);
    flush();
  }
  close("the client was closed");
}

void Connection::close(const std::string& reason) {
  if (closed()) return;
  state_ = State::CLOSED;
  reason_ = goaway_.empty() ? reason : "GOAWAY (" + goaway_ + "), then: " + reason;
  socket_.close();  // leaves epoll by itself
  for (Request* request : active_) {
    requests_.end(*request, "UNAVAILABLE: " + reason_);
    requests_.close(*request);
  }
  active_.clear();
}

}  // namespace narsil::load
