// libnghttp2's objects, owned by types, and what both ends of a connection need of it.
#pragma once

#include <nghttp2/nghttp2.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <string_view>

namespace narsil::wire {

template <auto FREE>
struct Freed {
  template <class T>
  void operator()(T* object) const {
    FREE(object);
  }
};

using SessionPtr = std::unique_ptr<nghttp2_session, Freed<nghttp2_session_del>>;
using CallbacksPtr = std::unique_ptr<nghttp2_session_callbacks, Freed<nghttp2_session_callbacks_del>>;
using OptionPtr = std::unique_ptr<nghttp2_option, Freed<nghttp2_option_del>>;

inline CallbacksPtr new_callbacks() {
  nghttp2_session_callbacks* callbacks = nullptr;
  if (nghttp2_session_callbacks_new(&callbacks)) throw std::bad_alloc();
  return CallbacksPtr(callbacks);
}

// Options by which nothing is remembered of streams that have ended.
inline OptionPtr new_option() {
  nghttp2_option* option = nullptr;
  if (nghttp2_option_new(&option)) throw std::bad_alloc();
  nghttp2_option_set_no_closed_streams(option, 1);
  return OptionPtr(option);
}

// What a callback returns. libnghttp2 is C: no exception may pass through it; where memory is short, the connection
// ends.
template <class Body>
int guarded(const Body& body) noexcept {
  try {
    return body();
  } catch (...) {
    return NGHTTP2_ERR_CALLBACK_FAILURE;
  }
}

// A header field for libnghttp2, which takes pointers that are not const and leaves alone what they point to.
inline nghttp2_nv field_of(std::string_view name, std::string_view value, uint8_t flags) {
  const auto bytes = [](std::string_view text) { return reinterpret_cast<uint8_t*>(const_cast<char*>(text.data())); };
  return {bytes(name), bytes(value), name.size(), value.size(), flags};
}

inline std::string_view text_of(const uint8_t* bytes, size_t size) {
  return {reinterpret_cast<const char*>(bytes), size};
}

}  // namespace narsil::wire
