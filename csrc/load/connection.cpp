#include "load/connection.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <new>

namespace narsil::load {
namespace {

constexpr std::uint32_t kStreamWindow = 8u << 20;     // bytes of a reply that may be under way
constexpr std::int32_t kConnectionWindow = 64 << 20;  // of all replies of a connection
constexpr std::size_t kMostChunks = 256;              // queued for the socket; then they are written first
constexpr std::size_t kVectors = 64;                  // pieces per sendmsg
constexpr std::size_t kReadBytes = 65536;             // per recv
constexpr int kReadsPerTurn = 4;                      // so that no connection starves the others
constexpr std::size_t kMostCalls = 1u << 18;          // under way on one connection: bounds memory
constexpr std::size_t kFrameHeader = 9;

std::string text_of(int error) {
  std::array<char, 128> buffer{};
  return strerror_r(error, buffer.data(), buffer.size());
}

std::string_view view(const std::uint8_t* bytes, std::size_t size) {
  return {reinterpret_cast<const char*>(bytes), size};
}

}  // namespace

// nghttp2 is C: no exception may pass through it, so each callback turns one into nghttp2's own failure.
struct Connection::Callbacks {
  template <typename Body>
  static int guarded(const Body& body) noexcept {
    try {
      return body();
    } catch (...) {
      return NGHTTP2_ERR_CALLBACK_FAILURE;
    }
  }

  static Call* call_of(nghttp2_session* session, std::int32_t stream) {
    return static_cast<Call*>(nghttp2_session_get_stream_user_data(session, stream));
  }

  static int on_begin_headers(nghttp2_session* session, const nghttp2_frame* frame, void*) {
    if (Call* call = call_of(session, frame->hd.stream_id)) call->reply.forget_status();
    return 0;
  }

  static int on_header(nghttp2_session* session, const nghttp2_frame* frame, const std::uint8_t* name,
                       std::size_t name_size, const std::uint8_t* value, std::size_t value_size, std::uint8_t,
                       void* user) {
    auto& self = *static_cast<Connection*>(user);
    return guarded([&] {
      Call* call = call_of(session, frame->hd.stream_id);
      if (call == nullptr || call->ended) return 0;
      if (call->reply.header(view(name, name_size), view(value, value_size), self.expected_)) return 0;
      self.calls_.end(*call, call->reply.verdict(self.expected_));
      return static_cast<int>(NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE);  // resets the stream
    });
  }

  static int on_data(nghttp2_session* session, std::uint8_t, std::int32_t stream, const std::uint8_t* bytes,
                     std::size_t size, void* user) {
    auto& self = *static_cast<Connection*>(user);
    return guarded([&] {
      Call* call = call_of(session, stream);
      if (call == nullptr || call->ended || call->reply.data(bytes, size, self.expected_)) return 0;
      self.calls_.end(*call, call->reply.verdict(self.expected_));
      self.cancel(*call);
      return 0;
    });
  }

  static int on_frame(nghttp2_session* session, const nghttp2_frame* frame, void* user) {
    auto& self = *static_cast<Connection*>(user);
    return guarded([&] {
      Call* call = call_of(session, frame->hd.stream_id);
      switch (frame->hd.type) {
        case NGHTTP2_SETTINGS:
          self.ready_ = self.ready_ || (frame->hd.flags & NGHTTP2_FLAG_ACK) == 0;
          break;
        case NGHTTP2_GOAWAY:
          self.draining_ = true;
          self.goaway_last_ = frame->goaway.last_stream_id;
          self.goaway_ = nghttp2_http2_strerror(frame->goaway.error_code);
          break;
        case NGHTTP2_RST_STREAM:
          if (call != nullptr) call->reset_by_peer = true;
          break;
        case NGHTTP2_HEADERS:
        case NGHTTP2_DATA:
          if (call == nullptr || (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) == 0) break;
          if (frame->hd.type == NGHTTP2_DATA) call->reply.forget_status();
          self.end_reply(*call);
          break;
        default:
          break;
      }
      return 0;
    });
  }

  static int on_stream_close(nghttp2_session* session, std::int32_t stream, std::uint32_t code, void* user) {
    auto& self = *static_cast<Connection*>(user);
    return guarded([&] {
      if (Call* call = call_of(session, stream)) self.stream_closed(*call, code);
      return 0;
    });
  }

  // The longest DATA frame that the server takes, as gRPC's own clients send; nghttp2 holds it to the windows.
  static ssize_t data_size(nghttp2_session*, std::uint8_t, std::int32_t, std::int32_t, std::int32_t,
                           std::uint32_t remote_max_frame_size, void*) {
    return static_cast<ssize_t>(remote_max_frame_size);
  }

  static ssize_t read_body(nghttp2_session*, std::int32_t, std::uint8_t*, std::size_t size, std::uint32_t* flags,
                           nghttp2_data_source* source, void*) {
    const Call& call = *static_cast<const Call*>(source->ptr);
    const std::size_t left = call.body->size() - call.sent;
    *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
    if (left <= size) *flags |= NGHTTP2_DATA_FLAG_EOF;
    return static_cast<ssize_t>(std::min(left, size));
  }

  static int send_body(nghttp2_session*, nghttp2_frame*, const std::uint8_t* frame_header, std::size_t size,
                       nghttp2_data_source* source, void* user) {
    auto& self = *static_cast<Connection*>(user);
    return guarded([&] {
      self.append_data(*static_cast<Call*>(source->ptr), frame_header, size);
      return self.chunks_.size() < kMostChunks ? 0 : static_cast<int>(NGHTTP2_ERR_PAUSE);
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

Connection::Connection(const Http2& http2, const Expected& expected, Calls& calls, int epoll, const Address& address,
                       Nanos not_before)
    : http2_(http2), expected_(expected), calls_(calls), epoll_(epoll), address_(address), not_before_(not_before) {
  if (nghttp2_session_client_new2(&session_, http2.callbacks(), this, http2.option()) != 0) throw std::bad_alloc();
  const std::array<nghttp2_settings_entry, 3> settings = {{
      {NGHTTP2_SETTINGS_ENABLE_PUSH, 0},
      {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, kStreamWindow},
      {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, static_cast<std::uint32_t>(expected.max_header_bytes)},
  }};
  if (nghttp2_submit_settings(session_, NGHTTP2_FLAG_NONE, settings.data(), settings.size()) != 0 ||
      nghttp2_session_set_local_window_size(session_, NGHTTP2_FLAG_NONE, 0, kConnectionWindow) != 0) {
    nghttp2_session_del(session_);
    throw std::bad_alloc();
  }
}

Connection::~Connection() {
  close("the client was closed");
  nghttp2_session_del(session_);
}

void Connection::start() {
  socket_ = ::socket(address_.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (socket_ < 0) return close(text_of(errno));
  if (address_.family() != AF_UNIX) {
    const int on = 1;
    setsockopt(socket_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  }
  if (::connect(socket_, address_.get(), address_.size) != 0 && errno != EINPROGRESS) return close(text_of(errno));
  state_ = State::connecting;
  epoll_event event{};
  event.events = EPOLLIN | EPOLLOUT;
  event.data.ptr = this;
  if (epoll_ctl(epoll_, EPOLL_CTL_ADD, socket_, &event) != 0) close(text_of(errno));
}

bool Connection::submit(Call& call) {
  if (!accepts()) return false;
  if (active_.size() == kMostCalls) {
    close("the server left " + std::to_string(kMostCalls) + " requests unanswered");
    return false;
  }
  nghttp2_data_provider provider{};
  provider.source.ptr = &call;
  provider.read_callback = Callbacks::read_body;
  call.position = active_.size();
  active_.push_back(&call);
  const std::int32_t stream =
      nghttp2_submit_request(session_, nullptr, http2_.headers().data(), http2_.headers().size(), &provider, &call);
  if (stream < 0) {
    active_.pop_back();
    draining_ = true;
    return false;
  }
  call.stream = stream;
  call.connection = this;
  return true;
}

void Connection::cancel(Call& call) {
  if (call.closed || closed()) return;
  nghttp2_submit_rst_stream(session_, NGHTTP2_FLAG_NONE, call.stream, NGHTTP2_CANCEL);
}

void Connection::handle(std::uint32_t events) {
  if (state_ == State::connecting && !connected()) return;
  if (state_ == State::open && (events & EPOLLOUT) != 0) {
    writable_ = true;
    watch(false);
  }
  if (state_ == State::open && (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0) receive();
}

// Whether the socket has been connected; closes where that failed.
bool Connection::connected() {
  int error = 0;
  socklen_t size = sizeof error;
  getsockopt(socket_, SOL_SOCKET, SO_ERROR, &error, &size);
  if (error != 0) {
    close(text_of(error));
    return false;
  }
  state_ = State::open;
  return true;
}

void Connection::receive() {
  std::array<std::uint8_t, kReadBytes> buffer;
  for (int reads = 0; reads < kReadsPerTurn; ++reads) {
    const ssize_t got = recv(socket_, buffer.data(), buffer.size(), 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got < 0) return close(text_of(errno));
    if (got == 0) return close("the server closed the connection");
    const ssize_t taken = nghttp2_session_mem_recv(session_, buffer.data(), static_cast<std::size_t>(got));
    if (taken < 0) {
      broken_ = true;
      return close(std::string("HTTP/2 failed: ") + nghttp2_strerror(static_cast<int>(taken)));
    }
    if (static_cast<std::size_t>(got) < buffer.size()) break;
  }
  close_if_finished();
}

// nghttp2 neither reads nor writes any more: after GOAWAY, or because the server broke the protocol.
void Connection::close_if_finished() {
  if (closed() || nghttp2_session_want_read(session_) != 0) return;
  if (nghttp2_session_want_write(session_) != 0 || next_chunk_ < chunks_.size()) return;
  broken_ = goaway_.empty();
  close(broken_ ? "the server broke HTTP/2" : "no stream is left");
}

void Connection::flush() {
  if (state_ != State::open || !writable_) return;
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
  while (chunks_.size() < kMostChunks) {
    const std::uint8_t* bytes = nullptr;
    const ssize_t size = nghttp2_session_mem_send(session_, &bytes);
    if (size < 0) {
      close(std::string("HTTP/2 failed: ") + nghttp2_strerror(static_cast<int>(size)));
      return false;
    }
    if (size == 0) break;
    append_small(bytes, static_cast<std::size_t>(size));
  }
  return !chunks_.empty();
}

// Whether all that was queued is written; otherwise epoll says when to go on, or the connection is closed.
bool Connection::write_out() {
  while (next_chunk_ < chunks_.size()) {
    std::array<iovec, kVectors> pieces;
    std::size_t count = 0;
    for (std::size_t at = next_chunk_; at < chunks_.size() && count < kVectors; ++at, ++count) {
      const Chunk& chunk = chunks_[at];
      const std::uint8_t* base = chunk.base != nullptr ? chunk.base : small_.data() + chunk.offset;
      pieces[count] = {const_cast<std::uint8_t*>(base), chunk.size};
    }
    msghdr message{};
    message.msg_iov = pieces.data();
    message.msg_iovlen = count;
    const ssize_t sent = sendmsg(socket_, &message, MSG_NOSIGNAL);
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
    advance(static_cast<std::size_t>(sent));
  }
  return true;
}

void Connection::advance(std::size_t sent) {
  while (sent > 0) {
    Chunk& chunk = chunks_[next_chunk_];
    const std::size_t part = std::min(sent, chunk.size);
    if (chunk.base != nullptr) {
      chunk.base += part;
    } else {
      chunk.offset += part;
    }
    chunk.size -= part;
    sent -= part;
    if (chunk.size == 0) ++next_chunk_;
  }
}

void Connection::append_small(const std::uint8_t* bytes, std::size_t size) {
  const std::size_t offset = small_.size();
  small_.insert(small_.end(), bytes, bytes + size);
  if (!chunks_.empty() && chunks_.back().base == nullptr) {  // it ends where this begins
    chunks_.back().size += size;
  } else {
    chunks_.push_back({nullptr, offset, size});
  }
}

// A DATA frame: its header and what falls into the gRPC prefix are copied, the body is not.
void Connection::append_data(Call& call, const std::uint8_t* frame_header, std::size_t size) {
  append_small(frame_header, kFrameHeader);
  if (call.sent < kPrefix) {
    const std::size_t part = std::min(size, kPrefix - call.sent);
    append_small(call.body->prefix.data() + call.sent, part);
    call.sent += part;
    size -= part;
  }
  if (size == 0) return;
  const auto* message = reinterpret_cast<const std::uint8_t*>(call.body->message.data());
  chunks_.push_back({message + (call.sent - kPrefix), 0, size});
  call.sent += size;
}

void Connection::end_reply(Call& call) {
  calls_.end(call, call.reply.verdict(expected_));
  if (call.sent < call.body->size()) cancel(call);  // answered before it was sent: the rest is of no use
}

void Connection::stream_closed(Call& call, std::uint32_t code) {
  if (!call.ended) {
    const std::string name = nghttp2_http2_strerror(code);
    if (!goaway_.empty() && call.stream > goaway_last_) {
      calls_.end(call, "UNAVAILABLE: GOAWAY (" + goaway_ + ")");
    } else {
      calls_.end(call, (call.reset_by_peer ? "RST_STREAM: " : "the stream broke HTTP/2: ") + name);
    }
  }
  active_[call.position] = active_.back();
  active_[call.position]->position = call.position;
  active_.pop_back();
  calls_.close(call);
}

// Whether epoll is to say when the socket takes more.
void Connection::watch(bool write) {
  epoll_event event{};
  event.events = EPOLLIN | (write ? EPOLLOUT : 0u);
  event.data.ptr = this;
  epoll_ctl(epoll_, EPOLL_CTL_MOD, socket_, &event);
}

void Connection::goodbye() {
  if (state_ == State::open) {
    nghttp2_session_terminate_session(session_, NGHTTP2_NO_ERROR);
    flush();
  }
  close("the client was closed");
}

void Connection::close(const std::string& reason) {
  if (closed()) return;
  state_ = State::closed;
  reason_ = goaway_.empty() ? reason : "GOAWAY (" + goaway_ + "), then: " + reason;
  if (socket_ >= 0) ::close(socket_);  // leaves epoll by itself
  socket_ = -1;
  for (Call* call : active_) {
    calls_.end(*call, "UNAVAILABLE: " + reason_);
    calls_.close(*call);
  }
  active_.clear();
}

}  // namespace narsil::load
