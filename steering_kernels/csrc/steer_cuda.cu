// Launchers of the device code in steer_cuda.cuh, called through ctypes by cuda.py.
//
// A launch neither allocates nor waits nor looks at a tensor's values, so it may be captured into a CUDA graph.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "steer_cuda.cuh"

namespace steering {

// What launches need to know about the device of their stream; filled by `steering_load`.
struct Device {
  int32_t multiprocessors;
  int32_t programmatic;     // whether it knows programmatic dependent launches
  int32_t max_hidden_size;  // of rows that cannot be held in registers
};

namespace {

using Kernel = void (*)(Call);

// Resident threads of a multiprocessor; on those that hold fewer, the blocks that are left over queue.
constexpr int kResidentThreads = 2048;
// Rows of a block in which every warp has its own.
constexpr int kRowsOfWarps = 4;
// Threads of a row while more are to be had by giving each fewer elements: fewer threads agree on a sum sooner.
constexpr int kEnoughThreads = 128;
// Drivers before this one cannot capture programmatic launches into a graph.
constexpr int kProgrammaticDriver = 12040;

// Longest row held in registers, and elements of it in each thread; a compiler given more would spill them.
template <typename T>
constexpr int kMaxItems = sizeof(T) == 4 ? 16 : 32;

// How a call is spread over threads. items: elements of a row in each thread's registers, 0 for a row in shared memory.
struct Plan {
  int items, threads, rows, shared_floats;
};

int ceil_divide(int value, int divisor) { return (value + divisor - 1) / divisor; }

template <typename T>
bool is_aligned(const void* pointer, int64_t stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride * sizeof(T) % 16 == 0;
}

template <typename T>
bool fits_registers(const Call& call) {
  const bool weight_fits =
      call.weight == nullptr || (call.weight_dtype == call.hidden_dtype && is_aligned<T>(call.weight, 0));
  return call.hidden_size <= kMaxItems<T> * kMaxThreads && is_aligned<T>(nullptr, call.hidden_size) &&
         call.pool_dtype == call.hidden_dtype && is_aligned<T>(call.pool, call.pool_stride) && weight_fits &&
         is_aligned<T>(call.hidden, call.hidden_stride) && is_aligned<T>(call.residual, call.residual_stride);
}

// Threads depend on the size of a row alone, so that its sums have the same bits in whatever batch and layout it comes.
template <typename T>
Plan make_plan(const Call& call) {
  const int size = call.hidden_size;
  const auto threads = [size](int items) { return ceil_divide(ceil_divide(size, items), kWarp) * kWarp; };
  int items = 8;
  while (items < kMaxItems<T> && threads(items) > kWarp &&
         (size <= kMaxItems<T> * kWarp || threads(2 * items) >= kEnoughThreads)) {
    items *= 2;
  }
  Plan plan = {items, std::min(threads(items), kMaxThreads), 1, kPartials};
  if (!fits_registers<T>(call)) {
    plan.items = 0;
    plan.shared_floats += ceil_divide(size, plan.threads * Packet<T>::kWidth) * plan.threads * Packet<T>::kWidth;
  } else if (plan.threads == kWarp) {
    plan.rows = kRowsOfWarps;
  }
  return plan;
}

template <typename Row>
Kernel pick(bool norm) {
  return norm ? &steer_add_rms_norm_kernel<Row> : &steer_kernel<Row>;
}

template <typename T>
Kernel pick(int items, bool norm) {
  constexpr int kWidth = Packet<T>::kWidth;
  if (items == 0) return pick<SharedRow<T>>(norm);
  if (items == 8) return pick<RegisterRow<T, 8 / kWidth>>(norm);
  return items == 16 ? pick<RegisterRow<T, 16 / kWidth>>(norm) : pick<RegisterRow<T, kMaxItems<T> / kWidth>>(norm);
}

// Calls body with a null pointer to the type that `dtype` names.
template <typename Body>
cudaError_t with_type(Dtype dtype, Body body) {
  switch (dtype) {
    case kBFloat16: return body(static_cast<__nv_bfloat16*>(nullptr));
    case kFloat16: return body(static_cast<__half*>(nullptr));
    default: return body(static_cast<float*>(nullptr));
  }
}

template <typename T>
cudaError_t launch(const Call& call, const Device& device, cudaStream_t stream, bool norm) {
  const Plan plan = make_plan<T>(call);
  const int64_t blocks = (call.num_tokens + plan.rows - 1) / plan.rows;
  const int64_t resident = int64_t{device.multiprocessors} * (kResidentThreads / (plan.threads * plan.rows));
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(norm ? blocks : std::min(blocks, resident)));
  config.blockDim = dim3(plan.threads, plan.rows);
  config.dynamicSmemBytes = sizeof(float) * plan.shared_floats;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = device.programmatic ? 1 : 0;
  return cudaLaunchKernelEx(&config, pick<T>(plan.items, norm), call);
}

// Errors of a launch stay behind in the runtime, which would report them again at the next one.
int forgotten(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

int launch(const Call& call, const Device& device, void* stream, bool norm) {
  return forgotten(with_type(call.hidden_dtype, [&](auto* type) {
    return launch<std::remove_pointer_t<decltype(type)>>(call, device, static_cast<cudaStream_t>(stream), norm);
  }));
}

// Kernels are loaded at their first use unless asked for before, and that might be inside the capture of a graph.
template <typename T>
cudaError_t load(int shared_bytes) {
  for (const bool norm : {false, true}) {
    for (const int items : {0, 8, 16, 32}) {
      cudaFuncAttributes attributes;
      cudaError_t error = cudaFuncGetAttributes(&attributes, pick<T>(items, norm));
      if (error == cudaSuccess && items == 0) {
        error = cudaFuncSetAttribute(pick<T>(items, norm), cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
      }
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

cudaError_t load(Device* device) {
  int index = 0, driver = 0, major = 0, shared_bytes = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  const auto read = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, index);
  };
  read(&device->multiprocessors, cudaDevAttrMultiProcessorCount);
  read(&major, cudaDevAttrComputeCapabilityMajor);
  read(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device->programmatic = major >= 9 && driver >= kProgrammaticDriver;
  // Rows in shared memory end at a whole vector of every thread.
  constexpr int kPadding = kMaxThreads * Packet<__half>::kWidth;
  device->max_hidden_size = shared_bytes / static_cast<int>(sizeof(float)) - kPartials - kPadding;
  for (const Dtype dtype : {kFloat32, kBFloat16, kFloat16}) {
    if (error != cudaSuccess) break;
    error = with_type(dtype, [&](auto* type) { return load<std::remove_pointer_t<decltype(type)>>(shared_bytes); });
  }
  return error;
}

}  // namespace
}  // namespace steering

// Each returns a cudaError_t, 0 for success; `steering_error_text` puts it in words.
extern "C" {

// Loads every kernel onto the current device and describes it.
int steering_load(steering::Device* device) { return steering::forgotten(steering::load(device)); }

int steer(const steering::Call* call, const steering::Device* device, void* stream) {
  return steering::launch(*call, *device, stream, false);
}

int steer_add_rms_norm(const steering::Call* call, const steering::Device* device, void* stream) {
  return steering::launch(*call, *device, stream, true);
}

const char* steering_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"
