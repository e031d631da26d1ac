// The steering operator on the host. Semantics: steering_kernels/reference.py.
//
// One pass over the steered rows: each value is widened to fp32, all of its token's vectors are added in listed order, and
// the result is rounded once. Rows without a vector are not touched. Plain pointers, so that it builds in a second.

#include <cstdint>
#include <cstring>

namespace {

struct BFloat16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline void store(float value, float* target) { *target = value; }

// Round to nearest, ties to even, as torch does; NaN stays a quiet NaN.
inline void store(float value, BFloat16* target) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  target->bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

constexpr int64_t kMaxOps = 64;

template <typename Value>
void steer(Value* hidden, int64_t num_tokens, int64_t hidden_size, int64_t hidden_stride, const Value* pool,
           const int32_t* write_rows, const float* scales, int64_t max_ops, const int32_t* slot_ids,
           const float* strengths) {
  for (int64_t token = 0; token < num_tokens; ++token) {
    const int32_t slot = slot_ids[token];
    if (slot < 0) continue;
    const Value* vectors[kMaxOps];
    float factors[kMaxOps];
    int64_t count = 0;
    for (int64_t op = 0; op < max_ops; ++op) {
      const int32_t row = write_rows[slot * max_ops + op];
      if (row < 0) continue;
      vectors[count] = pool + row * hidden_size;
      factors[count] = strengths[token] * scales[slot * max_ops + op];
      ++count;
    }
    Value* out = hidden + token * hidden_stride;
    if (count == 1) {
      const Value* vector = vectors[0];
      const float factor = factors[0];
      for (int64_t i = 0; i < hidden_size; ++i) store(widen(out[i]) + factor * widen(vector[i]), out + i);
    } else if (count > 1) {
      for (int64_t i = 0; i < hidden_size; ++i) {
        float sum = widen(out[i]);
        for (int64_t op = 0; op < count; ++op) sum += factors[op] * widen(vectors[op][i]);
        store(sum, out + i);
      }
    }
  }
}

}  // namespace

extern "C" {

void steer_float32(float* hidden, int64_t num_tokens, int64_t hidden_size, int64_t hidden_stride, const float* pool,
                   const int32_t* write_rows, const float* scales, int64_t max_ops, const int32_t* slot_ids,
                   const float* strengths) {
  steer(hidden, num_tokens, hidden_size, hidden_stride, pool, write_rows, scales, max_ops, slot_ids, strengths);
}

void steer_bfloat16(BFloat16* hidden, int64_t num_tokens, int64_t hidden_size, int64_t hidden_stride,
                    const BFloat16* pool, const int32_t* write_rows, const float* scales, int64_t max_ops,
                    const int32_t* slot_ids, const float* strengths) {
  steer(hidden, num_tokens, hidden_size, hidden_stride, pool, write_rows, scales, max_ops, slot_ids, strengths);
}

}  // extern "C"
