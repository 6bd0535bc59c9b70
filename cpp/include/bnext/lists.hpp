// The lists of what exists: operations, dtypes, epilogues. (The fourth, of instruction sets, is
// bnext_isa in CMakeLists.txt.) Enums, tables, launchers, bindings and tests are made from them.
#pragma once

// X(name, arguments of its launcher)
#define BNEXT_OPS(X)                              \
  X(batch_norm_forward, BatchNormForwardArgs)     \
  X(batch_norm_backward, BatchNormBackwardArgs)   \
  X(batch_norm_inference, BatchNormInferenceArgs) \
  X(dropout, DropoutArgs)

// X(name in NumPy and in DType, C++ type)
#define BNEXT_DTYPES(X) \
  X(float32, float)     \
  X(float64, double)

// X(name in Python and in Activation): a struct of that name in core/math.hpp has the arithmetic.
// z is the normalised value.
//   none: z;   relu: max(z, 0);   leaky_relu: z > 0 ? z : negative_slope * z
#define BNEXT_EPILOGUES(X) \
  X(none)                  \
  X(relu)                  \
  X(leaky_relu)
