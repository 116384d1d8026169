// What all connections of a client share: nghttp2's callbacks and options, and the headers of every request.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "wire/clock.hpp"
#include "wire/http2.hpp"

namespace narsil::load {

using wire::Nanos;

class Http2 {
 public:
  Http2(const std::string& authority, const std::string& method, Nanos timeout, const std::string& user_agent);
  Http2(const Http2&) = delete;
  Http2& operator=(const Http2&) = delete;

  nghttp2_session_callbacks* callbacks() const { return callbacks_.get(); }
  nghttp2_option* option() const { return option_.get(); }
  const std::vector<nghttp2_nv>& headers() const { return headers_; }

 private:
  void add_header(const std::string& name, const std::string& value);

  wire::CallbacksPtr callbacks_;
  wire::OptionPtr option_;
  std::deque<std::string> texts_;  // what headers_ points to
  std::vector<nghttp2_nv> headers_;
};

}  // namespace narsil::load
