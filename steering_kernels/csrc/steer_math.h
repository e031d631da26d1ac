// Scalar maths of one entry of the operation table. Semantics: reference.py; kinds, flags and columns: table.py.
//
// Plain C++ outside nvcc, so that the same lines run, and are tested, on the host.

#ifndef STEERING_KERNELS_CSRC_STEER_MATH_H_
#define STEERING_KERNELS_CSRC_STEER_MATH_H_

#include <cfloat>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define STEERING_INLINE __host__ __device__ __forceinline__
#else
#define STEERING_INLINE inline
#endif

namespace steering {
namespace table {

enum Kind : int32_t {
  kEnd = 0,
  kAdd = 1,
  kAddRelative = 2,
  kProject = 3,
  kClamp = 4,
  kGatedAdd = 5,
  kFeature = 6,
  kRotate = 7,
  kAffine = 8,
  kCondition = 9,
};

enum Flag : int32_t {
  kKeepNorm = 1,
  kCosine = 2,
  kHard = 4,
  kAbsolute = 8,
  kJumpRelu = 16,
  kIdentity = 32,
  kEditSet = 64,
  kEditAdd = 128,
};

enum Code : int32_t { kKind = 0, kRead = 1, kWrite = 2, kRead2 = 3, kWrite2 = 4, kGate = 5, kGateOut = 6, kFlags = 7 };

enum Param : int32_t { kScale = 0, kA = 1, kB = 2, kC = 3 };

constexpr int32_t kCodeWidth = 8;
constexpr int32_t kParamWidth = 4;

}  // namespace table

struct Constants {
  float a, b, c;
};

// What a rotation adds along its two write rows.
struct Turn {
  float write, write2;
};

STEERING_INLINE bool reads_row(int32_t kind) {
  constexpr uint32_t kReaders = 1u << table::kProject | 1u << table::kClamp | 1u << table::kGatedAdd |
                                1u << table::kFeature | 1u << table::kRotate | 1u << table::kCondition;
  return (kReaders >> kind & 1u) != 0;
}

STEERING_INLINE bool needs_norm(int32_t kind, int32_t flags) {
  if (kind == table::kCondition) return (flags & table::kCosine) != 0;
  return kind == table::kAddRelative || (flags & table::kKeepNorm) || (reads_row(kind) && (flags & table::kCosine));
}

STEERING_INLINE float gate_value(float p, const Constants& constants, int32_t flags) {
  const float z = constants.b * (p - constants.a);
  if (flags & table::kHard) return z > 0.0f ? 1.0f : 0.0f;
  return 1.0f / (1.0f + expf(-z));
}

STEERING_INLINE float feature_change(float p, const Constants& constants, int32_t flags) {
  const float z = p + constants.a;
  // Comparisons rather than fmaxf, which would turn a NaN into 0.
  float v = z < 0.0f ? 0.0f : z;
  if (flags & table::kJumpRelu) v = z > constants.b ? z : 0.0f;
  if (flags & table::kIdentity) v = z;
  if (flags & table::kEditSet) return constants.c - v;
  if (flags & table::kEditAdd) return v + constants.c - v;
  return constants.c * v - v;
}

// What a kind with a single write row adds along it, per unit of strength.
STEERING_INLINE float change(int32_t kind, float p, float norm, const Constants& constants, int32_t flags) {
  switch (kind) {
    case table::kAddRelative: return norm;
    case table::kProject: return -p;
    case table::kClamp: return fminf(fmaxf(p, constants.a), constants.b) - p;
    case table::kGatedAdd: return gate_value(p, constants, flags);
    case table::kFeature: return feature_change(p, constants, flags);
    default: return 1.0f;
  }
}

// The same angle in (-pi, pi].
STEERING_INLINE float wrapped(float angle) {
  constexpr float kPi = 3.14159265358979323846f;
  return angle - 2.0f * kPi * ceilf((angle - kPi) / (2.0f * kPi));
}

STEERING_INLINE Turn turn(float p, float q, float strength, float a, int32_t flags) {
  const float angle = strength * (flags & table::kAbsolute ? wrapped(a - atan2f(q, p)) : a);
  float sine, cosine;
#ifdef __CUDA_ARCH__
  // In units of pi the reduction of large angles is exact and needs no array in local memory, as sincosf does.
  sincospif(angle * 0.318309886183790671538f, &sine, &cosine);
#else
  sine = sinf(angle);
  cosine = cosf(angle);
#endif
  return {cosine * p - sine * q - p, sine * p + cosine * q - q};
}

STEERING_INLINE float cosine_of(float p, float norm) { return p / fmaxf(norm, FLT_MIN); }

}  // namespace steering

#endif  // STEERING_KERNELS_CSRC_STEER_MATH_H_
