// Lookup and pooling in tables of every kind: a bag's rows, each times its weight where it has one, become one vector.
#pragma once

#include <algorithm>
#include <cstring>

#include "model.hpp"

namespace narsil {

enum Stored : int64_t { ROW_FP32, ROW_FP16, ROW_INT8, ROW_INT4, ROW_INT2 };  // FBGEMM's SparseType

struct Table {
  const uint8_t* data;  // its first row
  int64_t rows;
  int64_t row_bytes;
  int64_t dim;
  int64_t kind;         // Stored
  int64_t scale_bytes;  // of an integer row's scale and bias together, which come first: 4 for FP16, 8 for FP32
  int64_t mean;         // whether bags are averaged
  int64_t feature;      // whose bags these are
  int64_t stream;       // whose ids and weights
};

namespace {

constexpr int64_t TABLE_IDS_AHEAD = 32;  // how many ids ahead a row is asked for

// Asks the memory for a table's row. In assembly, since GCC drops functions that do nothing but prefetch.
void ask(const Table& table, int64_t id) {
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(table.rows)) return;
  const uint8_t* row = table.data + id * table.row_bytes;
  for (int64_t byte = 0; byte < table.row_bytes; byte += 64) asm volatile("prefetcht0 (%0)" ::"r"(row + byte));
  asm volatile("prefetcht0 (%0)" ::"r"(row + table.row_bytes - 1));
}

// 16 numbers of a row from a column on, a multiple of 16, of which `inside` are the table's.
template <int KIND>
__m512 stored(const uint8_t* row, int64_t column, __mmask16 inside, __m512 scale, __m512 bias) {
  if (KIND == ROW_FP32) return _mm512_maskz_loadu_ps(inside, row + 4 * column);
  if (KIND == ROW_FP16) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(inside, row + 2 * column));
  __m512i codes;
  if (KIND == ROW_INT8) {
    codes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(inside, row + column));
  } else {
    // The first number lies in the lowest bits.
    constexpr int BITS = KIND == ROW_INT4 ? 4 : 2, PER_BYTE = 8 / BITS;
    const int count = (__builtin_popcount(inside) + PER_BYTE - 1) / PER_BYTE;
    const __m128i bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), row + column / PER_BYTE);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i wide = _mm512_cvtepu8_epi32(bytes);
    const __m512i own = _mm512_permutexvar_epi32(_mm512_srli_epi32(lanes, BITS == 4 ? 1 : 2), wide);
    const __m512i shift =
        _mm512_mullo_epi32(_mm512_and_si512(lanes, _mm512_set1_epi32(PER_BYTE - 1)), _mm512_set1_epi32(BITS));
    codes = _mm512_and_si512(_mm512_srlv_epi32(own, shift), _mm512_set1_epi32((1 << BITS) - 1));
  }
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), scale, bias);
}

void scale_and_bias(const Table& table, const uint8_t* row, __m512& scale, __m512& bias) {
  if (table.scale_bytes == 4) {
    uint32_t head;
    std::memcpy(&head, row, 4);
    const __m128 pair = _mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int>(head)));
    scale = _mm512_broadcastss_ps(pair), bias = _mm512_broadcastss_ps(_mm_movehdup_ps(pair));
  } else {
    float head[2];
    std::memcpy(head, row, 8);
    scale = _mm512_set1_ps(head[0]), bias = _mm512_set1_ps(head[1]);
  }
}

template <int KIND, int V, class Id>
void pool_stored(const Table& table, const Id* ids, const float* weights, int64_t count, float share, int64_t from,
                 __mmask16 inside, float* out) {
  __m512 sums[V], scale = _mm512_setzero_ps(), bias = scale;
  for (int v = 0; v < V; ++v) sums[v] = _mm512_setzero_ps();
  for (int64_t n = 0; n < count; ++n) {
    const uint8_t* row = table.data + static_cast<int64_t>(ids[n]) * table.row_bytes;
    if (from == 0 && n + TABLE_IDS_AHEAD < count) ask(table, ids[n + TABLE_IDS_AHEAD]);
    if (KIND >= ROW_INT8) {
      scale_and_bias(table, row, scale, bias);
      row += table.scale_bytes;
    }
    const __m512 weight = weights ? _mm512_set1_ps(weights[n]) : _mm512_set1_ps(1.0f);
    for (int v = 0; v < V; ++v) {
      const __m512 numbers = stored<KIND>(row, from + 16 * v, v + 1 < V ? 0xffff : inside, scale, bias);
      sums[v] = weights ? _mm512_fmadd_ps(numbers, weight, sums[v]) : _mm512_add_ps(sums[v], numbers);
    }
  }
  const __m512 part = _mm512_set1_ps(share);
  for (int v = 0; v < V; ++v)
    _mm512_mask_storeu_ps(out + from + 16 * v, v + 1 < V ? 0xffff : inside, _mm512_mul_ps(sums[v], part));
}

template <int KIND, class Id>
void pool_kind(const Table& table, const Id* ids, const float* weights, int64_t count, float share, float* out) {
  for (int64_t from = 0; from < table.dim; from += 64) {
    const int64_t left = std::min<int64_t>(table.dim - from, 64), vectors = (left + 15) / 16;
    const __mmask16 inside = static_cast<__mmask16>(0xffff >> (16 * vectors - left));
    if (vectors == 1) pool_stored<KIND, 1>(table, ids, weights, count, share, from, inside, out);
    if (vectors == 2) pool_stored<KIND, 2>(table, ids, weights, count, share, from, inside, out);
    if (vectors == 3) pool_stored<KIND, 3>(table, ids, weights, count, share, from, inside, out);
    if (vectors == 4) pool_stored<KIND, 4>(table, ids, weights, count, share, from, inside, out);
  }
}

// The pooled embedding of one bag: (dim,) floats. False: an id lies outside of the table, or its kind is unknown.
template <class Id>
bool pool_table(const Table& table, const Id* ids, const float* weights, int64_t count, float* out) {
  const uint64_t limit = static_cast<uint64_t>(table.rows);
  for (int64_t n = 0; n < count; ++n)
    if (static_cast<uint64_t>(static_cast<int64_t>(ids[n])) >= limit) return false;
  const float share = table.mean && count > 1 ? 1.0f / static_cast<float>(count) : 1.0f;
  switch (table.kind) {
    case ROW_FP32:
      pool_kind<ROW_FP32>(table, ids, weights, count, share, out);
      return true;
    case ROW_FP16:
      pool_kind<ROW_FP16>(table, ids, weights, count, share, out);
      return true;
    case ROW_INT8:
      pool_kind<ROW_INT8>(table, ids, weights, count, share, out);
      return true;
    case ROW_INT4:
      pool_kind<ROW_INT4>(table, ids, weights, count, share, out);
      return true;
    case ROW_INT2:
      pool_kind<ROW_INT2>(table, ids, weights, count, share, out);
      return true;
    default:
      return false;
  }
}

}  // namespace
}  // namespace narsil
