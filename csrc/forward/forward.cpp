// A DLRM's forward for x86 processors with AVX-512: rows in, scores out, one tile of rows at a time.
//
// Receives a Model (tables as FBGEMM lays out INT8 rows, weights as compile/packing.py packs them) and a batch of rows;
// writes one score per row. Owns nothing: weights and tables are mapped by the caller and shared by all lanes, scratch
// memory is a lane's own. `narsil compile` builds this file for the processor at hand; the server loads the result
// through ctypes, which lets go of the GIL.
//
// A tile's rows go through all parts before the next tile begins, so that what passes between parts stays in cache:
//
//     dense arch -> per row: lookup, pooling, dot products -> over arch -> sigmoid
//
// A row's score is the same bits whatever rows stand beside it: every row sums in the same order, whichever tile and
// block it falls in. Floats are not reassociated (no -ffast-math) for that reason.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <ctime>
#include <utility>

#include "interaction.hpp"
#include "linear.hpp"
#include "lookup.hpp"
#include "model.hpp"
#include "program.hpp"

namespace narsil {
namespace {

enum Part { LOOKUP, DENSE, INTERACTION, OVER, REST };  // of a forward, as its time is told

struct Clock {
  double* parts;  // null: nothing is measured
  double last = now();
  static double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }
  void end(Part part) {
    if (!parts) return;
    const double at = now();
    parts[part] += at - last;
    last = at;
  }
};

// A lane's scratch memory, cut up.
struct Scratch {
  float* first;     // (tile_rows, width)
  float* second;    // (tile_rows, width)
  uint32_t* codes;  // (tile_rows, width) of 2 bytes at most: a layer's input in its own kind
  float* steps;     // (tile_rows,)
  float* vectors;   // (tables + 1 up to a multiple of 4, dim up to a multiple of 16)
  int64_t* starts;  // (tables * rows,) where each bag begins
};

int64_t vector_floats(const Model& model) { return up(model.tables + 1, 4) * up(model.dim, 16); }

Scratch cut(const Model& model, void* memory) {
  float* at = static_cast<float*>(memory);
  Scratch scratch;
  scratch.first = at;
  scratch.second = at += model.tile_rows * model.width;
  scratch.codes = reinterpret_cast<uint32_t*>(at += model.tile_rows * model.width);
  scratch.steps = at += model.tile_rows * model.width / 2;
  scratch.vectors = at += up(model.tile_rows, 16);
  scratch.starts = reinterpret_cast<int64_t*>(at + vector_floats(model));
  return scratch;
}

template <class Id>
int64_t bag(const Rows& rows, const Scratch& scratch, int64_t table, int64_t row, const Id** ids) {
  const int64_t number = table * rows.rows + row;
  *ids = static_cast<const Id*>(rows.values) + (rows.lengths ? scratch.starts[number] : number);
  return rows.lengths ? rows.lengths[number] : 1;
}

// Asks for the table rows of the first ids in each of a row's bags.
template <class Id>
void fetch(const Model& model, const Rows& rows, const Scratch& scratch, int64_t row) {
  for (int64_t table = 0; table < model.tables; ++table) {
    const Id* ids;
    const int64_t count = std::min(bag(rows, scratch, table, row, &ids), IDS_AHEAD);
    for (int64_t n = 0; n < count; ++n)
      ask(model.table_bytes + model.table_starts[table] + static_cast<int64_t>(ids[n]) * model.row_bytes, model);
  }
}

template <class Id>
int tile(const Model& model, const Rows& rows, const Scratch& scratch, int64_t start, int64_t count, Clock& clock,
         float* scores) {
  const int64_t width = model.width, dim = up(model.dim, 16);
  float *in = scratch.first, *out = scratch.second;
  for (int64_t row = 0; row < count; ++row) {
    float* at = in + row * width;
    std::memcpy(at, rows.dense + (start + row) * model.dense_columns, sizeof(float) * model.dense_columns);
    std::memset(at + model.dense_columns, 0, sizeof(float) * (up(model.dense_columns, 32) - model.dense_columns));
  }
  clock.end(REST);
  for (int64_t layer = 0; layer < model.dense_layers; ++layer, std::swap(in, out))
    run_layer(model.layers[layer], in, scratch.codes, scratch.steps, count, width, out);
  clock.end(DENSE);

  const int64_t products = model.tables * (model.tables + 1) / 2, columns = model.dim + products;
  for (int64_t row = 0; row < count; ++row) {
    const float* dense = in + row * width;
    float* joined = out + row * width;
    std::memcpy(scratch.vectors, dense, sizeof(float) * model.dim);
    for (int64_t table = 0; table < model.tables; ++table) {
      const Id* ids;
      const int64_t length = bag(rows, scratch, table, start + row, &ids);
      if (!pool(model, table, ids, length, scratch.vectors + (table + 1) * dim)) return BAD_ID;
    }
    if (start + row + ROWS_AHEAD < rows.rows) fetch<Id>(model, rows, scratch, start + row + ROWS_AHEAD);
    clock.end(LOOKUP);
    std::memcpy(joined, dense, sizeof(float) * model.dim);
    interact(scratch.vectors, model.tables + 1, dim, joined + model.dim);
    std::memset(joined + columns, 0, sizeof(float) * (up(columns, 32) - columns));
    clock.end(INTERACTION);
  }
  std::swap(in, out);

  const Layer* over = model.layers + model.dense_layers;
  for (int64_t layer = 0; layer + 1 < model.over_layers; ++layer, std::swap(in, out))
    run_layer(over[layer], in, scratch.codes, scratch.steps, count, width, out);
  for (int64_t row = 0; row < count; ++row)
    scores[start + row] = 1.0f / (1.0f + std::exp(-logit_of(over[model.over_layers - 1], in + row * width)));
  clock.end(OVER);
  return OK;
}

template <class Id>
int forward(const Model& model, const Rows& rows, const Scratch& scratch, Clock& clock, float* scores) {
  int64_t bags = model.tables * rows.rows, total = rows.lengths ? 0 : bags;
  if (rows.lengths)
    for (int64_t number = 0; number < bags; ++number) {
      if (rows.lengths[number] < 0) return BAD_LENGTHS;
      scratch.starts[number] = total;
      total += rows.lengths[number];
    }
  if (total != rows.values_count) return BAD_LENGTHS;
  std::memset(scratch.vectors, 0, sizeof(float) * vector_floats(model));
  const int64_t tiles = (rows.rows + model.tile_rows - 1) / model.tile_rows;
  for (int64_t row = 0; row < std::min(ROWS_AHEAD, rows.rows); ++row) fetch<Id>(model, rows, scratch, row);
  clock.end(LOOKUP);
  for (int64_t number = 0; number < tiles; ++number) {
    const int64_t start = rows.rows * number / tiles, stop = rows.rows * (number + 1) / tiles;
    if (const int status = tile<Id>(model, rows, scratch, start, stop - start, clock, scores)) return status;
  }
  return OK;
}

}  // namespace

extern "C" {

// What this file's structures look like; changes whenever they do.
int64_t narsil_forward_version() { return 2; }

// Bytes of scratch memory, aligned to 64, that a forward of so many rows needs.
int64_t narsil_scratch_bytes(const Model* model, int64_t rows) {
  const int64_t floats = model->tile_rows * model->width * 5 / 2 + up(model->tile_rows, 16) + vector_floats(*model);
  return up(floats * static_cast<int64_t>(sizeof(float)) + model->tables * rows * 8, 64);
}

// (rows,) scores. Returns 0, 1 for an id outside of its table, or 2 for lengths that do not add up to the values; the
// scores mean nothing then. parts, where not null, has five doubles to which seconds are added.
int narsil_forward(const Model* model, const Rows* rows, void* memory, float* scores, double* parts) {
  Clock clock{parts};
  const Scratch scratch = cut(*model, memory);
  const int status = rows->wide_ids ? forward<int64_t>(*model, *rows, scratch, clock, scores)
                                    : forward<int32_t>(*model, *rows, scratch, clock, scores);
  clock.end(REST);
  return status;
}

}  // extern "C"

}  // namespace narsil
