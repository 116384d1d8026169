#include "load/scores.hpp"

#include <cstdint>

namespace narsil::load {
namespace {

enum Kind : std::uint32_t { kVarint = 0, kFixed64 = 1, kLen = 2, kFixed32 = 5 };

struct Field {
  std::uint32_t number;
  std::uint32_t kind;
  std::string_view bytes;  // of a kLen field its content; of others nothing that is needed here
};

// The fields of one message, one after the other.
class Fields {
 public:
  explicit Fields(std::string_view message) : left_(message) {}

  // The next field; nothing at the end, and nothing with broken() set where the bytes are no fields.
  std::optional<Field> next() {
    if (left_.empty() || broken_) return std::nullopt;
    std::uint64_t key = 0;
    if (!varint(key) || key >> 3 == 0 || key >> 3 >= 1u << 29) return fail();
    Field field{static_cast<std::uint32_t>(key >> 3), static_cast<std::uint32_t>(key & 7), {}};
    std::uint64_t size = 0;
    switch (field.kind) {
      case kVarint:
        return varint(size) ? std::optional(field) : fail();
      case kFixed64:
        size = 8;
        break;
      case kFixed32:
        size = 4;
        break;
      case kLen:
        if (!varint(size)) return fail();
        break;
      default:  // groups: no message here has them
        return fail();
    }
    if (size > left_.size()) return fail();
    field.bytes = left_.substr(0, size);
    left_.remove_prefix(size);
    return field;
  }

  bool broken() const { return broken_; }

 private:
  bool varint(std::uint64_t& value) {
    for (unsigned shift = 0; shift < 64 && !left_.empty(); shift += 7) {
      const auto byte = static_cast<unsigned char>(left_.front());
      left_.remove_prefix(1);
      value |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return true;
    }
    return false;
  }

  std::nullopt_t fail() {
    broken_ = true;
    return std::nullopt;
  }

  std::string_view left_;
  bool broken_ = false;
};

// Floats of a FloatVec: packed, or one by one, as protobuf allows both.
std::optional<std::size_t> count_floats(std::string_view vector) {
  std::size_t count = 0;
  Fields fields(vector);
  while (const auto field = fields.next()) {
    if (field->number != 1) continue;
    if (field->kind == kFixed32) {
      ++count;
    } else if (field->kind == kLen && field->bytes.size() % 4 == 0) {
      count += field->bytes.size() / 4;
    } else {
      return std::nullopt;
    }
  }
  if (fields.broken()) return std::nullopt;
  return count;
}

// One entry: its name, and the floats under it.
struct Entry {
  std::string_view name;
  std::size_t count = 0;
};

std::optional<Entry> read_entry(Wire wire, std::string_view bytes) {
  Entry entry;
  Fields fields(bytes);
  while (const auto field = fields.next()) {
    if (field->number > 2) continue;
    if (field->kind != kLen) return std::nullopt;
    if (field->number == 1) {
      entry.name = field->bytes;
    } else if (wire == Wire::predictor) {
      const auto count = count_floats(field->bytes);
      if (!count) return std::nullopt;
      entry.count += *count;  // a message that comes in parts is merged
    } else {
      if (field->bytes.size() % 4 != 0) return std::nullopt;
      entry.count = field->bytes.size() / 4;  // of a bytes field the last one counts
    }
  }
  if (fields.broken()) return std::nullopt;
  return entry;
}

}  // namespace

std::optional<std::size_t> count_scores(Wire wire, std::string_view task, std::string_view message) {
  const std::uint32_t number = wire == Wire::predictor ? 1 : 4;
  std::size_t count = 0;
  bool found = false;
  Fields fields(message);
  while (const auto field = fields.next()) {
    if (field->number != number) continue;
    if (field->kind != kLen) return std::nullopt;
    const auto entry = read_entry(wire, field->bytes);
    if (!entry) return std::nullopt;
    if (entry->name != task || (found && wire == Wire::narsil)) continue;  // of a map's equal keys the last counts
    found = true;
    count = entry->count;
  }
  if (fields.broken()) return std::nullopt;
  return count;
}

}  // namespace narsil::load
