// Operations on one row of the residual stream, which is held in fp32 (`x`) between its load and its store.
//
// Plain loops over plain pointers, for the compiler to vectorise. Nothing here needs -ffast-math: sums run in a fixed
// number of lanes, so that a row gives the same sum wherever it lies and whichever thread takes it.

#ifndef STEERING_KERNELS_CSRC_STEER_ROWS_H_
#define STEERING_KERNELS_CSRC_STEER_ROWS_H_

#include <cstdint>
#include <cstring>

namespace steering {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float widen(float value) { return value; }

inline float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

// By integer operations: the compilers in use do not vectorise a conversion from _Float16, and not all know the type.
inline float widen(Float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const uint32_t normal = (magnitude << 13) + (magnitude < 0x7c00u ? 112u << 23 : 224u << 23);
  return float_of(sign | (magnitude < 0x0400u ? bits_of(subnormal) : normal));
}

// Round to nearest, ties to even, as torch does; NaN stays a quiet NaN.
template <typename Value>
Value narrow(float value);

template <>
inline float narrow<float>(float value) {
  return value;
}

template <>
inline BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(value == value ? rounded : 0x7fc0u)};
}

template <>
inline Float16 narrow<Float16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // The carry out of the mantissa may make it infinite, as it should.
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // One unit in the last place of [0.5, 1) is 2^-24, the step of fp16 subnormals: the addition rounds.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < bits_of(0x1p-14f) ? subnormal : normal;
  const uint32_t result = magnitude < bits_of(0x1p16f) ? finite : special;
  return {static_cast<uint16_t>(((bits >> 16) & 0x8000u) | result)};
}

constexpr int64_t kLanes = 32;

// Sum over i of term(i).
template <typename Term>
inline float sum(int64_t size, Term term) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (int64_t lane = 0; i + lane < size; ++lane) lanes[lane] += term(i + lane);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

template <typename Value>
inline float dot(const float* x, const Value* row, int64_t size) {
  return sum(size, [=](int64_t i) { return x[i] * widen(row[i]); });
}

inline float sum_of_squares(const float* x, int64_t size) {
  return sum(size, [=](int64_t i) { return x[i] * x[i]; });
}

inline void scale(float* __restrict x, float factor, int64_t size) {
  for (int64_t i = 0; i < size; ++i) x[i] *= factor;
}

template <typename Value>
inline void add_scaled(float* __restrict x, float factor, const Value* __restrict row, int64_t size) {
  for (int64_t i = 0; i < size; ++i) x[i] += factor * widen(row[i]);
}

// x += factor * row * x
template <typename Value>
inline void add_scaled_product(float* __restrict x, float factor, const Value* __restrict row, int64_t size) {
  for (int64_t i = 0; i < size; ++i) x[i] += factor * (widen(row[i]) * x[i]);
}

template <typename Value>
inline void load(const Value* __restrict row, int64_t size, float* __restrict x) {
  for (int64_t i = 0; i < size; ++i) x[i] = widen(row[i]);
}

template <typename Value>
inline void load_sum(const Value* __restrict row, const Value* __restrict other, int64_t size, float* __restrict x) {
  for (int64_t i = 0; i < size; ++i) x[i] = widen(row[i]) + widen(other[i]);
}

template <typename Value>
inline void store(const float* __restrict x, int64_t size, Value* __restrict row) {
  for (int64_t i = 0; i < size; ++i) row[i] = narrow<Value>(x[i]);
}

// Also gives the sum of squares of x.
template <typename Value>
inline float store_squared(const float* __restrict x, int64_t size, Value* __restrict row) {
  return sum(size, [=](int64_t i) {
    row[i] = narrow<Value>(x[i]);
    return x[i] * x[i];
  });
}

template <typename Value>
inline void store_difference(const float* __restrict x, const Value* __restrict other, int64_t size,
                             Value* __restrict row) {
  for (int64_t i = 0; i < size; ++i) row[i] = narrow<Value>(x[i] - widen(other[i]));
}

template <typename Value>
inline void store_product(const float* __restrict x, float factor, const float* __restrict weight, int64_t size,
                          Value* __restrict row) {
  for (int64_t i = 0; i < size; ++i) row[i] = narrow<Value>(x[i] * factor * weight[i]);
}

}  // namespace steering

#endif  // STEERING_KERNELS_CSRC_STEER_ROWS_H_
