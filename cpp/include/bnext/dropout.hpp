// Dropout (Srivastava et al., 2014) with a mask that is a function, not an array.
//
// The random 32 bits of element i (in C order) follow from (seed, offset, i) alone; element i is
// dropped where they are below p 2^32. So the mask is the same for every number of threads,
// instruction set, device and dtype, and backward computes it again instead of reading it.
#pragma once

#include <bnext/random.hpp>
#include <bnext/types.hpp>

namespace bnext {

// Which random numbers a call used.
struct DropoutDraw {
  std::uint64_t seed = 0;
  std::uint64_t offset = 0;
};

// y = x / (1 - p) where element i is kept, 0 where it is dropped.
//
// Any shape, float32 or float64; y may be x. p in [0, 1]: 0 copies, 1 gives zeros.
// Errors: std::invalid_argument for shapes, values and partly overlapping memory, DTypeError for
// dtypes; nothing has been written or drawn then.
struct DropoutForward {
  Array x;
  double p = 0.5;
  Array y;  // out, like x
};
// Takes the generator's next offset, unless p is 0, and says which it was.
DropoutDraw dropout_forward(const DropoutForward& args, Generator& generator);

// grad_x = grad_y / (1 - p) where forward kept the element, 0 where it dropped it.
struct DropoutBackward {
  Array grad_y;
  double p = 0.5;    // as in forward
  DropoutDraw draw;  // from forward
  Array grad_x;      // out, like grad_y
};
void dropout_backward(const DropoutBackward& args);

}  // namespace bnext
