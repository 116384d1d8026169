#include "load/reply.hpp"

#include <array>

namespace narsil::load {
namespace {

constexpr std::size_t kKeptCapacity = 65536;  // a larger buffer is given back

constexpr std::array<const char*, 17> kCodes = {
    "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
    "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
    "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
    "DATA_LOSS", "UNAUTHENTICATED"};

// A number of one to three digits; `otherwise` for anything else.
int small_number(std::string_view text, int otherwise) {
  if (text.empty() || text.size() > 3) return otherwise;
  int value = 0;
  for (const char c : text) {
    if (c < '0' || c > '9') return otherwise;
    value = value * 10 + (c - '0');
  }
  return value;
}

// application/grpc, or that with a subtype or parameters.
bool is_grpc(std::string_view content_type) {
  constexpr std::string_view kGrpc = "application/grpc";
  if (content_type.substr(0, kGrpc.size()) != kGrpc) return false;
  return content_type.size() == kGrpc.size() || content_type[kGrpc.size()] == '+' || content_type[kGrpc.size()] == ';';
}

std::size_t message_size(const std::string& bytes) {
  std::size_t size = 0;
  for (std::size_t at = 1; at < kPrefix; ++at) size = size << 8 | static_cast<unsigned char>(bytes[at]);
  return size;
}

}  // namespace

void Reply::reset() {
  http_status_ = grpc_status_ = kNone;
  grpc_content_ = false;
  header_bytes_ = 0;
  overrun_.clear();
  bytes_.clear();
  if (bytes_.capacity() > kKeptCapacity) bytes_.shrink_to_fit();
}

bool Reply::header(std::string_view name, std::string_view value, const Expected& expected) {
  header_bytes_ += name.size() + value.size() + 32;  // as HTTP/2 counts a header list
  if (header_bytes_ > expected.max_header_bytes) {
    overrun_ = "headers of more than " + std::to_string(expected.max_header_bytes) + " bytes";
    return false;
  }
  if (name == ":status") {
    http_status_ = small_number(value, kUnreadable);
  } else if (name == "content-type") {
    grpc_content_ = is_grpc(value);
  } else if (name == "grpc-status") {
    grpc_status_ = small_number(value, kUnreadable);
  }
  return true;
}

bool Reply::data(const std::uint8_t* bytes, std::size_t size, const Expected& expected) {
  if (size > expected.max_bytes + kPrefix - bytes_.size()) {
    overrun_ = "a reply of more than " + std::to_string(expected.max_bytes) + " bytes";
    return false;
  }
  bytes_.append(reinterpret_cast<const char*>(bytes), size);
  return true;
}

std::string Reply::verdict(const Expected& expected) const {
  if (!overrun_.empty()) return overrun_;
  if (http_status_ != 200) return http_status_ < 0 ? "no HTTP status" : "HTTP status " + std::to_string(http_status_);
  if (!grpc_content_) return "content-type is not application/grpc";
  if (grpc_status_ == kNone) return "no grpc-status";
  if (grpc_status_ == kUnreadable) return "unreadable grpc-status";
  if (grpc_status_ == 0) return message_problem(expected);
  const auto code = static_cast<std::size_t>(grpc_status_);
  return code < kCodes.size() ? kCodes[code] : "grpc-status " + std::to_string(code);
}

std::string Reply::message_problem(const Expected& expected) const {
  if (bytes_.empty()) return "OK without a message";
  if (bytes_.size() < kPrefix) return "message cut off";
  if (bytes_[0] == 1) return "compressed reply";
  if (bytes_[0] != 0) return "unreadable message prefix";
  const std::size_t claimed = message_size(bytes_);
  const std::size_t arrived = bytes_.size() - kPrefix;
  if (arrived < claimed) return "message cut off";
  if (arrived > claimed) return "more than one message";
  const auto count = count_scores(expected.wire, expected.task, message());
  if (!count) return "unreadable reply";
  if (*count == expected.rows) return {};
  return std::to_string(*count) + " scores for " + std::to_string(expected.rows) + " rows";
}

}  // namespace narsil::load
