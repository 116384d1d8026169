// Functions of one, two or three numbers, column by column. Their numbers are backends/programs.py's.
//
// relu, sums, products and what else decides a hidden layer's time is left to the compiler's vectors; exp, and with it
// sigmoid, tanh and swish, have vectors of their own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "model.hpp"

namespace narsil {

enum Function : int64_t {
  F_RELU,
  F_SIGMOID,
  F_TANH,
  F_SILU,
  F_GELU,
  F_GELU_TANH,
  F_LEAKY_RELU,
  F_EXP,
  F_LOG,
  F_LOG1P,
  F_SQRT,
  F_ABS,
  F_NEG,
  F_RECIPROCAL,
  F_SIGN,
  F_FLOOR,
  F_NAN_TO_NUM,
  F_CLAMP,
  F_ISNAN,
  F_TO_BOOL,
  F_TO_INTEGER,
  F_TO_FLOAT16,
  F_TO_BFLOAT16,
  F_ADD,
  F_SUB,
  F_MUL,
  F_DIV,
  F_POW,
  F_MAXIMUM,
  F_MINIMUM,
  F_REMAINDER,
  F_GT,
  F_GE,
  F_LT,
  F_LE,
  F_EQ,
  F_NE,
  F_AND,
  F_OR,
  F_NOT,
  F_WHERE
};

namespace {

// e^x to about an ulp, by 2^n times a polynomial over [-ln 2 / 2, ln 2 / 2]. NaN stays.
__m512 exp_of(__m512 x) {
  const __m512 most = _mm512_set1_ps(89.0f), least = _mm512_set1_ps(-104.0f);
  const __m512 inside = _mm512_max_ps(least, _mm512_min_ps(most, x));  // a NaN in x is the second of each, and stays
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(inside, _mm512_set1_ps(1.44269504088896341f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), inside);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

// 1 / (1 + e^-x), by e^-|x| so that nothing overflows.
__m512 sigmoid_of(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), small = exp_of(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
  const __mmask16 below = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_div_ps(_mm512_mask_mov_ps(one, below, small), _mm512_add_ps(one, small));
}

// By e^-2|x|, and near 0, where that would cancel, by x - x^3 / 3 + 2 x^5 / 15 - 17 x^7 / 315.
__m512 tanh_of(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), size = _mm512_abs_ps(x);
  const __m512 small = exp_of(_mm512_mul_ps(_mm512_set1_ps(-2.0f), size));
  const __m512 far = _mm512_div_ps(_mm512_sub_ps(one, small), _mm512_add_ps(one, small));
  const __m512 square = _mm512_mul_ps(x, x);
  __m512 near = _mm512_set1_ps(-17.0f / 315.0f);
  near = _mm512_fmadd_ps(near, square, _mm512_set1_ps(2.0f / 15.0f));
  near = _mm512_fmadd_ps(near, square, _mm512_set1_ps(-1.0f / 3.0f));
  near = _mm512_fmadd_ps(_mm512_mul_ps(near, square), x, x);
  const __m512i sign = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN));
  const __m512 signed_far = _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(far), sign));
  return _mm512_mask_mov_ps(signed_far, _mm512_cmp_ps_mask(size, _mm512_set1_ps(0.15f), _CMP_LT_OQ), near);
}

template <class F>
void by_vectors(const float* x, int64_t width, float* out, F function) {
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 inside = width - i < 16 ? static_cast<__mmask16>((1u << (width - i)) - 1) : 0xffff;
    _mm512_mask_storeu_ps(out + i, inside, function(_mm512_maskz_loadu_ps(inside, x + i)));
  }
}

template <class F>
void each(int64_t width, float* out, F function) {
  for (int64_t i = 0; i < width; ++i) out[i] = function(i);
}

float to_half_and_back(float x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtps_ph(_mm_set_ss(x), 0))); }

float to_bfloat_and_back(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x == x) bits = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
  std::memcpy(&x, &bits, 4);
  return x;
}

float remainder_of(float x, float y) {
  const float left = std::fmod(x, y);
  return left != 0 && (left < 0) != (y < 0) ? left + y : left;
}

// Two or three numbers. Comparisons give 1 or 0; a NaN among two makes their maximum and minimum one.
void apply_several(int64_t function, const float* x, const float* y, const float* z, int64_t width, float* out) {
  switch (function) {
    case F_ADD:
      return each(width, out, [=](int64_t i) { return x[i] + y[i]; });
    case F_SUB:
      return each(width, out, [=](int64_t i) { return x[i] - y[i]; });
    case F_MUL:
      return each(width, out, [=](int64_t i) { return x[i] * y[i]; });
    case F_DIV:
      return each(width, out, [=](int64_t i) { return x[i] / y[i]; });
    case F_POW:
      return each(width, out, [=](int64_t i) { return std::pow(x[i], y[i]); });
    case F_MAXIMUM:
      return each(width, out, [=](int64_t i) { return x[i] > y[i] || x[i] != x[i] ? x[i] : y[i]; });
    case F_MINIMUM:
      return each(width, out, [=](int64_t i) { return x[i] < y[i] || x[i] != x[i] ? x[i] : y[i]; });
    case F_REMAINDER:
      return each(width, out, [=](int64_t i) { return remainder_of(x[i], y[i]); });
    case F_GT:
      return each(width, out, [=](int64_t i) { return x[i] > y[i] ? 1.0f : 0.0f; });
    case F_GE:
      return each(width, out, [=](int64_t i) { return x[i] >= y[i] ? 1.0f : 0.0f; });
    case F_LT:
      return each(width, out, [=](int64_t i) { return x[i] < y[i] ? 1.0f : 0.0f; });
    case F_LE:
      return each(width, out, [=](int64_t i) { return x[i] <= y[i] ? 1.0f : 0.0f; });
    case F_EQ:
      return each(width, out, [=](int64_t i) { return x[i] == y[i] ? 1.0f : 0.0f; });
    case F_NE:
      return each(width, out, [=](int64_t i) { return x[i] != y[i] ? 1.0f : 0.0f; });
    case F_AND:
      return each(width, out, [=](int64_t i) { return x[i] != 0 && y[i] != 0 ? 1.0f : 0.0f; });
    case F_OR:
      return each(width, out, [=](int64_t i) { return x[i] != 0 || y[i] != 0 ? 1.0f : 0.0f; });
    default:
      return each(width, out, [=](int64_t i) { return x[i] != 0 ? y[i] : z[i]; });  // F_WHERE
  }
}

float nan_to_num(float x, const float* numbers) {
  if (x != x) return numbers[0];
  return x == INFINITY ? numbers[1] : x == -INFINITY ? numbers[2] : x;
}

// A missing number, of a clamp that has one side, is NaN.
float clamped(float x, float least, float most) {
  if (x < least) x = least;
  return x > most ? most : x;
}

void apply(int64_t function, const float* x, const float* y, const float* z, const float* numbers, int64_t width,
           float* out) {
  const float a = numbers[0], b = numbers[1];
  switch (function) {
    case F_RELU:
      return by_vectors(x, width, out, [](__m512 v) { return _mm512_max_ps(_mm512_setzero_ps(), v); });
    case F_SIGMOID:
      return by_vectors(x, width, out, sigmoid_of);
    case F_TANH:
      return by_vectors(x, width, out, tanh_of);
    case F_SILU:
      return by_vectors(x, width, out, [](__m512 v) { return _mm512_mul_ps(v, sigmoid_of(v)); });
    case F_GELU:
      return each(width, out, [=](int64_t i) { return 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678118654752f)); });
    case F_GELU_TANH:
      return by_vectors(x, width, out, [](__m512 v) {
        const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(v, v), v);
        const __m512 inner =
            _mm512_mul_ps(_mm512_set1_ps(0.79788456080286536f), _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cube, v));
        const __m512 half = _mm512_mul_ps(_mm512_set1_ps(0.5f), v);
        return _mm512_fmadd_ps(half, tanh_of(inner), half);
      });
    case F_LEAKY_RELU:
      return each(width, out, [=](int64_t i) { return x[i] > 0 ? x[i] : x[i] * a; });
    case F_EXP:
      return by_vectors(x, width, out, exp_of);
    case F_LOG:
      return each(width, out, [=](int64_t i) { return std::log(x[i]); });
    case F_LOG1P:
      return each(width, out, [=](int64_t i) { return std::log1p(x[i]); });
    case F_SQRT:
      return each(width, out, [=](int64_t i) { return std::sqrt(x[i]); });
    case F_ABS:
      return each(width, out, [=](int64_t i) { return std::fabs(x[i]); });
    case F_NEG:
      return each(width, out, [=](int64_t i) { return -x[i]; });
    case F_RECIPROCAL:
      return each(width, out, [=](int64_t i) { return 1.0f / x[i]; });
    case F_SIGN:
      return each(width, out, [=](int64_t i) { return x[i] > 0 ? 1.0f : x[i] < 0 ? -1.0f : 0.0f; });
    case F_FLOOR:
      return each(width, out, [=](int64_t i) { return std::floor(x[i]); });
    case F_NAN_TO_NUM:
      return each(width, out, [=](int64_t i) { return nan_to_num(x[i], numbers); });
    case F_CLAMP:
      return each(width, out, [=](int64_t i) { return clamped(x[i], a, b); });
    case F_ISNAN:
      return each(width, out, [=](int64_t i) { return x[i] != x[i] ? 1.0f : 0.0f; });
    case F_TO_BOOL:
      return each(width, out, [=](int64_t i) { return x[i] != 0 ? 1.0f : 0.0f; });
    case F_TO_INTEGER:
      return each(width, out, [=](int64_t i) { return std::trunc(x[i]); });
    case F_TO_FLOAT16:
      return each(width, out, [=](int64_t i) { return to_half_and_back(x[i]); });
    case F_TO_BFLOAT16:
      return each(width, out, [=](int64_t i) { return to_bfloat_and_back(x[i]); });
    case F_NOT:
      return each(width, out, [=](int64_t i) { return x[i] == 0 ? 1.0f : 0.0f; });
    default:
      return apply_several(function, x, y, z, width, out);
  }
}

}  // namespace
}  // namespace narsil
