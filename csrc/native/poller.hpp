// The kernel's side of polling: what is watched, waiting for it, and waking whoever waits.
#pragma once

#include <sys/epoll.h>

#include <atomic>
#include <cstdint>

#include "wire/descriptor.hpp"

namespace narsil::native {

class Poller {
 public:
  static constexpr uint64_t WAKE = 0;  // the id of a wake's event; all others are the caller's

  // Throws std::system_error.
  Poller();

  // Has `id` come with the events of a descriptor, until that is closed. False, and errno, where the kernel has no
  // room.
  bool add(const wire::Descriptor& descriptor, uint32_t events, uint64_t id);

  // Waits at most `timeout` seconds, which may be 0 or endless; returns how many events there are, or less than 0.
  int wait(double timeout, epoll_event* events, int most);

  // Has one running wait, or the next, return with WAKE.
  void wake();

  // After WAKE: false where another thread was quicker, whose wake it then is.
  bool woken();

 private:
  wire::Descriptor epoll_, event_;
  std::atomic<bool> microseconds_{true};  // the kernel can wait for less than a millisecond
};

}  // namespace narsil::native
