// The streaming limit: the fastest way to move an operation's bytes through this machine. And what
// is left of it for training, which must sum in double precision before it can write.
#include <omp.h>

#include <cstring>

#include "bench.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bench {
namespace {

using Stream = void (*)(const float*, const float*, float*, std::int64_t);

void copy(const float* a, const float*, float* out, std::int64_t size) {
  std::memcpy(out, a, static_cast<std::size_t>(size) * sizeof(float));
}

void sum(const float* a, const float* b, float* out, std::int64_t size) {
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) out[i] = a[i] + b[i];
}

#if defined(__x86_64__)
template <bool Two, bool NonTemporal>
__attribute__((target("avx512f"), always_inline)) inline void store512(const float* a,
                                                                       const float* b, float* out) {
  __m512 v = _mm512_loadu_ps(a);
  if (Two) v = _mm512_add_ps(v, _mm512_loadu_ps(b));
  if (NonTemporal)
    _mm512_stream_ps(out, v);
  else
    _mm512_store_ps(out, v);
}

template <bool Two, bool NonTemporal>
__attribute__((target("avx512f"))) void stream512(const float* a, const float* b, float* out,
                                                  std::int64_t size) {
  for (std::int64_t i = 0; i + 16 <= size; i += 16) {
    store512<Two, NonTemporal>(a + i, b + i, out + i);
  }
  if (NonTemporal) _mm_sfence();
}

template <bool Two, bool NonTemporal>
__attribute__((target("avx2"))) void stream256(const float* a, const float* b, float* out,
                                               std::int64_t size) {
  for (std::int64_t i = 0; i + 8 <= size; i += 8) {
    __m256 v = _mm256_loadu_ps(a + i);
    if (Two) v = _mm256_add_ps(v, _mm256_loadu_ps(b + i));
    if (NonTemporal)
      _mm256_stream_ps(out + i, v);
    else
      _mm256_store_ps(out + i, v);
  }
  if (NonTemporal) _mm_sfence();
}

// What any BatchNorm in training has to do at least: sums of x and x^2, or of g and g x, as
// doubles; then one result for each value. Without channels, in blocks that stay in the cache of a
// core; the next block is fetched meanwhile.
template <bool Two, bool NonTemporal>
__attribute__((target("avx512f"))) void two_passes512(const float* a, const float* b, float* out,
                                                      std::int64_t size) {
  constexpr std::int64_t block = 32768;
  const auto wide = [](const float* p) __attribute__((target("avx512f"), always_inline)) {
    return _mm512_cvtps_pd(_mm256_loadu_ps(p));
  };
  __m512d total[4]{}, products[4]{};
  for (std::int64_t begin = 0; begin < size; begin += block) {
    const std::int64_t end = (begin + block < size ? begin + block : size) / 32 * 32;
    for (std::int64_t i = begin; i < end; i += 32)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const __m512d v = wide(a + i + 8 * k), w = Two ? wide(b + i + 8 * k) : v;
        total[k] = _mm512_add_pd(total[k], v);
        products[k] = _mm512_fmadd_pd(v, w, products[k]);
      }
    for (std::int64_t i = begin; i < end; i += 16) {
      if (NonTemporal) {
        _mm_prefetch(reinterpret_cast<const char*>(a + i + block), _MM_HINT_T0);
        if (Two) _mm_prefetch(reinterpret_cast<const char*>(b + i + block), _MM_HINT_T0);
      }
      store512<Two, NonTemporal>(a + i, b + i, out + i);
    }
  }
  if (NonTemporal) _mm_sfence();
  // The compiler must not find out that nobody needs the sums.
  double sums[32];
  for (int k = 0; k < 4; ++k) {
    _mm512_storeu_pd(sums + 8 * k, _mm512_add_pd(total[k], products[k]));
  }
  asm volatile("" : : "m"(sums));
}
#endif

}  // namespace

void add_streams(int reads, bool training, std::int64_t size, const Arrays& arrays, int threads,
                 std::vector<Contender>& contenders) {
  const auto add = [&](const std::string& name, Stream stream) {
    contenders.push_back({name, [=, &arrays] {
                            // Whole vectors for each thread; a rest of a few elements is left out.
                            const std::int64_t part = (size / threads + 15) / 16 * 16;
#pragma omp parallel num_threads(threads)
                            {
                              const std::int64_t begin = omp_get_thread_num() * part;
                              const std::int64_t end = begin + part < size ? begin + part : size;
                              if (begin < end)
                                stream(arrays.x + begin, arrays.grad_y + begin, arrays.out + begin,
                                       end - begin);
                            }
                          }});
  };
  const auto add_one = [&](const char* name, Stream stream) {
    add(std::string("limit ") + name, stream);
  };
  add_one(reads == 2 ? "add" : "memcpy", reads == 2 ? sum : copy);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    if (training) {
      add("two passes", reads == 2 ? two_passes512<true, false> : two_passes512<false, false>);
      add("two passes non-temporal",
          reads == 2 ? two_passes512<true, true> : two_passes512<false, true>);
    }
    add_one("avx512", reads == 2 ? stream512<true, false> : stream512<false, false>);
    add_one("avx512 non-temporal", reads == 2 ? stream512<true, true> : stream512<false, true>);
  } else if (__builtin_cpu_supports("avx2")) {
    add_one("avx2", reads == 2 ? stream256<true, false> : stream256<false, false>);
    add_one("avx2 non-temporal", reads == 2 ? stream256<true, true> : stream256<false, true>);
  }
#endif
}

}  // namespace bench
