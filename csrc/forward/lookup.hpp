// Lookup and pooling: a bag's table rows, INT8 as FBGEMM lays them out, become one vector of floats.
#pragma once

#include <algorithm>
#include <cstring>

#include "model.hpp"

namespace narsil {
namespace {

constexpr int64_t ROWS_AHEAD = 1;  // how many rows ahead the table rows of a bag's first ids are asked for
constexpr int64_t IDS_AHEAD = 32;  // how many ids these are, and how many ids ahead the later ones are asked for

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
    if (from == 0 && n + IDS_AHEAD < count)
      ask(base + static_cast<int64_t>(ids[n + IDS_AHEAD]) * model.row_bytes, model);
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

}  // namespace
}  // namespace narsil
