// One RPC from its first header to its last trailer.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <string>

#include "native/buffer.hpp"
#include "native/model.hpp"
#include "wire/grpc.hpp"

namespace narsil::native {

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
  // Those that score come first.
  PREDICTOR,     // scores rows: TorchRec's wire
  NARSIL,        // scores rows: Narsil's own wire
  OIP,           // scores rows: the Open Inference Protocol
  SCORES,        // scores rows: a wire that is decoded in Python
  UNARY,         // one message in, one out, answered in Python
  STREAM,        // each message in gets one out, answered in Python
  HEALTH_CHECK,  // answered here
  HEALTH_WATCH,  // answered here
};

// Whether the engine runs it: such a call can be refused while the server drains, and taken back when its client goes.
constexpr bool scores(Kind kind) { return kind <= Kind::SCORES; }

constexpr bool is_health(Kind kind) { return kind == Kind::HEALTH_CHECK || kind == Kind::HEALTH_WATCH; }

struct Method {
  std::string path;
  Kind kind;
};

// How far the request has come.
enum class Intake : uint8_t {
  HEADERS,   // then MESSAGES, or DROPPED where they say something that is not served
  MESSAGES,  // a stream stays here until it has ENDED
  WHOLE,     // the one message of a unary call is there, its end is not
  ENDED,     // the client has ended its side
  DROPPED,   // refused: what still comes is thrown away
};

// Who has the message that is to be answered. A stream goes round, message by message.
enum class Custody : uint8_t {
  SESSION,  // none is whole, or all are answered
  READY,    // it waits to be taken
  TAKEN,    // whoever took it owes an answer
};

// How far the reply has come.
enum class Reply : uint8_t {
  NONE,
  OPEN,      // its headers are submitted, and more may be added
  FINISHED,  // nothing will be added: what is left and the trailers are sent
};

// What a health watcher asked for.
enum class Watch : uint8_t { NONE, KNOWN, UNKNOWN };

// Owned by its session and by whoever answers it. Fields in the last part belong to the plane's mutex; those in the
// first are constant once the call has been taken.
struct Rpc {
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
  Session* session = nullptr;  // null once the stream is gone
  int32_t stream = 0;
  Intake intake = Intake::HEADERS;
  Custody custody = Custody::SESSION;
  Reply reply = Reply::NONE;
  Watch watch = Watch::NONE;
  double touched = 0;  // when bytes last moved on it

  bool post = false, grpc = false;  // what its headers have said
  size_t header_bytes = 0;

  wire::Prefix prefix{};
  size_t prefix_have = 0;
  size_t expected = 0;                          // bytes of the message that is arriving
  std::shared_ptr<Buffer> body;                 // that message
  std::shared_ptr<Buffer> request;              // the whole message that is to be answered, until it is taken
  std::deque<std::shared_ptr<Buffer>> waiting;  // of a stream: whole messages, the one being answered first

  std::string out;  // framed messages not yet sent
  size_t out_sent = 0;
  int status = OK;
  std::string message;

  size_t charged = 0;  // bytes of its messages counted against the plane's budget
  size_t unsent = 0;   // bytes of its answers that its client has not let through, counted likewise
};

using RpcPtr = std::shared_ptr<Rpc>;

}  // namespace narsil::native
