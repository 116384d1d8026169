#include "load/reply.hpp"

namespace narsil::load {
namespace {

constexpr size_t KEPT_CAPACITY = 65536;  // a larger buffer is given back

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

}  // namespace

void Reply::reset() {
  http_status_ = grpc_status_ = NONE;
  grpc_content_ = false;
  header_bytes_ = 0;
  overrun_.clear();
  bytes_.clear();
  if (bytes_.capacity() > KEPT_CAPACITY) bytes_.shrink_to_fit();
}

bool Reply::header(std::string_view name, std::string_view value, const Expected& expected) {
  header_bytes_ += name.size() + value.size() + 32;  // as HTTP/2 counts a header list
  if (header_bytes_ > expected.max_header_bytes) {
    overrun_ = "headers of more than " + std::to_string(expected.max_header_bytes) + " bytes";
    return false;
  }
  if (name == ":status") {
    http_status_ = small_number(value, UNREADABLE);
  } else if (name == "content-type") {
    grpc_content_ = wire::is_grpc(value);
  } else if (name == "grpc-status") {
    grpc_status_ = small_number(value, UNREADABLE);
  }
  return true;
}

bool Reply::data(const uint8_t* bytes, size_t size, const Expected& expected) {
  if (size > expected.max_bytes + wire::PREFIX_SIZE - bytes_.size()) {
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
  if (grpc_status_ == NONE) return "no grpc-status";
  if (grpc_status_ == UNREADABLE) return "unreadable grpc-status";
  if (grpc_status_ == 0) return message_problem(expected);
  const auto code = static_cast<size_t>(grpc_status_);
  return code < wire::STATUS_NAMES.size() ? std::string(wire::STATUS_NAMES[code])
                                          : "grpc-status " + std::to_string(code);
}

std::string Reply::message_problem(const Expected& expected) const {
  if (bytes_.empty()) return "OK without a message";
  if (bytes_.size() < wire::PREFIX_SIZE) return "message cut off";
  if (bytes_[0] == 1) return "compressed reply";
  if (bytes_[0] != 0) return "unreadable message prefix";
  const size_t claimed = wire::size_in(reinterpret_cast<const uint8_t*>(bytes_.data()));
  const size_t arrived = bytes_.size() - wire::PREFIX_SIZE;
  if (arrived < claimed) return "message cut off";
  if (arrived > claimed) return "more than one message";
  const auto count = count_scores(expected.wire, expected.task, message());
  if (!count) return "unreadable reply";
  if (*count == expected.rows) return {};
  return std::to_string(*count) + " scores for " + std::to_string(expected.rows) + " rows";
}

}  // namespace narsil::load
