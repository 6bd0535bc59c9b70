// What follows the normalisation in the same pass, + residual, activation, dropout, and back, for
// the values of one slot.
#pragma once

#include "bnext/batch_norm.hpp"
#include "core/args.hpp"
#include "cuda/device.cuh"

namespace bnext {
namespace cuda {

// `plain`: nothing but no activation or ReLU; else whatever the fusion says, which costs registers.
template <class S, bool plain>
struct Tail {
  using T = Compute<S>;
  static constexpr int width = width_of<S>;

  const Fusion& fusion;
  std::int64_t size;
  bool wide;

  template <class At>
  __device__ Stored<S> residual(const At& slot) const {
    if constexpr (!plain)
      if (fusion.residual != nullptr)
        return load(static_cast<const S*>(fusion.residual), slot, size, wide);
    return Stored<S>{};
  }

  // z becomes the result.
  template <class At>
  __device__ void values(T (&z)[width], const Stored<S>& residual, const At& slot) const {
    if constexpr (plain) {
      if (fusion.activation != Activation::relu) return;
#pragma unroll
      for (int e = 0; e < width; ++e) z[e] = epilogue::relu::value(z[e], T{});
      return;
    }
    const T slope = static_cast<T>(fusion.negative_slope);
    add(z, residual);
    unsigned passing = 0;
    with_epilogue([&](auto of) {
      using Epilogue = decltype(of);
#pragma unroll
      for (int e = 0; e < width; ++e) {
        if constexpr (Epilogue::gated) passing |= Epilogue::passes(z[e]) ? 1u << e : 0u;
        z[e] = Epilogue::value(z[e], slope);
      }
    });
    if (fusion.passes != nullptr) add_slot_bits(fusion.passes, slot, passing);
    drop(z, slot);
  }

  // What the gradients go by: x, or what the result that is there in its place was of.
  __device__ void inputs(T (&x)[width], const Stored<S>& stored) const {
#pragma unroll
    for (int e = 0; e < width; ++e) x[e] = stored[e];
    if constexpr (!plain) {
      if (!fusion.inverted) return;
      const T inverse = 1 / static_cast<T>(fusion.negative_slope);
#pragma unroll
      for (int e = 0; e < width; ++e) x[e] = epilogue::leaky_relu::value(x[e], inverse);
    }
  }

  // g becomes the gradient before the activation; affine(e) normalises x[e].
  template <class At, class AffineOf>
  __device__ void gradients(T (&g)[width], const T (&x)[width], const Stored<S>& residual,
                            const At& slot, AffineOf affine) const {
    if constexpr (plain) {
      if (fusion.activation != Activation::relu) return;
#pragma unroll
      for (int e = 0; e < width; ++e)
        g[e] = epilogue::relu::gradient(g[e], apply(affine(e), x[e]), T{});
      return;
    }
    drop(g, slot);
    if (fusion.activation == Activation::none) return;
    const T slope = static_cast<T>(fusion.negative_slope);
    const bool noted = fusion.passes != nullptr;
    const unsigned passing = noted ? slot_bits(fusion.passes, slot) : 0;
    T z[width];
#pragma unroll
    for (int e = 0; e < width; ++e) z[e] = noted ? T{} : apply(affine(e), x[e]);
    if (!noted) add(z, residual);
    with_epilogue([&](auto of) {
      using Epilogue = decltype(of);
      if constexpr (Epilogue::gated)
        if (noted) {
          // Nothing is left of an infinite gradient, not the NaN that times 0 would make of it.
          const T leak = Epilogue::leak(slope);
#pragma unroll
          for (int e = 0; e < width; ++e)
            g[e] = passing >> e & 1u ? g[e] : leak == 0 ? T{} : g[e] * leak;
          return;
        }
#pragma unroll
      for (int e = 0; e < width; ++e) g[e] = Epilogue::gradient(g[e], z[e], slope);
    });
  }

 private:
  __device__ void add(T (&z)[width], const Stored<S>& residual) const {
    if (fusion.residual == nullptr) return;
#pragma unroll
    for (int e = 0; e < width; ++e) z[e] += residual[e];
  }
  template <class At>
  __device__ void drop(T (&values)[width], const At& slot) const {
    if (fusion.kept == nullptr) return;
    const T scale = static_cast<T>(fusion.dropout.scale);
    const unsigned kept = slot_bits(fusion.kept, slot);
#pragma unroll
    for (int e = 0; e < width; ++e) values[e] = kept >> e & 1u ? values[e] * scale : T{};
  }
  template <class Body>
  __device__ void with_epilogue(Body body) const {
    switch (fusion.activation) {
#define BNEXT_CASE(name)    \
  case Activation::name:    \
    body(epilogue::name()); \
    break;
      BNEXT_EPILOGUES(BNEXT_CASE)
#undef BNEXT_CASE
    }
  }
};

}  // namespace cuda
}  // namespace bnext
