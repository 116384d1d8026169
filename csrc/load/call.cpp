#include "load/call.hpp"

#include <utility>

namespace narsil::load {

Call& Calls::begin(Nanos deadline) {
  Call& call = vacant();
  call.deadline = deadline;
  call.older = newest_;
  call.newer = nullptr;
  (newest_ ? newest_->newer : oldest_) = &call;
  newest_ = &call;
  return call;
}

Call& Calls::vacant() {
  if (free_.empty()) {
    all_.emplace_back();
    free_.reserve(all_.size());  // so that giving one back never allocates
    return all_.back();
  }
  Call& call = *free_.back();
  free_.pop_back();
  call.stream = -1;
  call.sent = 0;
  call.reset_by_peer = call.ended = call.settled = call.closed = false;
  call.problem.clear();
  call.reply.reset();
  return call;
}

void Calls::unwatch(Call& call) {
  (call.older ? call.older->newer : oldest_) = call.newer;
  (call.newer ? call.newer->older : newest_) = call.older;
}

void Calls::end(Call& call, std::string problem) {
  if (call.ended) return;
  call.ended = true;
  call.ended_at = clock_now();
  call.problem = std::move(problem);
  unwatch(call);
  ended_.push_back(&call);
}

void Calls::close(Call& call) {
  call.closed = true;
  free_if_done(call);
}

void Calls::settle(Call& call) {
  call.settled = true;
  free_if_done(call);
}

void Calls::free_if_done(Call& call) {
  if (call.settled && call.closed) free_.push_back(&call);
}

}  // namespace narsil::load
