// The interaction: dot products of all pairs of a row's vectors.
#pragma once

#include <algorithm>

#include "model.hpp"

namespace narsil {
namespace {

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

}  // namespace
}  // namespace narsil
