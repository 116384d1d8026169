// Protobuf's encoding, read and written in place. Source: https://protobuf.dev/programming-guides/encoding/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace narsil::wire {

enum class FieldType : uint32_t { VARINT = 0, FIXED64 = 1, LEN = 2, FIXED32 = 5 };

// Walks the fields of one message, which is hostile until it is read. Copies nothing. Groups, which no message here
// has, are no fields to it.
class Reader {
 public:
  Reader(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}
  explicit Reader(std::string_view message)
      : Reader(reinterpret_cast<const uint8_t*>(message.data()), message.size()) {}

  // The next field. False at the end, and for good at the first byte that is no field; `broken` tells which.
  bool next() {
    if (at_ == end_) return false;
    uint64_t key;
    if (!varint(key) || key >> 32) return fail();
    field = static_cast<uint32_t>(key >> 3);
    if (field == 0 || field >= 1u << 29) return fail();
    type = static_cast<FieldType>(key & 7);
    switch (type) {
      case FieldType::VARINT:
        return varint(number) || fail();
      case FieldType::FIXED64:
        return take(8) || fail();
      case FieldType::FIXED32:
        return take(4) || fail();
      case FieldType::LEN: {
        uint64_t size;
        return (varint(size) && take(size)) || fail();
      }
    }
    return fail();
  }

  bool is(uint32_t wanted_field, FieldType wanted_type) const { return field == wanted_field && type == wanted_type; }
  bool broken() const { return broken_; }

  uint32_t field = 0;
  FieldType type = FieldType::VARINT;
  uint64_t number = 0;            // of a VARINT
  const uint8_t* data = nullptr;  // of the others
  size_t size = 0;

  std::string_view text() const { return {reinterpret_cast<const char*>(data), size}; }

 private:
  bool take(uint64_t count) {
    if (count > static_cast<uint64_t>(end_ - at_)) return false;
    data = at_;
    size = static_cast<size_t>(count);
    at_ += count;
    return true;
  }

  bool varint(uint64_t& value) {
    value = 0;
    for (unsigned shift = 0; shift < 64 && at_ < end_; shift += 7) {
      const uint8_t byte = *at_++;
      value |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return true;
    }
    return false;
  }

  bool fail() {
    at_ = end_;
    broken_ = true;
    return false;
  }

  const uint8_t* at_;
  const uint8_t* end_;
  bool broken_ = false;
};

inline size_t varint_size(uint64_t value) {
  size_t size = 1;
  while (value >>= 7) ++size;
  return size;
}

inline void put_varint(std::string& out, uint64_t value) {
  for (; value > 0x7F; value >>= 7) out.push_back(static_cast<char>(value | 0x80));
  out.push_back(static_cast<char>(value));
}

inline void put_key(std::string& out, uint32_t field, FieldType type) {
  put_varint(out, uint64_t{field} << 3 | static_cast<uint32_t>(type));
}

}  // namespace narsil::wire
