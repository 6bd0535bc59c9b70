// Walks the tiles of an operation with the kernels of one instruction set. Compiled once; the
// kernels are pointers to functions that were compiled per instruction set.
#pragma once

#include "bnext/lists.hpp"
#include "core/args.hpp"
#include "core/math.hpp"
#include "cpu/grid.hpp"

namespace bnext {

// What one tile contributes to a channel's gradients: sum g and sum g (x - mean).
struct GradSums {
  double g, gx;
};

// How a fusion is computed: what needs no more than a vector of values stays in registers, the rest
// goes in stretches.
enum class Path { none, relu, leaky_relu, staged };
constexpr int path_count = 4;

// Serial loops over one tile; T is float or double. Arrays per channel start at channel 0, and
// partials[chunk * grid.problem.c + channel] is the place of a tile's sums. `forward` recomputes
// the normalised value where the gradient of an epilogue needs it.
template <class T>
struct Kernels {
  void (*moments)(const Grid&, std::int64_t group, std::int64_t chunk, const T* x,
                  Moments* partials);
  void (*apply[path_count])(const Grid&, std::int64_t group, std::int64_t chunk, const T* x,
                            const Affine<T>* forward, const Fusion&, T* y);
  void (*grad_sums[path_count])(const Grid&, std::int64_t group, std::int64_t chunk,
                                const T* grad_y, const T* x, const double* mean,
                                const Affine<T>* forward, const Fusion&, GradSums* partials);
  // grad_residual is optional.
  void (*apply_grad[path_count])(const Grid&, std::int64_t group, std::int64_t chunk,
                                 const T* grad_y, const T* x, const Affine<T>* forward,
                                 const GradAffine<T>* backward, const Fusion&, T* grad_x,
                                 T* grad_residual);
  // Spans [first, last) of MaskLayout::span elements.
  void (*dropout)(const DropoutArgs&, std::int64_t first, std::int64_t last, bool streaming);
};

template <class T>
void launch(const BatchNormForwardArgs&, const Kernels<T>&);
template <class T>
void launch(const BatchNormBackwardArgs&, const Kernels<T>&);
template <class T>
void launch(const BatchNormInferenceArgs&, const Kernels<T>&);
template <class T>
void launch(const DropoutArgs&, const Kernels<T>&);

}  // namespace bnext
