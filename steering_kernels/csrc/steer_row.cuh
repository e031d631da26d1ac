// A row of the residual stream in fp32, spread over the threads of a team. Each thread touches its own elements only.

#ifndef STEERING_KERNELS_CSRC_STEER_ROW_CUH_
#define STEERING_KERNELS_CSRC_STEER_ROW_CUH_

#include "steer_elements.cuh"
#include "steer_team.cuh"

namespace steering {

// A row in memory that is read along with x: `data[start + i]` for i below the row's size.
struct Source {
  const void* data;
  Dtype dtype;
  int64_t start;
};

// Operations that are the same wherever x lives. `Derived` has `each(source, body)`, which calls body(x, value) with
// every element and its counterpart, `each(source, other, body)`, likewise with two, and `each(body)` with none.
template <typename Derived, typename T>
class RowOperations {
 public:
  __device__ __forceinline__ void load(const T* hidden) {
    self().each(source(hidden), [](float& x, float value) { x = value; });
  }

  __device__ __forceinline__ void load_sum(const T* hidden, const T* residual) {
    self().each(source(hidden), source(residual), [](float& x, float value, float other) { x = value + other; });
  }

  // This thread's part of the product with another row.
  __device__ __forceinline__ float dot(const Source& other) {
    float sum = 0.0f;
    self().each(other, [&sum](float& x, float value) { sum = fmaf(x, value, sum); });
    return sum;
  }

  // This thread's part of the squared norm.
  __device__ __forceinline__ float square_sum() {
    float sum = 0.0f;
    self().each([&sum](float& x) { sum = fmaf(x, x, sum); });
    return sum;
  }

  __device__ __forceinline__ void add(float factor, const Source& other) {
    self().each(other, [factor](float& x, float value) { x = fmaf(factor, value, x); });
  }

  // x += factor * other * x
  __device__ __forceinline__ void add_product(float factor, const Source& other) {
    self().each(other, [factor](float& x, float value) { x = fmaf(factor * value, x, x); });
  }

  __device__ __forceinline__ void scale(float factor) {
    self().each([factor](float& x) { x *= factor; });
  }

  __device__ __forceinline__ void subtract(const T* residual) {
    self().each(source(residual), [](float& x, float value) { x -= value; });
  }

 private:
  static __device__ __forceinline__ Source source(const T* row) { return {row, Element<T>::kDtype, 0}; }
  __device__ __forceinline__ Derived& self() { return static_cast<Derived&>(*this); }
};

// x in registers, `kVectors` times 16 neighbouring bytes of T in each thread; 0 beyond the row's end. Other rows must
// have the dtype T, and all must be aligned to 16 bytes.
template <typename T, int kVectors>
class RegisterRow : public RowOperations<RegisterRow<T, kVectors>, T> {
 public:
  using Value = T;
  static constexpr int kWidth = Packet<T>::kWidth;
  struct Weight {
    Packet<T> packets[kVectors];
  };
  // Short rows serve small batches, which wait for memory: their weights should arrive while the sum is formed. Long
  // ones are short of registers and have other warps to hide the wait.
  static constexpr bool kFetchesEarly = kWidth * kVectors <= 16;

  __device__ __forceinline__ RegisterRow(int size, const Team& team)
      : size_(size), first_(team.thread * kWidth), step_(team.threads * kWidth) {}

  template <typename Body>
  __device__ __forceinline__ void each(const Source& other, Body body) {
#pragma unroll
    for (int base = 0; base < kVectors; base += kBatch) {
      Packet<T> packets[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) packets[i] = packet(other, base + i);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) use(packets[i], x_[base + i], body);
    }
  }

  template <typename Body>
  __device__ __forceinline__ void each(const Source& source, const Source& other, Body body) {
    Packet<T> packets[kVectors], others[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      packets[v] = packet(source, v);
      others[v] = packet(other, v);
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float values[kWidth], other_values[kWidth];
      packets[v].unpack(values);
      others[v].unpack(other_values);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) body(x_[v][i], values[i], other_values[i]);
    }
  }

  template <typename Body>
  __device__ __forceinline__ void each(Body body) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) body(x_[v][i]);
    }
  }

  __device__ __forceinline__ void fetch(const Source& other, Weight& weight) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) weight.packets[v] = packet(other, v);
  }

  // x *= weight + offset; `weight` was fetched from the same source.
  __device__ __forceinline__ void multiply(const Source&, const Weight& weight, float offset) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      use(weight.packets[v], x_[v], [offset](float& x, float value) { x *= value + offset; });
    }
  }

  __device__ __forceinline__ void store(T* row) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int index = first_ + v * step_;
      if (index < size_) Packet<T>::store(row + index, x_[v]);
    }
  }

 private:
  // Loads that are in flight together before the first is used.
  static constexpr int kBatch = kVectors < 4 ? kVectors : 4;

  __device__ __forceinline__ Packet<T> packet(const Source& source, int v) const {
    const int index = first_ + v * step_;
    return index < size_ ? Packet<T>::load(static_cast<const T*>(source.data) + source.start + index)
                         : Packet<T>::zero();
  }

  template <typename Body>
  static __device__ __forceinline__ void use(const Packet<T>& packet, float (&x)[kWidth], Body body) {
    float values[kWidth];
    packet.unpack(values);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) body(x[i], values[i]);
  }

  float x_[kVectors][kWidth];
  const int size_, first_, step_;
};

// x in shared memory, element by element: rows of any size, alignment and mix of dtypes. One team in each block. A
// thread has the elements that it would have in a RegisterRow, so that all sums have the same bits.
template <typename T>
class SharedRow : public RowOperations<SharedRow<T>, T> {
 public:
  using Value = T;
  struct Weight {};
  static constexpr bool kFetchesEarly = false;

  __device__ __forceinline__ SharedRow(int size, const Team& team)
      : size_(size), thread_(team.thread), threads_(team.threads) {}

  template <typename Body>
  __device__ __forceinline__ void each(const Source& other, Body body) {
    each_index([&](int i, float& x) { body(x, element(other, i)); });
  }

  template <typename Body>
  __device__ __forceinline__ void each(const Source& source, const Source& other, Body body) {
    each_index([&](int i, float& x) { body(x, element(source, i), element(other, i)); });
  }

  template <typename Body>
  __device__ __forceinline__ void each(Body body) {
    each_index([&](int, float& x) { body(x); });
  }

  __device__ __forceinline__ void fetch(const Source&, Weight&) const {}

  __device__ __forceinline__ void multiply(const Source& weight, const Weight&, float offset) {
    each(weight, [offset](float& x, float value) { x *= value + offset; });
  }

  __device__ __forceinline__ void store(T* row) {
    each_index([row](int i, float& x) { row[i] = Element<T>::narrow(x); });
  }

 private:
  static constexpr int kWidth = Packet<T>::kWidth;

  static __device__ __forceinline__ float element(const Source& source, int i) {
    return load_element(source.data, source.dtype, source.start + i);
  }

  template <typename Body>
  __device__ __forceinline__ void each_index(Body body) {
    // Neighbouring threads at neighbouring addresses, whichever elements they hold: no two meet in a bank.
    float* x = shared_memory + kPartials + thread_;
    for (int first = thread_ * kWidth; first < size_; first += threads_ * kWidth) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i, x += threads_) {
        if (first + i < size_) body(first + i, *x);
      }
    }
  }

  const int size_, thread_, threads_;
};

}  // namespace steering

#endif  // STEERING_KERNELS_CSRC_STEER_ROW_CUH_
