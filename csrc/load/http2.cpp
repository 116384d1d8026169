#include "load/http2.hpp"

#include "load/connection.hpp"
#include "wire/grpc.hpp"

namespace narsil::load {
namespace {

wire::CallbacksPtr callbacks_for_connections() {
  wire::CallbacksPtr callbacks = wire::new_callbacks();
  Connection::install(callbacks.get());
  return callbacks;
}

}  // namespace

Http2::Http2(const std::string& authority, const std::string& method, Nanos timeout, const std::string& user_agent)
    : callbacks_(callbacks_for_connections()), option_(wire::new_option()) {
  add_header(":method", "POST");
  add_header(":scheme", "http");
  add_header(":path", method);
  add_header(":authority", authority);
  add_header("te", "trailers");
  add_header("grpc-timeout", wire::timeout_text(timeout));
  add_header("content-type", std::string(wire::GRPC));
  add_header("grpc-accept-encoding", "identity");
  add_header("user-agent", user_agent);
}

void Http2::add_header(const std::string& name, const std::string& value) {
  const std::string& n = texts_.emplace_back(name);
  const std::string& v = texts_.emplace_back(value);
  headers_.push_back(wire::field_of(n, v, NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE));
}

}  // namespace narsil::load
