// The streaming limit: the fastest way to move an operation's bytes through this machine.
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

void add(const float* a, const float* b, float* out, std::int64_t size) {
#pragma omp simd
  for (std::int64_t i = 0; i < size; ++i) out[i] = a[i] + b[i];
}

#if defined(__x86_64__)
template <bool Two, bool NonTemporal>
__attribute__((target("avx512f"))) void stream512(const float* a, const float* b, float* out,
                                                  std::int64_t size) {
  for (std::int64_t i = 0; i + 16 <= size; i += 16) {
    __m512 v = _mm512_loadu_ps(a + i);
    if (Two) v = _mm512_add_ps(v, _mm512_loadu_ps(b + i));
    if (NonTemporal)
      _mm512_stream_ps(out + i, v);
    else
      _mm512_store_ps(out + i, v);
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
#endif

}  // namespace

void add_streams(int reads, std::int64_t size, const Arrays& arrays, int threads,
                 std::vector<Contender>& contenders) {
  const auto add_one = [&](const char* name, Stream stream) {
    contenders.push_back({std::string("limit ") + name, [=, &arrays] {
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
  add_one(reads == 2 ? "add" : "memcpy", reads == 2 ? add : copy);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    add_one("avx512", reads == 2 ? stream512<true, false> : stream512<false, false>);
    add_one("avx512 non-temporal", reads == 2 ? stream512<true, true> : stream512<false, true>);
  } else if (__builtin_cpu_supports("avx2")) {
    add_one("avx2", reads == 2 ? stream256<true, false> : stream256<false, false>);
    add_one("avx2 non-temporal", reads == 2 ? stream256<true, true> : stream256<false, true>);
  }
#endif
}

}  // namespace bench
