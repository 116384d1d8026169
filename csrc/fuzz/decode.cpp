// Fuzzes the protobuf decoders, and the collation of what they find right.
//
// Input: one byte that chooses the schema and the wire, then the message.
#include <cstdint>
#include <vector>

#include "fuzz/require.hpp"
#include "native/bytes.hpp"
#include "native/collate.hpp"
#include "native/decode.hpp"

using namespace narsil;

namespace {

const Schema SCHEMAS[] = {
    {3, {50, 7, 1000, 20}, false, 60, 2000, "fake", "1"},
    {2, {5, int64_t{1} << 40}, true, 60, 2000, "fake", "1"},
    {0, {3}, false, 60, 2000, "", ""},
};

void require_inside(const uint8_t* span, size_t size, const std::vector<uint8_t>& message) {
  if (size) REQUIRE(span >= message.data() && span + size <= message.data() + message.size());
}

// Everything that a forward takes for granted, checked the slow way.
void require_right(const Decoded& found, const Schema& schema, const std::vector<uint8_t>& message) {
  const size_t rows = static_cast<size_t>(found.rows), features = schema.rows.size();
  const size_t ids = static_cast<size_t>(found.ids), width = found.wide ? 8 : 4;
  REQUIRE(found.rows >= 1 && found.rows <= schema.max_rows && found.ids >= 0 && found.ids <= schema.max_ids);
  require_inside(found.dense, 4 * rows * static_cast<size_t>(schema.dense_dim), message);
  require_inside(found.values, width * ids, message);
  if (found.lengths) require_inside(found.lengths, 4 * rows * features, message);
  REQUIRE(found.lengths || found.one_hot);
  size_t at = 0;
  for (size_t bag = 0; bag < rows * features; ++bag) {
    const size_t feature = found.key_major ? bag / rows : bag % features;
    const int32_t length = found.lengths ? load<int32_t>(found.lengths + 4 * bag) : 1;
    REQUIRE(length >= 0 && (!found.one_hot || length == 1));
    for (int32_t i = 0; i < length; ++i, ++at) {
      REQUIRE(at < ids);
      const int64_t id = found.wide ? load<int64_t>(found.values + 8 * at) : load<int32_t>(found.values + 4 * at);
      REQUIRE(id >= 0 && id < schema.rows[feature]);
    }
  }
  REQUIRE(at == ids);
}

template <class Out>
void fuse(const Call& call, const Schema& schema) {
  const Decoded& found = call.decoded;
  const size_t features = schema.rows.size();
  for (const size_t copies : {1, 3}) {
    const size_t rows = copies * static_cast<size_t>(found.rows) + copies,
                 ids = copies * static_cast<size_t>(found.ids);
    std::vector<float> dense(rows * static_cast<size_t>(schema.dense_dim));
    std::vector<Out> values(found.one_hot ? rows * features : ids);
    std::vector<int32_t> lengths(found.one_hot ? 0 : rows * features);
    const std::vector<const Call*> calls(copies, &call);
    collate(calls, static_cast<int64_t>(rows), schema,
            {dense.data(), values.data(), found.one_hot ? nullptr : lengths.data()});
    for (size_t bag = 0, at = 0; bag < rows * features; ++bag) {
      const int32_t length = found.one_hot ? 1 : lengths[bag];
      REQUIRE(length >= 0);
      for (int32_t i = 0; i < length; ++i, ++at) {
        REQUIRE(at < values.size());
        REQUIRE(values[at] >= 0 && values[at] < schema.rows[bag / rows]);
      }
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (!size) return 0;
  const Schema& schema = SCHEMAS[(data[0] >> 1) % 3];
  const std::vector<uint8_t> message(data + 1, data + size);  // of its own, so that a byte too far is noticed
  Call call;
  call.decoded = data[0] & 1 ? decode_narsil(message.data(), message.size(), schema)
                             : decode_predictor(message.data(), message.size(), schema);
  if (!call.decoded.valid) return 0;
  require_right(call.decoded, schema, message);
  schema.wide_ids ? fuse<int64_t>(call, schema) : fuse<int32_t>(call, schema);
  return 0;
}
