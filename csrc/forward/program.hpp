// Plans: any model whose rows are computed by the steps below, a tile of rows at a time.
//
// compile/lowering.py writes the steps, and backends/plans.py has the same structures. A value of a tile lies in the
// arena as rows of `pitch` floats, a multiple of 32, from `at * tile_rows` on; what is behind its width up to there is
// zero, since the linear layers read it. Steps between two layers run row by row, so that what passes between them
// alone has one row for all of the tile: its pitch is 0, and it lies behind the arena. Every step computes a row from
// that row alone, in the same order wherever it stands, so that a row's scores are the same bits in any batch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "elementwise.hpp"
#include "interaction.hpp"
#include "linear.hpp"
#include "model.hpp"
#include "tables.hpp"

namespace narsil {

enum Operation : int64_t {
  COLUMNS,
  LOOKUP,
  LINEAR,
  DOT,
  MOVE,
  ELEMENTWISE,
  PAIRS,
  MATMUL,
  REDUCE,
  SOFTMAX,
  NORM,
  OUTPUT,
  SEQUENCE,
  LENGTHS
};

// Where a step finds a number for each column: in a value of the tile, or (width,) of the model's own.
struct Operand {
  int64_t at;             // floats of a row before it
  int64_t pitch;          // floats from row to row; 0: one row for all of the tile
  const float* constant;  // (width,), or null where it is a value
};

struct Step {
  int64_t operation;
  int64_t function;  // ELEMENTWISE: its number; LINEAR: 1 for a relu; REDUCE: 0 sum, 1 mean, 2 max, 3 min
  int64_t at;        // of what it makes
  int64_t pitch;     // of what it makes
  int64_t width;     // of what it makes
  Operand operands[3];
  int64_t sizes[4];  // LOOKUP: first table, tables; SEQUENCE: table, length; LENGTHS: first feature; LINEAR: sub-rows
                     // of a row, their strides in and out; DOT: inputs; MOVE: runs; PAIRS: vectors, dim; MATMUL: m, k,
                     // n, batch; REDUCE, SOFTMAX, NORM: outer, axis, inner; COLUMNS: first of those that it takes;
                     // OUTPUT: first of those that it fills
  const void*
      data[2];       // LINEAR: its Layer; DOT: weights and bias; MOVE: runs of 5 int64; NORM: weight and bias or null
  float numbers[3];  // ELEMENTWISE: what the function takes; NORM: epsilon; SEQUENCE: fill
};

struct Plan {
  int64_t dense_columns;
  int64_t features;  // of the request: bags are (features, rows)
  int64_t steps;
  int64_t arena;      // floats of a row, all values of the tile together
  int64_t transient;  // floats of the values that have one row for all
  int64_t codes;      // floats of the widest layer's input, all of its sub-rows together
  int64_t sub_rows;   // the most that a layer has in a row
  int64_t vectors;    // floats that PAIRS needs
  int64_t outputs;    // columns that a row has in the result
  int64_t tile_rows;
  const Step* program;
  const Table* tables;
};

struct Bags {
  int64_t rows;
  int64_t values_count;
  int64_t wide_ids;
  const float* dense;           // (rows, dense_columns)
  const int32_t* lengths;       // (features * rows,) key-major; null where every bag holds one id
  const void* const* values;    // by stream: (values_count,) ids, what the model does to them done
  const float* const* weights;  // by stream: (values_count,), or null
};

namespace {

struct Tile {
  const Plan& plan;
  const Bags& bags;
  float* arena;
  float* transient;
  uint32_t* codes;
  float* steps;
  float* vectors;
  int64_t* starts;
  int64_t start;
  int64_t count;
  float* scores;

  float* row(int64_t at, int64_t pitch, int64_t number) const {
    return pitch ? arena + at * plan.tile_rows + number * pitch : transient + at;
  }
  float* made(const Step& step, int64_t number) const { return row(step.at, step.pitch, number); }
  const float* taken(const Operand& operand, int64_t number) const {
    return operand.constant ? operand.constant : row(operand.at, operand.pitch, number);
  }
};

void clear_behind(float* row, const Step& step) {
  std::memset(row + step.width, 0, sizeof(float) * static_cast<size_t>(up(step.width, 32) - step.width));
}

// The ids of one bag of a table, and how many they are.
template <class Id>
int64_t bag_of(const Tile& tile, const Table& table, int64_t row, int64_t* first, const Id** ids) {
  const Bags& bags = tile.bags;
  const int64_t bag = table.feature * bags.rows + row;
  *first = bags.lengths ? tile.starts[bag] : bag;
  *ids = static_cast<const Id*>(bags.values[table.stream]) + *first;
  return bags.lengths ? bags.lengths[bag] : 1;
}

template <class Id>
int look_up(const Tile& tile, const Step& step, int64_t row, float* out) {
  const Table *table = tile.plan.tables + step.sizes[0], *end = table + step.sizes[1];
  const int64_t next = tile.start + row + 1;
  int64_t first;
  const Id* ids;
  for (const Table* later = table; next < tile.bags.rows && later < end; ++later) {
    const int64_t length = std::min(bag_of(tile, *later, next, &first, &ids), TABLE_IDS_AHEAD);
    for (int64_t n = 0; n < length; ++n) ask(*later, ids[n]);
  }
  for (; table < end; out += table->dim, ++table) {
    const int64_t length = bag_of(tile, *table, tile.start + row, &first, &ids);
    const float* weights = tile.bags.weights[table->stream];
    if (!pool_table(*table, ids, weights ? weights + first : nullptr, length, out)) return BAD_ID;
  }
  return OK;
}

// The vectors of a bag's first ids beside each other, and a number where there are none.
template <class Id>
int lay_out(const Tile& tile, const Step& step, int64_t row, float* out) {
  const Table& table = tile.plan.tables[step.sizes[0]];
  int64_t first;
  const Id* ids;
  const int64_t length = std::min(bag_of(tile, table, tile.start + row, &first, &ids), step.sizes[1]);
  for (int64_t n = 0; n < length; ++n) ask(table, ids[n]);
  for (int64_t n = 0; n < length; ++n, out += table.dim)
    if (!pool_table(table, ids + n, nullptr, 1, out)) return BAD_ID;
  std::fill_n(out, (step.sizes[1] - length) * table.dim, step.numbers[0]);
  return OK;
}

// How many ids the bags of some features hold.
void count_ids(const Tile& tile, const Step& step, int64_t row, float* out) {
  const Bags& bags = tile.bags;
  const int32_t* lengths = bags.lengths ? bags.lengths + step.sizes[0] * bags.rows + row : nullptr;
  for (int64_t f = 0; f < step.width; ++f) out[f] = lengths ? static_cast<float>(lengths[f * bags.rows]) : 1.0f;
}

// Runs of numbers, each (place, pitch of its value, first column, first column of what is made, length).
void move_runs(const Tile& tile, const Step& step, int64_t row, float* out) {
  const int64_t* runs = static_cast<const int64_t*>(step.data[0]);
  for (const int64_t *run = runs, *end = runs + 5 * step.sizes[0]; run < end; run += 5) {
    const float* from = tile.row(run[0], run[1], row) + run[2];
    if (run[4] == 1)
      out[run[3]] = *from;
    else
      std::memcpy(out + run[3], from, sizeof(float) * static_cast<size_t>(run[4]));
  }
}

// Dot products of all pairs of a row's vectors.
void run_pairs(const Tile& tile, const Step& step, const float* in, float* out) {
  const int64_t count = step.sizes[0], dim = step.sizes[1], wide = up(dim, 16);
  std::memset(tile.vectors, 0, sizeof(float) * static_cast<size_t>(up(count, 4) * wide));
  for (int64_t vector = 0; vector < count; ++vector)
    std::memcpy(tile.vectors + vector * wide, in + vector * dim, sizeof(float) * static_cast<size_t>(dim));
  interact(tile.vectors, count, wide, out);
}

// A layer of few outputs: (width, in up to a multiple of 16) weights.
void run_dots(const Step& step, const float* in, float* out) {
  const int64_t wide = up(step.sizes[0], 16);
  const float *weights = static_cast<const float*>(step.data[0]), *bias = static_cast<const float*>(step.data[1]);
  for (int64_t output = 0; output < step.width; ++output, weights += wide) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < wide; k += 16)
      sum = _mm512_fmadd_ps(_mm512_loadu_ps(in + k), _mm512_loadu_ps(weights + k), sum);
    const float whole = _mm512_reduce_add_ps(sum) + bias[output];
    out[output] = step.function ? std::max(whole, 0.0f) : whole;
  }
}

// Products of (m, k) by (k, n), as many as the batch has.
void multiply(const Step& step, const float* left, const float* right, float* out) {
  const int64_t m = step.sizes[0], k = step.sizes[1], n = step.sizes[2], batch = step.sizes[3];
  std::memset(out, 0, sizeof(float) * static_cast<size_t>(batch * m * n));
  for (int64_t b = 0; b < batch; ++b, left += m * k, right += k * n, out += m * n)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t p = 0; p < k; ++p) {
        const float factor = left[i * k + p];
        for (int64_t j = 0; j < n; ++j) out[i * n + j] += factor * right[p * n + j];
      }
}

// Whether a number takes the place of the largest, or of the least, so far: a NaN does, and stays.
bool takes_over(bool largest, float next, float so_far) {
  return so_far == so_far && !(largest ? next <= so_far : next >= so_far);
}

void reduce(const Step& step, const float* in, float* out) {
  const int64_t outer = step.sizes[0], axis = step.sizes[1], inner = step.sizes[2];
  for (int64_t i = 0; i < outer; ++i)
    for (int64_t j = 0; j < inner; ++j) {
      const float* at = in + i * axis * inner + j;
      float found = at[0];
      for (int64_t p = 1; p < axis; ++p) {
        const float next = at[p * inner];
        if (step.function < 2)
          found += next;
        else if (takes_over(step.function == 2, next, found))
          found = next;
      }
      out[i * inner + j] = step.function == 1 ? found / static_cast<float>(axis) : found;
    }
}

void softmax(const Step& step, const float* in, float* out) {
  const int64_t outer = step.sizes[0], axis = step.sizes[1], inner = step.sizes[2];
  for (int64_t i = 0; i < outer; ++i)
    for (int64_t j = 0; j < inner; ++j) {
      const int64_t from = i * axis * inner + j;
      float most = in[from], sum = 0;
      for (int64_t p = 1; p < axis; ++p) most = std::max(most, in[from + p * inner]);
      for (int64_t p = 0; p < axis; ++p) sum += out[from + p * inner] = std::exp(in[from + p * inner] - most);
      for (int64_t p = 0; p < axis; ++p) out[from + p * inner] /= sum;
    }
}

// Over the axis: mean 0 and variance 1, then scaled and moved.
void normalize(const Step& step, const float* in, float* out) {
  const int64_t outer = step.sizes[0], axis = step.sizes[1];
  const float *weight = static_cast<const float*>(step.data[0]), *bias = static_cast<const float*>(step.data[1]);
  for (int64_t i = 0; i < outer; ++i, in += axis, out += axis) {
    double sum = 0, squares = 0;
    for (int64_t p = 0; p < axis; ++p) sum += static_cast<double>(in[p]);
    const double mean = sum / static_cast<double>(axis);
    for (int64_t p = 0; p < axis; ++p) squares += (in[p] - mean) * (in[p] - mean);
    const double scale = 1 / std::sqrt(squares / static_cast<double>(axis) + static_cast<double>(step.numbers[0]));
    for (int64_t p = 0; p < axis; ++p) {
      const float scaled = static_cast<float>((in[p] - mean) * scale) * (weight ? weight[p] : 1.0f);
      out[p] = bias ? scaled + bias[p] : scaled;
    }
  }
}

// One step, that is no LINEAR, over one row.
template <class Id>
int run_step(const Tile& tile, const Step& step, int64_t row) {
  const Plan& plan = tile.plan;
  const float *in = tile.taken(step.operands[0], row), *other = tile.taken(step.operands[1], row);
  float* out =
      step.operation == OUTPUT ? tile.scores + (tile.start + row) * plan.outputs + step.sizes[0] : tile.made(step, row);
  int status = OK;
  switch (step.operation) {
    case COLUMNS:
      std::memcpy(out, tile.bags.dense + (tile.start + row) * plan.dense_columns + step.sizes[0],
                  sizeof(float) * static_cast<size_t>(step.width));
      break;
    case LOOKUP:
      status = look_up<Id>(tile, step, row, out);
      break;
    case SEQUENCE:
      status = lay_out<Id>(tile, step, row, out);
      break;
    case LENGTHS:
      count_ids(tile, step, tile.start + row, out);
      break;
    case DOT:
      run_dots(step, in, out);
      break;
    case MOVE:
      move_runs(tile, step, row, out);
      break;
    case ELEMENTWISE:
      apply(step.function, in, other, tile.taken(step.operands[2], row), step.numbers, step.width, out);
      break;
    case PAIRS:
      run_pairs(tile, step, in, out);
      break;
    case MATMUL:
      multiply(step, in, other, out);
      break;
    case REDUCE:
      reduce(step, in, out);
      break;
    case SOFTMAX:
      softmax(step, in, out);
      break;
    case NORM:
      normalize(step, in, out);
      break;
    case OUTPUT:
      std::memcpy(out, in, sizeof(float) * static_cast<size_t>(step.width));
      return OK;
    default:
      return BAD_STEP;
  }
  clear_behind(out, step);
  return status;
}

// Sub-rows are rows of their own to a layer.
void run_linear(const Tile& tile, const Step& step) {
  run_layer(*static_cast<const Layer*>(step.data[0]), tile.row(step.operands[0].at, step.operands[0].pitch, 0),
            step.sizes[1], tile.codes, tile.steps, tile.count * step.sizes[0], step.function ? RELU : IDENTITY,
            tile.made(step, 0), step.sizes[2]);
}

template <class Id>
int run_tile(const Tile& tile) {
  const Step *step = tile.plan.program, *end = step + tile.plan.steps;
  while (step < end) {
    if (step->operation == LINEAR) {
      run_linear(tile, *step++);
      continue;
    }
    const Step* behind = step;
    while (behind < end && behind->operation != LINEAR) ++behind;
    for (int64_t row = 0; row < tile.count; ++row)
      for (const Step* each = step; each < behind; ++each)
        if (const int status = run_step<Id>(tile, *each, row)) return status;
    step = behind;
  }
  return OK;
}

template <class Id>
int run_plan(const Plan& plan, const Bags& bags, float* memory, float* scores) {
  float* arena = memory;
  float* transient = arena + plan.arena * plan.tile_rows;
  float* codes = transient + plan.transient;
  float* steps = codes + plan.codes * plan.tile_rows;
  float* vectors = steps + up(plan.tile_rows * plan.sub_rows, 16);
  int64_t* starts = reinterpret_cast<int64_t*>(vectors + plan.vectors);
  const int64_t count = plan.features * bags.rows;
  int64_t total = bags.lengths ? 0 : count;
  if (bags.lengths)
    for (int64_t bag = 0; bag < count; ++bag) {
      if (bags.lengths[bag] < 0) return BAD_LENGTHS;
      starts[bag] = total;
      total += bags.lengths[bag];
    }
  if (total != bags.values_count) return BAD_LENGTHS;
  const int64_t tiles = (bags.rows + plan.tile_rows - 1) / plan.tile_rows;
  for (int64_t number = 0; number < tiles; ++number) {
    const int64_t start = bags.rows * number / tiles, stop = bags.rows * (number + 1) / tiles;
    const Tile tile{plan,   bags,  arena,        transient, reinterpret_cast<uint32_t*>(codes), steps, vectors,
                    starts, start, stop - start, scores};
    if (const int status = run_tile<Id>(tile)) return status;
  }
  return OK;
}

}  // namespace

extern "C" {

// Bytes of scratch memory, aligned to 64, that a plan needs for so many rows.
int64_t narsil_plan_bytes(const Plan* plan, int64_t rows) {
  const int64_t floats = (plan->arena + plan->codes) * plan->tile_rows + plan->transient +
                         up(plan->tile_rows * plan->sub_rows, 16) + plan->vectors;
  return up(floats * static_cast<int64_t>(sizeof(float)) + plan->features * rows * 8, 64);
}

// (rows, outputs) scores. Returns 0, or what is wrong: see Status.
int narsil_plan(const Plan* plan, const Bags* bags, void* memory, float* scores) {
  float* room = static_cast<float*>(memory);
  return bags->wide_ids ? run_plan<int64_t>(*plan, *bags, room, scores) : run_plan<int32_t>(*plan, *bags, room, scores);
}

}  // extern "C"

}  // namespace narsil
