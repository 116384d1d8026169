// A growing block of bytes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace narsil::native {

// Grows with what arrives, never to what a peer merely announces.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

  // False when memory is short. `most` is how large it will ever get.
  bool append(const uint8_t* bytes, size_t count, size_t most) {
    if (size_ + count > capacity_) {
      size_t grown = std::max({capacity_ * 2, size_ + count, std::min(most, FIRST_BLOCK)});
      grown = std::max(std::min(grown, most), size_ + count);
      void* const data = std::realloc(data_, grown);
      if (!data) return false;
      data_ = static_cast<uint8_t*>(data);
      capacity_ = grown;
    }
    if (count) std::memcpy(data_ + size_, bytes, count);
    size_ += count;
    return true;
  }

 private:
  static constexpr size_t FIRST_BLOCK = 64u << 10;  // what an announced message gets before it has come

  uint8_t* data_ = nullptr;
  size_t size_ = 0, capacity_ = 0;
};

}  // namespace narsil::native
