// What follows the normalisation in a fused operation, on stretches that stay in the L1 cache:
// + residual, activation, dropout, and back.
#pragma once

#include "bnext/batch_norm.hpp"
#include "core/args.hpp"
#include "core/math.hpp"
#include "cpu/dropout.hpp"
#include "cpu/simd.hpp"

namespace bnext {
namespace {

// Elements that are staged at once.
constexpr std::int64_t stage_length = 512;

// How many of `rest` elements that end up at `to` are staged next: those after them begin a line.
template <class T>
BNEXT_INLINE std::int64_t stage_count(const T* to, std::int64_t rest) {
  const std::int64_t count = until_next_line(to) + stage_length - line_length<T>;
  return rest < count ? rest : count;
}

template <class T>
class Stage {
 public:
  explicit Stage(const Fusion& f)
      : residual_(static_cast<const T*>(f.residual)),
        activation_(f.activation),
        slope_(static_cast<T>(f.negative_slope)),
        passes_(f.passes),
        dropping_(f.dropout.threshold > 0),
        scale_(static_cast<T>(f.dropout.scale)),
        mask_(f.dropout) {}

  // z[k], the normalised value of element first + k for k in [0, count), becomes its result.
  void forward(T* z, std::int64_t first, std::int64_t count) {
    add_residual(z, first, count);
    with_epilogue([&](auto e) __attribute__((always_inline)) {
      using Epilogue = decltype(e);
      if constexpr (Epilogue::gated)
        if (passes_ != nullptr) record(e, z, first, count);
      if constexpr (!Epilogue::linear)
        each_place<T>(0, count, [&](auto at) __attribute__((always_inline)) {
          at.write(Epilogue::value(at(z), slope_), z);
        });
    });
    drop(z, first, count);
  }

  // g[k], the gradient at the result of element first + k, becomes that at the sum of its
  // normalised value and its residual. normalised(place) is that value, where it is needed.
  template <class Normalised>
  BNEXT_INLINE void backward(T* g, std::int64_t first, std::int64_t count, Normalised normalised) {
    drop(g, first, count);
    with_epilogue([&](auto e) __attribute__((always_inline)) {
      using Epilogue = decltype(e);
      if constexpr (Epilogue::linear) return;
      if constexpr (Epilogue::gated)
        if (passes_ != nullptr) return pass(e, g, first, count);
      const T* residual = residual_ + (residual_ != nullptr ? first : 0);
      each_place<T>(0, count, [&](auto at) __attribute__((always_inline)) {
        auto z = normalised(at);
        if (residual_ != nullptr) z = z + at(residual);
        at.write(Epilogue::gradient(at(g), z, slope_), g);
      });
    });
  }

 private:
  template <class Body>
  BNEXT_INLINE void with_epilogue(Body body) const {
    switch (activation_) {
#define BNEXT_CASE(name) \
  case Activation::name: \
    return body(epilogue::name());
      BNEXT_EPILOGUES(BNEXT_CASE)
#undef BNEXT_CASE
    }
  }

  void add_residual(T* z, std::int64_t first, std::int64_t count) const {
    if (residual_ == nullptr) return;
    const T* residual = residual_ + first;
    each_place<T>(0, count, [&](auto at) __attribute__((always_inline)) {
      at.write(at(z) + at(residual), z);
    });
  }

  void drop(T* values, std::int64_t first, std::int64_t count) {
    if (!dropping_) return;
    for (std::int64_t k = 0; k < count;) {
      const std::int32_t* bits = mask_.of(first + k);
      const std::int64_t begin = (first + k) % MaskBits::batch;
      const std::int64_t rest = MaskBits::batch - begin;
      const std::int64_t n = count - k < rest ? count - k : rest;
      T* part = values + k;
      each_place<T>(0, n, [&](auto at) __attribute__((always_inline)) {
        const auto kept = at(part) * scale_;
        at.write(load_integers<T>(bits + begin + at.i) < mask_.high ? decltype(kept){} : kept,
                 part);
      });
      k += n;
    }
  }

  // Writes the bits of `count` elements. Bytes at the ends may have bits of other tiles, which
  // other threads write.
  template <class Epilogue>
  void record(Epilogue, const T* z, std::int64_t first, std::int64_t count) const {
    for (std::int64_t k = 0; k < count; k += stage_length) {
      const std::int64_t n = count - k < stage_length ? count - k : stage_length;
      std::uint64_t words[stage_length / 64 + 2] = {};
      const std::int64_t shift = (first + k) % 8;
      const T* part = z + k;
      each_place<T>(0, n, [&](auto at) __attribute__((always_inline)) {
        const std::int64_t bit = shift + at.i, inside = n - at.i;
        std::uint64_t mask = mask_of_lanes(Epilogue::passes(at(part)));
        if (inside < vector_length<T>) mask &= (std::uint64_t{1} << inside) - 1;
        words[bit / 64] |= mask << (bit % 64);
        if (bit % 64 > 48) words[bit / 64 + 1] |= mask >> (64 - bit % 64);
      });
      const auto* bytes = reinterpret_cast<const std::uint8_t*>(words);
      std::uint8_t* to = passes_ + (first + k) / 8;
      const std::int64_t last = (shift + n - 1) / 8;
      __atomic_fetch_or(to, bytes[0], __ATOMIC_RELAXED);
      if (last > 0) {
        __builtin_memcpy(to + 1, bytes + 1, static_cast<std::size_t>(last - 1));
        __atomic_fetch_or(to + last, bytes[last], __ATOMIC_RELAXED);
      }
    }
  }

  template <class Epilogue>
  BNEXT_INLINE void pass(Epilogue, T* g, std::int64_t first, std::int64_t count) const {
    const T leak = Epilogue::leak(slope_);
    each_place<T>(0, count, [&](auto at) __attribute__((always_inline)) {
      const std::int64_t bit = first + at.i;
      std::uint32_t word;
      __builtin_memcpy(&word, passes_ + bit / 8, sizeof word);
      const auto v = at(g);
      // Nothing is left of an infinite gradient, not the NaN that times 0 would make of it.
      const auto held = leak == 0 ? decltype(v){} : v * leak;
      at.write(lanes_of_mask<T>(word >> (bit % 8)) ? v : held, g);
    });
  }

  const T* residual_;
  Activation activation_;
  T slope_;
  std::uint8_t* passes_;
  bool dropping_;
  T scale_;
  MaskBits mask_;
};

}  // namespace
}  // namespace bnext
