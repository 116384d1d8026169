#include "native/collate.hpp"

#include <algorithm>
#include <cstring>

#include "native/bytes.hpp"

namespace narsil::native {
namespace {

template <class In, class Out>
void copy(const uint8_t* from, size_t count, Out* to) {
  if constexpr (sizeof(In) == sizeof(Out)) {
    if (count) std::memcpy(to, from, count * sizeof(Out));  // a message of empty bags may have no ids to point at
  } else {
    for (size_t i = 0; i < count; ++i) to[i] = static_cast<Out>(load<In>(from + sizeof(In) * i));
  }
}

// A part's (T, B) ids into its columns of the batch's (T, rows).
template <class In, class Out>
void one_hot(const Decoded& part, size_t features, size_t rows, Out* to) {
  const size_t own = static_cast<size_t>(part.rows);
  if (part.key_major) {
    for (size_t t = 0; t < features; ++t) copy<In>(part.values + sizeof(In) * t * own, own, to + t * rows);
    return;
  }
  // Eight rows of the message at a time, so that what is written to one feature's row fills its cache line.
  for (size_t first = 0; first < own; first += 8) {
    const size_t past = std::min(first + 8, own);
    for (size_t t = 0; t < features; ++t)
      for (size_t row = first; row < past; ++row)
        to[t * rows + row] = static_cast<Out>(load<In>(part.values + sizeof(In) * (row * features + t)));
  }
}

// One feature of a jagged batch, part by part; returns where the next feature's values go.
template <class Out>
class Jagged {
 public:
  Jagged(const std::vector<const Decoded*>& parts, size_t rows, const Schema& schema, int32_t* lengths, Out* values)
      : parts_(parts), features_(schema.rows.size()), rows_(rows), lengths_(lengths), values_(values) {
    for (const Decoded* part : parts) starts_.push_back(bag_starts(*part));
  }

  void run() {
    for (size_t t = 0; t < features_; ++t) {
      int32_t* lengths = lengths_ + t * rows_;
      size_t row = 0;
      for (size_t p = 0; p < parts_.size(); ++p) {
        const Decoded& part = *parts_[p];
        part.wide ? append<int64_t>(part, starts_[p], t, lengths + row)
                  : append<int32_t>(part, starts_[p], t, lengths + row);
        row += static_cast<size_t>(part.rows);
      }
      std::fill(lengths + row, lengths + rows_, 0);
    }
  }

 private:
  static int32_t length(const Decoded& part, size_t bag) {
    return part.lengths ? load<int32_t>(part.lengths + 4 * bag) : 1;
  }

  // Where each feature (key-major) or bag (sample-major) begins in the part's values.
  std::vector<size_t> bag_starts(const Decoded& part) const {
    const size_t own = static_cast<size_t>(part.rows);
    std::vector<size_t> starts(part.key_major ? features_ : features_ * own);
    size_t at = 0;
    for (size_t i = 0; i < starts.size(); ++i) {
      starts[i] = at;
      if (!part.key_major) {
        at += static_cast<size_t>(length(part, i));
      } else {
        for (size_t row = 0; row < own; ++row) at += static_cast<size_t>(length(part, i * own + row));
      }
    }
    return starts;
  }

  template <class In>
  void append(const Decoded& part, const std::vector<size_t>& starts, size_t t, int32_t* lengths) {
    const size_t own = static_cast<size_t>(part.rows);
    if (part.key_major) {
      size_t count = 0;
      for (size_t row = 0; row < own; ++row) count += static_cast<size_t>(lengths[row] = length(part, t * own + row));
      put<In>(part, starts[t], count);
      return;
    }
    for (size_t row = 0; row < own; ++row) {
      const size_t bag = row * features_ + t;
      lengths[row] = length(part, bag);
      put<In>(part, starts[bag], static_cast<size_t>(lengths[row]));
    }
  }

  template <class In>
  void put(const Decoded& part, size_t start, size_t count) {
    copy<In>(part.values + sizeof(In) * start, count, values_);
    values_ += count;
  }

  const std::vector<const Decoded*>& parts_;
  const size_t features_, rows_;
  int32_t* const lengths_;
  Out* values_;
  std::vector<std::vector<size_t>> starts_;
};

template <class Out>
void ids(const std::vector<const Decoded*>& parts, size_t rows, const Schema& schema, const Tensors& tensors) {
  Out* const values = static_cast<Out*>(tensors.values);
  if (tensors.lengths) {
    Jagged<Out>(parts, rows, schema, tensors.lengths, values).run();
    return;
  }
  const size_t features = schema.rows.size();
  size_t row = 0;
  for (const Decoded* part : parts) {
    part->wide ? one_hot<int64_t>(*part, features, rows, values + row)
               : one_hot<int32_t>(*part, features, rows, values + row);
    row += static_cast<size_t>(part->rows);
  }
  for (size_t t = 0; t < features; ++t) std::fill(values + t * rows + row, values + (t + 1) * rows, Out{0});
}

}  // namespace

void collate(const std::vector<const Decoded*>& parts, int64_t rows, const Schema& schema, const Tensors& tensors) {
  float* dense = tensors.dense;
  for (const Decoded* part : parts) {
    const size_t count = static_cast<size_t>(part->rows * schema.dense_dim);
    if (count) std::memcpy(dense, part->dense, 4 * count);
    dense += count;
  }
  std::fill(dense, tensors.dense + rows * schema.dense_dim, 0.0f);
  schema.wide_ids ? ids<int64_t>(parts, static_cast<size_t>(rows), schema, tensors)
                  : ids<int32_t>(parts, static_cast<size_t>(rows), schema, tensors);
}

}  // namespace narsil::native
