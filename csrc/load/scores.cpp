#include "load/scores.hpp"

#include "wire/protobuf.hpp"

namespace narsil::load {
namespace {

using wire::FieldType;
using wire::Reader;

// Floats of a FloatVec: packed, or one by one, as protobuf allows both.
std::optional<size_t> count_floats(std::string_view vector) {
  size_t count = 0;
  Reader reader(vector);
  while (reader.next()) {
    if (reader.field != 1) continue;
    if (reader.type == FieldType::FIXED32) {
      ++count;
    } else if (reader.type == FieldType::LEN && reader.size % 4 == 0) {
      count += reader.size / 4;
    } else {
      return std::nullopt;
    }
  }
  if (reader.broken()) return std::nullopt;
  return count;
}

// One entry: its name, and the floats under it.
struct Entry {
  std::string_view name;
  size_t count = 0;
};

std::optional<Entry> read_entry(Wire wire, std::string_view bytes) {
  Entry entry;
  Reader reader(bytes);
  while (reader.next()) {
    if (reader.field > 2) continue;
    if (reader.type != FieldType::LEN) return std::nullopt;
    if (reader.field == 1) {
      entry.name = reader.text();
    } else if (wire == Wire::PREDICTOR) {
      const auto count = count_floats(reader.text());
      if (!count) return std::nullopt;
      entry.count += *count;  // a message that comes in parts is merged
    } else {
      if (reader.size % 4 != 0) return std::nullopt;
      entry.count = reader.size / 4;  // of a bytes field the last one counts
    }
  }
  if (reader.broken()) return std::nullopt;
  return entry;
}

// The name of an InferOutputTensor.
std::optional<std::string_view> output_name(std::string_view output) {
  std::string_view name;
  Reader reader(output);
  while (reader.next()) {
    if (reader.field != 1) continue;
    if (reader.type != FieldType::LEN) return std::nullopt;
    name = reader.text();
  }
  if (reader.broken()) return std::nullopt;
  return name;
}

// Of the first output of this name; 0 where it has no raw contents.
std::optional<size_t> count_raw_scores(std::string_view task, std::string_view message) {
  size_t outputs = 0, place = 0, raws = 0, count = 0;
  bool found = false;
  Reader outer(message);
  while (outer.next()) {
    if (outer.field != 5) continue;
    if (outer.type != FieldType::LEN) return std::nullopt;
    const auto name = output_name(outer.text());
    if (!name) return std::nullopt;
    if (!found && *name == task) {
      found = true;
      place = outputs;
    }
    ++outputs;
  }
  if (outer.broken()) return std::nullopt;
  Reader reader(message);
  while (reader.next()) {
    if (reader.field != 6) continue;
    if (reader.type != FieldType::LEN || reader.size % 4 != 0) return std::nullopt;
    if (found && raws++ == place) count = reader.size / 4;
  }
  return count;
}

}  // namespace

std::optional<size_t> count_scores(Wire wire, std::string_view task, std::string_view message) {
  if (wire == Wire::OIP) return count_raw_scores(task, message);
  const uint32_t number = wire == Wire::PREDICTOR ? 1 : 4;
  size_t count = 0;
  bool found = false;
  Reader reader(message);
  while (reader.next()) {
    if (reader.field != number) continue;
    if (reader.type != FieldType::LEN) return std::nullopt;
    const auto entry = read_entry(wire, reader.text());
    if (!entry) return std::nullopt;
    if (entry->name != task || (found && wire == Wire::NARSIL)) continue;  // of a map's equal keys the last counts
    found = true;
    count = entry->count;
  }
  if (reader.broken()) return std::nullopt;
  return count;
}

}  // namespace narsil::load
