// Sums of the values of a thread, and of all threads, in float64: what forward says of the mean is
// what gradients of any size are multiplied with in backward, so it must be as exact as float64
// makes it. Data-center GPUs have the units for it (half the rate of float32); others may wait for
// these sums.
#pragma once

#include "cuda/device.cuh"

namespace bnext {
namespace cuda {

// Of two things at once: x - origin and its square, or g and g (x - origin).
struct alignas(16) Sums {
  double first, second;

  BNEXT_HD void add(const Sums& other) {
    first += other.first;
    second += other.second;
  }
  // With a value of the channel as the origin, moments_from_shifted loses nothing that counts.
  BNEXT_HD void add_moments(double d) {
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

// Over the threads of a warp whose numbers differ by multiples of `across`, a power of two.
__device__ inline Sums warp_sum(Sums sums, int across) {
#pragma unroll
  for (int step = warp_threads / 2; step >= across; step /= 2) {
    sums.first += __shfl_xor_sync(full_warp, sums.first, step);
    sums.second += __shfl_xor_sync(full_warp, sums.second, step);
  }
  return sums;
}

// Adds up `parts` rows of `columns` sums in shared memory, into the first row, for all threads.
__device__ inline void fold(Sums* rows, int parts, int columns) {
  int half = 1;
  while (half < parts) half *= 2;
  __syncthreads();
  for (half /= 2; half > 0; half /= 2) {
    const int others = (parts - half < half ? parts - half : half) * columns;
    for (auto i = static_cast<int>(threadIdx.x); i < others; i += static_cast<int>(blockDim.x))
      rows[i].add(rows[i + half * columns]);
    parts = half;
    __syncthreads();
  }
}

// Counts this block's arrival, for all its threads: the number of those before it. What its threads
// wrote is there for whoever knows of the arrival.
__device__ inline unsigned arrive(unsigned* counter, unsigned* scratch) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *scratch = atomicAdd(counter, 1u);
  __syncthreads();
  const unsigned before = *scratch;
  __threadfence();
  return before;
}

// Sums that other blocks have written.
__device__ inline Sums fresh(const Sums* at) {
#if defined(__CUDACC__)
  const double2 both = __ldcg(reinterpret_cast<const double2*>(at));
  return {both.x, both.y};
#else
  return *at;
#endif
}

// What blocks of one launch send each other. Each half of a number travels in one access with the
// number of the launch: whoever sees that has the half, too, and needs no fence, which would wait
// for all that a block has written (the protocol "LL" of NCCL).
struct alignas(16) Letter {
  unsigned word[8];
};
template <class T>
constexpr int letters_for = (sizeof(T) + letter_bytes - 1) / letter_bytes;

template <class T>
__device__ inline void post(Letter* to, const T& what, unsigned launch) {
  unsigned half[4 * letters_for<T>] = {};
  memcpy(half, &what, sizeof what);
#pragma unroll
  for (int k = 0; k < 2 * letters_for<T>; ++k) {
    unsigned* const at = to->word + 4 * k;
#if defined(__CUDACC__)
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(half[2 * k]),
                 "r"(launch), "r"(half[2 * k + 1]), "r"(launch)
                 : "memory");
#else
    at[0] = half[2 * k];
    at[2] = half[2 * k + 1];
    at[1] = at[3] = launch;
#endif
  }
}

__device__ inline Letter look_at(const Letter* from) {
  Letter letter;
#if defined(__CUDACC__)
#pragma unroll
  for (int k = 0; k < 2; ++k)
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(letter.word[4 * k]), "=r"(letter.word[4 * k + 1]),
                   "=r"(letter.word[4 * k + 2]), "=r"(letter.word[4 * k + 3])
                 : "l"(from->word + 4 * k)
                 : "memory");
#else
  letter = *from;
#endif
  return letter;
}
__device__ inline bool is_there(const Letter& letter, unsigned launch) {
  return letter.word[1] == launch && letter.word[3] == launch && letter.word[5] == launch &&
         letter.word[7] == launch;
}

// What letters say that somebody looked at before, once they are there.
template <class T>
__device__ inline T receive(const Letter* from, Letter (&letters)[letters_for<T>],
                            unsigned launch) {
  unsigned half[4 * letters_for<T>];
#pragma unroll
  for (int k = 0; k < letters_for<T>; ++k) {
    while (!is_there(letters[k], launch)) {
      let_others_run();
      letters[k] = look_at(from + k);
    }
#pragma unroll
    for (int h = 0; h < 4; ++h) half[4 * k + h] = letters[k].word[2 * h];
  }
  T what;
  memcpy(&what, half, sizeof what);
  return what;
}

// The sum of `count` letters, `between` apart.
__device__ inline Sums receive_all(const Letter* from, int count, int between, unsigned launch) {
  constexpr int together = 4;
  Sums sums{0, 0};
  for (int first = 0; first < count; first += together) {
    Letter letters[together][1];
#pragma unroll
    for (int u = 0; u < together; ++u)
      if (first + u < count) letters[u][0] = look_at(from + (first + u) * between);
#pragma unroll
    for (int u = 0; u < together; ++u)
      if (first + u < count)
        sums.add(receive<Sums>(from + (first + u) * between, letters[u], launch));
  }
  return sums;
}

}  // namespace cuda
}  // namespace bnext
