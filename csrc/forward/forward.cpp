// A DLRM's forward for x86 processors with AVX-512: rows in, scores out, one tile of rows at a time.
//
// Receives a Model (tables as FBGEMM lays out INT8 rows, weights as narsil/compile/packing.py packs them) and a batch
// of rows; writes one score per row. Owns nothing: weights and tables are mapped by the caller and shared by all lanes,
// scratch memory is a lane's own. `narsil compile` builds this file for the processor at hand; the server loads the
// result through ctypes, which lets go of the GIL.
//
// A tile's rows go through all parts before the next tile begins, so that what passes between parts stays in cache:
//
//     dense arch -> per row: lookup, pooling, dot products -> over arch -> sigmoid
//
// A row's score is the same bits whatever rows stand beside it: every row sums in the same order, whichever tile and
// block it falls in. Floats are not reassociated (no -ffast-math) for that reason.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ctime>

namespace {

constexpr int kBlockRows = 12;     // at most; 12 rows x 2 vectors of sums fill the registers
constexpr int64_t kPanel = 32;     // outputs that a block computes at once: 2 vectors
constexpr int64_t kRowsAhead = 1;  // how many rows ahead the table rows of a bag's first ids are asked for
constexpr int64_t kIdsAhead = 32;  // how many ids these are, and how many ids ahead the later ones are asked for

enum Kind : int64_t { kFp32, kBf16, kInt16, kInt8 };
enum Status : int { kOk, kBadId, kBadLengths };
enum Part { kLookup, kDense, kInteraction, kOver, kRest, kParts };

}  // namespace

extern "C" {

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

}  // extern "C"

namespace {

// How a kind multiplies dwords of input and weights, and what its sums mean. The products are written in assembly since
// compilers else copy every sum, or load the weights once for each row.
struct Fp32 {
  using Sum = __m512;
  static Sum zero() { return _mm512_setzero_ps(); }
  static void add(Sum& sum, __m512i a, __m512i b) { asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
  static __m512 real(Sum sum, const Layer& layer, int64_t column, float) {
    return _mm512_add_ps(sum, _mm512_loadu_ps(layer.bias + column));
  }
};

#ifdef __AVX512BF16__
struct Bf16 : Fp32 {
  static void add(Sum& sum, __m512i a, __m512i b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
};
#endif

#ifdef __AVX512VNNI__
struct Int8 {
  using Sum = __m512i;
  static Sum zero() { return _mm512_setzero_si512(); }
  static void add(Sum& sum, __m512i a, __m512i b) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
  static __m512 real(Sum sum, const Layer& layer, int64_t column, float step) {
    const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_loadu_si512(layer.excess + column)));
    const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(layer.scale + column), _mm512_set1_ps(step));
    return _mm512_fmadd_ps(exact, scale, _mm512_loadu_ps(layer.bias + column));
  }
};

struct Int16 : Int8 {
  static void add(Sum& sum, __m512i a, __m512i b) { asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }
};
#endif

// M rows by one panel: out[m][column ..] = relu(in[m] . weights + bias).
template <class K, int M>
void block(const Layer& layer, int64_t dwords, int64_t column, const uint32_t* in, int64_t in_stride,
           const float* steps, float* out, int64_t out_stride) {
  typename K::Sum low[M], high[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) low[m] = high[m] = K::zero();
  const __m512i* weights = static_cast<const __m512i*>(layer.weights) + column / kPanel * dwords * 2;
  for (int64_t k = 0; k < dwords; ++k) {
    const __m512i first = _mm512_loadu_si512(weights + 2 * k), second = _mm512_loadu_si512(weights + 2 * k + 1);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const __m512i a = _mm512_set1_epi32(static_cast<int>(in[m * in_stride + k]));
      K::add(low[m], a, first);
      K::add(high[m], a, second);
    }
  }
  const __m512 none = _mm512_setzero_ps();
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    float* row = out + m * out_stride + column;
    _mm512_storeu_ps(row, _mm512_max_ps(none, K::real(low[m], layer, column, steps[m])));  // NaN stays
    _mm512_storeu_ps(row + 16, _mm512_max_ps(none, K::real(high[m], layer, column + 16, steps[m])));
  }
}

using Block = void (*)(const Layer&, int64_t, int64_t, const uint32_t*, int64_t, const float*, float*, int64_t);

template <class K>
void linear(const Layer& layer, int64_t per_dword, const uint32_t* in, int64_t in_stride, const float* steps,
            int64_t rows, float* out, int64_t out_stride) {
  static constexpr Block kBlocks[kBlockRows] = {block<K, 1>, block<K, 2>,  block<K, 3>,  block<K, 4>,
                                                block<K, 5>, block<K, 6>,  block<K, 7>,  block<K, 8>,
                                                block<K, 9>, block<K, 10>, block<K, 11>, block<K, 12>};
  const int64_t dwords = (layer.in + per_dword - 1) / per_dword;
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t column = 0; column < layer.out; column += kPanel)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t start = rows * b / blocks, count = rows * (b + 1) / blocks - start;
      kBlocks[count - 1](layer, dwords, column, in + start * in_stride, in_stride, steps + start,
                         out + start * out_stride, out_stride);
    }
}

#ifdef __AVX512BF16__
void to_bf16(const float* from, int64_t count, uint32_t* to) {
  for (int64_t i = 0; i < count; i += 32)
    _mm512_storeu_si512(to + i / 2,
                        (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i)));
}
#endif

#ifdef __AVX512VNNI__
// A row's floats as integers, round(x / step) + shift; returns the step, which the row's own largest number sets. A row
// with an infinity or a NaN has no such step: it is NaN then, and so is all that comes of the row.
template <class Store>
float to_integers(const float* from, const Layer& layer, Store store) {
  __m512i largest = _mm512_castps_si512(_mm512_set1_ps(1e-30f));  // by their bits: NaN > infinity > all others
  for (int64_t i = 0; i < layer.in; i += 16)
    largest = _mm512_max_epi32(largest, _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(from + i))));
  const float most = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(largest))));
  const float levels = static_cast<float>(layer.levels);
  const __m512 inverse = _mm512_set1_ps(levels / most);
  const __m512i shift = _mm512_set1_epi32(static_cast<int>(layer.shift));
  for (int64_t i = 0; i < layer.in; i += 16)
    store(i, _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from + i), inverse)), shift));
  return most / levels + (most - most);  // infinity less infinity is NaN
}

float to_int8(const float* from, const Layer& layer, uint8_t* to) {
  return to_integers(from, layer, [to](int64_t i, __m512i x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtusepi32_epi8(x));
  });
}

float to_int16(const float* from, const Layer& layer, int16_t* to) {
  return to_integers(from, layer, [to](int64_t i, __m512i x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtsepi32_epi16(x));
  });
}
#endif

// relu(in . weights + bias) for a tile: in and out are (rows, width) floats, codes is room for the input in bytes.
void run_layer(const Layer& layer, const float* in, uint32_t* codes, float* steps, int64_t rows, int64_t width,
               float* out) {
  if (layer.kind == kFp32) {
    linear<Fp32>(layer, 1, reinterpret_cast<const uint32_t*>(in), width, steps, rows, out, width);
    return;
  }
#ifdef __AVX512BF16__
  if (layer.kind == kBf16) {
    for (int64_t row = 0; row < rows; ++row) to_bf16(in + row * width, layer.in, codes + row * width / 2);
    linear<Bf16>(layer, 2, codes, width / 2, steps, rows, out, width);
  }
#endif
#ifdef __AVX512VNNI__
  if (layer.kind == kInt8) {
    for (int64_t row = 0; row < rows; ++row)
      steps[row] = to_int8(in + row * width, layer, reinterpret_cast<uint8_t*>(codes + row * width / 4));
    linear<Int8>(layer, 4, codes, width / 4, steps, rows, out, width);
  }
  if (layer.kind == kInt16) {
    for (int64_t row = 0; row < rows; ++row)
      steps[row] = to_int16(in + row * width, layer, reinterpret_cast<int16_t*>(codes + row * width / 2));
    linear<Int16>(layer, 2, codes, width / 2, steps, rows, out, width);
  }
#endif
}

// The sums of 16 vectors' lanes: lane i is the sum of v[i].
__m512 sums_of(const __m512* v) {
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i)  // v[i], v[i + 8] by turns of lanes
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[i], v[i + 8]), _mm512_unpackhi_ps(v[i], v[i + 8]));
  for (int i = 0; i < 4; ++i)
    b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[i], a[i + 4]), _mm512_unpackhi_ps(a[i], a[i + 4]));
  // Each 128-bit part of b[i] holds sums of v[i], v[i + 4], v[i + 8], v[i + 12] over that part of the lanes.
  for (int i = 0; i < 2; ++i)
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[i], b[i + 2], 0x88), _mm512_shuffle_f32x4(b[i], b[i + 2], 0xdd));
  const __m512 d = _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
  // The parts are now of v[0 ..], v[2 ..], v[1 ..], v[3 ..], each by fours.
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15), d);
}

// Dot products of all pairs i < j of (count, dim) vectors, row-major, to out. dim is a multiple of 16; four vectors of
// zeros or of anything finite must follow the last one's place up to a multiple of four.
void interact(const float* vectors, int64_t count, int64_t dim, float* out) {
  for (int64_t i = 0; i < count; i += 4)
    for (int64_t j = i; j < count; j += 4) {
      const float *left = vectors + i * dim, *right = vectors + j * dim;
      __m512 sums[16];
#pragma GCC unroll 16
      for (int p = 0; p < 16; ++p) sums[p] = _mm512_setzero_ps();
      for (int64_t k = 0; k < dim; k += 16) {
        __m512 a[4], b[4];
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) {
          a[p] = _mm512_loadu_ps(left + p * dim + k);
          b[p] = _mm512_loadu_ps(right + p * dim + k);
        }
#pragma GCC unroll 16
        for (int p = 0; p < 16; ++p) sums[p] = _mm512_fmadd_ps(a[p / 4], b[p % 4], sums[p]);
      }
      const __m512 dots = sums_of(sums);
      const __m128 parts[4] = {_mm512_extractf32x4_ps(dots, 0), _mm512_extractf32x4_ps(dots, 1),
                               _mm512_extractf32x4_ps(dots, 2), _mm512_extractf32x4_ps(dots, 3)};
      for (int64_t p = 0; p < 4 && i + p < count; ++p) {
        const int64_t row = i + p;
        const unsigned inside = (1u << std::min<int64_t>(4, count - j)) - 1;
        const unsigned later = j > row ? 0xfu : 0xfu << (row - j + 1);
        const int64_t place = row * (2 * count - row - 1) / 2 + j - row - 1;
        _mm_mask_storeu_ps(out + place, static_cast<__mmask8>(inside & later), parts[p]);
      }
    }
}

// Asks the memory for a table row. In assembly, since GCC drops functions that do nothing but prefetch.
void ask(const uint8_t* row, const Model& model) {
  for (int64_t byte = 0; byte < model.row_bytes; byte += 64) asm volatile("prefetcht0 (%0)" ::"r"(row + byte));
  asm volatile("prefetcht0 (%0)" ::"r"(row + model.row_bytes - 1));
}

// V vectors of a bag's pooled embedding, from column `from` on. Of the last, `inside` says which lanes are the table's.
template <int V, class Id>
void pool_columns(const Model& model, const uint8_t* base, const Id* ids, int64_t count, float share, int64_t from,
                  __mmask16 inside, float* out) {
  __m512 sums[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) sums[v] = _mm512_setzero_ps();
  for (int64_t n = 0; n < count; ++n) {
    const uint8_t* row = base + static_cast<int64_t>(ids[n]) * model.row_bytes;
    if (from == 0 && n + kIdsAhead < count)
      ask(base + static_cast<int64_t>(ids[n + kIdsAhead]) * model.row_bytes, model);
    uint32_t head;
    std::memcpy(&head, row, 4);
    const __m128 pair = _mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int>(head)));
    const __m512 scale = _mm512_broadcastss_ps(pair), bias = _mm512_broadcastss_ps(_mm_movehdup_ps(pair));
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const uint8_t* at = row + 4 + from + 16 * v;
      const __m128i bytes =
          v + 1 < V ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)) : _mm_maskz_loadu_epi8(inside, at);
      sums[v] = _mm512_add_ps(sums[v], _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), scale, bias));
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v)
    _mm512_storeu_ps(out + from + 16 * v,
                     _mm512_maskz_mul_ps(v + 1 < V ? 0xffff : inside, sums[v], _mm512_set1_ps(share)));
}

// The pooled embedding of one bag, (dim,) floats padded to a multiple of 16 with zeros. False: an id is out of bounds.
template <class Id>
bool pool(const Model& model, int64_t table, const Id* ids, int64_t count, float* out) {
  const uint8_t* base = model.table_bytes + model.table_starts[table];
  const uint64_t limit = static_cast<uint64_t>(model.table_rows[table]);
  for (int64_t n = 0; n < count; ++n)
    if (static_cast<uint64_t>(static_cast<int64_t>(ids[n])) >= limit) return false;
  const float share = model.mean[table] && count > 1 ? 1.0f / static_cast<float>(count) : 1.0f;
  for (int64_t from = 0; from < model.dim; from += 64) {
    const int64_t left = std::min<int64_t>(model.dim - from, 64), vectors = (left + 15) / 16;
    const __mmask16 inside = static_cast<__mmask16>(0xffff >> (16 * vectors - left));
    switch (vectors) {
      case 1:
        pool_columns<1>(model, base, ids, count, share, from, inside, out);
        break;
      case 2:
        pool_columns<2>(model, base, ids, count, share, from, inside, out);
        break;
      case 3:
        pool_columns<3>(model, base, ids, count, share, from, inside, out);
        break;
      default:
        pool_columns<4>(model, base, ids, count, share, from, inside, out);
    }
  }
  return true;
}

float logit_of(const Layer& layer, const float* in) {
  __m512 sum = _mm512_setzero_ps();
  const float* weights = static_cast<const float*>(layer.weights);
  for (int64_t k = 0; k < layer.in; k += 16)
    sum = _mm512_fmadd_ps(_mm512_loadu_ps(in + k), _mm512_loadu_ps(weights + k), sum);
  return _mm512_reduce_add_ps(sum) + layer.bias[0];
}

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

int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

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
    const int64_t count = std::min(bag(rows, scratch, table, row, &ids), kIdsAhead);
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
  clock.end(kRest);
  for (int64_t layer = 0; layer < model.dense_layers; ++layer, std::swap(in, out))
    run_layer(model.layers[layer], in, scratch.codes, scratch.steps, count, width, out);
  clock.end(kDense);

  const int64_t products = model.tables * (model.tables + 1) / 2, columns = model.dim + products;
  for (int64_t row = 0; row < count; ++row) {
    const float* dense = in + row * width;
    float* joined = out + row * width;
    std::memcpy(scratch.vectors, dense, sizeof(float) * model.dim);
    for (int64_t table = 0; table < model.tables; ++table) {
      const Id* ids;
      const int64_t length = bag(rows, scratch, table, start + row, &ids);
      if (!pool(model, table, ids, length, scratch.vectors + (table + 1) * dim)) return kBadId;
    }
    if (start + row + kRowsAhead < rows.rows) fetch<Id>(model, rows, scratch, start + row + kRowsAhead);
    clock.end(kLookup);
    std::memcpy(joined, dense, sizeof(float) * model.dim);
    interact(scratch.vectors, model.tables + 1, dim, joined + model.dim);
    std::memset(joined + columns, 0, sizeof(float) * (up(columns, 32) - columns));
    clock.end(kInteraction);
  }
  std::swap(in, out);

  const Layer* over = model.layers + model.dense_layers;
  for (int64_t layer = 0; layer + 1 < model.over_layers; ++layer, std::swap(in, out))
    run_layer(over[layer], in, scratch.codes, scratch.steps, count, width, out);
  for (int64_t row = 0; row < count; ++row)
    scores[start + row] = 1.0f / (1.0f + std::exp(-logit_of(over[model.over_layers - 1], in + row * width)));
  clock.end(kOver);
  return kOk;
}

template <class Id>
int forward(const Model& model, const Rows& rows, const Scratch& scratch, Clock& clock, float* scores) {
  int64_t bags = model.tables * rows.rows, total = rows.lengths ? 0 : bags;
  if (rows.lengths)
    for (int64_t number = 0; number < bags; ++number) {
      if (rows.lengths[number] < 0) return kBadLengths;
      scratch.starts[number] = total;
      total += rows.lengths[number];
    }
  if (total != rows.values_count) return kBadLengths;
  std::memset(scratch.vectors, 0, sizeof(float) * vector_floats(model));
  const int64_t tiles = (rows.rows + model.tile_rows - 1) / model.tile_rows;
  for (int64_t row = 0; row < std::min(kRowsAhead, rows.rows); ++row) fetch<Id>(model, rows, scratch, row);
  clock.end(kLookup);
  for (int64_t number = 0; number < tiles; ++number) {
    const int64_t start = rows.rows * number / tiles, stop = rows.rows * (number + 1) / tiles;
    if (const int status = tile<Id>(model, rows, scratch, start, stop - start, clock, scores)) return status;
  }
  return kOk;
}

}  // namespace

extern "C" {

// What this file's structures look like; changes whenever they do.
int64_t narsil_forward_version() { return 1; }

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
  clock.end(kRest);
  return status;
}

}  // extern "C"
