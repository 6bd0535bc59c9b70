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

#define BNEXT_COUNT(...) +1
constexpr int epilogue_count = 0 BNEXT_EPILOGUES(BNEXT_COUNT);
#undef BNEXT_COUNT

// Serial loops over one tile; T is float or double. Arrays per channel start at channel 0, and
// partials[chunk * grid.problem.c + channel] is the place of a tile's sums. `forward` recomputes
// the normalised value where the derivative of an epilogue needs it.
template <class T>
struct Kernels {
  void (*moments)(const Grid&, std::int64_t group, std::int64_t chunk, const T* x,
                  Moments* partials);
  void (*apply[epilogue_count])(const Grid&, std::int64_t group, std::int64_t chunk, const T* x,
                                const Affine<T>* forward, T negative_slope, T* y);
  void (*grad_sums[epilogue_count])(const Grid&, std::int64_t group, std::int64_t chunk,
                                    const T* grad_y, const T* x, const double* mean,
                                    const Affine<T>* forward, T negative_slope, GradSums* partials);
  void (*apply_grad[epilogue_count])(const Grid&, std::int64_t group, std::int64_t chunk,
                                     const T* grad_y, const T* x, const Affine<T>* forward,
                                     const GradAffine<T>* backward, T negative_slope, T* grad_x);
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
