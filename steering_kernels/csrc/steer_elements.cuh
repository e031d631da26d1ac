// Elements of rows on the device: conversion to and from fp32, and loads and stores of 16 bytes at a time.

#ifndef STEERING_KERNELS_CSRC_STEER_ELEMENTS_CUH_
#define STEERING_KERNELS_CSRC_STEER_ELEMENTS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace steering {

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

template <typename T>
struct Element;

// `pack` and `unpack` work on words of 4 bytes; each result is rounded to nearest, ties to even.
template <>
struct Element<float> {
  static constexpr Dtype kDtype = kFloat32;
  static constexpr int kPerWord = 1;
  static __device__ __forceinline__ void unpack(uint32_t word, float* values) { values[0] = __uint_as_float(word); }
  static __device__ __forceinline__ uint32_t pack(const float* values) { return __float_as_uint(values[0]); }
  static __device__ __forceinline__ float narrow(float value) { return value; }
};

template <>
struct Element<__nv_bfloat16> {
  static constexpr Dtype kDtype = kBFloat16;
  static constexpr int kPerWord = 2;
  static __device__ __forceinline__ void unpack(uint32_t word, float* values) {
    values[0] = __uint_as_float(word << 16);
    values[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t pack(const float* values) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(values[0], values[1]);
    return static_cast<uint32_t>(__bfloat16_as_ushort(pair.x)) |
           static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
  }
  static __device__ __forceinline__ __nv_bfloat16 narrow(float value) { return __float2bfloat16_rn(value); }
};

template <>
struct Element<__half> {
  static constexpr Dtype kDtype = kFloat16;
  static constexpr int kPerWord = 2;
  static __device__ __forceinline__ void unpack(uint32_t word, float* values) {
    values[0] = __half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu)));
    values[1] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
  }
  static __device__ __forceinline__ uint32_t pack(const float* values) {
    const __half2 pair = __floats2half2_rn(values[0], values[1]);
    return static_cast<uint32_t>(__half_as_ushort(pair.x)) | static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
  }
  static __device__ __forceinline__ __half narrow(float value) { return __float2half_rn(value); }
};

// One element of a row whose dtype is known at run time only.
__device__ __forceinline__ float load_element(const void* row, Dtype dtype, int64_t index) {
  switch (dtype) {
    case kBFloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(row)[index]);
    case kFloat16: return __half2float(static_cast<const __half*>(row)[index]);
    default: return static_cast<const float*>(row)[index];
  }
}

// 16 neighbouring bytes of a row as they lie in memory; addresses are multiples of 16.
template <typename T>
struct Packet {
  static constexpr int kPerWord = Element<T>::kPerWord;
  static constexpr int kWidth = 4 * kPerWord;

  uint4 words;

  static __device__ __forceinline__ Packet zero() { return {make_uint4(0, 0, 0, 0)}; }
  static __device__ __forceinline__ Packet load(const T* source) { return {*reinterpret_cast<const uint4*>(source)}; }
  static __device__ __forceinline__ void store(T* target, const float (&values)[kWidth]) {
    *reinterpret_cast<uint4*>(target) =
        make_uint4(Element<T>::pack(values), Element<T>::pack(values + kPerWord),
                   Element<T>::pack(values + 2 * kPerWord), Element<T>::pack(values + 3 * kPerWord));
  }
  __device__ __forceinline__ void unpack(float (&values)[kWidth]) const {
    Element<T>::unpack(words.x, values);
    Element<T>::unpack(words.y, values + kPerWord);
    Element<T>::unpack(words.z, values + 2 * kPerWord);
    Element<T>::unpack(words.w, values + 3 * kPerWord);
  }
};

}  // namespace steering

#endif  // STEERING_KERNELS_CSRC_STEER_ELEMENTS_CUH_
