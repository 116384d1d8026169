// Fuses requests into a batch's tensors, straight from their messages.
#pragma once

#include "native/call.hpp"

namespace narsil {

// Where a batch's tensors are. B rows of all requests and the padding, T features, N ids in all.
struct Tensors {
  float* dense;      // (B, D)
  void* values;      // (N,) int32 or int64 by Schema::wide_ids, key-major
  int32_t* lengths;  // (T * B,) key-major; null for a batch of one id a bag
};

// Row i of call c becomes row `sum of rows before c` + i. Padding rows follow: zeros, and the id 0 in a one-hot batch
// or empty bags in a jagged one. Every call is valid and the tensors have room for them and `rows` >= all their rows.
void collate(const std::vector<const Call*>& calls, int64_t rows, const Schema& schema, const Tensors& tensors);

}  // namespace narsil
