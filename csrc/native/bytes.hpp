// Numbers in bytes that nobody has aligned.
#pragma once

#include <cstdint>
#include <cstring>

namespace narsil::native {

template <class T>
inline T load(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

}  // namespace narsil::native
