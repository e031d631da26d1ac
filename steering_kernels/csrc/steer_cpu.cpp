// The steering operators on the host. Semantics: steering_kernels/reference.py; layout of the table: table.py.
//
// A token's row is loaded into fp32 scratch that stays in the first-level cache, its entries are applied there in
// order, and the result is rounded once. Threads share out tokens, never a row, so their number changes no result.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "steer_math.h"
#include "steer_rows.h"

namespace steering {
namespace {

enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Code {
  int32_t kind, read, write, read2, write2, gate, gate_out, flags;
};

struct Param {
  float scale;
  Constants constants;
};

// Arguments of both operators; native.py packs them. Strides are in elements.
struct Call {
  void* hidden;
  void* residual;  // null: none
  const void* pool;
  const Code* codes;
  const Param* params;
  const int32_t* slot_ids;
  const float* strengths;
  float* gates;
  const void* weight;  // null: none
  int64_t num_tokens, hidden_size, hidden_stride, residual_stride, pool_stride, max_ops, num_gates, num_threads;
  int64_t hidden_dtype, pool_dtype, weight_dtype;
  double epsilon, weight_offset;
};

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kElementsForThreads = 32768;

// Calls `body` with a null pointer to the type that `dtype` names.
template <typename Body>
void with_type(int64_t dtype, Body body) {
  switch (dtype) {
    case kFloat32: return body(static_cast<float*>(nullptr));
    case kBFloat16: return body(static_cast<BFloat16*>(nullptr));
    case kFloat16: return body(static_cast<Float16*>(nullptr));
  }
}

// The entries of one token's slot, applied to its row x; pool rows are of type Value.
template <typename Value>
class Entries {
 public:
  Entries(const Call& call, int64_t token, float* x)
      : call_(call),
        x_(x),
        size_(call.hidden_size),
        strength_(call.strengths[token]),
        gates_(call.gates + token * call.num_gates) {}

  // Whether an entry of the slot changed x.
  bool apply(int64_t slot) {
    bool changed = false;
    for (int64_t index = slot * call_.max_ops; index < (slot + 1) * call_.max_ops; ++index) {
      const Code& code = call_.codes[index];
      const Param& param = call_.params[index];
      if (code.kind == table::kEnd) break;
      const float s = strength_ * param.scale * (code.gate >= 0 ? gates_[code.gate] : 1.0f);
      if (s == 0 && code.kind != table::kCondition) continue;
      const float old_norm = needs_norm(code.kind, code.flags) ? norm() : 0.0f;
      float p = reads_row(code.kind) ? product(code.read) : 0.0f;
      if (code.flags & table::kCosine) p = cosine_of(p, old_norm);
      if (code.kind == table::kCondition) {
        gates_[code.gate_out] = gate_value(p, param.constants, code.flags);
        continue;
      }
      write(code, param.constants, s, p, old_norm);
      if (code.flags & table::kKeepNorm) restore(old_norm);
      changed = true;
    }
    return changed;
  }

 private:
  void write(const Code& code, const Constants& constants, float s, float p, float norm) {
    if (code.kind == table::kAffine) {
      if (code.read >= 0) add_scaled_product(x_, s, row(code.read), size_);
      add(code.write, s);
    } else if (code.kind == table::kRotate) {
      const Turn turned = turn(p, product(code.read2), s, constants.a, code.flags);
      add(code.write, turned.write);
      add(code.write2, turned.write2);
    } else {
      add(code.write, s * change(code.kind, p, norm, constants, code.flags));
    }
  }

  void restore(float old_norm) {
    const float new_norm = norm();
    if (new_norm > 0) scale(x_, old_norm / new_norm, size_);
  }

  void add(int32_t index, float factor) {
    if (index >= 0) add_scaled(x_, factor, row(index), size_);
  }

  float product(int32_t index) const { return index >= 0 ? dot(x_, row(index), size_) : 0.0f; }

  float norm() const { return std::sqrt(sum_of_squares(x_, size_)); }

  const Value* row(int32_t index) const { return static_cast<const Value*>(call_.pool) + index * call_.pool_stride; }

  const Call& call_;
  float* const x_;
  const int64_t size_;
  const float strength_;
  float* const gates_;
};

bool apply_entries(const Call& call, int64_t token, float* x) {
  const int32_t slot = call.slot_ids[token];
  if (slot < 0) return false;
  bool changed = false;
  with_type(call.pool_dtype, [&](auto* type) {
    changed = Entries<std::remove_pointer_t<decltype(type)>>(call, token, x).apply(slot);
  });
  return changed;
}

struct Free {
  void operator()(float* row) const { operator delete[](row, std::align_val_t(64)); }
};

// Uninitialised fp32 row, aligned for the widest vector registers.
std::unique_ptr<float[], Free> new_row(int64_t size) {
  return std::unique_ptr<float[], Free>(new (std::align_val_t(64)) float[size]);
}

// Calls `body(token, scratch)` for every token; `num_elements` says how much work that is.
template <typename Body>
void for_each_token(const Call& call, int64_t num_elements, Body body) {
  const auto run = [&](int64_t begin, int64_t end) {
    const auto scratch = new_row(call.hidden_size);
    for (int64_t token = begin; token < end; ++token) body(token, scratch.get());
  };
  // All of torch's threads or none: a smaller team would make OpenMP end the others, which may be bound to cores.
  if (call.num_threads <= 1 || num_elements < kElementsForThreads) return run(0, call.num_tokens);
#pragma omp parallel for num_threads(call.num_threads) schedule(static, 1)
  for (int64_t part = 0; part < call.num_threads; ++part) {
    run(call.num_tokens * part / call.num_threads, call.num_tokens * (part + 1) / call.num_threads);
  }
}

template <typename Value>
void steer(const Call& call) {
  const int64_t num_steered = std::count_if(call.slot_ids, call.slot_ids + call.num_tokens,
                                            [](int32_t slot) { return slot >= 0; });
  for_each_token(call, num_steered * call.hidden_size, [&](int64_t token, float* x) {
    if (call.slot_ids[token] < 0) return;
    Value* hidden = static_cast<Value*>(call.hidden) + token * call.hidden_stride;
    const int64_t size = call.hidden_size;
    if (call.residual == nullptr) {
      load(hidden, size, x);
      if (apply_entries(call, token, x)) store(x, size, hidden);
    } else {
      const Value* residual = static_cast<const Value*>(call.residual) + token * call.residual_stride;
      load_sum(hidden, residual, size, x);
      if (apply_entries(call, token, x)) store_difference(x, residual, size, hidden);
    }
  });
}

// What the normalised row is multiplied by, [hidden_size].
std::unique_ptr<float[], Free> weights(const Call& call) {
  auto result = new_row(call.hidden_size);
  if (call.weight == nullptr) {
    std::fill_n(result.get(), call.hidden_size, 1.0f);
  } else {
    with_type(call.weight_dtype, [&](auto* type) {
      load(static_cast<decltype(type)>(const_cast<void*>(call.weight)), call.hidden_size, result.get());
    });
    const float offset = static_cast<float>(call.weight_offset);
    for (int64_t i = 0; i < call.hidden_size; ++i) result[i] += offset;
  }
  return result;
}

template <typename Value>
void steer_add_rms_norm(const Call& call) {
  const auto weight = weights(call);
  for_each_token(call, call.num_tokens * call.hidden_size, [&](int64_t token, float* x) {
    Value* hidden = static_cast<Value*>(call.hidden) + token * call.hidden_stride;
    Value* residual = static_cast<Value*>(call.residual) + token * call.residual_stride;
    const int64_t size = call.hidden_size;
    load_sum(hidden, residual, size, x);
    apply_entries(call, token, x);
    const float mean = store_squared(x, size, residual) / static_cast<float>(size);
    store_product(x, 1.0f / std::sqrt(mean + static_cast<float>(call.epsilon)), weight.get(), size, hidden);
  });
}

}  // namespace
}  // namespace steering

extern "C" {

int32_t steer_is_needed(const int32_t* slot_ids, int64_t num_tokens) {
  int32_t signs = -1;
  for (int64_t token = 0; token < num_tokens; ++token) signs &= slot_ids[token];
  return signs >= 0;
}

void steer(const steering::Call* call) {
  steering::with_type(call->hidden_dtype, [&](auto* type) {
    steering::steer<std::remove_pointer_t<decltype(type)>>(*call);
  });
}

void steer_add_rms_norm(const steering::Call* call) {
  steering::with_type(call->hidden_dtype, [&](auto* type) {
    steering::steer_add_rms_norm<std::remove_pointer_t<decltype(type)>>(*call);
  });
}

}  // extern "C"
