#include "native/session.hpp"

#include <algorithm>
#include <iterator>
#include <new>

namespace narsil::native {
namespace {

constexpr int32_t STREAM_WINDOW = 4 << 20;  // a lane busy with one batch must not stall the peer
constexpr int32_t CONNECTION_WINDOW = 32 << 20;
constexpr uint32_t MAX_FRAME = 1u << 20;  // fewer frames for large messages
constexpr size_t MAX_BLOCK = 512u << 10;  // bytes of a header block of usual limits, overlong strings left out

// So that metadata which is too large by far is yet refused call by call.
size_t most_of_block(const Config& config) {
  return std::min<size_t>(MAX_FRAME, std::max(MAX_BLOCK, config.max_metadata + (64u << 10)));
}

}  // namespace

// Not every libnghttp2 has these. Its own limits would end connections for one call's metadata, and those of clients
// whose deadlines pass.
extern "C" __attribute__((weak)) void nghttp2_option_set_max_continuations(nghttp2_option*, size_t);
extern "C" __attribute__((weak)) void nghttp2_option_set_stream_reset_rate_limit(nghttp2_option*, uint64_t, uint64_t);

struct Session::Callbacks {
  static Session& self(void* user) { return *static_cast<Session*>(user); }

  static int begin_headers(nghttp2_session*, const nghttp2_frame* frame, void* user) {
    if (frame->hd.type != NGHTTP2_HEADERS || frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;
    return wire::guarded([&] {
      self(user).begin(frame->hd.stream_id);
      return 0;
    });
  }

  static int header(nghttp2_session*, const nghttp2_frame* frame, const uint8_t* name, size_t name_size,
                    const uint8_t* value, size_t value_size, uint8_t, void* user) {
    if (frame->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;  // trailers say nothing that matters here
    return wire::guarded([&] {
      Rpc* const rpc = self(user).find(frame->hd.stream_id);
      if (rpc) self(user).header(*rpc, wire::text_of(name, name_size), wire::text_of(value, value_size));
      return 0;
    });
  }

  static int frame(nghttp2_session*, const nghttp2_frame* frame, void* user) {
    Session& session = self(user);
    session.established_ = true;
    if (frame->hd.type == NGHTTP2_RST_STREAM) session.count_reset(session.shared_.config.max_streams);
    if (frame->hd.type != NGHTTP2_HEADERS && frame->hd.type != NGHTTP2_DATA) return 0;
    Rpc* const rpc = session.find(frame->hd.stream_id);
    if (!rpc) return 0;
    rpc->touched = session.shared_.now;
    return wire::guarded([&] {
      if (frame->hd.type == NGHTTP2_HEADERS && frame->headers.cat == NGHTTP2_HCAT_REQUEST) session.headers_done(*rpc);
      if (frame->hd.flags & NGHTTP2_FLAG_END_STREAM) session.half_closed(*rpc);
      return 0;
    });
  }

  static int data(nghttp2_session*, uint8_t, int32_t stream, const uint8_t* data, size_t size, void* user) {
    return wire::guarded([&] {
      if (Rpc* const rpc = self(user).find(stream)) self(user).take(*rpc, data, size);
      return 0;
    });
  }

  static int closed(nghttp2_session*, int32_t stream, uint32_t, void* user) {
    return wire::guarded([&] {
      self(user).closed(stream);
      return 0;
    });
  }

  // A call that was answered before its request was whole: the peer is told to stop sending. And a peer that breaks the
  // protocol in order to have its streams reset by this side is no better than one that resets them itself.
  static int sent(nghttp2_session* session, const nghttp2_frame* frame, void* user) {
    if (frame->hd.type == NGHTTP2_RST_STREAM && frame->rst_stream.error_code != NGHTTP2_NO_ERROR &&
        frame->rst_stream.error_code != NGHTTP2_CANCEL && self(user).find(frame->hd.stream_id))
      self(user).count_reset(0);
    if (frame->hd.type == NGHTTP2_HEADERS && frame->hd.flags & NGHTTP2_FLAG_END_STREAM &&
        nghttp2_session_get_stream_remote_close(session, frame->hd.stream_id) == 0)
      nghttp2_submit_rst_stream(session, NGHTTP2_FLAG_NONE, frame->hd.stream_id, NGHTTP2_NO_ERROR);
    return 0;
  }

  static wire::CallbacksPtr callbacks() {
    wire::CallbacksPtr made = wire::new_callbacks();
    nghttp2_session_callbacks_set_on_begin_headers_callback(made.get(), begin_headers);
    nghttp2_session_callbacks_set_on_header_callback(made.get(), header);
    nghttp2_session_callbacks_set_on_frame_recv_callback(made.get(), frame);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(made.get(), data);
    nghttp2_session_callbacks_set_on_stream_close_callback(made.get(), closed);
    nghttp2_session_callbacks_set_on_frame_send_callback(made.get(), sent);
    return made;
  }

  static wire::OptionPtr option() {
    wire::OptionPtr made = wire::new_option();
    if (nghttp2_option_set_max_continuations)
      nghttp2_option_set_max_continuations(made.get(), MAX_FRAME);  // see guard_
    if (nghttp2_option_set_stream_reset_rate_limit)
      nghttp2_option_set_stream_reset_rate_limit(made.get(), UINT32_MAX, UINT32_MAX);  // see count_reset
    return made;
  }

  static wire::SessionPtr session(Session& self) {
    static const wire::CallbacksPtr callbacks = Callbacks::callbacks();
    static const wire::OptionPtr option = Callbacks::option();
    nghttp2_session* made = nullptr;
    if (nghttp2_session_server_new2(&made, callbacks.get(), &self, option.get())) throw std::bad_alloc();
    return wire::SessionPtr(made);
  }
};

Session::Session(Shared& shared)
    : shared_(shared),
      session_(Callbacks::session(*this)),
      guard_([this](const uint8_t* data, size_t size) { return pass(data, size); }, most_of_block(shared.config)),
      resets_(RESETS_S * static_cast<double>(shared.config.max_resets_per_second)),
      resets_at_(shared.now) {
  const nghttp2_settings_entry settings[] = {
      {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, static_cast<uint32_t>(shared.config.max_streams)},
      {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, STREAM_WINDOW},
      {NGHTTP2_SETTINGS_MAX_FRAME_SIZE, MAX_FRAME},
      {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, static_cast<uint32_t>(shared.config.max_metadata)},
#if NGHTTP2_VERSION_NUM >= 0x013200
      {NGHTTP2_SETTINGS_NO_RFC7540_PRIORITIES, 1},  // no tree of priorities for peers to grow
#endif
  };
  if (nghttp2_submit_settings(session_.get(), NGHTTP2_FLAG_NONE, settings, std::size(settings)) ||
      nghttp2_session_set_local_window_size(session_.get(), NGHTTP2_FLAG_NONE, 0, CONNECTION_WINDOW))
    throw std::bad_alloc();
}

Session::~Session() {
  shared_.buffered -= held_;
  while (!calls_.empty()) closed(calls_.begin()->first);
}

bool Session::feed(const uint8_t* data, size_t size) {
  const HeaderGuard::Verdict verdict = guard_.feed(data, size);
  if (verdict == HeaderGuard::Verdict::BROKEN) {
    nghttp2_session_terminate_session(session_.get(), NGHTTP2_PROTOCOL_ERROR);
    return false;
  }
  charge_held();
  if (verdict == HeaderGuard::Verdict::ENDLESS) {
    ++shared_.statistics.header_floods;
    drain();
  }
  return !broken_;
}

bool Session::pass(const uint8_t* data, size_t size) {
  broken_ = nghttp2_session_mem_recv(session_.get(), data, size) != static_cast<ssize_t>(size);
  return !broken_;
}

// Counts what the guard holds against the plane's budget.
void Session::charge_held() {
  shared_.buffered += guard_.held();
  shared_.buffered -= held_;
  held_ = guard_.held();
  held_at_ = shared_.now;
  if (held_ && shared_.buffered > shared_.config.max_buffered) give_up_block();
}

// Without one block, no later one can be read.
void Session::give_up_block() {
  guard_.give_up();
  shared_.buffered -= held_;
  held_ = 0;
  ++shared_.statistics.header_floods;
  drain();
}

bool Session::pull(std::string& out, size_t most) {
  while (out.size() < most) {
    const uint8_t* data;
    const ssize_t size = nghttp2_session_mem_send(session_.get(), &data);
    if (size < 0) return false;
    if (size == 0) break;
    out.append(reinterpret_cast<const char*>(data), static_cast<size_t>(size));
  }
  return true;
}

Rpc* Session::find(int32_t stream) {
  return static_cast<Rpc*>(nghttp2_session_get_stream_user_data(session_.get(), stream));
}

void Session::begin(int32_t stream) {
  if (draining()) {  // and the peer has not heard it yet
    nghttp2_submit_rst_stream(session_.get(), NGHTTP2_FLAG_NONE, stream, NGHTTP2_REFUSED_STREAM);
    return;
  }
  auto rpc = std::make_shared<Rpc>();
  rpc->id = ++shared_.last_id;
  rpc->session = this;
  rpc->stream = stream;
  rpc->arrived = rpc->touched = shared_.now;
  nghttp2_session_set_stream_user_data(session_.get(), stream, rpc.get());
  calls_.emplace(stream, std::move(rpc));
  ++shared_.statistics.calls;
}

void Session::closed(int32_t stream) {
  const auto found = calls_.find(stream);
  if (found == calls_.end()) return;
  Rpc& rpc = *found->second;
  if (rpc.reply != Reply::FINISHED) {
    rpc.cancelled = true;
    ++shared_.statistics.cancelled;
    if (rpc.custody == Custody::TAKEN && scores(rpc.method->kind)) shared_.gone.push_back(rpc.id);
  }
  if (rpc.watch != Watch::NONE) --watchers_;
  shared_.buffered -= rpc.charged + rpc.unsent;
  rpc.charged = rpc.unsent = 0;
  rpc.session = nullptr;
  calls_.erase(found);
}

double Session::resets_left() const {
  const double rate = static_cast<double>(shared_.config.max_resets_per_second);
  return std::min(RESETS_S * rate, resets_ + (shared_.now - resets_at_) * rate);
}

// A client that opens streams only to reset them costs more than it pays. One whose deadlines pass under overload looks
// the same: while it has had its share its new calls are refused, which tells it to send fewer. It may yet reset
// `more`, as many as it has in flight; one that goes on beyond that has to go.
void Session::count_reset(size_t more) {
  resets_ = resets_left() - 1;
  resets_at_ = shared_.now;
  if (draining() || resets_ >= -static_cast<double>(more)) return;
  ++shared_.statistics.reset_floods;
  drain();
}

// Tells the peer to go. What runs goes on and is answered; nothing new is taken, and what would never end ends.
void Session::drain() {
  if (draining()) return;
  drained_at_ = shared_.now;
  end_watchers();
  nghttp2_submit_goaway(session_.get(), NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(session_.get()),
                        NGHTTP2_ENHANCE_YOUR_CALM, nullptr, 0);
}

void Session::expire_stalled() {
  const double oldest = shared_.now - shared_.config.stall_s;
  if (held_ && held_at_ <= oldest) give_up_block();
  for (const auto& entry : calls_) {
    Rpc& rpc = *entry.second;
    const bool leaving = rpc.reply == Reply::FINISHED, arriving = !leaving && rpc.intake < Intake::ENDED;
    if (rpc.touched > oldest || (!arriving && !leaving)) continue;
    if (arriving && rpc.method && rpc.method->kind == Kind::STREAM && !rpc.prefix_have) continue;  // it may rest
    nghttp2_submit_rst_stream(session_.get(), NGHTTP2_FLAG_NONE, rpc.stream, NGHTTP2_CANCEL);
  }
}

void Session::ping() { nghttp2_submit_ping(session_.get(), NGHTTP2_FLAG_NONE, nullptr); }

void Session::go_away(bool last_word) {
  if (last_word) {
    nghttp2_session_terminate_session(session_.get(), NGHTTP2_NO_ERROR);
  } else {
    nghttp2_submit_shutdown_notice(session_.get());
  }
}

}  // namespace narsil::native
