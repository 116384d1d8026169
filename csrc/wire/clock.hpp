// The monotonic clock: CLOCK_MONOTONIC, as Python's time.monotonic reads it.
#pragma once

#include <time.h>

#include <cstdint>

namespace narsil::wire {

using Nanos = int64_t;

constexpr Nanos NANOS_PER_SECOND = 1'000'000'000;

inline Nanos monotonic_nanos() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<Nanos>(now.tv_sec) * NANOS_PER_SECOND + now.tv_nsec;
}

inline double monotonic_seconds() { return static_cast<double>(monotonic_nanos()) * 1e-9; }

}  // namespace narsil::wire
