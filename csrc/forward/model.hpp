// What the forward is given: a model, whose arrays the caller owns and maps, and rows. backends/fused.py has the same
// structures; narsil_forward_version changes whenever they do.
#pragma once

// GCC 12 takes the intrinsics' own undefined vectors for reads of uninitialized ones, wherever they are inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>

namespace narsil {

enum Kind : int64_t { FP32, BF16, INT16, INT8 };
enum Status : int { OK, BAD_ID, BAD_LENGTHS, BAD_STEP };

// One linear layer. Weights are panels of 32 outputs; a panel holds, for each dword of the input (1 float, 2 bfloat16
// or int16, 4 bytes), the 32 outputs' dwords one after the other. All arrays are padded with zeros to whole panels. In
// the logit's layer, weights are (in up to a multiple of 16,) floats.
struct Layer {
  int64_t in;
  int64_t out;
  int64_t kind;
  int64_t shift;          // int8: added to the input's integers, 128 where they may be negative and else 0
  int64_t levels;         // int8, int16: the integer that a row's largest number becomes
  const void* weights;    // (panels, dwords of the input, 32)
  const float* bias;      // (panels * 32,)
  const float* scale;     // (panels * 32,) int8, int16: what one step of a weight is worth
  const int32_t* excess;  // (panels * 32,) int8, int16: shift times the sum of the output's weights
};

struct Model {
  int64_t dense_columns;
  int64_t tables;
  int64_t dim;
  int64_t row_bytes;
  int64_t dense_layers;
  int64_t over_layers;  // the last one, of one output in fp32, gives the logit
  int64_t width;        // floats that a row needs where it is widest, a multiple of 64
  int64_t tile_rows;    // at most; a batch is cut into tiles of equal size
  const Layer* layers;  // dense, then over
  const uint8_t* table_bytes;
  const int64_t* table_starts;  // (tables,) bytes
  const int64_t* table_rows;    // (tables,)
  const uint8_t* mean;          // (tables,) whether bags are averaged
};

struct Rows {
  int64_t rows;
  int64_t values_count;
  int64_t wide_ids;        // whether ids are int64, else int32
  const float* dense;      // (rows, dense_columns)
  const void* values;      // (values_count,) key-major
  const int32_t* lengths;  // (tables * rows,) key-major; null where every bag holds one id
};

// Functions of these files stay inside their translation unit, so that the compiler sees all of their calls: which of
// them it inlines decides the speed.
namespace {

constexpr int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

}  // namespace
}  // namespace narsil
