// Fuses requests into a batch's tensors, straight from their messages.
#pragma once

#include "native/decode.hpp"

namespace narsil::native {

// Where a batch's tensors are. B rows of all requests and the padding, T features, N ids in all.
struct Tensors {
  float* dense;      // (B, D)
  void* values;      // (N,) int32 or int64 by Schema::wide_ids, key-major
  int32_t* lengths;  // (T * B,) key-major; null for a batch of one id a bag
};

// Row i of part p becomes row `sum of rows before p` + i. Padding rows follow: zeros, and the id 0 in a one-hot batch
// or empty bags in a jagged one. Every part has been held against this schema, and the tensors have room for them and
// `rows` >= all their rows.
void collate(const std::vector<const Decoded*>& parts, int64_t rows, const Schema& schema, const Tensors& tensors);

}  // namespace narsil::native
