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
        gate_(f.gate),
        dropping_(f.dropout.threshold > 0),
        scale_(static_cast<T>(f.dropout.scale)),
        mask_(f.dropout) {}

  // z[k], the normalised value of element first + k for k in [0, count), becomes its result.
  void forward(T* z, std::int64_t first, std::int64_t count) {
    add_residual(z, first, count);
    with_epilogue([&](auto e) __attribute__((always_inline)) {
      using Epilogue = decltype(e);
      if constexpr (Epilogue::gated)
        if (passes_ != nullptr)
          record(passes_, z, first, count, [](auto v) { return Epilogue::passes(v); });
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
        if (passes_ != nullptr)
          return select(passes_, g, first, count, T{1}, static_cast<T>(Epilogue::leak(slope_)));
      const T* residual = residual_ + (residual_ != nullptr ? first : 0);
      each_place<T>(0, count, [&](auto at) __attribute__((always_inline)) {
        auto z = normalised(at);
        if (residual_ != nullptr) z = z + at(residual);
        at.write(Epilogue::gradient(at(g), z, slope_), g);
      });
    });
  }

  // The same, and the gate is written.
  template <class Normalised>
  BNEXT_INLINE void backward_first(T* g, std::int64_t first, std::int64_t count,
                                   Normalised normalised) {
    if (gate_ == nullptr) return backward(g, first, count, normalised);
    // What becomes of ones tells where the gate is open, whatever the gradients are.
    alignas(64) T ones[stage_length];
    for (std::int64_t k = 0; k < count; k += stage_length) {
      const std::int64_t n = count - k < stage_length ? count - k : stage_length;
      for (std::int64_t i = 0; i < n; ++i) ones[i] = 1;
      backward(ones, first + k, n, [&](auto at) __attribute__((always_inline)) {
        at.i += k;
        return normalised(at);
      });
      record(gate_, ones, first + k, n, [](auto v) { return v != decltype(v){}; });
      T* part = g + k;
      each_place<T>(0, n, [&](auto at) __attribute__((always_inline)) {
        const auto through = at(part) * scale_;
        at.write(at(ones) != decltype(through){} ? through : decltype(through){}, part);
      });
    }
  }

  // The same once more, by the gate.
  template <class Normalised>
  BNEXT_INLINE void backward_again(T* g, std::int64_t first, std::int64_t count,
                                   Normalised normalised) {
    if (gate_ == nullptr) return backward(g, first, count, normalised);
    select(gate_, g, first, count, scale_, T{0});
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
        at.write(mask_.template keep<T>(at(part) * scale_, bits + begin + at.i), part);
      });
      k += n;
    }
  }

  // Writes the bits of `count` elements. Bytes at the ends may have bits of other tiles, which
  // other threads write.
  template <class Test>
  static void record(std::uint8_t* bits, const T* values, std::int64_t first, std::int64_t count,
                     Test test) {
    for (std::int64_t k = 0; k < count; k += stage_length) {
      const std::int64_t n = count - k < stage_length ? count - k : stage_length;
      const T* part = values + k;
      std::uint64_t words[stage_length / 64 + 1];
      const std::int64_t whole = n / 64 * 64;
      for (std::int64_t i = 0; i < whole; i += 64) words[i / 64] = mask_of_word(part + i, test);
      words[whole / 64] = 0;
      each_place<T>(whole, n, [&](auto at) __attribute__((always_inline)) {
        std::uint64_t mask = mask_of_lanes(test(at(part)));
        if (n - at.i < vector_length<T>) mask &= (std::uint64_t{1} << (n - at.i)) - 1;
        words[whole / 64] |= mask << (at.i - whole);
      });
      // To where they belong, which may be anywhere in a byte.
      const std::int64_t shift = (first + k) % 8;
      std::uint64_t carry = 0;
      for (std::int64_t j = 0; j <= whole / 64; ++j) {
        const std::uint64_t word = words[j];
        words[j] = word << shift | carry;
        carry = shift > 0 ? word >> (64 - shift) : 0;
      }
      std::uint8_t bytes[sizeof words + 1];
      __builtin_memcpy(bytes, words, sizeof words);
      bytes[(whole / 64 + 1) * 8] = static_cast<std::uint8_t>(carry);
      std::uint8_t* to = bits + (first + k) / 8;
      const std::int64_t last = (shift + n - 1) / 8;
      __atomic_fetch_or(to, bytes[0], __ATOMIC_RELAXED);
      if (last > 0) {
        __builtin_memcpy(to + 1, bytes + 1, static_cast<std::size_t>(last - 1));
        __atomic_fetch_or(to + last, bytes[last], __ATOMIC_RELAXED);
      }
    }
  }

  // The bits of 64 elements.
  template <class Test>
  BNEXT_INLINE static std::uint64_t mask_of_word(const T* values, Test test) {
    std::uint64_t word = 0;
#pragma GCC unroll 4
    for (std::int64_t i = 0; i < 64; i += vector_length<T>)
      word |= std::uint64_t{mask_of_lanes(test(Place<T>{i}(values)))} << i;
    return word;
  }

  // g times `one` where the bit of its element is set, times `other` elsewhere.
  BNEXT_INLINE static void select(const std::uint8_t* bits, T* g, std::int64_t first,
                                  std::int64_t count, T one, T other) {
    each_place<T>(0, count, [&](auto at) __attribute__((always_inline)) {
      const std::int64_t bit = first + at.i;
      std::uint32_t word;
      __builtin_memcpy(&word, bits + bit / 8, sizeof word);
      const auto v = at(g);
      const auto through = v * one;
      // Nothing is left of an infinite gradient, not the NaN that times 0 would make of it.
      const auto held = other == 0 ? decltype(v){} : v * other;
      at.write(select_lanes<T>(word >> (bit % 8), through, held), g);
    });
  }

  const T* residual_;
  Activation activation_;
  T slope_;
  std::uint8_t *passes_, *gate_;
  bool dropping_;
  T scale_;
  MaskBits mask_;
};

}  // namespace
}  // namespace bnext
