// Arithmetic that every device shares. Functions are static: a file compiled for one instruction
// set must not offer its version of an inline function to the linker for everybody.
#pragma once

#if defined(__CUDACC__)
#define BNEXT_HD __host__ __device__
#else
#define BNEXT_HD
#endif

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
  return {values, count == 1 ? origin : mean, m2};
}

// y = (x - mean) scale + shift: the normalisation as the apply loops compute it. The mean is
// rounded to T, what rounding took away goes into the shift: x - mean is then exact where it
// matters, and nothing of the size of |mean| scale is ever added.
template <class T>
struct Affine {
  T mean, scale, shift;
};

template <class T>
BNEXT_HD static inline Affine<T> normalisation(double mean, double inv_std, double weight,
                                               double bias) {
  const T rounded = static_cast<T>(mean);
  const double scale = weight * inv_std;
  // Zero when nothing was rounded away, even if scale is infinite (a constant channel, eps = 0).
  const double lost = mean - static_cast<double>(rounded);
  const double shift = lost == 0 ? bias : bias - lost * scale;
  return {rounded, static_cast<T>(scale), static_cast<T>(shift)};
}

// Also for vectors of T, with the coefficients of one channel or vectors of them.
template <class T, class X>
BNEXT_HD static inline X apply(const Affine<T>& f, X x) {
  return (x - f.mean) * f.scale + f.shift;
}

// grad_x = g_scale (g - g_mean) + x_scale (x - x_mean) + shift
template <class T>
struct GradAffine {
  T g_mean, g_scale, x_mean, x_scale, shift;
};

// From weight r (g - <g> - n <g n>), n = (x - mean) r.
template <class T>
BNEXT_HD static inline GradAffine<T> grad_normalisation(double mean, double inv_std, double weight,
                                                        double mean_g, double mean_gn) {
  const double g_scale = weight * inv_std;
  const double x_scale = -g_scale * inv_std * mean_gn;
  const T g_rounded = static_cast<T>(mean_g), x_rounded = static_cast<T>(mean);
  const double shift = -g_scale * (mean_g - static_cast<double>(g_rounded)) -
                       x_scale * (mean - static_cast<double>(x_rounded));
  return {g_rounded, static_cast<T>(g_scale), x_rounded, static_cast<T>(x_scale),
          static_cast<T>(shift)};
}

template <class T, class X>
BNEXT_HD static inline X apply(const GradAffine<T>& f, X g, X x) {
  return f.g_scale * (g - f.g_mean) + f.x_scale * (x - f.x_mean) + f.shift;
}

// Epilogues: value(z) of the normalised z, and the gradient at z for the gradient g at value(z), of
// scalars or vectors; linear: value(z) = z. NaN stays NaN. Gated: the gradient is g where
// passes(z), and g leak(slope) elsewhere, so that one bit is enough to know it.
namespace epilogue {
namespace {
struct none {
  static constexpr bool linear = true, gated = false;
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
  static constexpr bool linear = false, gated = true;
  template <class X, class T>
  BNEXT_HD static X value(X z, T) {
    return z <= X{} ? X{} : z;
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
  static constexpr bool linear = false, gated = true;
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
}  // namespace
}  // namespace epilogue

}  // namespace bnext
