#include "native/poller.hpp"

#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>

#include <cmath>

namespace narsil::native {

Poller::Poller()
    : epoll_(wire::owned(epoll_create1(EPOLL_CLOEXEC), "epoll_create1")),
      event_(wire::owned(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE), "eventfd")) {
  if (!add(event_, EPOLLIN, WAKE)) wire::fail("epoll_ctl");
}

bool Poller::add(const wire::Descriptor& descriptor, uint32_t events, uint64_t id) {
  epoll_event event{};
  event.events = events;
  event.data.u64 = id;
  return !epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, descriptor.get(), &event);
}

int Poller::wait(double timeout, epoll_event* events, int most) {
#ifdef SYS_epoll_pwait2
  // Microseconds matter to a batch timeout. Older kernels know milliseconds only (ENOSYS), and a container's profile
  // that is older than the call refuses it (EPERM, as a rule): whatever is wrong with it, the plain wait is tried.
  if (microseconds_ && std::isfinite(timeout) && timeout > 0) {
    const double whole = std::floor(timeout);
    const timespec time{static_cast<time_t>(whole), static_cast<long>((timeout - whole) * 1e9)};
    const long count = syscall(SYS_epoll_pwait2, epoll_.get(), events, most, &time, nullptr, size_t{0});
    if (count >= 0 || errno == EINTR) return static_cast<int>(count);
    microseconds_ = false;
  }
#endif
  const int milliseconds = std::isfinite(timeout) ? static_cast<int>(std::ceil(timeout * 1e3)) : -1;
  return epoll_wait(epoll_.get(), events, most, milliseconds);
}

void Poller::wake() {
  const uint64_t one = 1;
  // Full means that it is readable already.
  [[maybe_unused]] const ssize_t written = ::write(event_.get(), &one, sizeof one);
}

bool Poller::woken() {
  uint64_t value;
  return ::read(event_.get(), &value, sizeof value) > 0;
}

}  // namespace narsil::native
