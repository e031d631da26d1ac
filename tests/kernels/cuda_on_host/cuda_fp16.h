// CUDA's fp16 for a host compiler; see cuda_runtime.h.

#ifndef TESTS_KERNELS_CUDA_ON_HOST_CUDA_FP16_H_
#define TESTS_KERNELS_CUDA_ON_HOST_CUDA_FP16_H_

#include "cuda_runtime.h"

using __half = _Float16;

struct __half2 {
  __half x, y;
};

inline float __half2float(__half value) { return value; }

inline __half __float2half_rn(float value) { return static_cast<__half>(value); }

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

inline __half __ushort_as_half(unsigned short bits) {
  __half value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline unsigned short __half_as_ushort(__half value) {
  unsigned short bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

#endif  // TESTS_KERNELS_CUDA_ON_HOST_CUDA_FP16_H_
