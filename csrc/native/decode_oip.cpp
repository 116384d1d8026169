// The Open Inference Protocol's ModelInferRequest: named tensors, each beside its raw bytes.
#include <algorithm>
#include <optional>

#include "native/bytes.hpp"
#include "native/spans.hpp"

namespace narsil::native {
namespace {

using wire::FieldType;
using wire::Reader;

constexpr size_t MAX_FIELDS = 10'000;  // of a message and all that it holds, as narsil.wire has it

struct Tensor {
  bool integers = false;  // else FP32
  bool wide = false;      // of 8 bytes each
  size_t rank = 0;        // 0: the tensor is not there
  uint64_t sizes[2] = {};
  Span raw;

  bool given() const { return rank > 0; }
  bool is(uint64_t first) const { return rank == 1 && sizes[0] == first; }
  bool is(uint64_t first, uint64_t second) const { return rank == 2 && sizes[0] == first && sizes[1] == second; }
  size_t count() const { return raw.size / (wide ? 8 : 4); }

  // Whether the bytes are as many numbers as the shape says.
  bool whole() const {
    if (!given() || raw.size % (wide ? 8 : 4)) return false;
    const uint64_t across = rank == 2 ? sizes[1] : 1;
    if (across == 0) return count() == 0;
    return count() % across == 0 && count() / across == sizes[0];
  }
};

// Ids of all features or of one: IDS alone, or VALUES with LENGTHS.
struct Ids {
  Tensor parts[3];

  bool any() const { return parts[0].given() || parts[1].given() || parts[2].given(); }
  bool alone() const { return parts[Place::IDS].given() && !parts[Place::VALUES].given() && !lengths().given(); }
  bool bags() const { return !parts[Place::IDS].given() && parts[Place::VALUES].given() && lengths().given(); }
  const Tensor& values() const { return parts[parts[Place::IDS].given() ? Place::IDS : Place::VALUES]; }
  const Tensor& lengths() const { return parts[Place::LENGTHS]; }
};

// The message, in pieces.
struct Message {
  Span name, version, id;
  std::vector<Span> inputs, outputs, raws;
  size_t fields = 0;
};

bool read_message(const uint8_t* data, size_t size, Message& message) {
  Reader reader(data, size);
  while (reader.next()) {
    if (reader.type != FieldType::LEN || ++message.fields > MAX_FIELDS) return false;
    const Span span{reader.data, reader.size, true};
    switch (reader.field) {
      case 1:
        if (!once(message.name, reader)) return false;
        break;
      case 2:
        if (!once(message.version, reader)) return false;
        break;
      case 3:
        if (!once(message.id, reader)) return false;
        break;
      case 5:
        message.inputs.push_back(span);
        break;
      case 6:
        message.outputs.push_back(span);
        break;
      case 7:
        message.raws.push_back(span);
        break;
      default:
        return false;  // parameters, or nothing that is known
    }
  }
  return !reader.broken() && message.raws.size() == message.inputs.size();
}

bool add_size(Tensor& tensor, uint64_t size) {
  if (tensor.rank == 2) return false;
  tensor.sizes[tensor.rank++] = size;
  return true;
}

// Varints end to end.
bool add_sizes(Tensor& tensor, Span packed) {
  uint64_t size = 0;
  unsigned shift = 0;
  for (size_t i = 0; i < packed.size; ++i) {
    const uint8_t byte = packed.data[i];
    if (shift > 63) return false;
    size |= static_cast<uint64_t>(byte & 0x7F) << shift;
    shift += 7;
    if (byte >= 0x80) continue;
    if (!add_size(tensor, size)) return false;
    size = 0;
    shift = 0;
  }
  return shift == 0;
}

// An InferInputTensor: its name, and the rest.
bool read_input(Span input, Span& name, Tensor& tensor, size_t& fields) {
  Span datatype;
  Reader reader(input.data, input.size);
  while (reader.next()) {
    if (++fields > MAX_FIELDS) return false;
    if (reader.is(3, FieldType::VARINT)) {
      if (!add_size(tensor, reader.number)) return false;
    } else if (reader.type != FieldType::LEN) {
      return false;
    } else if (reader.field == 3) {
      if (!add_sizes(tensor, {reader.data, reader.size, true})) return false;
    } else if (reader.field > 2 || !once(reader.field == 1 ? name : datatype, reader)) {
      return false;
    }
  }
  tensor.wide = datatype.text() == "INT64";
  tensor.integers = tensor.wide || datatype.text() == "INT32";
  return !reader.broken() && (tensor.integers || datatype.text() == "FP32");
}

// The tensors of a request, where each belongs.
struct Inputs {
  Tensor dense;
  std::optional<Place::Form> form;  // of the ids
  Ids shared;                       // of every form but FEATURES
  std::vector<Ids> features;        // (T,) of FEATURES
};

bool place_inputs(const Message& message, const Model& model, size_t& fields, Inputs& found) {
  const size_t features = model.schema.rows.size();
  if (message.inputs.size() > 1 + 2 * features) return false;
  for (size_t i = 0; i < message.inputs.size(); ++i) {
    Span name;
    Tensor tensor;
    if (!read_input(message.inputs[i], name, tensor, fields)) return false;
    tensor.raw = message.raws[i];
    const Place* const place = model.places.find(name.text());
    if (!place || !tensor.whole()) return false;
    Tensor* where = &found.dense;
    if (place->form != Place::DENSE) {
      if (found.form.value_or(place->form) != place->form || !tensor.integers) return false;
      found.form = place->form;
      if (place->form == Place::FEATURES) found.features.resize(features);
      where = &(place->form == Place::FEATURES ? found.features[place->feature] : found.shared).parts[place->part];
    } else if (tensor.integers) {
      return false;
    }
    if (where->given()) return false;
    *where = tensor;
  }
  return found.form.has_value() && found.dense.given() == (model.schema.dense_dim > 0);
}

bool read_outputs(const Message& message, const Model& model, size_t& fields, std::vector<uint32_t>& outputs) {
  if (message.outputs.size() > model.tasks.size()) return false;
  for (const Span& output : message.outputs) {
    Span name;
    Reader reader(output.data, output.size);
    while (reader.next())
      if (++fields > MAX_FIELDS || !reader.is(1, FieldType::LEN) || !once(name, reader)) return false;
    const auto task = std::find(model.tasks.begin(), model.tasks.end(), name.text());
    if (reader.broken() || task == model.tasks.end()) return false;
    const auto place = static_cast<uint32_t>(task - model.tasks.begin());
    if (std::find(outputs.begin(), outputs.end(), place) != outputs.end()) return false;
    outputs.push_back(place);
  }
  return true;
}

// How many rows the inputs say there are.
uint64_t rows_of(const Inputs& inputs, size_t features) {
  if (inputs.dense.given()) return inputs.dense.sizes[0];
  if (inputs.form == Place::FEATURES) {
    const Ids& first = inputs.features.front();
    return first.lengths().given() ? first.lengths().sizes[0] : first.values().sizes[0];
  }
  if (inputs.form == Place::LISTS || inputs.form == Place::SCORE_LISTS)
    return inputs.shared.lengths().count() / features;
  return inputs.form == Place::BY_ROW ? inputs.shared.values().sizes[0] : inputs.shared.lengths().sizes[0];
}

// (lengths,) int32 of a tensor of either width, and what they add up to; nothing where one is none.
std::optional<uint64_t> narrow(const Tensor& lengths, uint8_t* to) {
  uint64_t sum = 0, outside = 0;
  for (size_t i = 0; i < lengths.count(); ++i) {
    const uint64_t length =
        lengths.wide ? load<uint64_t>(lengths.raw.data + 8 * i) : load<uint32_t>(lengths.raw.data + 4 * i);
    const auto kept = static_cast<uint32_t>(length);
    std::memcpy(to + 4 * i, &kept, sizeof kept);
    outside |= length & ~uint64_t{INT32_MAX};
    sum += length & INT32_MAX;
  }
  if (outside) return std::nullopt;
  return sum;
}

// Room for ids and lengths beside the message; lengths come after.
uint8_t* make_room(Decoded& found, size_t size) {
  found.own = std::shared_ptr<uint8_t[]>(new uint8_t[size]);
  found.own_size = size;
  return found.own.get();
}

// Ids of all features together.
bool read_shared(Decoded& found, const Inputs& inputs, const Schema& schema) {
  const uint64_t rows = static_cast<uint64_t>(found.rows), features = schema.rows.size();
  const Ids& ids = inputs.shared;
  const Tensor& values = ids.values();
  found.wide = values.wide;
  if (inputs.form == Place::BY_ROW)
    return values.is(rows, features) && right(found, inputs.dense.raw, values.raw, {}, schema, true);
  found.key_major = inputs.form != Place::BAGS;
  const Tensor& lengths = ids.lengths();
  if (!ids.bags() || values.rank != 1) return false;
  if (!(found.key_major ? lengths.is(features * rows) || lengths.is(features, rows) : lengths.is(rows, features)))
    return false;
  Span counts = lengths.raw;
  if (lengths.wide) {
    counts = {make_room(found, 4 * lengths.count()), 4 * lengths.count(), true};
    if (!narrow(lengths, found.own.get())) return false;
  }
  return right(found, inputs.dense.raw, values.raw, counts, schema, true);
}

template <class Out>
uint8_t* put_values(const Tensor& values, uint8_t* to) {
  if (values.wide == (sizeof(Out) == 8)) {
    if (values.raw.size) std::memcpy(to, values.raw.data, values.raw.size);
    return to + values.raw.size;
  }
  for (size_t i = 0; i < values.count(); ++i, to += sizeof(Out)) {
    const Out value = load<int32_t>(values.raw.data + 4 * i);
    std::memcpy(to, &value, sizeof value);
  }
  return to;
}

// (rows,) lengths of one feature's bags; false where they do not add up to its ids.
bool put_lengths(const Ids& ids, size_t rows, uint8_t* to) {
  const size_t count = ids.values().count();
  if (ids.lengths().given()) return narrow(ids.lengths(), to) == count;
  const auto each = static_cast<int32_t>(count / rows);
  for (size_t row = 0; row < rows; ++row) std::memcpy(to + 4 * row, &each, sizeof each);
  return true;
}

// A tensor, or two, for each feature: laid end to end, key-major. Where all have one id for each row, without lengths.
bool read_features(Decoded& found, const Inputs& inputs, const Schema& schema) {
  const size_t rows = static_cast<size_t>(found.rows), features = schema.rows.size();
  size_t count = 0;
  bool one_each = true;
  for (const Ids& ids : inputs.features) {
    const Tensor& values = ids.values();
    if (ids.alone()) {
      // A bag without a number in the message would let a few bytes ask for lengths without end.
      if (values.sizes[0] != rows || !values.count()) return false;
    } else if (!ids.bags() || values.rank != 1 || !ids.lengths().is(rows)) {
      return false;
    }
    found.wide |= values.wide;
    one_each &= ids.alone() && values.count() == rows;
    count += values.count();
  }
  if (count > static_cast<size_t>(schema.max_ids)) return false;
  const size_t values_size = count * (found.wide ? 8 : 4), lengths_size = one_each ? 0 : 4 * rows * features;
  uint8_t* at = make_room(found, values_size + lengths_size);
  const Span values{at, values_size, true};
  for (const Ids& ids : inputs.features)
    at = found.wide ? put_values<int64_t>(ids.values(), at) : put_values<int32_t>(ids.values(), at);
  const Span lengths{at, lengths_size, !one_each};
  for (size_t t = 0; t < features && !one_each; ++t, at += 4 * rows)
    if (!put_lengths(inputs.features[t], rows, at)) return false;
  found.key_major = true;
  return right(found, inputs.dense.raw, values, lengths, schema, true);
}

}  // namespace

Places::Places(const std::vector<std::string>& features) {
  places_ = {{"dense", {Place::DENSE, {}}},
             {"float_features", {Place::DENSE, {}}},
             {"ids", {Place::BY_ROW, Place::IDS}},
             {"ids.values", {Place::BAGS, Place::VALUES}},
             {"ids.lengths", {Place::BAGS, Place::LENGTHS}},
             {"id_list_features.values", {Place::LISTS, Place::VALUES}},
             {"id_list_features.lengths", {Place::LISTS, Place::LENGTHS}},
             {"id_score_list_features.values", {Place::SCORE_LISTS, Place::VALUES}},
             {"id_score_list_features.lengths", {Place::SCORE_LISTS, Place::LENGTHS}}};
  const auto ends = [](const std::string& name, std::string_view with) {
    return name.size() >= with.size() && name.compare(name.size() - with.size(), with.size(), with) == 0;
  };
  bool alike = false;
  for (uint32_t t = 0; t < features.size(); ++t) {
    alike |= ends(features[t], ".values") || ends(features[t], ".lengths") || ends(features[t], ".weights");
    alike |= !places_.insert({features[t], {Place::FEATURES, Place::IDS, t}}).second;
    alike |= !places_.insert({features[t] + ".values", {Place::FEATURES, Place::VALUES, t}}).second;
    alike |= !places_.insert({features[t] + ".lengths", {Place::FEATURES, Place::LENGTHS, t}}).second;
  }
  // Which of them is meant is for the portable decoder to say.
  if (alike) places_.clear();
}

Decoded decode_oip(const uint8_t* data, size_t size, const ModelSet& models, const ModelName& named) {
  Decoded found;
  Message message;
  if (!read_message(data, size, message)) return found;
  std::string_view name, version;
  if (!agreed(name, message.name, named.name) || !agreed(version, message.version, named.version)) return found;
  const ModelPtr model = models.find(name, version);
  if (!model || model->schema.rows.empty() || !is_ascii(message.id.text())) return found;
  const Schema& schema = model->schema;
  Inputs inputs;
  if (!place_inputs(message, *model, message.fields, inputs)) return found;
  if (!read_outputs(message, *model, message.fields, found.outputs)) return found;
  const uint64_t rows = rows_of(inputs, schema.rows.size());
  if (rows < 1 || rows > static_cast<uint64_t>(schema.max_rows)) return found;
  if (schema.dense_dim && !inputs.dense.is(rows, static_cast<uint64_t>(schema.dense_dim))) return found;
  found.rows = static_cast<int64_t>(rows);
  found.request_id = message.id.text();
  const bool read =
      inputs.form == Place::FEATURES ? read_features(found, inputs, schema) : read_shared(found, inputs, schema);
  if (!read) return {};  // with what was copied
  found.model = model;
  return found;
}

}  // namespace narsil::native
