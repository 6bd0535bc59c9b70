// Arithmetic that every device shares. Functions are static: a file compiled for one instruction
// set must not offer its version of an inline function to the linker for everybody.
#pragma once

#include "core/host_device.hpp"

namespace bnext {

// Count, mean and sum of squared deviations of a set of values.
struct Moments {
  double count, mean, m2;
};

// From sum = sum (x - shift) and sumsq = sum (x - shift)^2. With a shift from among the values
// nothing cancels that float64 could not spare, however large |mean| is against the deviation
// (Chan, Golub & LeVeque, 1983, "Algorithms for computing the sample variance", eq. 1.7).
BNEXT_HD static inline Moments moments_from_shifted(double count, double shift, double sum,
                                                    double sumsq) {
  const double mean = sum / count;
  const double m2 = sumsq - sum * mean;
  return {count, shift + mean, m2 < 0 ? 0 : m2};  // NaN stays NaN
}

// Moments of the union of `count` sets, `stride` apart; the first is not empty (Chan, Golub &
// LeVeque, 1983, eq. 2.1, for all at once: no division for each).
BNEXT_HD static inline Moments merged(const Moments* sets, long count, long stride) {
  if (count == 1) return sets[0];
  const double origin = sets[0].mean;
  double values = 0, moment = 0, m2 = 0;
  for (long i = 0; i < count; ++i) {
    const Moments& set = sets[i * stride];
    values += set.count;
    moment += set.count * (set.mean - origin);
  }
  const double mean = origin + moment / values;
  for (long i = 0; i < count; ++i) {
    const Moments& set = sets[i * stride];
    m2 += set.m2 + set.count * (set.mean - mean) * (set.mean - mean);
  }
  return {values, mean, m2};
}

// To the type of the loops. A NaN becomes one whose digits are all zeros: those of another could be
// carried into the sign where results are rounded to bfloat16.
template <class T>
BNEXT_HD static inline T narrowed(double value) {
  return static_cast<T>(value == value ? value : __builtin_nan(""));
}

// y = (mean - x) minus_scale + shift: the normalisation as the apply loops compute it. The mean is
// rounded to T, what rounding took away goes into the shift: mean - x is then exact where it
// matters, and nothing of the size of |mean| scale is ever added. Not x - mean: what is taken away
// may lie in memory, in instructions of x86-64.
template <class T>
struct Affine {
  T mean, minus_scale, shift;
};

template <class T>
BNEXT_HD static inline Affine<T> normalisation(double mean, double inv_std, double weight,
                                               double bias) {
  const T rounded = narrowed<T>(mean);
  const double scale = weight * inv_std;
  // Zero when nothing was rounded away, even if scale is infinite (a constant channel, eps = 0).
  const double lost = mean - static_cast<double>(rounded);
  const double shift = lost == 0 ? bias : bias - lost * scale;
  return {rounded, narrowed<T>(-scale), narrowed<T>(shift)};
}

// Also for vectors of T, with the coefficients of one channel or vectors of them.
template <class T, class X>
BNEXT_HD static inline X apply(const Affine<T>& f, X x) {
  return (f.mean - x) * f.minus_scale + f.shift;
}

// grad_x = (g_mean - g) minus_g_scale + (x_mean - x) minus_x_scale + shift
template <class T>
struct GradAffine {
  T g_mean, minus_g_scale, x_mean, minus_x_scale, shift;
};

// From weight r (g - <g> - n <g n>), n = (x - mean) r.
template <class T>
BNEXT_HD static inline GradAffine<T> grad_normalisation(double mean, double inv_std, double weight,
                                                        double mean_g, double mean_gn) {
  const double g_scale = weight * inv_std;
  const double x_scale = -g_scale * inv_std * mean_gn;
  const T g_rounded = narrowed<T>(mean_g), x_rounded = narrowed<T>(mean);
  const double shift = -g_scale * (mean_g - static_cast<double>(g_rounded)) -
                       x_scale * (mean - static_cast<double>(x_rounded));
  return {g_rounded, narrowed<T>(-g_scale), x_rounded, narrowed<T>(-x_scale), narrowed<T>(shift)};
}

template <class T, class X>
BNEXT_HD static inline X apply(const GradAffine<T>& f, X g, X x) {
  return (f.g_mean - g) * f.minus_g_scale + (f.x_mean - x) * f.minus_x_scale + f.shift;
}

// The same where the gradient may not depend on x, as by constant statistics: then nothing is made
// of an infinite x, not the NaN that 0 times it would be.
template <class T, class X>
BNEXT_HD static inline X apply_if_it_depends(const GradAffine<T>& f, X g, X x) {
  const X without = (f.g_mean - g) * f.minus_g_scale + f.shift;
  return f.minus_x_scale == T{} ? without : apply(f, g, x);
}

// What the gradients go by: n = (v - center) scale, v being x or, `from_result`, the result without
// its activation. With a weight that makes up for it, the gradient has one form.
struct Centered {
  double center, scale, weight;
};

BNEXT_HD static inline Centered centered(bool from_result, double mean, double inv_std,
                                         double weight, double bias) {
  if (from_result) return {bias, 1 / weight, weight * weight * inv_std};
  return {mean, inv_std, weight};
}

// exp(x), of a number, or of each of a vector of them to a few units in the last place: infinite
// from where 1 + exp(x) no longer differs from exp(x) in any way that a sigmoid could show (above
// 88 and 708), zero below the smallest normal number. NaN stays NaN.
#if defined(__CUDACC__) || defined(BNEXT_CUDA_EMULATED)
BNEXT_HD static inline float exponential(float x) {
  return expf(x);
}
BNEXT_HD static inline double exponential(double x) {
  return exp(x);
}
#else
// exp(x) = 2^n exp(r), n the integer next to x / ln 2, |r| <= ln(2) / 2: Taylor's polynomial of r
// is right to the last place but one with seven terms in float, thirteen in double.
template <class V>
static inline __attribute__((always_inline)) V exponential(V x) {
  using T = decltype(x[0] + 0);
  using Integers = decltype(x < x);
  constexpr bool single = sizeof(T) == 4;
  constexpr T most = single ? T(88) : T(708), least = single ? T(-87.3) : T(-708);
  // Adding it leaves the nearest integer in the lowest bits.
  constexpr T round = single ? T(0x1.8p23) : T(0x1.8p52);
  // ln 2 in two parts, the first with so few bits that its products with n are exact.
  constexpr T log2 = T(0x1.62e42fefa39efp-1);
  constexpr T high = single ? T(0x1.62ep-1) : T(0x1.62e42fee00000p-1);
  constexpr T low = T(single ? 0x1.0bfbe8e7bcd5ep-15 : 0x1.a39ef35793c76p-33);
  constexpr int mantissa = single ? 23 : 52, terms = single ? 7 : 13;
  V in_range = x > most ? V{} + most : x;
  in_range = in_range < least ? V{} + least : in_range;
  const V shifted = in_range * (1 / log2) + round;
  const V n = shifted - round;
  const V r = (in_range - n * high) - n * low;
  V sum = V{} + T(1);
  for (int k = terms; k > 0; --k) sum = sum * r * (T(1) / static_cast<T>(k)) + T(1);
  const V result = (V)((Integers)sum + ((Integers)shifted << mantissa));
  const V large = x > most ? V{} + static_cast<T>(__builtin_inf()) : result;
  return x < least ? V{} : large;
}
#endif

// Epilogues: value(z) of the normalised z, and the gradient at z for the gradient g at value(z), of
// scalars or vectors; linear: value(z) = z. NaN stays NaN. Gated: the gradient is g where
// passes(z), and g leak(slope) elsewhere, so that one bit is enough to know it. Cheap: a few
// instructions.
namespace epilogue {
namespace {
struct none {
  static constexpr bool linear = true, gated = false, cheap = true;
  template <class X, class T>
  BNEXT_HD static X value(X z, T) {
    return z;
  }
  template <class X, class T>
  BNEXT_HD static X gradient(X g, X, T) {
    return g;
  }
};

struct relu {
  static constexpr bool linear = false, gated = true, cheap = true;
  template <class X, class T>
  BNEXT_HD static X value(X z, T) {
    return X{} > z ? X{} : z;
  }
  template <class X, class T>
  BNEXT_HD static X gradient(X g, X z, T) {
    return z <= X{} ? X{} : g;
  }
  template <class X>
  BNEXT_HD static auto passes(X z) {
    return z > X{};
  }
  template <class T>
  BNEXT_HD static T leak(T) {
    return 0;
  }
};
struct leaky_relu {
  static constexpr bool linear = false, gated = true, cheap = true;
  template <class X, class T>
  BNEXT_HD static X value(X z, T slope) {
    return z > X{} ? z : z * slope;
  }
  template <class X, class T>
  BNEXT_HD static X gradient(X g, X z, T slope) {
    return z > X{} ? g : g * slope;
  }
  template <class X>
  BNEXT_HD static auto passes(X z) {
    return z > X{};
  }
  template <class T>
  BNEXT_HD static T leak(T slope) {
    return slope;
  }
};
struct relu6 {
  static constexpr bool linear = false, gated = true, cheap = true;
  template <class X, class T>
  BNEXT_HD static X value(X z, T slope) {
    const X six = X{} + 6, positive = relu::value(z, slope);
    return positive > six ? six : positive;
  }
  template <class X, class T>
  BNEXT_HD static X gradient(X g, X z, T) {
    return z <= X{} ? X{} : z >= X{} + 6 ? X{} : g;
  }
  template <class X>
  BNEXT_HD static auto passes(X z) {
    return (z > X{}) & (z < X{} + 6);
  }
  template <class T>
  BNEXT_HD static T leak(T) {
    return 0;
  }
};
// Howard et al., 2019, "Searching for MobileNetV3", eq. 4.
struct hardswish {
  static constexpr bool linear = false, gated = false, cheap = false;
  template <class X, class T>
  BNEXT_HD static X value(X z, T slope) {
    return z * relu6::value(z + 3, slope) * (T{1} / 6);
  }
  template <class X, class T>
  BNEXT_HD static X gradient(X g, X z, T) {
    return z <= X{} - 3 ? X{} : z >= X{} + 3 ? g : g * (z * (T{1} / 3) + T{0.5});
  }
};
// Elfwing et al., 2018, "Sigmoid-weighted linear units for neural network function approximation".
struct silu {
  static constexpr bool linear = false, gated = false, cheap = false;
  template <class X>
  BNEXT_HD static X sigmoid(X z) {
    return 1 / (1 + exponential(-z));
  }
  template <class X, class T>
  BNEXT_HD static X value(X z, T) {
    return z * sigmoid(z);
  }
  template <class X, class T>
  BNEXT_HD static X gradient(X g, X z, T) {
    const X s = sigmoid(z);
    return g * (s + z * s * (1 - s));
  }
};
// Hendrycks & Gimpel, 2016, "Gaussian error linear units", the approximation by tanh:
// z (1 + tanh u) / 2 = z sigmoid(2 u).
struct gelu {
  static constexpr bool linear = false, gated = false, cheap = false;
  static constexpr double twice_root = 1.5957691216057308, cubic = 0.044715;  // 2 sqrt(2 / pi)
  // 2 u of z, of a size that its cube does not overflow: the sigmoid is 0 or 1 long before.
  template <class X, class T>
  BNEXT_HD static X argument(X z, T) {
    return z * (z * z * static_cast<T>(twice_root * cubic) + static_cast<T>(twice_root));
  }
  template <class X, class T>
  BNEXT_HD static X limited(X z, T) {
    const X most = X{} + T{50};
    return z > most ? most : z < -most ? -most : z;
  }
  template <class X, class T>
  BNEXT_HD static X value(X z, T slope) {
    return z * silu::sigmoid(argument(limited(z, slope), slope));
  }
  template <class X, class T>
  BNEXT_HD static X gradient(X g, X z, T slope) {
    const X x = limited(z, slope), s = silu::sigmoid(argument(x, slope));
    const X derivative =
        x * x * static_cast<T>(3 * twice_root * cubic) + static_cast<T>(twice_root);
    return g * (s + x * s * (1 - s) * derivative);
  }
};
}  // namespace
}  // namespace epilogue

}  // namespace bnext
