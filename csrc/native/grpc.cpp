// A session's gRPC: what it makes of a call's header fields and bytes, and of its answers.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "native/session.hpp"

namespace narsil::native {
namespace {

constexpr size_t WATCHER_BYTES = 2u << 10;  // what a call that stays open costs, generously
constexpr size_t MAX_WAITING = 16;          // messages of one stream behind the one being answered
constexpr size_t MAX_UNREAD = 1u << 20;     // bytes of answers that one stream's client has not yet let through

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
  wire::put_prefix(out, 2);
  return out + '\x08' + static_cast<char>(status);
}

// A field that comes several times has its values joined, as HTTP says.
void add_value(std::string& text, std::string_view value) {
  if (!text.empty()) text += ',';
  text += value;
}

// The name is known to outlive the session, the value is copied.
nghttp2_nv field(std::string_view name, std::string_view value) {
  return wire::field_of(name, value, NGHTTP2_NV_FLAG_NO_COPY_NAME);
}

}  // namespace

void Session::header(Rpc& rpc, std::string_view name, std::string_view value) {
  rpc.header_bytes += name.size() + value.size() + 32;
  if (name == ":method") {
    rpc.post = value == "POST";
  } else if (name == "content-type") {
    rpc.grpc = wire::is_grpc(value);
  } else if (rpc.header_bytes > shared_.config.max_metadata) {
    return;
  } else if (name == ":path") {
    const auto found = shared_.config.methods.find(std::string(value));
    if (found != shared_.config.methods.end()) rpc.method = &found->second;
  } else if (name == "grpc-timeout") {
    const double seconds = wire::timeout_seconds(value);
    rpc.deadline = seconds < 0 ? NAN : rpc.arrived + seconds;
  } else if (name == "narsil-model") {
    add_value(rpc.model.name, value);
  } else if (name == "narsil-model-version") {
    add_value(rpc.model.version, value);
  }
}

void Session::headers_done(Rpc& rpc) {
  const Config& config = shared_.config;
  const size_t bytes = rpc.header_bytes + guard_.cut();
  const bool fits = bytes <= config.max_metadata;
  if (!rpc.post) return refuse_http(rpc, "405");
  if (!rpc.grpc) return refuse_http(rpc, fits ? "415" : "431");
  if (!fits)
    return refuse(rpc, RESOURCE_EXHAUSTED,
                  "the call's metadata has " + std::to_string(bytes) + " bytes; the limit is " +
                      std::to_string(config.max_metadata) + " (--max-metadata-bytes)");
  if (!rpc.method) return refuse(rpc, UNIMPLEMENTED, "this server has no such method");
  if (resets_left() <= 0 && !is_health(rpc.method->kind))
    return refuse(rpc, RESOURCE_EXHAUSTED,
                  "this connection has had more than " + std::to_string(config.max_resets_per_second) +
                      " calls a second cancelled (--max-resets-per-second); retry with backoff and longer deadlines");
  if (std::isnan(rpc.deadline)) return refuse(rpc, INVALID_ARGUMENT, "grpc-timeout is no number of time units");
  rpc.intake = Intake::MESSAGES;
}

void Session::take(Rpc& rpc, const uint8_t* data, size_t size) {
  rpc.touched = shared_.now;
  while (size && rpc.intake != Intake::DROPPED) {
    if (rpc.intake == Intake::WHOLE) return refuse(rpc, UNIMPLEMENTED, "this method takes one message, and more came");
    if (rpc.prefix_have < wire::PREFIX_SIZE) {
      const size_t count = std::min(size, wire::PREFIX_SIZE - rpc.prefix_have);
      std::memcpy(rpc.prefix.data() + rpc.prefix_have, data, count);
      rpc.prefix_have += count;
      data += count;
      size -= count;
      if (rpc.prefix_have < wire::PREFIX_SIZE || !prefix_done(rpc)) continue;
    }
    const size_t count = std::min(size, rpc.expected - rpc.body->size());
    if (!rpc.body->append(data, count, rpc.expected))
      return refuse(rpc, RESOURCE_EXHAUSTED, "the server is short of memory");
    rpc.charged += count;
    shared_.buffered += count;
    if (over_budget(rpc)) return;
    data += count;
    size -= count;
    if (rpc.body->size() == rpc.expected) message_done(rpc);
  }
}

// Refuses the call if the plane holds too much.
bool Session::over_budget(Rpc& rpc) {
  if (shared_.buffered <= shared_.config.max_buffered) return false;
  refuse(rpc, RESOURCE_EXHAUSTED,
         "the server holds as many bytes of waiting requests as it may (--max-queue-bytes); retry with backoff");
  return true;
}

// Whether a message follows whose bytes are still to come.
bool Session::prefix_done(Rpc& rpc) {
  rpc.expected = wire::size_in(rpc.prefix.data());
  if (rpc.prefix[0]) {
    refuse(rpc, UNIMPLEMENTED, "compressed messages are not supported; send them with grpc-encoding: identity");
    return false;
  }
  if (rpc.expected > shared_.config.max_message) {
    refuse(rpc, RESOURCE_EXHAUSTED,
           // As gRPC's own servers word it: clients tell it from a full queue by this.
           "received message larger than max (" + std::to_string(rpc.expected) + " vs. " +
               std::to_string(shared_.config.max_message) + "): send fewer rows, or raise --max-message-bytes");
    return false;
  }
  if (over_budget(rpc)) return false;
  rpc.body = std::make_shared<Buffer>();
  if (rpc.expected) return true;
  message_done(rpc);
  return false;
}

void Session::message_done(Rpc& rpc) {
  ++shared_.statistics.messages;
  if (rpc.method->kind != Kind::STREAM) {
    rpc.intake = Intake::WHOLE;
    return;
  }
  // Of a stream, messages are answered one at a time, in order.
  rpc.prefix_have = 0;
  if (rpc.waiting.size() == MAX_WAITING || rpc.out.size() - rpc.out_sent > MAX_UNREAD)
    return refuse(rpc, RESOURCE_EXHAUSTED, "more messages than are answered, or answers than are read; wait for them");
  rpc.waiting.push_back(std::move(rpc.body));
  if (rpc.custody == Custody::SESSION) enqueue(calls_.at(rpc.stream));
}

void Session::half_closed(Rpc& rpc) {
  if (rpc.intake == Intake::ENDED || rpc.intake == Intake::DROPPED) return;
  const bool whole = rpc.intake == Intake::WHOLE;
  rpc.intake = Intake::ENDED;
  const Kind kind = rpc.method->kind;
  if (kind == Kind::STREAM) {
    if (rpc.prefix_have) return refuse(rpc, INTERNAL, "the stream ended inside a message");
    if (rpc.custody == Custody::SESSION) respond(rpc, Reply::FINISHED);
    return;
  }
  if (!whole) return refuse(rpc, INTERNAL, "the stream ended before the message did");
  if (is_health(kind)) return answer_health(rpc, rpc.body->data(), rpc.body->size());
  if (scores(kind) && !shared_.refusal.empty()) return refuse(rpc, UNAVAILABLE, shared_.refusal);
  enqueue(calls_.at(rpc.stream));
}

void Session::enqueue(const RpcPtr& rpc) {
  rpc->request = rpc->method->kind == Kind::STREAM ? rpc->waiting.front() : std::move(rpc->body);
  rpc->custody = Custody::READY;
  rpc->answered = false;
  shared_.ready.push_back(rpc);
}

void Session::answer_health(Rpc& rpc, const uint8_t* message, size_t size) {
  std::string service;
  if (!health_service(message, size, service)) return refuse(rpc, INVALID_ARGUMENT, "no HealthCheckRequest");
  bool known = service.empty();
  for (const auto& entry : shared_.config.methods) {
    const std::string& path = entry.first;
    const Kind kind = entry.second.kind;
    if ((scores(kind) || kind == Kind::UNARY) && path.compare(1, path.rfind('/') - 1, service) == 0) known = true;
  }
  const bool watch = rpc.method->kind == Kind::HEALTH_WATCH;
  if (!known && !watch) return refuse(rpc, NOT_FOUND, "this server has no such service");
  if (watch) {
    if (watchers_ == shared_.config.max_watchers)
      return refuse(rpc, RESOURCE_EXHAUSTED,
                    "more than " + std::to_string(watchers_) + " health watchers on one connection; end some of them");
    rpc.watch = known ? Watch::KNOWN : Watch::UNKNOWN;
    ++watchers_;
  }
  release(rpc);
  if (watch) {
    rpc.charged = WATCHER_BYTES;
    shared_.buffered += WATCHER_BYTES;
    if (over_budget(rpc)) return;
  }
  rpc.out = health_message(!known ? SERVICE_UNKNOWN : shared_.serving ? SERVING : NOT_SERVING);
  // The status changes once, and for good: a watcher of a server that is going away has nothing more to wait for.
  respond(rpc, watch && shared_.serving ? Reply::OPEN : Reply::FINISHED);
}

void Session::tell_watchers() {
  for (const auto& entry : calls_) {
    Rpc& rpc = *entry.second;
    if (rpc.watch == Watch::NONE || rpc.reply == Reply::FINISHED) continue;
    if (rpc.watch == Watch::KNOWN) rpc.out += health_message(shared_.serving ? SERVING : NOT_SERVING);
    respond(rpc, shared_.serving ? Reply::OPEN : Reply::FINISHED);
  }
}

void Session::end_watchers() {
  for (const auto& entry : calls_)
    if (entry.second->watch != Watch::NONE && entry.second->reply != Reply::FINISHED)
      refuse(*entry.second, UNAVAILABLE, "this connection ends; watch on another");
}

void Session::release(Rpc& rpc) {
  shared_.buffered -= rpc.charged;
  rpc.charged = 0;
  rpc.body.reset();
  rpc.waiting.clear();
  rpc.request.reset();
}

void Session::refuse(Rpc& rpc, int status, const std::string& message) {
  rpc.status = status;
  rpc.message = message;
  rpc.intake = Intake::DROPPED;
  rpc.cancelled = true;
  ++shared_.statistics.refused;
  release(rpc);
  respond(rpc, Reply::FINISHED);
}

void Session::refuse_http(Rpc& rpc, const char* status) {
  rpc.intake = Intake::DROPPED;
  rpc.reply = Reply::FINISHED;
  ++shared_.statistics.refused;
  release(rpc);
  const nghttp2_nv only = field(":status", status);
  nghttp2_submit_response(session_.get(), rpc.stream, &only, 1, nullptr);
}

void Session::answer(const RpcPtr& rpc) {
  rpc->custody = Custody::SESSION;
  if (rpc->reply == Reply::FINISHED) return;
  ++shared_.statistics.answered;
  rpc->out.erase(0, rpc->out_sent);
  rpc->out_sent = 0;
  rpc->out += rpc->answer;
  rpc->unsent += rpc->answer.size();
  shared_.buffered += rpc->answer.size();
  rpc->answer.clear();
  rpc->status = rpc->answer_status;
  rpc->message.swap(rpc->answer_message);
  if (rpc->method->kind == Kind::STREAM && rpc->status == OK) {
    rpc->waiting.pop_front();
    const bool last = rpc->waiting.empty() && rpc->intake == Intake::ENDED;
    if (!rpc->waiting.empty()) enqueue(rpc);
    return respond(*rpc, last ? Reply::FINISHED : Reply::OPEN);
  }
  rpc->intake = Intake::DROPPED;  // of a stream that fails there may be more
  release(*rpc);
  respond(*rpc, Reply::FINISHED);
}

// Starts the response, or goes on with it.
void Session::respond(Rpc& rpc, Reply reply) {
  const bool begun = rpc.reply != Reply::NONE;
  rpc.reply = reply;
  if (begun) {
    nghttp2_session_resume_data(session_.get(), rpc.stream);
    return;
  }
  nghttp2_nv fields[4] = {field(":status", "200"), field("content-type", wire::GRPC)};
  if (reply == Reply::FINISHED && rpc.out.empty()) {
    const std::string status = std::to_string(rpc.status), message = wire::percent_encoded(rpc.message);
    fields[2] = field("grpc-status", status);
    size_t count = 3;
    if (!message.empty()) fields[count++] = field("grpc-message", message);
    nghttp2_submit_response(session_.get(), rpc.stream, fields, count, nullptr);
    return;
  }
  nghttp2_data_provider provider;
  provider.source.ptr = &rpc;
  provider.read_callback = read_answer;
  nghttp2_submit_response(session_.get(), rpc.stream, fields, 2, &provider);
}

// The next bytes of an answer, for libnghttp2.
ssize_t Session::read_answer(nghttp2_session*, int32_t, uint8_t* to, size_t room, uint32_t* flags,
                             nghttp2_data_source* source, void* user) {
  Session& self = *static_cast<Session*>(user);
  Rpc& rpc = *static_cast<Rpc*>(source->ptr);
  const size_t count = std::min(room, rpc.out.size() - rpc.out_sent);
  if (count) std::memcpy(to, rpc.out.data() + rpc.out_sent, count);
  rpc.out_sent += count;
  const size_t counted = std::min(count, rpc.unsent);
  rpc.unsent -= counted;
  self.shared_.buffered -= counted;
  rpc.touched = self.shared_.now;
  if (rpc.out_sent < rpc.out.size()) return static_cast<ssize_t>(count);
  if (rpc.reply == Reply::FINISHED) {
    *flags |= NGHTTP2_DATA_FLAG_EOF | NGHTTP2_DATA_FLAG_NO_END_STREAM;
    const int failed = wire::guarded([&] {
      self.submit_trailers(rpc);
      return 0;
    });
    if (failed) return failed;
  } else if (!count) {
    return NGHTTP2_ERR_DEFERRED;
  }
  return static_cast<ssize_t>(count);
}

void Session::submit_trailers(Rpc& rpc) {
  const std::string status = std::to_string(rpc.status), message = wire::percent_encoded(rpc.message);
  const nghttp2_nv fields[] = {field("grpc-status", status), field("grpc-message", message)};
  nghttp2_submit_trailer(session_.get(), rpc.stream, fields, message.empty() ? 1 : 2);
}

}  // namespace narsil::native
