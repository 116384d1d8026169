#include "native/session.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

namespace narsil {
namespace {

constexpr int32_t STREAM_WINDOW = 4 << 20;  // a lane busy with one batch must not stall the peer
constexpr int32_t CONNECTION_WINDOW = 32 << 20;
constexpr uint32_t MAX_FRAME = 1u << 20;   // fewer frames for large messages
constexpr size_t MAX_WAITING = 16;         // messages of one stream behind the one being answered
constexpr size_t MAX_UNREAD = 1u << 20;    // bytes of answers that one stream's client has not yet let through
constexpr int MAX_CONTINUATIONS = 16;      // frames of one header block beyond the first
constexpr size_t FIRST_BLOCK = 64u << 10;  // bytes that an announced message gets before they have come

bool is(const uint8_t* at, size_t size, const char* text) {
  return size == std::strlen(text) && !std::memcmp(at, text, size);
}

nghttp2_nv header_field(const char* name, const std::string& value) {
  return {reinterpret_cast<uint8_t*>(const_cast<char*>(name)),
          reinterpret_cast<uint8_t*>(const_cast<char*>(value.data())), std::strlen(name), value.size(),
          NGHTTP2_NV_FLAG_NO_COPY_NAME};
}

// A field that comes several times has its values joined, as HTTP says.
void add_value(std::string& text, const uint8_t* value, size_t size) {
  if (!text.empty()) text += ',';
  text.append(reinterpret_cast<const char*>(value), size);
}

const std::string HTTP_OK = "200", GRPC = "application/grpc", IDENTITY = "identity";

// application/grpc, with or without a format (+proto) or parameters; not application/grpc-web.
bool is_grpc(const uint8_t* at, size_t size) {
  return size >= GRPC.size() && !std::memcmp(at, GRPC.data(), GRPC.size()) &&
         (size == GRPC.size() || at[GRPC.size()] == '+' || at[GRPC.size()] == ';');
}

// Seconds of a grpc-timeout value (one to eight digits and a unit); negative where it is none.
double timeout_seconds(const uint8_t* at, size_t size) {
  if (size < 2 || size > 9) return -1;
  double value = 0;
  for (size_t i = 0; i + 1 < size; ++i) {
    if (at[i] < '0' || at[i] > '9') return -1;
    value = 10 * value + (at[i] - '0');
  }
  switch (at[size - 1]) {
    case 'H':
      return value * 3600;
    case 'M':
      return value * 60;
    case 'S':
      return value;
    case 'm':
      return value * 1e-3;
    case 'u':
      return value * 1e-6;
    case 'n':
      return value * 1e-9;
    default:
      return -1;
  }
}

// A grpc-message: percent-encoded, and never longer than a header may well be.
std::string percent_encoded(const std::string& text) {
  static const char digits[] = "0123456789ABCDEF";
  std::string out;
  for (const char c : text) {
    if (out.size() > 4096) break;
    const auto byte = static_cast<uint8_t>(c);
    if (byte >= 0x20 && byte <= 0x7E && byte != '%') {
      out.push_back(c);
    } else {
      out += {'%', digits[byte >> 4], digits[byte & 15]};
    }
  }
  return out;
}

// grpc.health.v1.HealthCheckRequest.service; false where the bytes are none.
bool health_service(const uint8_t* at, size_t size, std::string& service) {
  if (size == 0) return true;
  if (size < 2 || at[0] != 0x0A || at[1] >= 0x80 || size != 2u + at[1]) return false;
  service.assign(reinterpret_cast<const char*>(at + 2), at[1]);
  return true;
}

enum Health : char { SERVING = 1, NOT_SERVING = 2, SERVICE_UNKNOWN = 3 };

std::string health_message(Health status) {
  std::string out;
  put_frame_prefix(out, 2);
  return out + '\x08' + static_cast<char>(status);
}

}  // namespace

void put_frame_prefix(std::string& out, size_t size) {
  out.push_back(0);
  for (int shift = 24; shift >= 0; shift -= 8) out.push_back(static_cast<char>(size >> shift));
}

bool Buffer::append(const uint8_t* bytes, size_t count, size_t most) {
  if (size_ + count > capacity_) {
    size_t grown = std::max({capacity_ * 2, size_ + count, std::min(most, FIRST_BLOCK)});
    grown = std::max(std::min(grown, most), size_ + count);
    void* const data = std::realloc(data_, grown);
    if (!data) return false;
    data_ = static_cast<uint8_t*>(data);
    capacity_ = grown;
  }
  if (count) std::memcpy(data_ + size_, bytes, count);
  size_ += count;
  return true;
}

// Not every libnghttp2 has it, and its own limit would end the connections of clients whose deadlines pass.
extern "C" __attribute__((weak)) void nghttp2_option_set_stream_reset_rate_limit(nghttp2_option*, uint64_t, uint64_t);

struct Session::Callbacks {
  static Session& self(void* user) { return *static_cast<Session*>(user); }

  // libnghttp2 is C: where memory is short, the connection ends instead of an exception passing through it.
  template <class Body>
  static int guarded(const Body& body) noexcept {
    try {
      return body();
    } catch (...) {
      return NGHTTP2_ERR_CALLBACK_FAILURE;
    }
  }

  static int begin_frame(nghttp2_session*, const nghttp2_frame_hd* frame, void* user) {
    return self(user).continuation_allowed(*frame) ? 0 : NGHTTP2_ERR_CALLBACK_FAILURE;
  }

  static int begin_headers(nghttp2_session*, const nghttp2_frame* frame, void* user) {
    if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;
    return guarded([&] {
      self(user).begin(frame->hd.stream_id);
      return 0;
    });
  }

  static int header(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name, size_t name_size,
                    const uint8_t* value, size_t value_size, uint8_t, void* user) {
    if (frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;  // trailers say nothing that matters here
    return guarded([&] {
      Call* const call = self(user).find(frame->hd.stream_id);
      return call ? self(user).header(*call, name, name_size, value, value_size) : 0;
    });
  }

  static int frame(nghttp2_session*, const nghttp2_frame* frame, void* user) {
    Session& session = self(user);
    session.established_ = true;
    if (frame->hd.type == NGHTTP2_RST_STREAM) return session.reset_allowed() ? 0 : NGHTTP2_ERR_CALLBACK_FAILURE;
    if (frame->hd.type != NGHTTP2_HEADERS && frame->hd.type != NGHTTP2_DATA) return 0;
    Call* const call = session.find(frame->hd.stream_id);
    if (!call) return 0;
    call->touched = session.shared_.now;
    return guarded([&] {
      if (frame->hd.type == NGHTTP2_HEADERS && frame->headers.cat == NGHTTP2_HCAT_REQUEST) session.headers_done(*call);
      if (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) session.half_closed(*call);
      return 0;
    });
  }

  static int data(nghttp2_session*, uint8_t, int32_t stream, const uint8_t* data, size_t size, void* user) {
    return guarded([&] {
      if (Call* const call = self(user).find(stream)) self(user).take(*call, data, size);
      return 0;
    });
  }

  static int closed(nghttp2_session*, int32_t stream, uint32_t, void* user) {
    return guarded([&] {
      self(user).closed(stream);
      return 0;
    });
  }

  // A call that was answered before its request was whole: the peer is told to stop sending. And a peer that breaks the
  // protocol in order to have its streams reset by this side is no better than one that resets them itself.
  static int sent(nghttp2_session* session, const nghttp2_frame* frame, void* user) {
    if (frame->hd.type == NGHTTP2_RST_STREAM && frame->rst_stream.error_code != NGHTTP2_NO_ERROR &&
        frame->rst_stream.error_code != NGHTTP2_CANCEL && self(user).find(frame->hd.stream_id) &&
        !self(user).reset_allowed())
      return NGHTTP2_ERR_CALLBACK_FAILURE;
    if (frame->hd.type == NGHTTP2_HEADERS && frame->hd.flags & NGHTTP2_FLAG_END_STREAM &&
        nghttp2_session_get_stream_remote_close(session, frame->hd.stream_id) == 0)
      nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, frame->hd.stream_id, NGHTTP2_NO_ERROR);
    return 0;
  }

  static ssize_t read(nghttp2_session*, int32_t, uint8_t* to, size_t room, uint32_t* flags, nghttp2_data_source* source,
                      void* user) {
    Call& call = *static_cast<Call*>(source->ptr);
    const size_t count = std::min(room, call.out.size() - call.out_sent);
    if (count) std::memcpy(to, call.out.data() + call.out_sent, count);
    call.out_sent += count;
    const size_t counted = std::min(count, call.unsent);
    call.unsent -= counted;
    self(user).shared_.buffered -= counted;
    call.touched = self(user).shared_.now;
    if (call.out_sent < call.out.size()) return static_cast<ssize_t>(count);
    if (call.finished) {
      *flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
      const int failed = guarded([&] {
        self(user).submit_trailers(call);
        return 0;
      });
      if (failed) return failed;
    } else if (!count) {
      return NGHTTP2_ERR_DEFERRED;
    }
    return static_cast<ssize_t>(count);
  }

  // The table of callbacks and the options, made once.
  struct Table {
    nghttp2_session_callbacks* callbacks = nullptr;
    nghttp2_option* option = nullptr;

    Table() {
      if (nghttp2_session_callbacks_new(&callbacks) || nghttp2_option_new(&option)) throw std::bad_alloc();
      nghttp2_session_callbacks_set_on_begin_frame_callback(callbacks, begin_frame);
      nghttp2_session_callbacks_set_on_begin_headers_callback(callbacks, begin_headers);
      nghttp2_session_callbacks_set_on_header_callback(callbacks, header);
      nghttp2_session_callbacks_set_on_frame_recv_callback(callbacks, frame);
      nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, data);
      nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, closed);
      nghttp2_session_callbacks_set_on_frame_send_callback(callbacks, sent);
      nghttp2_option_set_no_closed_streams(option, 1);  // nothing is remembered of streams that have ended
      if (nghttp2_option_set_stream_reset_rate_limit)
        nghttp2_option_set_stream_reset_rate_limit(option, UINT32_MAX, UINT32_MAX);  // see reset_allowed
    }
  };

  static const Table& table() {
    static const Table table;
    return table;
  }
};

Session::Session(Shared& shared) : shared_(shared), resets_(shared.config.max_resets), resets_at_(shared.now) {
  const Callbacks::Table& table = Callbacks::table();
  if (nghttp2_session_server_new2(&session_, table.callbacks, this, table.option)) throw std::bad_alloc();
  const nghttp2_settings_entry settings[] = {
      {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, static_cast<uint32_t>(shared.config.max_streams)},
      {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, STREAM_WINDOW},
      {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, MAX_FRAME},
      {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, static_cast<uint32_t>(shared.config.max_header_bytes)},
#if NGHTTP2_VERSION_NUM >= 0x013200
      {NGHTTP2_SETTINGS_NO_RFC7540_PRIORITIES, 1},  // no tree of priorities for peers to grow
#endif
  };
  if (nghttp2_submit_settings(session_, NGHTTP2_FLAG_NONE, settings, std::size(settings)) ||
      nghttp2_session_set_local_window_size(session_, NGHTTP2_FLAG_NONE, 0, CONNECTION_WINDOW)) {
    nghttp2_session_del(session_);
    throw std::bad_alloc();
  }
}

Session::~Session() {
  nghttp2_session_del(session_);
  while (!calls_.empty()) closed(calls_.begin()->first);
}

bool Session::feed(const uint8_t* data, size_t size) {
  return nghttp2_session_mem_recv(session_, data, size) == static_cast<ssize_t>(size) && !flooded_;
}

bool Session::pull(std::string& out, size_t most) {
  while (out.size() < most) {
    const uint8_t* data;
    const ssize_t size = nghttp2_session_mem_send(session_, &data);
    if (size < 0) return false;
    if (size == 0) break;
    out.append(reinterpret_cast<const char*>(data), static_cast<size_t>(size));
  }
  return true;
}

Call* Session::find(int32_t stream) {
  return static_cast<Call*>(nghttp2_session_get_stream_user_data(session_, stream));
}

void Session::begin(int32_t stream) {
  auto call = std::make_shared<Call>();
  call->id = ++shared_.last_id;
  call->session = this;
  call->stream = stream;
  call->arrived = call->touched = shared_.now;
  nghttp2_session_set_stream_user_data(session_, stream, call.get());
  calls_.emplace(stream, std::move(call));
  ++shared_.statistics.calls;
}

int Session::header(Call& call, const uint8_t* name, size_t name_size, const uint8_t* value, size_t value_size) {
  call.header_bytes += name_size + value_size + 32;
  if (call.header_bytes > 4 * shared_.config.max_header_bytes)
    return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;  // resets it
  if (call.refused || call.header_bytes > shared_.config.max_header_bytes) return 0;
  if (is(name, name_size, ":path")) {
    const auto found = shared_.config.methods.find(std::string(reinterpret_cast<const char*>(value), value_size));
    if (found != shared_.config.methods.end()) call.method = &found->second;
  } else if (is(name, name_size, ":method")) {
    call.post = is(value, value_size, "POST");
  } else if (is(name, name_size, "content-type")) {
    call.grpc = is_grpc(value, value_size);
  } else if (is(name, name_size, "grpc-timeout")) {
    const double seconds = timeout_seconds(value, value_size);
    call.deadline = seconds < 0 ? NAN : call.arrived + seconds;
  } else if (is(name, name_size, "narsil-model")) {
    add_value(call.model.name, value, value_size);
  } else if (is(name, name_size, "narsil-model-version")) {
    add_value(call.model.version, value, value_size);
  }
  return 0;
}

void Session::headers_done(Call& call) {
  if (call.header_bytes > shared_.config.max_header_bytes) return refuse_http(call, "431");
  if (!call.post) return refuse_http(call, "405");
  if (!call.grpc) return refuse_http(call, "415");
  if (!call.method) return refuse(call, UNIMPLEMENTED, "this server has no such method");
  if (std::isnan(call.deadline)) return refuse(call, INVALID_ARGUMENT, "grpc-timeout is no number of time units");
}

void Session::take(Call& call, const uint8_t* data, size_t size) {
  call.touched = shared_.now;
  while (size && !call.refused) {
    if (call.complete) return refuse(call, UNIMPLEMENTED, "this method takes one message, and more came");
    if (call.prefix_have < sizeof call.prefix) {
      const size_t count = std::min(size, sizeof call.prefix - call.prefix_have);
      std::memcpy(call.prefix + call.prefix_have, data, count);
      call.prefix_have += count;
      data += count;
      size -= count;
      if (call.prefix_have < sizeof call.prefix || !prefix_done(call)) continue;
    }
    const size_t count = std::min(size, call.expected - call.body->size());
    if (!call.body->append(data, count, call.expected))
      return refuse(call, RESOURCE_EXHAUSTED, "the server is short of memory");
    call.charged += count;
    shared_.buffered += count;
    if (over_budget(call)) return;
    data += count;
    size -= count;
    if (call.body->size() == call.expected) message_done(call);
  }
}

// Refuses the call if the plane holds too much.
bool Session::over_budget(Call& call) {
  if (shared_.buffered <= shared_.config.max_buffered) return false;
  refuse(call, RESOURCE_EXHAUSTED,
         "the server holds as many bytes of waiting requests as it may (--max-queue-bytes); retry with backoff");
  return true;
}

// Whether a message follows whose bytes are still to come.
bool Session::prefix_done(Call& call) {
  const uint8_t* const p = call.prefix;
  call.expected =
      static_cast<size_t>(p[1]) << 24 | static_cast<size_t>(p[2]) << 16 | static_cast<size_t>(p[3]) << 8 | p[4];
  if (p[0]) {
    refuse(call, UNIMPLEMENTED, "compressed messages are not supported; send them with grpc-encoding: identity");
    return false;
  }
  if (call.expected > shared_.config.max_message) {
    refuse(call, RESOURCE_EXHAUSTED,
           "the message has " + std::to_string(call.expected) + " bytes; the limit is " +
               std::to_string(shared_.config.max_message) + " (--max-message-bytes)");
    return false;
  }
  if (over_budget(call)) return false;
  call.body = std::make_shared<Buffer>();
  if (call.expected) return true;
  message_done(call);
  return false;
}

void Session::message_done(Call& call) {
  ++shared_.statistics.messages;
  if (!call.method || call.method->kind != Kind::stream) {
    call.complete = true;
    return;
  }
  // Of a stream, messages are answered one at a time, in order.
  call.prefix_have = 0;
  if (call.waiting.size() == MAX_WAITING || call.out.size() - call.out_sent > MAX_UNREAD)
    return refuse(call, RESOURCE_EXHAUSTED, "more messages than are answered, or answers than are read; wait for them");
  call.waiting.push_back(std::move(call.body));
  if (call.waiting.size() == 1 && !call.handed_out) enqueue(calls_.at(call.stream));
}

void Session::half_closed(Call& call) {
  if (call.ended || call.refused || !call.method) return;
  call.ended = true;
  const Kind kind = call.method->kind;
  if (kind == Kind::stream) {
    if (call.prefix_have) return refuse(call, INTERNAL, "the stream ended inside a message");
    if (!call.waiting.empty() || call.handed_out) return;
    call.finished = true;
    return respond(call);
  }
  if (!call.complete) return refuse(call, INTERNAL, "the stream ended before the message did");
  if (is_health(kind)) return answer_health(call, call.body->data(), call.body->size());
  if (scores(kind) && !shared_.refusal.empty()) return refuse(call, UNAVAILABLE, shared_.refusal);
  enqueue(calls_.at(call.stream));
}

void Session::enqueue(const CallPtr& call) {
  call->request = call->method->kind == Kind::stream ? call->waiting.front() : std::move(call->body);
  call->handed_out = true;
  call->answered = false;
  shared_.ready.push_back(call);
}

void Session::answer_health(Call& call, const uint8_t* message, size_t size) {
  std::string service;
  if (!health_service(message, size, service)) return refuse(call, INVALID_ARGUMENT, "no HealthCheckRequest");
  bool known = service.empty();
  for (const auto& entry : shared_.config.methods) {
    const std::string& path = entry.first;
    if (entry.second.kind <= Kind::unary && path.compare(1, path.rfind('/') - 1, service) == 0) known = true;
  }
  const bool watch = call.method->kind == Kind::health_watch;
  if (!known && !watch) return refuse(call, NOT_FOUND, "this server has no such service");
  if (watch) {
    if (shared_.watchers == shared_.config.max_watchers)
      return refuse(call, RESOURCE_EXHAUSTED,
                    "more than " + std::to_string(shared_.config.max_watchers) + " health watchers");
    call.watching = true;
    ++shared_.watchers;
  }
  call.out = health_message(!known ? SERVICE_UNKNOWN : shared_.serving ? SERVING : NOT_SERVING);
  // The status changes once, and for good: a watcher of a server that is going away has nothing more to wait for.
  call.finished = !watch || !shared_.serving;
  call.complete = known;
  release(call);
  respond(call);
}

void Session::tell_watchers() {
  for (const auto& entry : calls_) {
    Call& call = *entry.second;
    if (!call.method || call.method->kind != Kind::health_watch || !call.responding || call.finished) continue;
    if (call.complete) call.out += health_message(shared_.serving ? SERVING : NOT_SERVING);
    call.finished = !shared_.serving;
    respond(call);
  }
}

void Session::release(Call& call) {
  shared_.buffered -= call.charged;
  call.charged = 0;
  call.body.reset();
  call.waiting.clear();
  call.request.reset();
}

void Session::refuse(Call& call, int status, const std::string& message) {
  call.status = status;
  call.message = message;
  call.refused = call.finished = true;
  call.cancelled = true;
  ++shared_.statistics.refused;
  release(call);
  respond(call);
}

void Session::refuse_http(Call& call, const char* status) {
  call.refused = call.finished = call.responding = true;
  ++shared_.statistics.refused;
  release(call);
  const std::string value = status;
  const nghttp2_nv field = header_field(":status", value);
  nghttp2_submit_response(session_, call.stream, &field, 1, nullptr);
}

void Session::answer(const CallPtr& call) {
  call->handed_out = false;
  if (call->finished) return;
  ++shared_.statistics.answered;
  call->out.erase(0, call->out_sent);
  call->out_sent = 0;
  call->out += call->answer;
  call->unsent += call->answer.size();
  shared_.buffered += call->answer.size();
  call->answer.clear();
  call->status = call->answer_status;
  call->message.swap(call->answer_message);
  call->finished = true;
  if (call->method->kind == Kind::stream && call->status == OK) {
    call->waiting.pop_front();
    if (!call->waiting.empty()) enqueue(call);
    call->finished = call->ended && call->waiting.empty();
  } else {
    release(*call);
  }
  respond(*call);
}

// Starts the response, or goes on with it.
void Session::respond(Call& call) {
  if (call.responding) {
    nghttp2_session_resume_data(session_, call.stream);
    return;
  }
  call.responding = true;
  nghttp2_nv fields[4] = {header_field(":status", HTTP_OK), header_field("content-type", GRPC)};
  if (call.finished && call.out.empty()) {
    const std::string status = std::to_string(call.status), message = percent_encoded(call.message);
    fields[2] = header_field("grpc-status", status);
    size_t count = 3;
    if (!message.empty()) fields[count++] = header_field("grpc-message", message);
    nghttp2_submit_response(session_, call.stream, fields, count, nullptr);
    return;
  }
  nghttp2_data_provider provider;
  provider.source.ptr = &call;
  provider.read_callback = Callbacks::read;
  nghttp2_submit_response(session_, call.stream, fields, 2, &provider);
}

void Session::submit_trailers(Call& call) {
  const std::string status = std::to_string(call.status), message = percent_encoded(call.message);
  const nghttp2_nv fields[] = {header_field("grpc-status", status), header_field("grpc-message", message)};
  nghttp2_submit_trailer(session_, call.stream, fields, message.empty() ? 1 : 2);
}

void Session::closed(int32_t stream) {
  const auto found = calls_.find(stream);
  if (found == calls_.end()) return;
  Call& call = *found->second;
  if (!call.finished) {
    call.cancelled = true;
    ++shared_.statistics.cancelled;
    if (call.taken && scores(call.method->kind)) shared_.gone.push_back(call.id);
  }
  if (call.watching) --shared_.watchers;
  shared_.buffered -= call.charged + call.unsent;
  call.charged = call.unsent = 0;
  call.session = nullptr;
  calls_.erase(found);
}

// A block of header fields in endlessly many frames is refused before its bytes count: the frames may be empty.
bool Session::continuation_allowed(const nghttp2_frame_hd& frame) {
  continuations_ = frame.type == NGHTTP2_CONTINUATION ? continuations_ + 1 : 0;
  if (continuations_ <= MAX_CONTINUATIONS) return true;
  nghttp2_session_terminate_session(session_, NGHTTP2_ENHANCE_YOUR_CALM);
  return false;
}

// A client that opens streams only to reset them costs more than it pays; it may do so now and then.
bool Session::reset_allowed() {
  const double most = static_cast<double>(shared_.config.max_resets);
  resets_ = std::min(most, resets_ + (shared_.now - resets_at_) * most / 5) - 1;
  resets_at_ = shared_.now;
  if (resets_ >= 0) return true;
  ++shared_.statistics.reset_floods;
  flooded_ = true;
  nghttp2_session_terminate_session(session_, NGHTTP2_ENHANCE_YOUR_CALM);
  return false;
}

void Session::expire_stalled() {
  const double oldest = shared_.now - shared_.config.stall_s;
  for (const auto& entry : calls_) {
    Call& call = *entry.second;
    const bool arriving = !call.ended && !call.finished, leaving = call.finished;
    if (call.touched > oldest || (!arriving && !leaving)) continue;
    if (arriving && call.method && call.method->kind == Kind::stream && !call.prefix_have) continue;  // it may rest
    nghttp2_submit_rst_stream(session_, NGHTTP2_FLAG_NONE, call.stream, NGHTTP2_CANCEL);
  }
}

void Session::ping() { nghttp2_submit_ping(session_, NGHTTP2_FLAG_NONE, nullptr); }

void Session::go_away(bool last_word) {
  if (last_word) {
    nghttp2_session_terminate_session(session_, NGHTTP2_NO_ERROR);
  } else {
    nghttp2_submit_shutdown_notice(session_);
  }
}

}  // namespace narsil
