// One gRPC reply as it arrives, and the verdict on it.
//
// Receives header fields and DATA of one stream from HTTP/2's side; every byte is the server's and hostile. Holds at
// most `Expected::max_bytes` of message. Source of the rules:
// https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "load/scores.hpp"
#include "wire/grpc.hpp"

namespace narsil::load {

// What every reply of a load is held against.
struct Expected {
  Wire wire = Wire::PREDICTOR;
  std::string task;
  size_t rows = 0;                  // float32 under the task
  size_t max_bytes = 4u << 20;      // of a reply's message
  size_t max_header_bytes = 65536;  // of all header fields of a reply
};

class Reply {
 public:
  // Ready for the next one; keeps its memory unless it was unusually large.
  void reset();

  // Only the block of headers that ends the stream may say how the call ended: called where another one begins, and
  // where DATA ends the stream.
  void forget_status() { grpc_status_ = NONE; }

  // False where the reply must be given up; verdict() then says why.
  bool header(std::string_view name, std::string_view value, const Expected& expected);
  bool data(const uint8_t* bytes, size_t size, const Expected& expected);

  // What is wrong with the reply that has ended, as a short name; empty if it is right.
  std::string verdict(const Expected& expected) const;

  // Without its prefix; only of a reply whose verdict is empty.
  std::string_view message() const { return std::string_view(bytes_).substr(wire::PREFIX_SIZE); }

 private:
  static constexpr int NONE = -1;
  static constexpr int UNREADABLE = -2;

  std::string message_problem(const Expected& expected) const;

  int http_status_ = NONE;
  int grpc_status_ = NONE;
  bool grpc_content_ = false;
  size_t header_bytes_ = 0;
  std::string overrun_;  // why it was given up
  std::string bytes_;    // prefix and message
};

}  // namespace narsil::load
