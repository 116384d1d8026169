// Fuzzes the protobuf decoders, and the collation of what they find right.
//
// Input: one byte that chooses the wire (bit 0, and bit 7: the Open Inference Protocol), the usual model (bits 1 to 3)
// and what the metadata names (bits 4 to 6), then the message.
#include <cmath>
#include <cstdint>
#include <iterator>
#include <vector>

#include "fuzz/require.hpp"
#include "native/bytes.hpp"
#include "native/collate.hpp"
#include "native/decode.hpp"

using namespace narsil::native;

namespace {

ModelPtr model(const char* name, Schema schema, const std::vector<std::string>& features) {
  return std::make_shared<const Model>(Model{name, "1", std::move(schema), Places(features), {"a", "b"}});
}

// The input's first byte says which is meant where nothing is named, and what the metadata names.
const std::vector<ModelPtr> MODELS = {
    model("fake", {3, {}, {50, 7, 1000, 20}, {0, -5, 0, INT32_MIN}, false, 60, 2000}, {"f", "g", "h", "i"}),
    model("wide", {2, {0, 1}, {5, int64_t{1} << 40}, {0, INT64_MIN}, true, 60, 2000}, {"f", "g"}),
    model("one", {0, {}, {3}, {0}, false, 60, 2000}, {"f"}),
};

const ModelName NAMES[] = {{"", ""}, {"fake", ""}, {"wide", "1"}, {"", "2"}, {"none", ""}};

bool inside(const uint8_t* span, size_t size, const uint8_t* whole, size_t whole_size) {
  return span >= whole && span + size <= whole + whole_size;
}

// Everything that a forward takes for granted, checked the slow way.
void require_right(const Decoded& found, const std::vector<uint8_t>& message) {
  const Schema& schema = found.model->schema;
  const size_t rows = static_cast<size_t>(found.rows), features = schema.rows.size();
  const size_t ids = static_cast<size_t>(found.ids), width = found.wide ? 8 : 4;
  REQUIRE(found.rows >= 1 && found.rows <= schema.max_rows && found.ids >= 0 && found.ids <= schema.max_ids);
  const auto require_there = [&](const uint8_t* span, size_t size) {
    REQUIRE(!size || inside(span, size, message.data(), message.size()) ||
            inside(span, size, found.own.get(), found.own_size));
  };
  const size_t columns = static_cast<size_t>(schema.dense_dim);
  require_there(found.dense, 4 * rows * columns);
  for (size_t i = 0; i < rows * columns; ++i) {
    const float value = load<float>(found.dense + 4 * i);
    REQUIRE(std::isfinite(value) || (std::isnan(value) && !schema.takes_nan.empty() && schema.takes_nan[i % columns]));
  }
  require_there(found.values, width * ids);
  if (found.lengths) require_there(found.lengths, 4 * rows * features);
  REQUIRE(found.own_size <= 3 * message.size());  // int32 as int64, and lengths
  for (const uint32_t task : found.outputs) REQUIRE(task < found.model->tasks.size());
  REQUIRE(found.lengths || found.one_hot);
  size_t at = 0;
  for (size_t bag = 0; bag < rows * features; ++bag) {
    const size_t feature = found.key_major ? bag / rows : bag % features;
    const int32_t length = found.lengths ? load<int32_t>(found.lengths + 4 * bag) : 1;
    REQUIRE(length >= 0 && (!found.one_hot || length == 1));
    for (int32_t i = 0; i < length; ++i, ++at) {
      REQUIRE(at < ids);
      const int64_t id = found.wide ? load<int64_t>(found.values + 8 * at) : load<int32_t>(found.values + 4 * at);
      REQUIRE(id >= schema.least[feature] && id < schema.rows[feature]);
    }
  }
  REQUIRE(at == ids);
}

template <class Out>
void fuse(const Decoded& found) {
  const Schema& schema = found.model->schema;
  const size_t features = schema.rows.size();
  for (const size_t copies : {1, 3}) {
    const size_t rows = copies * static_cast<size_t>(found.rows) + copies,
                 ids = copies * static_cast<size_t>(found.ids);
    std::vector<float> dense(rows * static_cast<size_t>(schema.dense_dim));
    std::vector<Out> values(found.one_hot ? rows * features : ids);
    std::vector<int32_t> lengths(found.one_hot ? 0 : rows * features);
    const std::vector<const Decoded*> parts(copies, &found);
    collate(parts, static_cast<int64_t>(rows), schema,
            {dense.data(), values.data(), found.one_hot ? nullptr : lengths.data()});
    for (size_t bag = 0, at = 0; bag < rows * features; ++bag) {
      const int32_t length = found.one_hot ? 1 : lengths[bag];
      REQUIRE(length >= 0);
      for (int32_t i = 0; i < length; ++i, ++at) {
        REQUIRE(at < values.size());
        REQUIRE(values[at] >= schema.least[bag / rows] && values[at] < schema.rows[bag / rows]);
      }
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (!size) return 0;
  const ModelSet models(MODELS, (data[0] >> 1 & 7) % MODELS.size());
  const ModelName& named = NAMES[(data[0] >> 4 & 7) % std::size(NAMES)];
  const std::vector<uint8_t> message(data + 1, data + size);  // of its own, so that a byte too far is noticed
  const auto decode = data[0] & 0x80 ? decode_oip : data[0] & 1 ? decode_narsil : decode_predictor;
  const Decoded found = decode(message.data(), message.size(), models, named);
  if (!found.model) return 0;
  REQUIRE(named.name.empty() || named.name == found.model->name);
  REQUIRE(named.version.empty() || named.version == found.model->version);
  require_right(found, message);
  found.model->schema.wide_ids ? fuse<int64_t>(found) : fuse<int32_t>(found);
  return 0;
}
