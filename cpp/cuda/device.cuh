// What kernels are made of: threads of a block and of a warp; accesses to memory;
// numbers of 16 bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "bnext/types.hpp"
#include "core/math.hpp"
#include "cuda/plan.hpp"

namespace bnext {
namespace cuda {

constexpr unsigned full_warp = 0xFFFFFFFFu;

// -- threads --------------------------------------------------------------------------------------

#if defined(__CUDACC__)
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bnext_shared[];
  return bnext_shared;
}
// What other blocks have written: not from this multiprocessor's own cache.
__device__ inline double fresh(const double* at) {
  return __ldcg(at);
}
// In a loop that waits for other blocks.
__device__ inline void let_others_run() {}
#else
inline unsigned char* shared_memory() {
  return emulated::block_memory();
}
inline double fresh(const double* at) {
  return *at;
}
inline void let_others_run() {
  emulated::yield();
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
// reach beyond it. Slots that are known to be whole are of arrays that are wide.
template <class S, class At>
__device__ inline bool is_one_access(const At& slot, std::int64_t size, bool wide) {
  if constexpr (At::is_whole)
    return true;
  else
    return wide && slot.first + width_of<S> <= size;
}

template <class S, class At>
__device__ inline Stored<S> load(const S* array, const At& slot, std::int64_t size, bool wide) {
  Stored<S> result;
  if (is_one_access<S>(slot, size, wide)) {
    const uint4 raw = *reinterpret_cast<const uint4*>(array + slot.first);
    memcpy(&result, &raw, sizeof raw);
  } else {
#pragma unroll
    for (int e = 0; e < width_of<S>; ++e)
      result.value[e] = slot.has(e) ? array[slot.first + e] : S{};
  }
  return result;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
// Two at a time, the first in the lower half.
__device__ inline void narrow_two(bfloat16* to, float first, float second) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  memcpy(to, &both, sizeof both);
}
__device__ inline void narrow_two(float16* to, float first, float second) {
  unsigned both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  memcpy(to, &both, sizeof both);
}
#else
template <class S>
__device__ inline void narrow_two(S* to, float first, float second) {
  to[0] = narrow<S>(first);
  to[1] = narrow<S>(second);
}
#endif
template <class S>
__device__ inline void narrow(Stored<S>& to, const Compute<S> (&values)[width_of<S>]) {
#pragma unroll
  for (int e = 0; e < width_of<S>; e += 2)
    if constexpr (sizeof(S) == 2) {
      narrow_two(to.value + e, values[e], values[e + 1]);
    } else {
      to.value[e] = values[e];
      to.value[e + 1] = values[e + 1];
    }
}

// Brings an access into shared memory, for the same thread. Accesses are there after commit_fetches
// and wait_for_fetches(n), when at most the last n commits, 0 or 1, are still on their way.
template <class S, class At>
__device__ inline void fetch(Stored<S>* to, const S* array, const At& slot, std::int64_t size,
                             bool wide) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if (is_one_access<S>(slot, size, wide)) {
    const auto shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared),
                 "l"(array + slot.first));
    return;
  }
#endif
  *to = load(array, slot, size, wide);
}
// Keeps what reads the places from being moved behind their next fetches.
__device__ inline void begin_fetches() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("" ::: "memory");
#endif
}
__device__ inline void commit_fetches() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
__device__ inline void wait_for_fetches(int but) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if (but == 0)
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  else
    asm volatile("cp.async.wait_group 1;" ::: "memory");
#else
  (void)but;
#endif
}

template <class S, class At>
__device__ inline void store(S* array, const At& slot, const Compute<S> (&values)[width_of<S>],
                             bool wide) {
  Stored<S> result;
  narrow(result, values);
  if (At::is_whole || (wide && slot.whole(width_of<S>))) {
    uint4 raw;
    memcpy(&raw, &result, sizeof raw);
    *reinterpret_cast<uint4*>(array + slot.first) = raw;
  } else {
#pragma unroll
    for (int e = 0; e < width_of<S>; ++e)
      if (slot.has(e)) array[slot.first + e] = result.value[e];
  }
}

// The bits of a slot's elements, in the lowest bits. Slots begin at multiples of their width, so
// they never share bytes in another way than whole.
template <class At>
__device__ inline unsigned slot_bits(const std::uint8_t* bits, const At& slot) {
  return static_cast<unsigned>(bits[slot.first / 8]) >> (slot.first % 8);
}
// Of a slot that shares its word with others.
template <class At>
__device__ inline void add_slot_bits(std::uint8_t* bits, const At& slot, unsigned value) {
  value &= slot.mask();
  if (value != 0)
    atomicOr(reinterpret_cast<unsigned*>(bits) + slot.first / 32, value << (slot.first % 32));
}

}  // namespace cuda
}  // namespace bnext
