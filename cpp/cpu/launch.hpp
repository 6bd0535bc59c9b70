// Walks the tiles of an operation with the kernels of one instruction set. Compiled once; the
// kernels are pointers to functions that were compiled per instruction set.
#pragma once

#include "bnext/types.hpp"
#include "core/args.hpp"
#include "core/math.hpp"
#include "cpu/grid.hpp"

namespace bnext {

// What one tile contributes to a channel's gradients: sum g and sum g (x - origin).
struct GradSums {
  double g, gx;
};
// Whether that may be another origin than 0: products of float32 need none, see origin_of.
template <class S>
constexpr bool sums_have_origin = sizeof(S) != 4;

// How what follows the normalisation is computed: what is frequent and costs next to nothing has
// loops of its own.
enum class Path { none, relu, relu6, relu_and_dropout, residual_and_relu, general };
constexpr int paths = 6;

// Elements that one call of `dropout` takes at most.
constexpr std::int64_t dropout_run = 32768;

// Serial loops over one tile; S is the dtype of the data. Arrays per channel start at channel 0,
// and partials[chunk * grid.problem.c + channel] is the place of a tile's sums. `forward`
// recomputes the normalised value where the gradient of an epilogue needs it. With next_partials,
// which needs rows and sums_next, it also makes the sums of the tile of the next group in the
// mirrored chunk.
template <class S>
struct Kernels {
  using T = Compute<S>;
  void (*moments)(const Grid&, std::int64_t group, std::int64_t chunk, const S* x,
                  Moments* partials);
  struct Apply {
    void (*run)(const Grid&, std::int64_t group, std::int64_t chunk, const S* x,
                const Affine<T>* forward, const Fusion&, S* y, Moments* next_partials);
    bool sums_next;  // takes next_partials
  } apply[paths];
  void (*grad_sums[paths])(const Grid&, std::int64_t group, std::int64_t chunk, const S* grad_y,
                           const S* x, const double* origin, const Affine<T>* forward,
                           const Fusion&, GradSums* partials);
  // grad_residual is optional.
  struct ApplyGrad {
    void (*run)(const Grid&, std::int64_t group, std::int64_t chunk, const S* grad_y, const S* x,
                const double* origin, const Affine<T>* forward, const GradAffine<T>* backward,
                const Fusion&, S* grad_x, S* grad_residual, GradSums* next_partials);
    bool sums_next;
  } apply_grad[paths];
  // Elements [first, end); first is a multiple of dropout_run.
  void (*dropout)(const DropoutArgs&, std::int64_t first, std::int64_t end, bool streaming);
};

// Those of one instruction set, for all dtypes. (The first is for the comma after it.)
template <class, class... S>
struct KernelsFor : Kernels<S>... {};
#define BNEXT_AND_TYPE(name, type, compute) , type
using IsaKernels = KernelsFor<void BNEXT_DTYPES(BNEXT_AND_TYPE)>;
#undef BNEXT_AND_TYPE

template <class S>
void launch(const BatchNormForwardArgs&, const Kernels<S>&);
template <class S>
void launch(const BatchNormBackwardArgs&, const Kernels<S>&);
template <class S>
void launch(const BatchNormInferenceArgs&, const Kernels<S>&);
template <class S>
void launch(const DropoutArgs&, const Kernels<S>&);

}  // namespace bnext
