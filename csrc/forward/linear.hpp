// Linear layers: a tile of rows times panels of 32 outputs, in each kind of number; and the logit.
//
// A row's result is the same bits whatever rows stand beside it: every row sums in the same order, whichever block it
// falls in.
#pragma once

#include "model.hpp"

namespace narsil {
namespace {

constexpr int BLOCK_ROWS = 12;  // at most; 12 rows x 2 vectors of sums fill the registers
constexpr int64_t PANEL = 32;   // outputs that a block computes at once: 2 vectors

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

// M rows by one panel: out[m][column ..] = in[m] . weights + bias, and no less than `least`: 0 for a relu.
template <class K, int M>
void block(const Layer& layer, int64_t dwords, int64_t column, const uint32_t* in, int64_t in_stride,
           const float* steps, float least, float* out, int64_t out_stride) {
  typename K::Sum low[M], high[M];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) low[m] = high[m] = K::zero();
  const __m512i* weights = static_cast<const __m512i*>(layer.weights) + column / PANEL * dwords * 2;
  for (int64_t k = 0; k < dwords; ++k) {
    const __m512i first = _mm512_loadu_si512(weights + 2 * k), second = _mm512_loadu_si512(weights + 2 * k + 1);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const __m512i a = _mm512_set1_epi32(static_cast<int>(in[m * in_stride + k]));
      K::add(low[m], a, first);
      K::add(high[m], a, second);
    }
  }
  const __m512 none = _mm512_set1_ps(least);
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
    float* row = out + m * out_stride + column;
    _mm512_storeu_ps(row, _mm512_max_ps(none, K::real(low[m], layer, column, steps[m])));  // NaN stays
    _mm512_storeu_ps(row + 16, _mm512_max_ps(none, K::real(high[m], layer, column + 16, steps[m])));
  }
}

using Block = void (*)(const Layer&, int64_t, int64_t, const uint32_t*, int64_t, const float*, float, float*, int64_t);

template <class K>
void linear(const Layer& layer, int64_t per_dword, const uint32_t* in, int64_t in_stride, const float* steps,
            int64_t rows, float least, float* out, int64_t out_stride) {
  static constexpr Block BLOCKS[BLOCK_ROWS] = {block<K, 1>, block<K, 2>,  block<K, 3>,  block<K, 4>,
                                               block<K, 5>, block<K, 6>,  block<K, 7>,  block<K, 8>,
                                               block<K, 9>, block<K, 10>, block<K, 11>, block<K, 12>};
  const int64_t dwords = (layer.in + per_dword - 1) / per_dword;
  const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  for (int64_t column = 0; column < layer.out; column += PANEL)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t start = rows * b / blocks, count = rows * (b + 1) / blocks - start;
      BLOCKS[count - 1](layer, dwords, column, in + start * in_stride, in_stride, steps + start, least,
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

constexpr float RELU = 0, IDENTITY = -__builtin_inff();  // the least that comes of a layer

// in . weights + bias for a tile, no less than `least`. Rows of in and out are multiples of 32 floats apart, and in has
// zeros up to one; codes is room for the input in bytes.
void run_layer(const Layer& layer, const float* in, int64_t in_stride, uint32_t* codes, float* steps, int64_t rows,
               float least, float* out, int64_t out_stride) {
  if (layer.kind == FP32) {
    linear<Fp32>(layer, 1, reinterpret_cast<const uint32_t*>(in), in_stride, steps, rows, least, out, out_stride);
    return;
  }
#ifdef __AVX512BF16__
  if (layer.kind == BF16) {
    for (int64_t row = 0; row < rows; ++row) to_bf16(in + row * in_stride, layer.in, codes + row * in_stride / 2);
    linear<Bf16>(layer, 2, codes, in_stride / 2, steps, rows, least, out, out_stride);
  }
#endif
#ifdef __AVX512VNNI__
  if (layer.kind == INT8) {
    for (int64_t row = 0; row < rows; ++row)
      steps[row] = to_int8(in + row * in_stride, layer, reinterpret_cast<uint8_t*>(codes + row * in_stride / 4));
    linear<Int8>(layer, 4, codes, in_stride / 4, steps, rows, least, out, out_stride);
  }
  if (layer.kind == INT16) {
    for (int64_t row = 0; row < rows; ++row)
      steps[row] = to_int16(in + row * in_stride, layer, reinterpret_cast<int16_t*>(codes + row * in_stride / 2));
    linear<Int16>(layer, 2, codes, in_stride / 2, steps, rows, least, out, out_stride);
  }
#endif
}

// relu(in . weights + bias) for a tile: in and out are (rows, width) floats.
void run_layer(const Layer& layer, const float* in, uint32_t* codes, float* steps, int64_t rows, int64_t width,
               float* out) {
  run_layer(layer, in, width, codes, steps, rows, RELU, out, width);
}

// The last layer's one output.
float logit_of(const Layer& layer, const float* in) {
  __m512 sum = _mm512_setzero_ps();
  const float* weights = static_cast<const float*>(layer.weights);
  for (int64_t k = 0; k < layer.in; k += 16)
    sum = _mm512_fmadd_ps(_mm512_loadu_ps(in + k), _mm512_loadu_ps(weights + k), sum);
  return _mm512_reduce_add_ps(sum) + layer.bias[0];
}

}  // namespace
}  // namespace narsil
