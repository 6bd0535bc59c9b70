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
  // For arrays of a GPU: if not null, the seed is read there, in its memory, when the operation
  // runs. So a captured CUDA graph draws other masks each time, if the graph also sets it.
  const std::uint64_t* device_seed = nullptr;
};

// y = x / (1 - p) where element i is kept, 0 where it is dropped.
//
// Any shape and dtype; y may be x. p in [0, 1]: 0 copies, 1 gives zeros.
//
// With a mask_shape, the mask has that shape and is broadcast to x: (N, C, 1, 1) drops whole
// channels, (N, 1, 1, 1) whole samples, (1, C, H, W) the same elements of all samples. Each extent
// is that of x or 1, and axes that share bits are neighbours, but for two groups of them.
//
// Alpha dropout (Klambauer et al., 2017, arXiv:1706.02515) keeps the mean 0 and the variance 1 of
// inputs that have them: with s = -1.758..., the value that SELU goes to at -inf, and
// a = ((1 - p)(1 + p s^2))^(-1/2), y = a (x - p s) where kept and a s (1 - p) where dropped.
//
// Errors: std::invalid_argument for shapes, values and partly overlapping memory, DTypeError for
// dtypes; nothing has been written or drawn then.
struct DropoutForward {
  Array x;
  double p = 0.5;
  Array y;                // out, like x
  Shape mask_shape = {};  // optional: that of x
  bool alpha = false;
  Stream stream = nullptr;
};
// Takes the generator's next offset, unless p is 0, and says which it was.
DropoutDraw dropout_forward(const DropoutForward& args, Generator& generator);
void dropout_forward(const DropoutForward& args, const DropoutDraw& draw);

// grad_x = grad_y / (1 - p) (alpha: a grad_y) where forward kept the element, 0 where it dropped
// it.
struct DropoutBackward {
  Array grad_y;
  double p = 0.5;         // as in forward
  DropoutDraw draw;       // from forward
  Array grad_x;           // out, like grad_y
  Shape mask_shape = {};  // as in forward
  bool alpha = false;
  Stream stream = nullptr;
};
void dropout_backward(const DropoutBackward& args);

// kept[i] = 1 where a mask keeps element first + i, 0 where it drops it, for i in [0, count).
// Neither number is negative, and first + count < 2^63, else std::invalid_argument; without
// elements, `kept` may be null. So also below.
void dropout_mask(double p, const DropoutDraw& draw, std::int64_t first, std::int64_t count,
                  std::uint8_t* kept);

// Gaussian dropout multiplies element i by noise[i - first], from N(1, p / (1 - p)); p in [0, 1).
void gaussian_dropout_noise(double p, const DropoutDraw& draw, std::int64_t first,
                            std::int64_t count, float* noise);

}  // namespace bnext
