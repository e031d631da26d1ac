// The steering operators on a GPU: device code. Semantics: reference.py; layout of the table: table.py.
//
// A team of threads, one warp or one block, holds a row in registers in fp32 from its loads to its stores. Whatever
// decides where a team goes (slot, entries, sums) is the same in all of its threads, so all meet at every barrier.

#ifndef STEERING_KERNELS_CSRC_STEER_CUDA_CUH_
#define STEERING_KERNELS_CSRC_STEER_CUDA_CUH_

#include "steer_math.h"
#include "steer_row.cuh"
#include "steer_team.cuh"

namespace steering {

// Arguments of both operators; cuda.py packs them. Strides are in elements.
struct Call {
  void* hidden;
  void* residual;  // null: none
  const void* pool;
  const int32_t* codes;
  const float* params;
  const int32_t* slot_ids;
  const float* strengths;
  float* gates;
  const void* weight;  // null: none
  int64_t num_tokens, hidden_stride, residual_stride, pool_stride;
  int32_t hidden_size, max_ops, num_gates;
  Dtype hidden_dtype, pool_dtype, weight_dtype;
  float epsilon, weight_offset;
};

__device__ __forceinline__ Source pool_row(const Call& call, int row) {
  return {call.pool, call.pool_dtype, row * call.pool_stride};
}

// A slot's entries, as many at a time as a warp has lanes for their codes. Every warp holds its own copy.
class Entries {
 public:
  static constexpr int kWindow = kWarp / table::kCodeWidth;

  __device__ __forceinline__ Entries(const Call& call, int slot, int lane)
      : codes_(call.codes + static_cast<int64_t>(slot) * call.max_ops * table::kCodeWidth),
        params_(call.params + static_cast<int64_t>(slot) * call.max_ops * table::kParamWidth),
        max_ops_(call.max_ops),
        lane_(lane) {}

  __device__ __forceinline__ void load(int first) {
    const int left = max_ops_ - first;
    code_ = lane_ < left * table::kCodeWidth ? codes_[first * table::kCodeWidth + lane_] : table::kEnd;
    const bool holds = lane_ < kWindow * table::kParamWidth && lane_ < left * table::kParamWidth;
    param_ = holds ? params_[first * table::kParamWidth + lane_] : 0.0f;
  }
  __device__ __forceinline__ int code(int index, table::Code column) const {
    return __shfl_sync(kAllLanes, code_, index % kWindow * table::kCodeWidth + column);
  }
  __device__ __forceinline__ float param(int index, table::Param column) const {
    return __shfl_sync(kAllLanes, param_, index % kWindow * table::kParamWidth + column);
  }
  __device__ __forceinline__ Constants constants(int index) const {
    return {param(index, table::kA), param(index, table::kB), param(index, table::kC)};
  }

 private:
  const int32_t* codes_;
  const float* params_;
  int max_ops_, lane_;
  int32_t code_ = table::kEnd;
  float param_ = 0.0f;
};

// p, q and the norm of the row, whichever the kind asks for; 0 otherwise.
struct Readings {
  float p, q, norm;
};

template <typename Row>
__device__ __forceinline__ Readings read(Row& row, const Call& call, Team& team, const Entries& entries, int index,
                                         int32_t kind, int32_t flags) {
  const bool reads = reads_row(kind), normed = needs_norm(kind, flags);
  if (!reads && !normed) return {0.0f, 0.0f, 0.0f};
  const auto dot = [&](table::Code column) {
    const int read_row = entries.code(index, column);
    return read_row < 0 ? 0.0f : row.dot(pool_row(call, read_row));
  };
  if (reads && !normed && kind != table::kRotate) {
    float p[1] = {dot(table::kRead)};
    team.sum(p);
    return {p[0], 0.0f, 0.0f};
  }
  float sums[kMaxSums] = {0.0f, 0.0f, normed ? row.square_sum() : 0.0f};
  if (reads) sums[0] = dot(table::kRead);
  if (kind == table::kRotate) sums[1] = dot(table::kRead2);
  team.sum(sums);
  const float norm = sqrtf(sums[2]);
  return {flags & table::kCosine ? cosine_of(sums[0], norm) : sums[0], sums[1], norm};
}

// The write half of one entry with effective strength s.
template <typename Row>
__device__ __forceinline__ void write(Row& row, const Call& call, Team& team, const Entries& entries, int index,
                                      int32_t kind, int32_t flags, float s, const Readings& readings) {
  const auto add = [&](float factor, table::Code column) {
    const int write_row = entries.code(index, column);
    if (write_row >= 0) row.add(factor, pool_row(call, write_row));
  };
  float factor = s;
  if (kind == table::kAffine) {
    const int read_row = entries.code(index, table::kRead);
    if (read_row >= 0) row.add_product(s, pool_row(call, read_row));
  } else if (kind == table::kRotate) {
    const Turn turned = turn(readings.p, readings.q, s, entries.param(index, table::kA), flags);
    add(turned.write2, table::kWrite2);
    factor = turned.write;
  } else if (kind != table::kAdd) {
    factor = s * change(kind, readings.p, readings.norm, entries.constants(index), flags);
  }
  add(factor, table::kWrite);
  if (flags & table::kKeepNorm) {
    float square[1] = {row.square_sum()};
    team.sum(square);
    if (square[0] > 0.0f) row.scale(readings.norm / sqrtf(square[0]));
  }
}

// Applies the entries of a slot to a token's row in order; returns whether one of them changed it.
template <typename Row>
__device__ __forceinline__ bool apply(Row& row, const Call& call, Team& team, int64_t token, int slot) {
  Entries entries(call, slot, team.lane);
  const float strength = call.strengths[token];
  // Lane g of every warp holds gate g, so that a condition reaches the entries behind it without a barrier.
  float* gates = call.gates + token * call.num_gates;
  float gate = team.lane < call.num_gates ? gates[team.lane] : 0.0f;
  bool changed = false;
#pragma unroll 1
  for (int index = 0; index < call.max_ops; ++index) {
    if (index % Entries::kWindow == 0) entries.load(index);
    const int32_t kind = entries.code(index, table::kKind);
    if (kind == table::kEnd) break;
    const int32_t flags = entries.code(index, table::kFlags);
    const int32_t gate_in = entries.code(index, table::kGate);
    float s = strength * entries.param(index, table::kScale);
    if (gate_in >= 0) s *= __shfl_sync(kAllLanes, gate, gate_in);
    if (s == 0.0f && kind != table::kCondition) continue;
    const Readings readings = read(row, call, team, entries, index, kind, flags);
    if (kind == table::kCondition) {
      const int32_t gate_out = entries.code(index, table::kGateOut);
      const float value = gate_value(readings.p, entries.constants(index), flags);
      if (team.lane == gate_out) gate = value;
      if (team.thread == gate_out) gates[gate_out] = value;
      continue;
    }
    write(row, call, team, entries, index, kind, flags, s, readings);
    changed = true;
  }
  return changed;
}

// The launch may let this kernel start while the one before it ends: nothing may be read or written before the wait.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// steer_: each team takes every n-th token, and looks at the slots of 32 of its tokens at once, so that a batch that
// nobody steers costs little more than the launch.
template <typename Row>
__global__ void __launch_bounds__(kMaxThreads, 1) steer_kernel(const __grid_constant__ Call call) {
  using T = typename Row::Value;
  wait_for_previous_kernel();
  Team team;
  const int64_t teams = static_cast<int64_t>(gridDim.x) * blockDim.y;
  int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  for (; first < call.num_tokens; first += kWarp * teams) {
    const int64_t token_of_lane = first + team.lane * teams;
    const int slot_of_lane = token_of_lane < call.num_tokens ? call.slot_ids[token_of_lane] : -1;
    uint32_t steered = __ballot_sync(kAllLanes, slot_of_lane >= 0);
#pragma unroll 1
    for (; steered != 0; steered &= steered - 1) {
      const int lane = __ffs(static_cast<int>(steered)) - 1;
      const int64_t token = first + lane * teams;
      T* hidden = static_cast<T*>(call.hidden) + token * call.hidden_stride;
      const bool is_split = call.residual != nullptr;
      const T* residual = static_cast<const T*>(call.residual) + (is_split ? token * call.residual_stride : 0);
      Row row(call.hidden_size, team);
      if (is_split) {
        row.load_sum(hidden, residual);
      } else {
        row.load(hidden);
      }
      if (!apply(row, call, team, token, __shfl_sync(kAllLanes, slot_of_lane, lane))) continue;
      if (is_split) row.subtract(residual);
      row.store(hidden);
    }
  }
}

// steer_add_rms_norm_: one team for each token.
template <typename Row>
__global__ void __launch_bounds__(kMaxThreads, 1) steer_add_rms_norm_kernel(const __grid_constant__ Call call) {
  using T = typename Row::Value;
  wait_for_previous_kernel();
  Team team;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= call.num_tokens) return;
  T* hidden = static_cast<T*>(call.hidden) + token * call.hidden_stride;
  T* residual = static_cast<T*>(call.residual) + token * call.residual_stride;
  const int slot = call.slot_ids[token];
  Row row(call.hidden_size, team);
  row.load_sum(hidden, residual);
  if (slot >= 0) apply(row, call, team, token, slot);
  row.store(residual);

  const bool weighted = call.weight != nullptr;
  const Source source = {call.weight, call.weight_dtype, 0};
  typename Row::Weight weight;
  if (Row::kFetchesEarly && weighted) row.fetch(source, weight);
  float square[1] = {row.square_sum()};
  team.sum(square);
  row.scale(rsqrtf(square[0] / static_cast<float>(call.hidden_size) + call.epsilon));
  if (weighted) {
    if (!Row::kFetchesEarly) row.fetch(source, weight);
    row.multiply(source, weight, call.weight_offset);
  }
  row.store(hidden);
}

}  // namespace steering

#endif  // STEERING_KERNELS_CSRC_STEER_CUDA_CUH_
