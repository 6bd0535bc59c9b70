// What follows the normalisation in the same pass, + residual, activation, dropout, and back: what
// loops over a run of values ask for each vector of them.
#pragma once

#include <type_traits>

#include "bnext/batch_norm.hpp"
#include "core/args.hpp"
#include "core/math.hpp"
#include "cpu/dropout.hpp"
#include "cpu/simd.hpp"

namespace bnext {
namespace {

// The longest run of values that a tile takes in one go.
constexpr std::int64_t longest_run = 16384;

// ReLU as a maximum, of a zero that is unknown: of a known one, compilers make two instructions.
struct positive_part : epilogue::relu {
  template <class X, class T>
  static BNEXT_INLINE X value(X z, T zero) {
    const X least = zero - X{};
    return least > z ? least : z;
  }
};

// ReLU and ReLU6 in the same loops: without a limit it is NaN, which nothing is above.
template <class T>
struct Bounds {
  T zero, limit;
};
struct clip {
  static constexpr bool linear = false;
  template <class X, class T>
  static BNEXT_INLINE X value(X z, Bounds<T> by) {
    const X positive = positive_part::value(z, by.zero), most = by.limit - X{};
    return most < positive ? most : positive;
  }
  template <class X, class T>
  static BNEXT_INLINE X gradient(X g, X z, Bounds<T> by) {
    return z >= by.limit - X{} ? X{} : epilogue::relu::gradient(g, z, by.zero);
  }
};

// The gradient of a cheap epilogue at z, of which ReLU needs to know the sign alone.
template <class Epilogue, class V, class Normalised, class T>
BNEXT_INLINE V gradient_at(V g, Normalised z, T by) {
  if constexpr (std::is_base_of<epilogue::relu, Epilogue>::value)
    return z.not_positive() ? V{} : g;
  else
    return Epilogue::gradient(g, z(), by);
}

// An activation alone. `linear`: gradients pass as they are. `plain`: a run has nothing of its own.
// `adds`: there may be a residual. `known`: takes little code, and its sums are of gradients with
// no more digits than S, to be multiplied by scale_of_sums() at the end. `draws`: there may be
// masks, which are drawn in the order of memory.
template <class S, class Epilogue>
class Plain {
 public:
  using T = Compute<S>;
  static constexpr bool linear = Epilogue::linear, plain = true, adds = false, known = true,
                        draws = false;

  explicit Plain(const Fusion& f)
      : bounds_{unknown(T(0)),
                f.activation == Activation::relu6 ? T(6) : static_cast<T>(__builtin_nan(""))} {}

  // A run of `length` values, the first of which is element `first`; `noted`: at which byte of all
  // the first pass notes its bits for the second; `ahead`: of the residual.
  struct Run {
    static constexpr bool invertible = false;
    Bounds<T> bounds;

    template <class V>
    BNEXT_INLINE V input(V x) const {
      return x;
    }
    BNEXT_INLINE void ready(std::int64_t, std::int64_t) {}
    BNEXT_INLINE void finish() {}
    BNEXT_INLINE void fetch(std::int64_t, std::int64_t) const {}
    template <class V, class P>
    BNEXT_INLINE V value(V z, P) {
      return Epilogue::value(z, bounds);
    }
    template <class V, class P, class Normalised>
    BNEXT_INLINE V gradient(V g, P, Normalised z) const {
      return gradient_at<Epilogue>(g, z, bounds);
    }
  };
  BNEXT_INLINE Run run(std::int64_t, std::int64_t, std::int64_t, Ahead) { return {bounds_}; }
  double scale_of_sums() const { return 1; }

 private:
  Bounds<T> bounds_;
};

// Epilogues that are not cheap have one copy of their code.
template <class Epilogue, class V, class T>
__attribute__((noinline)) V value_of_its_own(V z, T slope) {
  return Epilogue::value(z, slope);
}
template <class Epilogue, class V, class T>
__attribute__((noinline)) V gradient_of_its_own(V g, V z, T slope) {
  return Epilogue::gradient(g, z, slope);
}

// Where the random bits of dropout come from in a pass, and whether they are noted for another.
enum class Mask { drawn, drawn_and_noted, noted };

// What a loop knows of its fusion when it is compiled: nothing,
struct Unknown {
  static constexpr bool known = false, residual = false, dropping = false;
};
// or an activation that needs no more than a zero, whether there is a residual, of which backward
// has the bits that passed, and dropout. Nothing is inverted.
template <class Epilogue_, bool residual_, bool dropping_>
struct Known {
  using Epilogue = Epilogue_;
  static constexpr bool known = true, residual = residual_, dropping = dropping_;
};

// Whatever the fusion says.
template <class S, Mask mask, class Knowledge = Unknown>
class General {
 public:
  using T = Compute<S>;
  static constexpr bool linear = false, plain = false,
                        adds = !Knowledge::known || Knowledge::residual, known = Knowledge::known,
                        draws = !Knowledge::known || Knowledge::dropping;

  explicit General(const Fusion& f)
      : fusion_(f),
        residual_(static_cast<const S*>(f.residual)),
        slope_(Knowledge::known ? unknown(T(0)) : static_cast<T>(f.negative_slope)),
        dropping_(f.dropout.threshold > 0),
        recording_(mask == Mask::drawn && f.passes != nullptr),
        scale_(static_cast<T>(f.dropout.scale)),
        mask_(f.dropout) {}

  class Run {
   public:
    static constexpr bool invertible = !Knowledge::known;

    Run(General& of, std::int64_t first, std::int64_t length, std::int64_t noted, Ahead ahead)
        : of_(of),
          first_(first),
          end_(first + length),
          drawn_(first / mask_word_size),
          residual_(of.residual_ != nullptr ? of.residual_ + first : nullptr),
          ahead_(ahead),
          activation_(of.fusion_.activation),
          slope_(of.slope_),
          scale_(of.scale_),
          inverse_(1 / of.slope_),
          inverted_(of.fusion_.inverted),
          may_drop_(of.dropping_),
          recording_(of.recording_),
          next_(of.passed_),
          filled_(static_cast<std::uint64_t>(first % 8)) {
      if (dropping())
        kept_ = {mask == Mask::drawn ? of.kept_ : of.fusion_.kept + noted, first % mask_word_size};
      if (of.fusion_.passes != nullptr && !recording_)
        passes_ = {of.fusion_.passes + first / 8, first % 8};
      if (recording()) of.passed_[0] = 0;  // also the bits that are not of this run
    }
    Run(const Run&) = delete;

    // What the loops go by: x, or, if there is the result of a LeakyReLU instead, what that was of.
    template <class V>
    BNEXT_INLINE V input(V x) const {
      if constexpr (Knowledge::known) return x;
      return inverted_ ? epilogue::leaky_relu::value(x, inverse_) : x;
    }

    // Before `count` elements from i on are asked for, counted from the first.
    BNEXT_INLINE void ready(std::int64_t i, std::int64_t count) {
      if (knowing()) passes_.vectors_from(i);
      if (!dropping()) return;
      kept_.vectors_from(i);
      if (mask == Mask::noted) return;
      while (drawn_ * mask_word_size < first_ + i + count) draw();
    }
    BNEXT_INLINE void fetch(std::int64_t i, std::int64_t count) const {
      if (residual_ != nullptr) ahead_.fetch(residual_, i, count);
    }
    // After the last element.
    BNEXT_INLINE void finish() {
      if (recording()) deposit(of_, first_, end_ - first_);
    }

    template <class V, class P>
    BNEXT_INLINE V value(V z, P at) {
      if constexpr (compact && !Knowledge::known)
        return value_once(z, at);
      else
        return value_here(z, at);
    }
    template <class V, class P, class Normalised>
    BNEXT_INLINE V gradient(V g, P at, Normalised z) const {
      if constexpr (compact && !Knowledge::known)
        return gradient_once(g, z(), at);
      else
        return gradient_here(g, at, z);
    }

   private:
    BNEXT_INLINE bool adding() const {
      if constexpr (Knowledge::known) return Knowledge::residual;
      return residual_ != nullptr;
    }
    BNEXT_INLINE bool dropping() const {
      if constexpr (Knowledge::known) return Knowledge::dropping;
      return may_drop_;
    }
    // Bits of what passes are written, or read.
    static constexpr bool may_record =
        mask == Mask::drawn && (!Knowledge::known || Knowledge::residual);
    BNEXT_INLINE bool recording() const { return may_record && recording_; }
    BNEXT_INLINE bool knowing() const {
      if constexpr (Knowledge::known) return Knowledge::residual;
      return passes_.bytes != nullptr;
    }
    template <class V, class P>
    __attribute__((noinline)) V value_once(V z, P at) {
      return value_here(z, at);
    }
    template <class V, class P>
    __attribute__((noinline)) V gradient_once(V g, V z, P at) const {
      return gradient_here(g, at, [&] { return z; });
    }
    template <class V, class P>
    BNEXT_INLINE V value_here(V z, P at) {
      if (adding()) z = z + at(residual_);
      V y = with_epilogue([&](auto e) __attribute__((always_inline)) -> V {
        using Epilogue = decltype(e);
        if constexpr (Epilogue::gated && may_record)
          if (recording()) record(mask_of_lanes(Epilogue::passes(z)), at);
        if constexpr (Epilogue::cheap) return Epilogue::value(z, slope_);
        return value_of_its_own<Epilogue>(z, slope_);
      });
      return dropping() ? at.select(kept_, y * scale_, V{}) : y;
    }

    template <class V, class P, class Normalised>
    BNEXT_INLINE V gradient_here(V g, P at, Normalised normalised) const {
      if (dropping()) g = at.select(kept_, scaling_sums ? g : g * scale_, V{});
      return with_epilogue([&](auto e) __attribute__((always_inline)) -> V {
        using Epilogue = decltype(e);
        if constexpr (Epilogue::linear) return g;
        if constexpr (Epilogue::gated)
          if (knowing()) {
            // Nothing is left of an infinite gradient, not the NaN that times 0 would make of it.
            const T leak = Epilogue::leak(slope_);
            return at.select(passes_, g, leak == 0 ? V{} : g * leak);
          }
        if constexpr (Knowledge::known) return gradient_at<Epilogue>(g, normalised, slope_);
        V z = normalised();
        if (adding()) z = z + at(residual_);
        if constexpr (Epilogue::cheap) return Epilogue::gradient(g, z, slope_);
        return gradient_of_its_own<Epilogue>(g, z, slope_);
      });
    }

    template <class Body>
    BNEXT_INLINE auto with_epilogue(Body body) const {
      if constexpr (Knowledge::known)
        return body(typename Knowledge::Epilogue());
      else
        switch (activation_) {
#define BNEXT_CASE(name) \
  case Activation::name: \
    return body(epilogue::name());
          BNEXT_EPILOGUES(BNEXT_CASE)
#undef BNEXT_CASE
        }
      return body(epilogue::none());
    }

    // Some words from drawn_ on, to where this run has them: a call has to put aside what loops
    // have in registers.
    BNEXT_INLINE void draw() {
      constexpr std::int64_t some = 32;
      const std::int64_t left = (end_ - 1) / mask_word_size + 1 - drawn_;
      const std::int64_t count = left < some ? left : some;
      of_.mask_.draw(static_cast<std::uint64_t>(drawn_), count,
                     const_cast<std::uint8_t*>(kept_.bytes) +
                         (drawn_ - first_ / mask_word_size) * mask_word_bytes);
      drawn_ += count;
    }

    // The lanes of a place that pass, after those of all places before, as they will lie in memory:
    // whole bytes, where whole vectors begin with one.
    template <class P>
    BNEXT_INLINE void record(std::uint64_t passing, P at) {
      constexpr std::int64_t length = vector_length<S>;
      if constexpr (P::whole && length % 8 == 0)
        if (__builtin_expect(filled_ == 0, true)) {
          __builtin_memcpy(next_, &passing, length / 8);
          next_ += length / 8;
          return;
        }
      if (at.count < length) passing &= (std::uint64_t{1} << at.count) - 1;
      std::uint64_t word;
      __builtin_memcpy(&word, next_, sizeof word);
      word = (word & ((std::uint64_t{1} << filled_) - 1)) | passing << filled_;
      __builtin_memcpy(next_, &word, sizeof word);
      filled_ += static_cast<std::uint64_t>(at.count);
      next_ += filled_ / 8;
      filled_ %= 8;
    }

    // What has been recorded, to where it belongs. A byte at an end may have bits of other tiles,
    // which other threads write; only then is it locked, since that waits for all that has been
    // streamed.
    static void deposit(const General& of, std::int64_t first, std::int64_t count) {
      std::uint8_t* const to = of.fusion_.passes + first / 8;
      const std::int64_t end_bit = first % 8 + count;
      std::int64_t begin = 0, end = end_bit / 8;
      const auto add = [&](std::int64_t i) {
        __atomic_fetch_or(to + i, of.passed_[i], __ATOMIC_RELAXED);
      };
      if (first % 8 > 0) add(begin++);
      if (end_bit % 8 > 0 && end >= begin) add(end);
      if (begin < end)
        __builtin_memcpy(to + begin, of.passed_ + begin, static_cast<std::size_t>(end - begin));
    }

    General& of_;
    std::int64_t first_, end_;
    std::int64_t drawn_;  // up to this word of the mask
    const S* residual_;
    Ahead ahead_;
    Activation activation_;
    T slope_, scale_, inverse_;
    bool inverted_, may_drop_, recording_;
    Bits kept_, passes_;
    std::uint8_t* next_;    // what has been recorded, up to this byte
    std::uint64_t filled_;  // and as many of its bits
  };
  BNEXT_INLINE Run run(std::int64_t first, std::int64_t length, std::int64_t noted, Ahead ahead) {
    return Run(*this, first, length, noted, ahead);
  }
  double scale_of_sums() const { return scaling_sums ? static_cast<double>(scale_) : 1; }

 private:
  static constexpr bool scaling_sums = Knowledge::dropping && mask == Mask::drawn_and_noted;

  const Fusion fusion_;
  const S* const residual_;
  const T slope_;
  const bool dropping_, recording_;
  const T scale_;
  MaskWords mask_;
  // Of one run: what is kept, and what passes.
  std::uint8_t kept_[mask == Mask::drawn ? mask_room(longest_run) : 1];
  std::uint8_t passed_[mask == Mask::drawn ? longest_run / 8 + 2 * sizeof(std::uint64_t) : 1];
};

}  // namespace
}  // namespace bnext
