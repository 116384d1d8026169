#include "load/http2.hpp"

#include <algorithm>
#include <new>

#include "load/connection.hpp"

namespace narsil::load {
namespace {

std::string timeout_header(Nanos timeout) {
  const Nanos milliseconds = std::max<Nanos>(1, (timeout + 999'999) / 1'000'000);
  constexpr Nanos kMost = 99'999'999;  // eight digits
  return milliseconds <= kMost ? std::to_string(milliseconds) + "m"
                               : std::to_string(std::min(kMost, milliseconds / 1000)) + "S";
}

nghttp2_session_callbacks* new_callbacks() {
  nghttp2_session_callbacks* callbacks = nullptr;
  if (nghttp2_session_callbacks_new(&callbacks) != 0) throw std::bad_alloc();
  Connection::install(callbacks);
  return callbacks;
}

nghttp2_option* new_option() {
  nghttp2_option* option = nullptr;
  if (nghttp2_option_new(&option) != 0) throw std::bad_alloc();
  nghttp2_option_set_no_closed_streams(option, 1);  // keeps nothing of a stream that has ended
  return option;
}

}  // namespace

Http2::Http2(const std::string& authority, const std::string& method, Nanos timeout, const std::string& user_agent)
    : callbacks_(new_callbacks(), nghttp2_session_callbacks_del), option_(new_option(), nghttp2_option_del) {
  add_header(":method", "POST");
  add_header(":scheme", "http");
  add_header(":path", method);
  add_header(":authority", authority);
  add_header("te", "trailers");
  add_header("grpc-timeout", timeout_header(timeout));
  add_header("content-type", "application/grpc");
  add_header("grpc-accept-encoding", "identity");
  add_header("user-agent", user_agent);
}

void Http2::add_header(const std::string& name, const std::string& value) {
  std::string& n = texts_.emplace_back(name);
  std::string& v = texts_.emplace_back(value);
  headers_.push_back({reinterpret_cast<std::uint8_t*>(n.data()), reinterpret_cast<std::uint8_t*>(v.data()), n.size(),
                      v.size(), NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE});
}

}  // namespace narsil::load
