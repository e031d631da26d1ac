// The threads that share a row of the residual stream, and their sums.

#ifndef STEERING_KERNELS_CSRC_STEER_TEAM_CUH_
#define STEERING_KERNELS_CSRC_STEER_TEAM_CUH_

#include <cuda_runtime.h>

#include <cstdint>

namespace steering {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr uint32_t kAllLanes = 0xffffffffu;
// Values that are summed together, at most.
constexpr int kMaxSums = 3;
// Floats of shared memory in which the warps of a team meet; two halves, used in turn.
constexpr int kPartials = 2 * kMaxSums * kMaxWarps;

extern __shared__ float shared_memory[];

// A warp where blockDim.x is 32 (one row for each threadIdx.y), the block otherwise.
class Team {
 public:
  __device__ __forceinline__ Team() : thread(threadIdx.x), threads(blockDim.x), lane(threadIdx.x % kWarp) {}

  // Every thread gets the sum over the team, with the same bits.
  template <int kSums>
  __device__ __forceinline__ void sum(float (&values)[kSums]) {
    add_lanes<kSums, kWarp>(values);
    if (threads == kWarp) return;
    float* partials = shared_memory + half_ * kMaxSums * kMaxWarps;
    // One barrier for each sum is enough: who writes here again has passed the next barrier, behind everybody's reads.
    half_ ^= 1;
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) partials[i * kMaxWarps + thread / kWarp] = values[i];
    }
    __syncthreads();
    const int warp = lane % kMaxWarps;
#pragma unroll
    for (int i = 0; i < kSums; ++i) values[i] = warp < threads / kWarp ? partials[i * kMaxWarps + warp] : 0.0f;
    add_lanes<kSums, kMaxWarps>(values);
  }

  const int thread, threads, lane;

 private:
  template <int kSums, int kLanes>
  static __device__ __forceinline__ void add_lanes(float (&values)[kSums]) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) values[i] += __shfl_xor_sync(kAllLanes, values[i], distance);
    }
  }

  int half_ = 0;
};

}  // namespace steering

#endif  // STEERING_KERNELS_CSRC_STEER_TEAM_CUH_
