// Sums of the values of a thread, and of all threads, in float64: what forward says of the mean is
// what gradients of any size are multiplied with in backward, so it must be as exact as float64
// makes it. Data-center GPUs have the units for it (half the rate of float32); others may wait for
// these sums.
#pragma once

#include "cuda/device.cuh"

namespace bnext {
namespace cuda {

// Of two things at once: x - origin and its square, or g and g (x - origin).
struct Sums {
  double first, second;

  BNEXT_HD void add(const Sums& other) {
    first += other.first;
    second += other.second;
  }
  // With a value of the channel as the origin, moments_from_shifted loses nothing that counts.
  template <class T>
  BNEXT_HD void add_moments(T x, double origin) {
    const double d = static_cast<double>(x) - origin;
    first += d;
    second = fma(d, d, second);
  }
  // Products of floats are exact as float64, so that their origin can be 0.
  template <class T>
  BNEXT_HD void add_products(T g, T x, double origin) {
    const auto gradient = static_cast<double>(g), value = static_cast<double>(x);
    first += gradient;
    second = fma(gradient, sizeof(T) == 4 ? value : value - origin, second);
  }
};

__device__ inline Sums warp_sum(Sums sums) {
#pragma unroll
  for (int step = warp_threads / 2; step > 0; step /= 2) {
    sums.first += __shfl_xor_sync(full_warp, sums.first, step);
    sums.second += __shfl_xor_sync(full_warp, sums.second, step);
  }
  return sums;
}

// Of all threads of the block, for all of them. `scratch` has a place for each warp.
__device__ inline Sums block_sum(Sums sums, Sums* scratch) {
  const int warps = static_cast<int>(blockDim.x) / warp_threads;
  const Sums of_warp = warp_sum(sums);
  __syncthreads();
  if (threadIdx.x % warp_threads == 0) scratch[threadIdx.x / warp_threads] = of_warp;
  __syncthreads();
  Sums total = scratch[0];
  for (int w = 1; w < warps; ++w) total.add(scratch[w]);
  return total;
}

// Whether this is the last of `count` blocks to come here, for all threads of the block; it finds
// in memory what the others wrote. The counter is 0 again afterwards.
__device__ inline bool last_to_arrive(unsigned* counter, unsigned count, unsigned* scratch) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *scratch = atomicAdd(counter, 1u);
    if (*scratch == count - 1) *counter = 0;
  }
  __syncthreads();
  const bool last = *scratch == count - 1;
  __threadfence();
  return last;
}

}  // namespace cuda
}  // namespace bnext
