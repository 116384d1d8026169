#include "native/decode.hpp"

#include <algorithm>
#include <limits>
#include <optional>
#include <type_traits>

#include "native/bytes.hpp"
#include "native/spans.hpp"

namespace narsil::native {
namespace {

using wire::FieldType;
using wire::Reader;

constexpr uint32_t INFINITE = 0x7F800000u;  // the bits of infinity; those of NaN are more

// The loops below have no early exit, so that compilers vectorise them.

bool all_finite(const uint8_t* at, size_t count) {
  uint32_t wrong = 0;
  for (size_t i = 0; i < count; ++i) wrong |= (load<uint32_t>(at + 4 * i) & INFINITE) == INFINITE;
  return !wrong;
}

// As all_finite, where NaN is a value of some columns.
bool all_values(const uint8_t* at, size_t rows, const std::vector<uint8_t>& takes_nan) {
  uint32_t wrong = 0;
  for (size_t row = 0; row < rows; ++row, at += 4 * takes_nan.size())
    for (size_t column = 0; column < takes_nan.size(); ++column) {
      const uint32_t size = load<uint32_t>(at + 4 * column) & 0x7FFFFFFFu;
      wrong |= (size == INFINITE) | ((size > INFINITE) & !takes_nan[column]);
    }
  return !wrong;
}

bool all_ones(const uint8_t* at, size_t count) {
  uint32_t wrong = 0;
  for (size_t i = 0; i < count; ++i) wrong |= load<uint32_t>(at + 4 * i) ^ 1u;
  return !wrong;
}

// The ids of a feature, as far as numbers of U's width can be such: those at most `span` above `least`, all of them
// read as unsigned.
template <class U>
struct Bounds {
  U least, span;

  Bounds(const Schema& schema, size_t feature) {
    using Signed = std::make_signed_t<U>;
    const int64_t low = std::max<int64_t>(schema.least[feature], std::numeric_limits<Signed>::min());
    const int64_t high = std::min<int64_t>(schema.rows[feature] - 1, std::numeric_limits<Signed>::max());
    least = static_cast<U>(low);
    span = static_cast<U>(static_cast<U>(high) - least);
  }

  bool miss(U id) const { return static_cast<U>(id - least) > span; }
};

template <class U>
bool all_inside(const uint8_t* at, size_t count, Bounds<U> bounds) {
  U wrong = 0;
  for (size_t i = 0; i < count; ++i) wrong |= bounds.miss(load<U>(at + sizeof(U) * i));
  return !wrong;
}

// One id a bag, by row, every id inside its table.
template <class U>
bool rows_inside(const uint8_t* at, size_t rows, const Schema& schema) {
  std::vector<Bounds<U>> bounds;
  for (size_t t = 0; t < schema.rows.size(); ++t) bounds.emplace_back(schema, t);
  U wrong = 0;
  for (size_t row = 0; row < rows; ++row, at += sizeof(U) * bounds.size())
    for (size_t t = 0; t < bounds.size(); ++t) wrong |= bounds[t].miss(load<U>(at + sizeof(U) * t));
  return !wrong;
}

// What the lengths add up to; nothing where one is below 0.
std::optional<uint64_t> sum_of(const uint8_t* at, size_t count) {
  uint32_t negative = 0;
  uint64_t sum = 0;
  for (size_t i = 0; i < count; ++i) {
    const uint32_t length = load<uint32_t>(at + 4 * i);
    negative |= length & 0x80000000u;
    sum += length;
  }
  if (negative) return std::nullopt;
  return sum;
}

// How many ids there are, by the lengths; false where the values are not that many. Where the message does not say how
// wide ids are, they are int32 unless only int64 makes them that many. A gRPC message has less than 2^32 bytes, so that
// 8 times the lengths' sum, each of less than 2^31, is no more than 64 bits hold.
bool count_ids(Decoded& found, size_t size, Span lengths, size_t bags, bool typed) {
  const bool may_be_one_each = size == 4 * bags || size == 8 * bags;
  found.one_hot = may_be_one_each && (!lengths.given || all_ones(lengths.data, bags));
  const std::optional<uint64_t> ids = found.one_hot ? bags : lengths.given ? sum_of(lengths.data, bags) : std::nullopt;
  if (!ids) return false;
  if (!typed) found.wide = *ids && size == 8 * *ids;
  found.ids = static_cast<int64_t>(*ids);
  return size == (found.wide ? 8 : 4) * *ids;
}

// Every id of every bag inside its table. Lengths have been found to add up.
template <class U>
bool bags_inside(const Decoded& found, const Schema& schema) {
  const uint8_t* values = found.values;
  const size_t features = schema.rows.size(), rows = static_cast<size_t>(found.rows);
  if (found.key_major) {
    for (size_t t = 0; t < features; ++t) {
      size_t count = 0;
      for (size_t row = 0; row < rows; ++row) count += load<uint32_t>(found.lengths + 4 * (t * rows + row));
      if (!all_inside<U>(values, count, {schema, t})) return false;
      values += sizeof(U) * count;
    }
    return true;
  }
  for (size_t bag = 0; bag < rows * features; ++bag) {
    const size_t count = load<uint32_t>(found.lengths + 4 * bag);
    if (!all_inside<U>(values, count, {schema, bag % features})) return false;
    values += sizeof(U) * count;
  }
  return true;
}

// One id a bag, by feature, every id inside its table.
template <class U>
bool columns_inside(const uint8_t* at, size_t rows, const Schema& schema) {
  for (size_t t = 0; t < schema.rows.size(); ++t, at += sizeof(U) * rows)
    if (!all_inside<U>(at, rows, {schema, t})) return false;
  return true;
}

}  // namespace

bool right(Decoded& found, Span dense, Span values, Span lengths, const Schema& schema, bool typed) {
  if (found.rows < 1 || found.rows > schema.max_rows) return false;
  const size_t rows = static_cast<size_t>(found.rows), features = schema.rows.size();
  if (dense.size != 4 * rows * static_cast<size_t>(schema.dense_dim)) return false;
  if (lengths.given && lengths.size != 4 * rows * features) return false;
  if (!(schema.takes_nan.empty() ? all_finite(dense.data, dense.size / 4)
                                 : all_values(dense.data, rows, schema.takes_nan)))
    return false;
  if (!count_ids(found, values.size, lengths, rows * features, typed) || found.ids > schema.max_ids) return false;
  found.dense = dense.data;
  found.values = values.data;
  found.lengths = lengths.given ? lengths.data : nullptr;
  if (!found.one_hot) return found.wide ? bags_inside<uint64_t>(found, schema) : bags_inside<uint32_t>(found, schema);
  if (found.key_major)
    return found.wide ? columns_inside<uint64_t>(values.data, rows, schema)
                      : columns_inside<uint32_t>(values.data, rows, schema);
  return found.wide ? rows_inside<uint64_t>(values.data, rows, schema)
                    : rows_inside<uint32_t>(values.data, rows, schema);
}

bool agreed(std::string_view& name, Span message, const std::string& metadata) {
  name = message.size ? message.text() : metadata;
  return metadata.empty() || name == metadata;
}

bool once(Span& place, const Reader& reader) {
  if (place.given) return false;
  place = {reader.data, reader.size, true};
  return true;
}

bool is_ascii(std::string_view text) {
  return std::none_of(text.begin(), text.end(), [](char byte) { return static_cast<uint8_t>(byte) >= 0x80; });
}

namespace {

// A FloatFeatures or SparseFeatures of TorchRec's wire: num_features, and up to three spans for fields 2 .. 4.
bool read_group(Span group, uint64_t& count, Span (&spans)[3]) {
  Reader reader(group.data, group.size);
  bool counted = false;
  while (reader.next()) {
    if (reader.field == 1 && reader.type == FieldType::VARINT && !counted) {
      counted = true;
      count = reader.number;
    } else if (reader.field < 2 || reader.field > 4 || reader.type != FieldType::LEN ||
               !once(spans[reader.field - 2], reader)) {
      return false;
    }
  }
  return !reader.broken();
}

bool is_empty_group(Span group) {
  uint64_t count = 0;
  Span spans[3];
  return read_group(group, count, spans) && count == 0 && !spans[0].size && !spans[1].size && !spans[2].size;
}

// Narsil's own SparseFeatures. Without num_features the portable decoder knows what is meant; it is no common form.
struct Ids {
  uint64_t features = 0;
  bool wide = false;
  Span values, lengths;
};

bool read_ids(Span sparse, Ids& ids) {
  bool counted = false, typed = false;
  Reader reader(sparse.data, sparse.size);
  while (reader.next()) {
    if (reader.field == 1 && reader.type == FieldType::VARINT && !counted) {
      counted = true;
      ids.features = reader.number;
    } else if (reader.field == 3 && reader.type == FieldType::VARINT && !typed && reader.number <= 1) {
      typed = true;
      ids.wide = reader.number == 1;
    } else if (reader.type != FieldType::LEN || (reader.field != 4 && reader.field != 5) ||
               !once(reader.field == 4 ? ids.values : ids.lengths, reader)) {
      return false;
    }
  }
  return counted && !reader.broken();
}

}  // namespace

Decoded decode_predictor(const uint8_t* data, size_t size, const ModelSet& models, const ModelName& named) {
  Decoded found;
  found.key_major = true;
  Span floats, ids, unused[3];
  bool counted = false;
  Reader reader(data, size);
  while (reader.next()) {
    if (reader.field == 1 && reader.type == FieldType::VARINT && !counted) {
      counted = true;
      if (reader.number > INT32_MAX) return found;
      found.rows = static_cast<int64_t>(reader.number);
    } else if (reader.type != FieldType::LEN) {
      return found;
    } else if (reader.field == 2 || reader.field == 3) {
      if (!once(reader.field == 2 ? floats : ids, reader)) return found;
    } else if (reader.field < 4 || reader.field > 6 || !once(unused[reader.field - 4], reader) ||
               !is_empty_group(unused[reader.field - 4])) {
      return found;
    }
  }
  if (reader.broken()) return found;
  uint64_t columns = 0, features = 0;
  Span dense[3], sparse[3];
  if (!read_group(floats, columns, dense) || !read_group(ids, features, sparse)) return found;
  const ModelPtr model = models.find(named.name, named.version);
  if (!model) return found;
  const Schema& schema = model->schema;
  if (columns != static_cast<uint64_t>(schema.dense_dim) || features != schema.rows.size()) return found;
  if (dense[1].given || dense[2].given || sparse[2].size || !sparse[0].given) return found;
  // Without batch_size the dense bytes tell it, as TorchRec's server has it. Where there are none, the portable decoder
  // knows what the lengths tell.
  if (found.rows == 0 && columns)
    found.rows = static_cast<int64_t>(std::min<size_t>(dense[0].size / (4 * columns), INT32_MAX));
  if (right(found, dense[0], sparse[1], sparse[0], schema, false)) found.model = model;
  return found;
}

Decoded decode_narsil(const uint8_t* data, size_t size, const ModelSet& models, const ModelName& named) {
  Decoded found;
  Span dense, sparse, name, version, id;
  bool counted = false;
  Reader reader(data, size);
  while (reader.next()) {
    if (reader.field == 4 && reader.type == FieldType::VARINT && !counted) {
      counted = true;
      if (reader.number > INT32_MAX) return found;
      found.rows = static_cast<int64_t>(reader.number);
    } else if (reader.type != FieldType::LEN) {
      return found;
    } else {
      Span* const places[] = {nullptr, &name, &version, &id, nullptr, &dense, &sparse};
      Span* const place = reader.field <= 6 ? places[reader.field] : nullptr;
      if (!place || !once(*place, reader)) return found;
    }
  }
  if (reader.broken()) return found;
  std::string_view model_name, model_version;
  if (!agreed(model_name, name, named.name) || !agreed(model_version, version, named.version)) return found;
  const ModelPtr model = models.find(model_name, model_version);
  if (!model) return found;
  if (!is_ascii(id.text())) return found;
  found.request_id = id.text();
  Ids ids;
  if (!read_ids(sparse, ids) || ids.features != model->schema.rows.size()) return found;
  found.wide = ids.wide;
  if (right(found, dense, ids.values, ids.lengths, model->schema, true)) found.model = model;
  return found;
}

}  // namespace narsil::native
