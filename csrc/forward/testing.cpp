// The forward's kernels and their references, for the tests to call one by one; no part of a compiled folder.
//
// Buffers are as the forward's own: rows `width` floats apart (a multiple of 64), zeros after a layer's inputs up to a
// multiple of 32.

#include "forward.cpp"  // all of it, so that the kernels are compiled as they are there
#include "reference.hpp"

namespace narsil {
namespace {

// The forward without tiles: one row after another, each with scratch memory of its own. What it must agree with to the
// bit, whatever tile, block and neighbours a row has.
template <class Id>
int row_by_row(const Model& model, const Rows& rows, float* scores) {
  const Layer *layers = model.layers, *over = layers + model.dense_layers;
  const int64_t dim = up(model.dim, 16), columns = model.dim + model.tables * (model.tables + 1) / 2;
  const Id* ids = static_cast<const Id*>(rows.values);
  for (int64_t row = 0; row < rows.rows; ++row) {
    std::vector<float> in(static_cast<size_t>(model.width)), out(in),
        vectors(static_cast<size_t>(vector_floats(model)));
    std::vector<uint32_t> codes(in.size());
    float step;
    std::copy_n(rows.dense + row * model.dense_columns, model.dense_columns, in.data());
    for (int64_t layer = 0; layer < model.dense_layers; ++layer, std::swap(in, out))
      run_layer(layers[layer], in.data(), codes.data(), &step, 1, model.width, out.data());
    std::copy_n(in.data(), model.dim, vectors.data());
    for (int64_t table = 0, number = 0, start = 0; table < model.tables; ++table)
      for (int64_t other = 0; other < rows.rows; ++other, ++number) {
        const int64_t count = rows.lengths ? rows.lengths[number] : 1;
        if (other == row && !pool(model, table, ids + start, count, vectors.data() + (table + 1) * dim)) return BAD_ID;
        start += count;
      }
    std::fill(out.begin(), out.end(), 0.0f);
    std::copy_n(in.data(), model.dim, out.data());
    interact(vectors.data(), model.tables + 1, dim, out.data() + model.dim);
    std::fill(out.begin() + columns, out.end(), 0.0f);
    std::swap(in, out);
    for (int64_t layer = 0; layer + 1 < model.over_layers; ++layer, std::swap(in, out))
      run_layer(over[layer], in.data(), codes.data(), &step, 1, model.width, out.data());
    scores[row] = 1.0f / (1.0f + std::exp(-logit_of(over[model.over_layers - 1], in.data())));
  }
  return OK;
}

}  // namespace

extern "C" {

// relu(in . weights + bias) of (rows, width) floats, by the kernel.
void narsil_test_layer(const Layer* layer, const float* in, int64_t rows, int64_t width, float* out) {
  std::vector<uint32_t> codes(static_cast<size_t>(rows * width));
  std::vector<float> steps(static_cast<size_t>(rows));
  run_layer(*layer, in, codes.data(), steps.data(), rows, width, out);
}

// (rows, out) by the reference; magnitude is null in the integer kinds, which have no rounding to bound.
void narsil_reference_layer(const Layer* layer, const float* in, int64_t rows, int64_t width, double* out,
                            double* magnitude) {
  std::vector<float> exact(static_cast<size_t>(layer->out));
  for (int64_t row = 0; row < rows; ++row, in += width, out += layer->out) {
    if (magnitude) {
      reference::floating_layer(*layer, in, out, magnitude + row * layer->out);
    } else {
      reference::integer_layer(*layer, in, exact.data());
      std::copy(exact.begin(), exact.end(), out);
    }
  }
}

// A row's input in a layer's own kind, (in,) integers or the bits of bfloat16, and its step (0 in bf16), by the kernel.
// codes: what the kernel writes, in rooms of the kind's size.
float narsil_test_codes(const Layer* layer, const float* in, void* codes) {
#ifdef __AVX512VNNI__
  if (layer->kind == INT8) return to_int8(in, *layer, static_cast<uint8_t*>(codes));
  if (layer->kind == INT16) return to_int16(in, *layer, static_cast<int16_t*>(codes));
#endif
#ifdef __AVX512BF16__
  if (layer->kind == BF16) to_bf16(in, layer->in, static_cast<uint32_t*>(codes));
#endif
  return 0;
}

float narsil_reference_codes(const Layer* layer, const float* in, int32_t* codes) {
  if (layer->kind != BF16) return reference::to_integers(in, *layer, codes);
  for (int64_t i = 0; i < layer->in; ++i) codes[i] = reference::to_bf16(in[i]);
  return 0;
}

float narsil_test_logit(const Layer* layer, const float* in) { return logit_of(*layer, in); }

double narsil_reference_logit(const Layer* layer, const float* in, double* magnitude) {
  const reference::Sum sum = reference::logit(*layer, in);
  *magnitude = sum.magnitude;
  return sum.value;
}

// (count, stride) vectors, of which dim columns are not zero; stride is a multiple of 16.
void narsil_test_interact(const float* vectors, int64_t count, int64_t stride, float* out) {
  interact(vectors, count, stride, out);
}

void narsil_reference_interact(const float* vectors, int64_t count, int64_t dim, int64_t stride, double* out,
                               double* magnitude) {
  reference::interact(vectors, count, dim, stride, out, magnitude);
}

// (dim up to a multiple of 16,) floats of one bag; 0 where an id is outside of the table.
int narsil_test_pool(const Model* model, int64_t table, const void* ids, int64_t count, int64_t wide, float* out) {
  return wide ? pool(*model, table, static_cast<const int64_t*>(ids), count, out)
              : pool(*model, table, static_cast<const int32_t*>(ids), count, out);
}

int narsil_reference_pool(const Model* model, int64_t table, const void* ids, int64_t count, int64_t wide, double* out,
                          double* magnitude) {
  return wide ? reference::pool(*model, table, static_cast<const int64_t*>(ids), count, out, magnitude)
              : reference::pool(*model, table, static_cast<const int32_t*>(ids), count, out, magnitude);
}

int narsil_test_row_by_row(const Model* model, const Rows* rows, float* scores) {
  return rows->wide_ids ? row_by_row<int64_t>(*model, *rows, scores) : row_by_row<int32_t>(*model, *rows, scores);
}

}  // extern "C"

}  // namespace narsil
