// The lists of what exists: operations, dtypes, epilogues. (The fourth, of instruction sets, is
// bnext_isa in CMakeLists.txt.) Enums, tables, launchers, bindings and tests are made from them.
#pragma once

#include <cstdint>

namespace bnext {

// Numbers of 16 bits, which are only stored so: they are computed as float.
struct float16 {
  std::uint16_t bits;
};
struct bfloat16 {
  std::uint16_t bits;
};

}  // namespace bnext

// X(name, arguments of its launcher)
#define BNEXT_OPS(X)                              \
  X(batch_norm_forward, BatchNormForwardArgs)     \
  X(batch_norm_backward, BatchNormBackwardArgs)   \
  X(batch_norm_inference, BatchNormInferenceArgs) \
  X(dropout, DropoutArgs)

// X(name in NumPy and in DType, C++ type, type of computation and of weight, bias and statistics)
#define BNEXT_DTYPES(X)      \
  X(float32, float, float)   \
  X(float64, double, double) \
  X(float16, float16, float) \
  X(bfloat16, bfloat16, float)

// X(name in Python and in Activation): a struct of that name in core/math.hpp has the arithmetic.
// z is the normalised value.
//   none: z;   relu: max(z, 0);   leaky_relu: z > 0 ? z : negative_slope * z
//   relu6: min(max(z, 0), 6);   hardswish: z relu6(z + 3) / 6;   silu: z / (1 + exp(-z))
//   gelu: z / (1 + exp(-2 u)), u = sqrt(2 / pi) (z + 0.044715 z^3), the tanh form
#define BNEXT_EPILOGUES(X) \
  X(none)                  \
  X(relu)                  \
  X(leaky_relu)            \
  X(relu6)                 \
  X(hardswish)             \
  X(silu)                  \
  X(gelu)
