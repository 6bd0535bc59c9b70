// What kernels are made of: threads of a block, of a warp and of a cluster; accesses to memory;
// numbers of 16 bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "bnext/types.hpp"
#include "core/math.hpp"
#include "cuda/plan.hpp"

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#endif

namespace bnext {
namespace cuda {

constexpr int warp_threads = 32;
constexpr unsigned full_warp = 0xFFFFFFFFu;

// -- threads --------------------------------------------------------------------------------------

#if defined(__CUDACC__)
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bnext_shared[];
  return bnext_shared;
}
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline int cluster_rank() {
  return static_cast<int>(cooperative_groups::this_cluster().block_rank());
}
__device__ inline void cluster_barrier() {
  cooperative_groups::this_cluster().sync();
}
template <class T>
__device__ inline T* of_peer(T* shared, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}
#else
// Older devices have no clusters, and get plans without.
__device__ inline int cluster_rank() {
  return 0;
}
__device__ inline void cluster_barrier() {
  __syncthreads();
}
template <class T>
__device__ inline T* of_peer(T* shared, int) {
  return shared;
}
#endif
#else
inline unsigned char* shared_memory() {
  return emulated::block_memory();
}
inline int cluster_rank() {
  return emulated::cluster_rank();
}
inline void cluster_barrier() {
  emulated::cluster_barrier();
}
template <class T>
inline T* of_peer(T* shared, int rank) {
  return static_cast<T*>(emulated::of_peer(shared, rank));
}
#endif

// -- numbers --------------------------------------------------------------------------------------

__device__ inline float widen(float x) {
  return x;
}
__device__ inline double widen(double x) {
  return x;
}
__device__ inline float widen(bfloat16 x) {
  const unsigned bits = static_cast<unsigned>(x.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}
__device__ inline float widen(float16 x) {
  float wide;
#if defined(__CUDACC__)
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
#else
  _Float16 half;
  memcpy(&half, &x.bits, sizeof half);
  wide = static_cast<float>(half);
#endif
  return wide;
}

// To the nearest, ties to even.
template <class S>
__device__ inline S narrow(Compute<S> x) {
  return x;
}
template <>
__device__ inline bfloat16 narrow<bfloat16>(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return {static_cast<std::uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<std::uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}
template <>
__device__ inline float16 narrow<float16>(float x) {
  float16 result;
#if defined(__CUDACC__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
#else
  const auto half = static_cast<_Float16>(x);
  memcpy(&result.bits, &half, sizeof half);
#endif
  return result;
}

// -- memory ---------------------------------------------------------------------------------------

template <class S>
constexpr int width_of = access_bytes / static_cast<int>(sizeof(S));

// Values of one access, as they are stored.
template <class S>
struct alignas(access_bytes) Stored {
  S value[width_of<S>];

  __device__ Compute<S> operator[](int e) const { return widen(value[e]); }
};

// Where it is not `wide`, arrays are not aligned to accesses; at the end of an array one would
// reach beyond it.
template <class S>
__device__ inline Stored<S> load(const S* array, const Slot& slot, std::int64_t size, bool wide) {
  Stored<S> result;
  if (wide && slot.first + width_of<S> <= size) {
    const uint4 raw = *reinterpret_cast<const uint4*>(array + slot.first);
    memcpy(&result, &raw, sizeof raw);
    return result;
  }
#pragma unroll
  for (int e = 0; e < width_of<S>; ++e)
    result.value[e] = e >= slot.begin && e < slot.end ? array[slot.first + e] : S{};
  return result;
}

template <class S>
__device__ inline void store(S* array, const Slot& slot, const Compute<S> (&values)[width_of<S>],
                             bool wide) {
  Stored<S> result;
#pragma unroll
  for (int e = 0; e < width_of<S>; ++e) result.value[e] = narrow<S>(values[e]);
  if (wide && slot.begin == 0 && slot.end == width_of<S>) {
    uint4 raw;
    memcpy(&raw, &result, sizeof raw);
    *reinterpret_cast<uint4*>(array + slot.first) = raw;
    return;
  }
#pragma unroll
  for (int e = 0; e < width_of<S>; ++e)
    if (e >= slot.begin && e < slot.end) array[slot.first + e] = result.value[e];
}

// The bits of a slot's elements, in the lowest bits. Slots begin at multiples of their width, so
// they never share bytes in another way than whole.
__device__ inline unsigned slot_bits(const std::uint8_t* bits, const Slot& slot) {
  return static_cast<unsigned>(bits[slot.first / 8]) >> (slot.first % 8);
}
// Of a slot that shares its word with others.
__device__ inline void add_slot_bits(std::uint8_t* bits, const Slot& slot, unsigned value) {
  value &= slot.mask();
  if (value != 0)
    atomicOr(reinterpret_cast<unsigned*>(bits) + slot.first / 32, value << (slot.first % 32));
}

}  // namespace cuda
}  // namespace bnext
