#include "load/request.hpp"

#include <utility>

namespace narsil::load {

Request& Requests::begin(Nanos deadline) {
  Request& request = vacant();
  request.deadline = deadline;
  request.older = newest_;
  request.newer = nullptr;
  (newest_ ? newest_->newer : oldest_) = &request;
  newest_ = &request;
  return request;
}

Request& Requests::vacant() {
  if (free_.empty()) {
    all_.emplace_back();
    free_.reserve(all_.size());  // so that giving one back never allocates
    return all_.back();
  }
  Request& request = *free_.back();
  free_.pop_back();
  request.stream = -1;
  request.sent = 0;
  request.reset_by_peer = request.ended = request.settled = request.closed = false;
  request.problem.clear();
  request.reply.reset();
  return request;
}

void Requests::unwatch(Request& request) {
  (request.older ? request.older->newer : oldest_) = request.newer;
  (request.newer ? request.newer->older : newest_) = request.older;
}

void Requests::end(Request& request, std::string problem) {
  if (request.ended) return;
  request.ended = true;
  request.ended_at = wire::monotonic_nanos();
  request.problem = std::move(problem);
  unwatch(request);
  ended_.push_back(&request);
}

void Requests::close(Request& request) {
  request.closed = true;
  free_if_done(request);
}

void Requests::settle(Request& request) {
  request.settled = true;
  free_if_done(request);
}

void Requests::free_if_done(Request& request) {
  if (request.settled && request.closed) free_.push_back(&request);
}

}  // namespace narsil::load
