// Vectors of the instruction set that this file is compiled for, in packs of sixteen lanes: sums
// are accumulated in sixteen lanes whatever the length of a vector, so that the order of additions,
// and with it the result, is the same for all instruction sets.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace bnext {
namespace {

#define BNEXT_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

constexpr std::int64_t lanes = 16;

template <class T>
struct Native;
template <>
struct Native<float> {
  typedef float type __attribute__((vector_size(vector_bytes)));
};
template <>
struct Native<double> {
  typedef double type __attribute__((vector_size(vector_bytes)));
};

using f32v = Native<float>::type;
using f64v = Native<double>::type;
typedef std::uint64_t u64v __attribute__((vector_size(vector_bytes)));
typedef std::uint32_t u32v __attribute__((vector_size(vector_bytes)));

// -- one vector -----------------------------------------------------------------------------------

template <class V>
BNEXT_INLINE V load_vector(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// The first n elements at p; `fill` in the other lanes.
template <class T>
BNEXT_INLINE typename Native<T>::type load_vector_first(const T* p, std::int64_t n, T fill) {
  T values[vector_bytes / sizeof(T)];
  for (std::int64_t l = 0; l < static_cast<std::int64_t>(vector_bytes / sizeof(T)); ++l)
    values[l] = l < n ? p[l] : fill;
  return load_vector<typename Native<T>::type>(values);
}

#if defined(__AVX512F__)
BNEXT_INLINE f32v load_vector_first(const float* p, std::int64_t n, float fill) {
  const unsigned mask = n >= 16 ? 0xFFFFu : n > 0 ? (1u << n) - 1 : 0;
  return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>(mask), p);
}
BNEXT_INLINE f64v load_vector_first(const double* p, std::int64_t n, double fill) {
  const unsigned mask = n >= 8 ? 0xFFu : n > 0 ? (1u << n) - 1 : 0;
  return _mm512_mask_loadu_pd(_mm512_set1_pd(fill), static_cast<__mmask8>(mask), p);
}
// Eight (four, two) floats at p as doubles.
BNEXT_INLINE f64v load_widened(const float* p) {
  return _mm512_cvtps_pd(_mm256_loadu_ps(p));
}
BNEXT_INLINE f64v widen_low(f32v v) {
  return _mm512_cvtps_pd(_mm512_castps512_ps256(v));
}
BNEXT_INLINE f64v widen_high(f32v v) {
  return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
}
BNEXT_INLINE f64v multiply_add(f64v a, f64v b, f64v c) {
  return _mm512_fmadd_pd(a, b, c);
}
// The low halves of the 64-bit lanes, multiplied.
BNEXT_INLINE u64v multiply_low(u64v a, std::uint32_t b) {
  return (u64v)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
}
BNEXT_INLINE void stream_vector(void* to, u32v v) {
  _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)v);
}
#elif defined(__AVX2__)
BNEXT_INLINE f32v load_vector_first(const float* p, std::int64_t n, float fill) {
  const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(n > 8 ? 8 : static_cast<int>(n)),
                                          _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask),
                          _mm256_castsi256_ps(mask));
}
BNEXT_INLINE f64v load_vector_first(const double* p, std::int64_t n, double fill) {
  const __m256i mask = _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
  return _mm256_blendv_pd(_mm256_set1_pd(fill), _mm256_maskload_pd(p, mask),
                          _mm256_castsi256_pd(mask));
}
BNEXT_INLINE f64v load_widened(const float* p) {
  return _mm256_cvtps_pd(_mm_loadu_ps(p));
}
BNEXT_INLINE f64v widen_low(f32v v) {
  return _mm256_cvtps_pd(_mm256_castps256_ps128(v));
}
BNEXT_INLINE f64v widen_high(f32v v) {
  return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
}
BNEXT_INLINE f64v multiply_add(f64v a, f64v b, f64v c) {
  return _mm256_fmadd_pd(a, b, c);
}
BNEXT_INLINE u64v multiply_low(u64v a, std::uint32_t b) {
  return (u64v)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
}
BNEXT_INLINE void stream_vector(void* to, u32v v) {
  _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)v);
}
#elif defined(__SSE2__)
BNEXT_INLINE f64v load_widened(const float* p) {
  return _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
BNEXT_INLINE f64v widen_low(f32v v) {
  return _mm_cvtps_pd(v);
}
BNEXT_INLINE f64v widen_high(f32v v) {
  return _mm_cvtps_pd(_mm_movehl_ps(v, v));
}
BNEXT_INLINE f64v multiply_add(f64v a, f64v b, f64v c) {
  return a * b + c;
}
BNEXT_INLINE u64v multiply_low(u64v a, std::uint32_t b) {
  return (u64v)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
}
BNEXT_INLINE void stream_vector(void* to, u32v v) {
  _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)v);
}
#else
BNEXT_INLINE f64v load_widened(const float* p) {
  return f64v{p[0], p[1]};
}
BNEXT_INLINE f64v widen_low(f32v v) {
  return f64v{v[0], v[1]};
}
BNEXT_INLINE f64v widen_high(f32v v) {
  return f64v{v[2], v[3]};
}
BNEXT_INLINE f64v multiply_add(f64v a, f64v b, f64v c) {
  return a * b + c;
}
BNEXT_INLINE u64v multiply_low(u64v a, std::uint32_t b) {
  return (a & 0xFFFFFFFFu) * std::uint64_t{b};
}
BNEXT_INLINE void stream_vector(void* to, u32v v) {
  __builtin_memcpy(to, &v, sizeof v);
}
#endif

// Waits until what was streamed is visible to other threads.
BNEXT_INLINE void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// -- packs ----------------------------------------------------------------------------------------

// `count` vectors, as a binary tree of fields: compilers keep fields in registers, not arrays.
template <class V, int count>
struct Vectors {
  Vectors<V, count / 2> low, high;
};
template <class V>
struct Vectors<V, 1> {
  V only;
};

// Sixteen values of type T.
template <class T>
using Pack = Vectors<typename Native<T>::type, lanes * sizeof(T) / vector_bytes>;

#define BNEXT_OPERATOR(op)                                                   \
  template <class V>                                                         \
  BNEXT_INLINE Vectors<V, 1> operator op(Vectors<V, 1> a, Vectors<V, 1> b) { \
    return {a.only op b.only};                                               \
  }                                                                          \
  template <class V, int n>                                                  \
  BNEXT_INLINE Vectors<V, n> operator op(Vectors<V, n> a, Vectors<V, n> b) { \
    return {a.low op b.low, a.high op b.high};                               \
  }
BNEXT_OPERATOR(+)
BNEXT_OPERATOR(-)
BNEXT_OPERATOR(*)
#undef BNEXT_OPERATOR

// a * b + c where the products are exact, as those of two floats are in double: fused or not, the
// bits are the same.
BNEXT_INLINE Vectors<f64v, 1> multiply_add(Vectors<f64v, 1> a, Vectors<f64v, 1> b,
                                           Vectors<f64v, 1> c) {
  return {multiply_add(a.only, b.only, c.only)};
}
template <int n>
BNEXT_INLINE Vectors<f64v, n> multiply_add(Vectors<f64v, n> a, Vectors<f64v, n> b,
                                           Vectors<f64v, n> c) {
  return {multiply_add(a.low, b.low, c.low), multiply_add(a.high, b.high, c.high)};
}

template <class P>
struct Access;

template <class V>
struct Access<Vectors<V, 1>> {
  template <class T>
  static BNEXT_INLINE Vectors<V, 1> load(const T* p) {
    return {load_vector<V>(p)};
  }
  template <class T>
  static BNEXT_INLINE Vectors<V, 1> load_first(const T* p, std::int64_t n, T fill) {
    return {load_vector_first(p, n, fill)};
  }
  template <class T>
  static BNEXT_INLINE Vectors<V, 1> broadcast(T value) {
    return {value - V{}};
  }
  static BNEXT_INLINE Vectors<V, 1> widened(const float* p) { return {load_widened(p)}; }
  template <class T>
  static BNEXT_INLINE void store(Vectors<V, 1> v, T* to) {
    __builtin_memcpy(to, &v.only, sizeof v.only);
  }
};

template <class V, int n>
struct Access<Vectors<V, n>> {
  using Half = Access<Vectors<V, n / 2>>;
  template <class T>
  static constexpr std::int64_t half() {
    return n / 2 * vector_bytes / static_cast<std::int64_t>(sizeof(T));
  }
  template <class T>
  static BNEXT_INLINE Vectors<V, n> load(const T* p) {
    return {Half::load(p), Half::load(p + half<T>())};
  }
  template <class T>
  static BNEXT_INLINE Vectors<V, n> load_first(const T* p, std::int64_t count, T fill) {
    return {Half::load_first(p, count, fill),
            Half::load_first(p + half<T>(), count - half<T>(), fill)};
  }
  template <class T>
  static BNEXT_INLINE Vectors<V, n> broadcast(T value) {
    return {Half::broadcast(value), Half::broadcast(value)};
  }
  static BNEXT_INLINE Vectors<V, n> widened(const float* p) {
    return {Half::widened(p), Half::widened(p + half<double>())};
  }
  template <class T>
  static BNEXT_INLINE void store(Vectors<V, n> v, T* to) {
    Half::store(v.low, to);
    Half::store(v.high, to + half<T>());
  }
};

template <class T>
BNEXT_INLINE Pack<T> load(const T* p) {
  return Access<Pack<T>>::load(p);
}
// The first n of sixteen values, `fill` for the rest.
template <class T>
BNEXT_INLINE Pack<T> load_first(const T* p, std::int64_t n, T fill) {
  return Access<Pack<T>>::load_first(p, n, fill);
}
template <class T>
BNEXT_INLINE Pack<T> broadcast(T value) {
  return Access<Pack<T>>::broadcast(value);
}
template <class T>
BNEXT_INLINE void store(Pack<T> v, T* to) {
  Access<Pack<T>>::store(v, to);
}

BNEXT_INLINE Pack<double> widen(Pack<double> v) {
  return v;
}
#if defined(__AVX512F__)
BNEXT_INLINE Pack<double> widen(Pack<float> v) {
  return {{widen_low(v.only)}, {widen_high(v.only)}};
}
#else
BNEXT_INLINE Vectors<f64v, 2> widen_vectors(Vectors<f32v, 1> v) {
  return {{widen_low(v.only)}, {widen_high(v.only)}};
}
template <int n>
BNEXT_INLINE Vectors<f64v, 2 * n> widen_vectors(Vectors<f32v, n> v) {
  return {widen_vectors(v.low), widen_vectors(v.high)};
}
BNEXT_INLINE Pack<double> widen(Pack<float> v) {
  return widen_vectors(v);
}
#endif
// Sixteen values from memory, as doubles.
BNEXT_INLINE Pack<double> load_wide(const float* p) {
  return Access<Pack<double>>::widened(p);
}
BNEXT_INLINE Pack<double> load_wide(const double* p) {
  return load(p);
}

// The sum of the lanes, in an order of its own but the same everywhere.
BNEXT_INLINE double sum(Pack<double> v) {
  double lane[lanes];
  store(v, lane);
  for (std::int64_t half = lanes / 2; half > 0; half /= 2)
    for (std::int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

// -- reading ahead --------------------------------------------------------------------------------

// Some processors fetch too little ahead from memory, or stop at every page: the kernels do it
// themselves where a tensor exceeds the caches.
constexpr std::int64_t prefetch_bytes = 4096;

// Where the line at p is in a repeating pattern of four.
BNEXT_INLINE unsigned quarter(const void* p) {
  return static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(p) / 64 % 4);
}

// Fetches what lies prefetch_bytes after p, where p runs through blocks of memory: what would lie
// after the end of this block lies at the start of the next one instead. Null: nothing to fetch.
template <class T>
struct Ahead {
  const T* end;
  const T* next;

  BNEXT_INLINE void fetch(const T* p, std::int64_t count) const {
    constexpr std::int64_t line = 64 / static_cast<std::int64_t>(sizeof(T));
    if (next == nullptr) return;
    const T* q = p + prefetch_bytes / static_cast<std::int64_t>(sizeof(T));
    if (q >= end) q = next + (q - end);
    for (std::int64_t i = 0; i < count; i += line) __builtin_prefetch(q + i);
    // Otherwise GCC takes what only prefetches for a function without effects, and drops the call.
    __asm__ volatile("");
  }
};

// Fetches memory that is wanted after two passes over other memory: a quarter of its lines in the
// first pass, which only reads, the rest in the second, in which memory also takes results. Null:
// nothing to fetch.
template <class T>
struct Next {
  const T* start;

  BNEXT_INLINE void fetch_early(std::int64_t i, std::int64_t count) const {
    if (start != nullptr) fetch(i, count, [](const T* p) { return quarter(p) == 0; });
  }
  BNEXT_INLINE void fetch_late(std::int64_t i, std::int64_t count) const {
    if (start != nullptr) fetch(i, count, [](const T* p) { return quarter(p) != 0; });
  }

 private:
  template <class Wanted>
  BNEXT_INLINE void fetch(std::int64_t i, std::int64_t count, Wanted wanted) const {
    constexpr std::int64_t line = 64 / static_cast<std::int64_t>(sizeof(T));
    for (const T* p = start + i; p < start + i + count; p += line)
      if (wanted(p)) __builtin_prefetch(p);
    __asm__ volatile("");
  }
};

// -- writing results ------------------------------------------------------------------------------

// to[i] = value(i) for i in [0, length). With `streaming` past the caches: worth it where nothing
// will read the result before it would have left them anyway. fetch(i, count) is called before
// values [i, i + count) are asked for.
template <class T, class Value, class Fetch>
BNEXT_INLINE void write(T* __restrict to, std::int64_t length, bool streaming, Value value,
                        Fetch fetch) {
  constexpr std::int64_t block = 512 / static_cast<std::int64_t>(sizeof(T));
  if (!streaming) {
    std::int64_t i = 0;
    for (; i + block <= length; i += block) {
      fetch(i, block);
#pragma omp simd
      for (std::int64_t k = i; k < i + block; ++k) to[k] = value(k);
    }
    if (i < length) fetch(i, length - i);
#pragma omp simd
    for (std::int64_t k = i; k < length; ++k) to[k] = value(k);
    return;
  }
  constexpr std::int64_t line = 64 / static_cast<std::int64_t>(sizeof(T));
  constexpr std::int64_t step = vector_bytes / static_cast<std::int64_t>(sizeof(T));
  // Whole lines are streamed; a line that two calls share is written in the ordinary way.
  const auto misaligned =
      static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(to) / sizeof(T) % line);
  std::int64_t i = misaligned == 0 ? 0 : line - misaligned;
  if (i > length) i = length;
  for (std::int64_t k = 0; k < i; ++k) to[k] = value(k);
  // A line at a time, so that reads and writes are under way together.
  alignas(64) T values[line];
  for (; i + line <= length; i += line) {
    fetch(i, line);
#pragma omp simd
    for (std::int64_t k = 0; k < line; ++k) values[k] = value(i + k);
    for (std::int64_t k = 0; k < line; k += step)
      stream_vector(to + i + k, load_vector<u32v>(values + k));
  }
  for (; i < length; ++i) to[i] = value(i);
}

}  // namespace
}  // namespace bnext
