// What gRPC adds to HTTP/2. Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "wire/clock.hpp"

namespace narsil::wire {

// google.rpc.Code, by its number.
constexpr std::array<std::string_view, 17> STATUS_NAMES = {
    "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
    "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
    "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
    "DATA_LOSS", "UNAUTHENTICATED"};

constexpr std::string_view GRPC = "application/grpc";

// application/grpc, with or without a format (+proto) or parameters; not application/grpc-web.
inline bool is_grpc(std::string_view content_type) {
  if (content_type.substr(0, GRPC.size()) != GRPC) return false;
  return content_type.size() == GRPC.size() || content_type[GRPC.size()] == '+' || content_type[GRPC.size()] == ';';
}

// Before every message: one byte that says whether it is compressed, and its size, big-endian.
using Prefix = std::array<uint8_t, 5>;

constexpr size_t PREFIX_SIZE = std::tuple_size_v<Prefix>;

inline Prefix prefix_of(size_t size) {
  const auto byte = [size](int shift) { return static_cast<uint8_t>(size >> shift); };
  return {0, byte(24), byte(16), byte(8), byte(0)};
}

inline size_t size_in(const uint8_t* prefix) {
  size_t size = 0;
  for (size_t at = 1; at < PREFIX_SIZE; ++at) size = size << 8 | prefix[at];
  return size;
}

inline void put_prefix(std::string& out, size_t size) {
  const Prefix prefix = prefix_of(size);
  out.append(reinterpret_cast<const char*>(prefix.data()), prefix.size());
}

// Seconds of a grpc-timeout value (one to eight digits and a unit); negative where it is none.
inline double timeout_seconds(std::string_view text) {
  constexpr std::string_view UNITS = "HMSmun";
  constexpr std::array<double, UNITS.size()> SECONDS = {3600, 60, 1, 1e-3, 1e-6, 1e-9};
  if (text.size() < 2 || text.size() > 9) return -1;
  double value = 0;
  for (const char digit : text.substr(0, text.size() - 1)) {
    if (digit < '0' || digit > '9') return -1;
    value = 10 * value + (digit - '0');
  }
  const size_t unit = UNITS.find(text.back());
  return unit == std::string_view::npos ? -1 : value * SECONDS[unit];
}

// A grpc-timeout value that is no shorter than the timeout, which is above 0.
inline std::string timeout_text(Nanos timeout) {
  constexpr Nanos MOST = 99'999'999;  // eight digits
  const Nanos milliseconds = std::max<Nanos>(1, (timeout + 999'999) / 1'000'000);
  if (milliseconds <= MOST) return std::to_string(milliseconds) + "m";
  return std::to_string(std::min(MOST, milliseconds / 1000)) + "S";
}

// A grpc-message: percent-encoded, and never longer than a header may well be.
inline std::string percent_encoded(std::string_view text) {
  constexpr std::string_view DIGITS = "0123456789ABCDEF";
  constexpr size_t MOST = 4096;
  std::string out;
  for (const char c : text) {
    if (out.size() > MOST) break;
    const auto byte = static_cast<uint8_t>(c);
    if (byte >= 0x20 && byte <= 0x7E && byte != '%') {
      out.push_back(c);
    } else {
      out += {'%', DIGITS[byte >> 4], DIGITS[byte & 15]};
    }
  }
  return out;
}

}  // namespace narsil::wire
