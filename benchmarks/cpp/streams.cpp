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

// What is read and written, in words of 32 bits: what they mean does not matter, but for the sums.
struct Words {
  const std::int32_t* in[2];
  std::int32_t* out[2];
};

using Stream = void (*)(const Words&, std::int64_t begin, std::int64_t end);

void copy(const Words& a, std::int64_t begin, std::int64_t end) {
  std::memcpy(a.out[0] + begin, a.in[0] + begin, static_cast<std::size_t>(end - begin) * 4);
}

template <int reads, int writes>
void loop(const Words& a, std::int64_t begin, std::int64_t end) {
#pragma omp simd
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int32_t v = reads == 2 ? a.in[0][i] + a.in[1][i] : a.in[0][i];
    a.out[0][i] = v;
    if (writes == 2) a.out[1][i] = v;
  }
}

#if defined(__x86_64__)
template <int reads, int writes, bool non_temporal>
__attribute__((target("avx512f"), always_inline)) inline void move512(const Words& a,
                                                                      std::int64_t i) {
  __m512i v = _mm512_loadu_si512(a.in[0] + i);
  if (reads == 2) v = _mm512_add_epi32(v, _mm512_loadu_si512(a.in[1] + i));
  for (int k = 0; k < writes; ++k)
    if (non_temporal)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(a.out[k] + i), v);
    else
      _mm512_store_si512(a.out[k] + i, v);
}

template <int reads, int writes, bool non_temporal>
__attribute__((target("avx512f"))) void stream512(const Words& a, std::int64_t begin,
                                                  std::int64_t end) {
  for (std::int64_t i = begin; i + 16 <= end; i += 16) move512<reads, writes, non_temporal>(a, i);
  if (non_temporal) _mm_sfence();
}

template <int reads, int writes, bool non_temporal>
__attribute__((target("avx2"), always_inline)) inline void move256(const Words& a, std::int64_t i) {
  const auto load = [](const std::int32_t* p) __attribute__((target("avx2"), always_inline)) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  };
  __m256i v = load(a.in[0] + i);
  if (reads == 2) v = _mm256_add_epi32(v, load(a.in[1] + i));
  for (int k = 0; k < writes; ++k) {
    const auto to = reinterpret_cast<__m256i*>(a.out[k] + i);
    if (non_temporal)
      _mm256_stream_si256(to, v);
    else
      _mm256_store_si256(to, v);
  }
}

template <int reads, int writes, bool non_temporal>
__attribute__((target("avx2"))) void stream256(const Words& a, std::int64_t begin,
                                               std::int64_t end) {
  for (std::int64_t i = begin; i + 8 <= end; i += 8) move256<reads, writes, non_temporal>(a, i);
  if (non_temporal) _mm_sfence();
}

// Values of a block that stays in the cache of a core, together with the next one.
constexpr std::int64_t two_passes_block = 16384;

// What any BatchNorm of float32 in training has to do at least: sums of x and x^2, or of g and g x
// (`products`), as doubles; then one result for each value. Without channels, in blocks that stay
// in the cache of a core; the next block is fetched meanwhile.
template <bool products, int reads, int writes, bool non_temporal>
__attribute__((target("avx512f"))) void two_passes512(const Words& a, std::int64_t first,
                                                      std::int64_t last) {
  constexpr std::int64_t block = two_passes_block;
  const auto wide = [](const std::int32_t* p) __attribute__((target("avx512f"), always_inline)) {
    return _mm512_cvtps_pd(_mm256_loadu_ps(reinterpret_cast<const float*>(p)));
  };
  __m512d total[4]{}, product[4]{};
  for (std::int64_t begin = first; begin < last; begin += block) {
    const std::int64_t size = begin + block < last ? block : last - begin;
    const std::int64_t end = begin + size / 32 * 32;
    for (std::int64_t i = begin; i < end; i += 32)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const __m512d v = wide(a.in[0] + i + 8 * k), w = products ? wide(a.in[1] + i + 8 * k) : v;
        total[k] = _mm512_add_pd(total[k], v);
        product[k] = _mm512_fmadd_pd(v, w, product[k]);
      }
    for (std::int64_t i = begin; i < end; i += 16) {
      if (non_temporal)
        for (int k = 0; k < reads; ++k)
          _mm_prefetch(reinterpret_cast<const char*>(a.in[k] + i + block), _MM_HINT_T0);
      move512<reads, writes, non_temporal>(a, i);
    }
  }
  if (non_temporal) _mm_sfence();
  // The compiler must not find out that nobody needs the sums.
  double sums[32];
  for (int k = 0; k < 4; ++k) {
    _mm512_storeu_pd(sums + 8 * k, _mm512_add_pd(total[k], product[k]));
  }
  asm volatile("" : : "m"(sums));
}

template <bool products, int reads, int writes, bool non_temporal>
__attribute__((target("avx2,fma"))) void two_passes256(const Words& a, std::int64_t first,
                                                       std::int64_t last) {
  constexpr std::int64_t block = two_passes_block;
  const auto wide = [](const std::int32_t* p) __attribute__((target("avx2,fma"), always_inline)) {
    return _mm256_cvtps_pd(_mm_loadu_ps(reinterpret_cast<const float*>(p)));
  };
  __m256d total[4]{}, product[4]{};
  for (std::int64_t begin = first; begin < last; begin += block) {
    const std::int64_t size = begin + block < last ? block : last - begin;
    const std::int64_t end = begin + size / 16 * 16;
    for (std::int64_t i = begin; i < end; i += 16)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const __m256d v = wide(a.in[0] + i + 4 * k), w = products ? wide(a.in[1] + i + 4 * k) : v;
        total[k] = _mm256_add_pd(total[k], v);
        product[k] = _mm256_fmadd_pd(v, w, product[k]);
      }
    for (std::int64_t i = begin; i < end; i += 16) {
      if (non_temporal)
        for (int k = 0; k < reads; ++k)
          _mm_prefetch(reinterpret_cast<const char*>(a.in[k] + i + block), _MM_HINT_T0);
      move256<reads, writes, non_temporal>(a, i);
      move256<reads, writes, non_temporal>(a, i + 8);
    }
  }
  if (non_temporal) _mm_sfence();
  // The compiler must not find out that nobody needs the sums.
  double sums[16];
  for (int k = 0; k < 4; ++k) {
    _mm256_storeu_pd(sums + 4 * k, _mm256_add_pd(total[k], product[k]));
  }
  asm volatile("" : : "m"(sums));
}
#endif

struct Named {
  std::string name;
  Stream stream;
};

template <bool products, int reads, int writes>
std::vector<Named> streams(bool sums) {
  std::vector<Named> list;
  if (reads == 1)
    list.push_back({"limit memcpy", copy});
  else
    list.push_back({"limit add", loop<reads, writes>});
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    if (sums) {
      list.push_back({"two passes", two_passes512<products, reads, writes, false>});
      list.push_back({"two passes non-temporal", two_passes512<products, reads, writes, true>});
    }
    list.push_back({"limit avx512", stream512<reads, writes, false>});
    list.push_back({"limit avx512 non-temporal", stream512<reads, writes, true>});
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    if (sums) {
      list.push_back({"two passes", two_passes256<products, reads, writes, false>});
      list.push_back({"two passes non-temporal", two_passes256<products, reads, writes, true>});
    }
    list.push_back({"limit avx2", stream256<reads, writes, false>});
    list.push_back({"limit avx2 non-temporal", stream256<reads, writes, true>});
  }
#endif
  return list;
}

}  // namespace

void add_streams(const Op& op, Arrays& arrays, int threads, std::vector<Contender>& contenders) {
  const bool sums = op.training() && arrays.dtype == bnext::DType::float32;
  const auto list = op.kind == Kind::backward
                        ? (op.residual ? streams<true, 2, 2> : streams<true, 2, 1>)(sums)
                        : (op.residual ? streams<false, 2, 1> : streams<false, 1, 1>)(sums);
  const auto words = [](const Tensor& t) { return static_cast<std::int32_t*>(t.data()); };
  const Words a{{words(arrays.x), words(arrays.other)}, {words(arrays.out), words(arrays.more)}};
  const std::int64_t size = arrays.x.bytes() / 4;
  for (const Named& named : list) {
    contenders.push_back({named.name, op, [a, size, threads, stream = named.stream] {
                            // Whole vectors for each thread; a rest of a few words is left out.
                            const std::int64_t part = (size / threads + 15) / 16 * 16;
#pragma omp parallel num_threads(threads)
                            {
                              const std::int64_t begin = omp_get_thread_num() * part;
                              const std::int64_t end = begin + part < size ? begin + part : size;
                              if (begin < end) stream(a, begin, end);
                            }
                          }});
  }
}

}  // namespace bench
