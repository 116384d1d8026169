// One RPC from its first header to its last trailer.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "native/model.hpp"

namespace narsil {

class Session;

constexpr double NEVER = std::numeric_limits<double>::infinity();

// google.rpc.Code, as far as the data plane speaks of itself.
enum Status : int {
  OK = 0,
  INVALID_ARGUMENT = 3,
  NOT_FOUND = 5,
  RESOURCE_EXHAUSTED = 8,
  UNIMPLEMENTED = 12,
  INTERNAL = 13,
  UNAVAILABLE = 14,
};

enum class Kind : uint8_t {
  predictor,     // scores rows: TorchRec's wire
  narsil,        // scores rows: Narsil's own wire
  unary,         // one message in, one out, answered in Python
  stream,        // each message in gets one out, answered in Python
  health_check,  // answered here
  health_watch,  // answered here
};

// Whether the engine runs it: such a call can be refused while the server drains, and taken back when its client goes.
constexpr bool scores(Kind kind) { return kind == Kind::predictor || kind == Kind::narsil; }

constexpr bool is_health(Kind kind) { return kind == Kind::health_check || kind == Kind::health_watch; }

struct Method {
  std::string path;
  Kind kind;
};

// A growing block of bytes. Grows with what arrives, never to what a peer merely announces.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  uint8_t* data() { return data_; }
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  size_t capacity() const { return capacity_; }

  // False when memory is short. `most` is how large it will ever get.
  bool append(const uint8_t* bytes, size_t count, size_t most);

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0, capacity_ = 0;
};

// Owned by its session and by whoever answers it. Fields in the second part belong to the plane's mutex; those in the
// first are constant once the call has been handed out.
struct Call {
  uint64_t id = 0;  // unlike any other call's of this plane
  const Method* method = nullptr;
  double arrived = 0;  // seconds, CLOCK_MONOTONIC
  double deadline = NEVER;
  ModelName model;  // that its metadata names

  std::atomic<bool> cancelled{false};  // nobody waits for the answer any more
  std::atomic<bool> answered{false};

  // What the answering thread leaves for the next flush. Written by one thread before it enters the outbox.
  std::string answer;  // framed messages to append
  int answer_status = OK;
  std::string answer_message;

  // Under the plane's mutex.
  Session* session = nullptr;       // null once the stream is gone
  std::shared_ptr<Buffer> request;  // the whole message that is to be answered, until it is taken
  int status = OK;
  std::string message;
  int32_t stream = 0;
  double touched = 0;  // when bytes last moved on it
  bool post = false, grpc = false, refused = false, handed_out = false, taken = false, complete = false, ended = false;
  bool watching = false;    // counted as a health watcher
  bool responding = false;  // response headers are submitted
  bool finished = false;    // no more messages will be added
  size_t header_bytes = 0;
  size_t charged = 0;            // bytes of its messages counted against the plane's budget
  size_t unsent = 0;             // bytes of its answers that its client has not let through, counted likewise
  std::shared_ptr<Buffer> body;  // the message that is arriving
  uint8_t prefix[5] = {};
  size_t prefix_have = 0;
  size_t expected = 0;
  std::deque<std::shared_ptr<Buffer>> waiting;  // of a stream: whole messages, the one being answered first
  std::string out;                              // framed messages not yet sent
  size_t out_sent = 0;
};

using CallPtr = std::shared_ptr<Call>;

// Appends a gRPC frame's prefix; the message of this size follows.
void put_frame_prefix(std::string& out, size_t size);

}  // namespace narsil
