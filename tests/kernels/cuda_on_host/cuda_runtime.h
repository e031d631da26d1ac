// CUDA's names for a host compiler, so that tests can run device code where there is no GPU.
//
// Every thread of a block is a fiber of its own. A warp that is drawn at random runs until it can run no further, then
// another does: as far apart as barriers allow, so that a missing one shows. Stricter than a GPU: warps must be whole
// and their lanes agree on the intrinsic, no thread may have left at a barrier, and shared memory starts as NaN.

#ifndef TESTS_KERNELS_CUDA_ON_HOST_CUDA_RUNTIME_H_
#define TESTS_KERNELS_CUDA_ON_HOST_CUDA_RUNTIME_H_

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

struct cudaFuncAttributes {};

constexpr int kSharedBytes = 99 * 1024;

// The array that the device code declares.
namespace steering {
inline float shared_memory[kSharedBytes / sizeof(float)];
}

namespace cuda_on_host {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;

// Threads that wait for each other.
struct Barrier {
  unsigned size = 0, waiting = 0, generation = 0, left = 0;
};

struct Warp {
  Barrier barrier;
  uint32_t values[2][kLanes];
  int operations[2][kLanes];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  dim3 index;
  unsigned lane = 0, exchanges = 0;
  Warp* warp = nullptr;
  bool done = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  ucontext_t scheduler;
  Fiber* running = nullptr;
  bool progress = false;
  std::function<void()> kernel;
};

inline Block block;
inline std::mt19937 order{1};
inline const char* failure = nullptr;

inline void leave() { swapcontext(&block.running->context, &block.scheduler); }

[[noreturn]] inline void fail(const char* why) {
  if (failure == nullptr) failure = why;
  for (;;) leave();
}

inline void wait(Barrier& barrier) {
  if (barrier.left > 0) fail("a barrier after threads have left");
  const unsigned generation = barrier.generation;
  if (++barrier.waiting == barrier.size) {
    barrier.waiting = 0;
    ++barrier.generation;
    block.progress = true;
  }
  while (barrier.generation == generation) leave();
}

// Gives `value` to the warp; returns everybody's.
inline const uint32_t* exchange(uint32_t value, int operation) {
  Fiber& fiber = *block.running;
  Warp& warp = *fiber.warp;
  if (warp.barrier.size != kLanes) fail("an intrinsic of a warp that is not whole");
  const unsigned half = fiber.exchanges++ % 2;
  warp.values[half][fiber.lane] = value;
  warp.operations[half][fiber.lane] = operation;
  wait(warp.barrier);
  for (const int other : warp.operations[half]) {
    if (other != operation) fail("the lanes of a warp disagree on an intrinsic");
  }
  return warp.values[half];
}

inline void run_fiber() {
  block.kernel();
  Fiber& fiber = *block.running;
  fiber.done = true;
  ++block.barrier.left;
  ++fiber.warp->barrier.left;
  block.progress = true;
  for (;;) leave();
}

inline void start_block(unsigned threads) {
  block.fibers.resize(threads);
  block.warps.assign((threads + kLanes - 1) / kLanes, Warp());
  block.barrier = Barrier();
  block.barrier.size = threads;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.index = dim3(i % blockDim.x, i / blockDim.x);
    fiber.lane = i % kLanes;
    fiber.exchanges = 0;
    fiber.done = false;
    fiber.warp = &block.warps[i / kLanes];
    ++fiber.warp->barrier.size;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
}

// Whether any thread of the warp came past a barrier or to its end.
inline bool run_warp(unsigned warp) {
  std::vector<unsigned> turns(std::min<size_t>(kLanes, block.fibers.size() - warp * kLanes));
  std::iota(turns.begin(), turns.end(), warp * kLanes);
  bool any = false;
  do {
    std::shuffle(turns.begin(), turns.end(), order);
    block.progress = false;
    for (const unsigned i : turns) {
      if (block.fibers[i].done) continue;
      block.running = &block.fibers[i];
      threadIdx = block.running->index;
      swapcontext(&block.scheduler, &block.running->context);
      if (failure != nullptr) return true;
    }
    any |= block.progress;
  } while (block.progress);
  return any;
}

inline void run_block() {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  start_block(threads);
  std::vector<unsigned> warps(block.warps.size());
  std::iota(warps.begin(), warps.end(), 0u);
  while (failure == nullptr && block.barrier.left < threads) {
    std::shuffle(warps.begin(), warps.end(), order);
    bool any = false;
    for (const unsigned warp : warps) {
      any |= run_warp(warp);
      if (failure != nullptr) return;
    }
    if (!any) failure = "threads wait for each other forever";
  }
}

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

}  // namespace cuda_on_host

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_on_host;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  if (gridDim.x == 0 || blockDim.x * blockDim.y > 1024 || config->dynamicSmemBytes > kSharedBytes) {
    return cudaErrorInvalidConfiguration;
  }
  failure = nullptr;
  block.kernel = [&] { kernel(arguments...); };
  for (unsigned i = 0; i < gridDim.x && failure == nullptr; ++i) {
    blockIdx = dim3(i);
    std::fill(std::begin(steering::shared_memory), std::end(steering::shared_memory),
              std::numeric_limits<float>::quiet_NaN());
    run_block();
  }
  return failure == nullptr ? cudaSuccess : cudaErrorLaunchFailure;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return cuda_on_host::failure;
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

template <typename Function>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Function) {
  return cudaSuccess;
}

template <typename Function>
cudaError_t cudaFuncSetAttribute(Function, cudaFuncAttribute, int) {
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int values[] = {4, 9, kSharedBytes};
  *value = values[attribute];
  return cudaSuccess;
}

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::block.barrier); }

inline float __uint_as_float(uint32_t bits) { return cuda_on_host::float_of(bits); }

inline uint32_t __float_as_uint(float value) { return cuda_on_host::bits_of(value); }

inline float __shfl_xor_sync(uint32_t, float value, int distance) {
  const uint32_t* values = cuda_on_host::exchange(cuda_on_host::bits_of(value), 1000 + distance);
  return cuda_on_host::float_of(values[cuda_on_host::block.running->lane ^ distance]);
}

inline float __shfl_sync(uint32_t, float value, int lane) {
  return cuda_on_host::float_of(cuda_on_host::exchange(cuda_on_host::bits_of(value), 2000)[lane % 32]);
}

inline int __shfl_sync(uint32_t, int value, int lane) {
  return static_cast<int>(cuda_on_host::exchange(static_cast<uint32_t>(value), 3000)[lane % 32]);
}

inline uint32_t __ballot_sync(uint32_t, bool vote) {
  const uint32_t* votes = cuda_on_host::exchange(vote, 4000);
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= votes[lane] << lane;
  return result;
}

inline int __ffs(int value) { return __builtin_ffs(value); }

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

extern "C" {

// Draws another order of threads.
void cuda_on_host_seed(unsigned seed) { cuda_on_host::order.seed(seed); }

// Called by code compiled with -fsanitize=alignment.
void __ubsan_handle_type_mismatch_v1(void*, void*) { cuda_on_host::fail("a misaligned or null address"); }
}

#endif  // TESTS_KERNELS_CUDA_ON_HOST_CUDA_RUNTIME_H_
