// Sums of many values, accurate without many float64 operations, which most GPUs have few units
// for: some values at a time make exact-enough sums in their own precision, around one of
// themselves, and only these are added as float64.
#pragma once

#include <cfloat>

#include "cuda/device.cuh"

namespace bnext {
namespace cuda {

// Adds (x - origin) and (x - origin)^2 of those values whose bits are set.
//
// `origin` is a value of the channel, so that moments_from_shifted loses nothing that counts. With
// k one of the values, d = x - k and m = sum d / n rounded, sum (d - m)^2 has no cancellation left,
// and e = k - origin, sum (d - m) = sum d - n m give the sums around the origin exactly as far as
// float64 goes.
template <class T, int count>
BNEXT_HD inline void add_moments(const T (&x)[count], unsigned valid, double origin, double& total,
                                 double& squares) {
  if (valid == 0) return;
  constexpr unsigned all = count == 32 ? ~0u : (1u << count % 32) - 1u;
  T k = x[0];
  int n = count;
  if (valid != all) {
    n = 0;
    for (int i = count; i-- > 0;)
      if (valid >> i & 1u) {
        k = x[i];
        ++n;
      }
  }
  T sum = 0, square = 0;
  for (int i = 0; i < count; ++i)
    if (valid == all || (valid >> i & 1u)) sum += x[i] - k;
  const T mean = sum / static_cast<T>(n);
  for (int i = 0; i < count; ++i)
    if (valid == all || (valid >> i & 1u)) {
      const T deviation = (x[i] - k) - mean;
      square += deviation * deviation;
    }
  // What float cannot hold the squares of is added one by one.
  constexpr bool narrow_range = sizeof(T) == 4;
  if (narrow_range && !(square > T(1e-30) && square < T(1e37))) {
    for (int i = 0; i < count; ++i)
      if (valid == all || (valid >> i & 1u)) {
        const double d = static_cast<double>(x[i]) - origin;
        total += d;
        squares += d * d;
      }
    return;
  }
  const double e = static_cast<double>(k) - origin, values = n, m = mean;
  const double from_origin = m + e, rest = static_cast<double>(sum) - values * m;
  total += static_cast<double>(sum) + values * e;
  squares += static_cast<double>(square) + from_origin * (2 * rest + values * from_origin);
}

// Adds g and g (x - mean) of those values whose bits are set.
template <class T, int count>
BNEXT_HD inline void add_products(const T (&g)[count], const T (&x)[count], unsigned valid, T mean,
                                  double& total, double& products) {
  T sum = 0, product = 0;
  for (int i = 0; i < count; ++i)
    if (valid >> i & 1u) {
      sum += g[i];
      product += g[i] * (x[i] - mean);
    }
  constexpr bool narrow_range = sizeof(T) == 4;
  if (narrow_range && !(product > T(-1e37) && product < T(1e37))) {
    for (int i = 0; i < count; ++i)
      if (valid >> i & 1u) {
        total += static_cast<double>(g[i]);
        products += static_cast<double>(g[i]) * (static_cast<double>(x[i]) - mean);
      }
    return;
  }
  total += static_cast<double>(sum);
  products += static_cast<double>(product);
}

}  // namespace cuda
}  // namespace bnext
