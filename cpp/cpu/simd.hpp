// Sixteen float64 accumulators, whatever the vector length of the instruction set: the order of
// additions, and so the result, is the same for all.
#pragma once

#include <cstdint>

namespace bnext {
namespace {

typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));

constexpr std::int64_t lanes = 16;

// Sixteen values, widened.
struct Wide {
  f64x8 low, high;
};

inline __attribute__((always_inline)) Wide load(const float* p) {
  f32x8 low, high;
  __builtin_memcpy(&low, p, sizeof low);
  __builtin_memcpy(&high, p + 8, sizeof high);
  return {__builtin_convertvector(low, f64x8), __builtin_convertvector(high, f64x8)};
}

inline __attribute__((always_inline)) Wide load(const double* p) {
  Wide wide;
  __builtin_memcpy(&wide.low, p, sizeof wide.low);
  __builtin_memcpy(&wide.high, p + 8, sizeof wide.high);
  return wide;
}

inline __attribute__((always_inline)) double sum(const Wide& wide) {
  const f64x8 half = wide.low + wide.high;
  return ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
}

}  // namespace
}  // namespace bnext
