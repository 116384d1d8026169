// What each kernel of the forward computes, in plain loops: no vectors, no blocks, and doubles where a sum of floats
// would round. For the tests alone (see testing.cpp), which hold kernel and reference against each other over odd
// sizes.
//
// Sums of integers are exact in both, and must be the same bits. Sums of floats may differ by what rounding explains:
// for that, a reference also tells the sum of its terms' magnitudes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "model.hpp"

namespace narsil {
namespace reference {
namespace {

struct Sum {
  double value = 0;
  double magnitude = 0;  // of all terms

  void add(double term) {
    value += term;
    magnitude += std::fabs(term);
  }
};

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// FP16: a sign, 5 bits of exponent and 10 of fraction.
double from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent == 31  ? (fraction ? NAN : INFINITY)
                      : exponent == 0 ? std::ldexp(fraction, -24)
                                      : std::ldexp(fraction + 1024, exponent - 25);
  return bits >> 15 ? -size : size;
}

// The leading 16 bits of a float, rounded to nearest and ties to even. As the processor has it, numbers below the
// smallest normal one are zero, and NaN is a quiet one.
uint16_t to_bf16(float value) {
  const uint32_t bits = to_bits(value), sign = bits & 0x80000000u;
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  if (std::fabs(value) < 0x1p-126f) return static_cast<uint16_t>(sign >> 16);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A row's integers; returns what one step of them is worth: NaN where the row holds an infinity or NaN.
float to_integers(const float* in, const Layer& layer, int32_t* codes) {
  float most = 1e-30f;
  for (int64_t i = 0; i < layer.in; ++i) {
    if (!std::isfinite(in[i])) return NAN;
    most = std::max(most, std::fabs(in[i]));
  }
  const float inverse = static_cast<float>(layer.levels) / most;
  for (int64_t i = 0; i < layer.in; ++i)
    codes[i] = static_cast<int32_t>(std::nearbyint(in[i] * inverse)) + static_cast<int32_t>(layer.shift);
  return most / static_cast<float>(layer.levels);
}

int64_t per_dword(int64_t kind) { return kind == FP32 ? 1 : kind == INT8 ? 4 : 2; }

// The weight that an output has for an input, in its kind's own number.
template <class T>
T weight(const Layer& layer, int64_t output, int64_t input) {
  const int64_t many = per_dword(layer.kind), dwords = (layer.in + many - 1) / many;
  const int64_t dword = (output / 32 * dwords + input / many) * 32 + output % 32;
  return static_cast<const T*>(layer.weights)[dword * many + input % many];
}

double relu(double value) { return value < 0 ? 0 : value; }  // NaN stays

// relu(in . weights + bias) of one row in a floating kind: value and magnitude of each output.
void floating_layer(const Layer& layer, const float* in, double* out, double* magnitude) {
  for (int64_t output = 0; output < layer.out; ++output) {
    Sum sum;
    for (int64_t i = 0; i < layer.in; ++i)
      sum.add(layer.kind == FP32 ? static_cast<double>(in[i]) * static_cast<double>(weight<float>(layer, output, i))
                                 : static_cast<double>(from_bits(static_cast<uint32_t>(to_bf16(in[i])) << 16)) *
                                       static_cast<double>(
                                           from_bits(static_cast<uint32_t>(weight<uint16_t>(layer, output, i)) << 16)));
    sum.add(layer.bias[output]);
    out[output] = relu(sum.value);
    magnitude[output] = sum.magnitude;
  }
}

// The same in an integer kind, exactly: the only floats are the row's step, the output's scale and its bias.
void integer_layer(const Layer& layer, const float* in, float* out) {
  std::vector<int32_t> codes(static_cast<size_t>(layer.in));
  const float step = to_integers(in, layer, codes.data());
  for (int64_t output = 0; output < layer.out; ++output) {
    int64_t sum = -layer.excess[output];
    for (int64_t i = 0; i < layer.in; ++i)
      sum += static_cast<int64_t>(codes[static_cast<size_t>(i)]) *
             (layer.kind == INT8 ? weight<int8_t>(layer, output, i) : weight<int16_t>(layer, output, i));
    const float real = std::fma(static_cast<float>(sum), layer.scale[output] * step, layer.bias[output]);
    out[output] = real < 0 ? 0 : real;
  }
}

Sum logit(const Layer& layer, const float* in) {
  Sum sum;
  for (int64_t i = 0; i < layer.in; ++i)
    sum.add(static_cast<double>(in[i]) * static_cast<double>(static_cast<const float*>(layer.weights)[i]));
  sum.add(layer.bias[0]);
  return sum;
}

// Products of all pairs i < j of (count, dim) vectors that lie `stride` apart, row-major.
void interact(const float* vectors, int64_t count, int64_t dim, int64_t stride, double* out, double* magnitude) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = i + 1; j < count; ++j) {
      Sum sum;
      for (int64_t k = 0; k < dim; ++k)
        sum.add(static_cast<double>(vectors[i * stride + k]) * static_cast<double>(vectors[j * stride + k]));
      *out++ = sum.value;
      *magnitude++ = sum.magnitude;
    }
}

// (dim,) the pooled embedding of one bag. False: an id is outside of the table.
template <class Id>
bool pool(const Model& model, int64_t table, const Id* ids, int64_t count, double* out, double* magnitude) {
  std::vector<Sum> sums(static_cast<size_t>(model.dim));
  for (int64_t n = 0; n < count; ++n) {
    if (ids[n] < 0 || ids[n] >= model.table_rows[table]) return false;
    const uint8_t* row = model.table_bytes + model.table_starts[table] + ids[n] * model.row_bytes;
    const double scale = from_half(static_cast<uint16_t>(row[0] | row[1] << 8));
    const double bias = from_half(static_cast<uint16_t>(row[2] | row[3] << 8));
    for (int64_t k = 0; k < model.dim; ++k) {
      sums[static_cast<size_t>(k)].add(row[4 + k] * scale);
      sums[static_cast<size_t>(k)].add(bias);
    }
  }
  const double shared = model.mean[table] && count ? static_cast<double>(count) : 1;
  for (int64_t k = 0; k < model.dim; ++k) {
    out[k] = sums[static_cast<size_t>(k)].value / shared;
    magnitude[k] = sums[static_cast<size_t>(k)].magnitude / shared;
  }
  return true;
}

}  // namespace
}  // namespace reference
}  // namespace narsil
