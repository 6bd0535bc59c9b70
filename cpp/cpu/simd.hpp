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
typedef std::uint16_t u16v __attribute__((vector_size(vector_bytes)));
typedef std::int32_t i32v __attribute__((vector_size(vector_bytes)));
typedef std::int64_t i64v __attribute__((vector_size(vector_bytes)));
typedef std::int32_t half_i32v __attribute__((vector_size(vector_bytes / 2)));

// Elements of a vector.
template <class T>
constexpr std::int64_t vector_length = vector_bytes / sizeof(T);

// -- one vector -----------------------------------------------------------------------------------

template <class V>
BNEXT_INLINE V load_vector(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// As many integers as a vector of T has elements, each as wide as T.
template <class T>
BNEXT_INLINE auto load_integers(const std::int32_t* p) {
  if constexpr (sizeof(T) == 4)
    return load_vector<i32v>(p);
  else
    return __builtin_convertvector(load_vector<half_i32v>(p), i64v);
}

// The first n elements at p; `fill` in the other lanes.
template <class T>
BNEXT_INLINE typename Native<T>::type load_vector_first(const T* p, std::int64_t n, T fill) {
  T values[vector_length<T>];
  for (std::int64_t l = 0; l < vector_length<T>; ++l) values[l] = l < n ? p[l] : fill;
  return load_vector<typename Native<T>::type>(values);
}

// The first n elements of v, to p.
template <class T>
BNEXT_INLINE void store_vector_first(typename Native<T>::type v, std::int64_t n, T* p) {
  T values[vector_length<T>];
  __builtin_memcpy(values, &v, sizeof v);
  for (std::int64_t l = 0; l < n; ++l) p[l] = values[l];
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
BNEXT_INLINE void store_vector_first(f32v v, std::int64_t n, float* p) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
}
BNEXT_INLINE void store_vector_first(f64v v, std::int64_t n, double* p) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), v);
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
BNEXT_INLINE double sum_vector(f64v v) {
  const __m256d four = _mm512_castpd512_pd256(v) + _mm512_extractf64x4_pd(v, 1);
  const __m128d two = _mm256_castpd256_pd128(four) + _mm256_extractf128_pd(four, 1);
  return two[0] + two[1];
}
// The low halves of the 64-bit lanes, multiplied.
BNEXT_INLINE u64v multiply_low(u64v a, std::uint32_t b) {
  return (u64v)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
}
// One bit for each lane of the result of a comparison.
template <class V>
BNEXT_INLINE unsigned mask_of_lanes(V v) {
  if constexpr (sizeof v[0] == 4)
    return _mm512_movepi32_mask((__m512i)v);
  else
    return _mm512_movepi64_mask((__m512i)v);
}
// The low halves of a in the even 32-bit lanes, those of b in the odd ones.
BNEXT_INLINE u32v interleave_low(u64v a, u64v b) {
  return (u32v)_mm512_mask_shuffle_epi32((__m512i)a, 0xAAAA, (__m512i)b, _MM_PERM_CCAA);
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
BNEXT_INLINE double sum_vector(f64v v) {
  const __m128d two = _mm256_castpd256_pd128(v) + _mm256_extractf128_pd(v, 1);
  return two[0] + two[1];
}
BNEXT_INLINE u64v multiply_low(u64v a, std::uint32_t b) {
  return (u64v)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
}
template <class V>
BNEXT_INLINE unsigned mask_of_lanes(V v) {
  if constexpr (sizeof v[0] == 4)
    return static_cast<unsigned>(_mm256_movemask_ps((__m256)v));
  else
    return static_cast<unsigned>(_mm256_movemask_pd((__m256d)v));
}
BNEXT_INLINE u32v interleave_low(u64v a, u64v b) {
  return (u32v)_mm256_blend_epi32((__m256i)a, (__m256i)(b << 32), 0xAA);
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
BNEXT_INLINE double sum_vector(f64v v) {
  return v[0] + v[1];
}
BNEXT_INLINE u64v multiply_low(u64v a, std::uint32_t b) {
  return (u64v)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
}
template <class V>
BNEXT_INLINE unsigned mask_of_lanes(V v) {
  if constexpr (sizeof v[0] == 4)
    return static_cast<unsigned>(_mm_movemask_ps((__m128)v));
  else
    return static_cast<unsigned>(_mm_movemask_pd((__m128d)v));
}
BNEXT_INLINE u32v interleave_low(u64v a, u64v b) {
  return (u32v)((a & 0xFFFFFFFFu) | (b << 32));
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
BNEXT_INLINE double sum_vector(f64v v) {
  return v[0] + v[1];
}
BNEXT_INLINE u64v multiply_low(u64v a, std::uint32_t b) {
  return (a & 0xFFFFFFFFu) * std::uint64_t{b};
}
template <class V>
BNEXT_INLINE unsigned mask_of_lanes(V v) {
  unsigned mask = 0;
  for (std::int64_t l = 0; l < static_cast<std::int64_t>(sizeof v / sizeof v[0]); ++l)
    mask |= (v[l] != 0 ? 1u : 0u) << l;
  return mask;
}
BNEXT_INLINE u32v interleave_low(u64v a, u64v b) {
  return (u32v)((a & 0xFFFFFFFFu) | (b << 32));
}
BNEXT_INLINE void stream_vector(void* to, u32v v) {
  __builtin_memcpy(to, &v, sizeof v);
}
#endif

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

// f of each vector of some packs.
template <class F, class V, class... More>
BNEXT_INLINE Vectors<V, 1> each_vector(F f, Vectors<V, 1> first, More... more) {
  return {f(first.only, more.only...)};
}
template <class F, class V, int n, class... More>
BNEXT_INLINE Vectors<V, n> each_vector(F f, Vectors<V, n> first, More... more) {
  return {each_vector(f, first.low, more.low...), each_vector(f, first.high, more.high...)};
}

// The sum of the lanes, in an order of its own but the same everywhere: the upper half is added to
// the lower one until one lane is left.
BNEXT_INLINE double sum(Vectors<f64v, 1> v) {
  return sum_vector(v.only);
}
template <int n>
BNEXT_INLINE double sum(Vectors<f64v, n> v) {
  return sum(v.low + v.high);
}

// -- reading ahead --------------------------------------------------------------------------------

// Some processors fetch too little ahead from memory, or stop at every page: the kernels do it
// themselves where a tensor exceeds the caches.
constexpr std::int64_t prefetch_bytes = 4096;

// Elements of a line of the caches.
template <class T>
constexpr std::int64_t line_length = 64 / sizeof(T);

// Fetches `count` elements from p on.
template <class T>
BNEXT_INLINE void fetch(const T* p, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += line_length<T>) __builtin_prefetch(p + i);
  // Otherwise GCC takes what only prefetches for a function without effects, and drops the call.
  __asm__ volatile("");
}

// Fetches what lies prefetch_bytes after p, where p runs through blocks of memory: what would lie
// after the end of this block lies at the start of the next one instead. Null: nothing to fetch.
template <class T>
struct Ahead {
  const T* end;
  const T* next;

  BNEXT_INLINE void fetch(const T* p, std::int64_t count) const {
    if (next == nullptr) return;
    const T* q = p + prefetch_bytes / static_cast<std::int64_t>(sizeof(T));
    if (q >= end) q = next + (q - end);
    bnext::fetch(q, count);
  }
};

// Fetches memory from `start` on that is wanted after this pass. Null: nothing to fetch.
template <class T>
struct Next {
  const T* start;

  BNEXT_INLINE void fetch(std::int64_t i, std::int64_t count) const {
    if (start != nullptr) bnext::fetch(start + i, count);
  }
};

// -- writing results ------------------------------------------------------------------------------

// The lanes of a where the bit of a lane is set, of b elsewhere.
template <class T>
BNEXT_INLINE typename Native<T>::type select_lanes(std::uint32_t mask, typename Native<T>::type a,
                                                   typename Native<T>::type b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return _mm512_mask_blend_ps(static_cast<__mmask16>(mask), b, a);
  else
    return _mm512_mask_blend_pd(static_cast<__mmask8>(mask), b, a);
#else
  using Lanes = decltype(load_integers<T>(nullptr));
  Lanes bits{};
  for (std::int64_t l = 0; l < vector_length<T>; ++l) bits[l] = 1 << l;
  return (bits & static_cast<int>(mask & 0xFFFFu)) != 0 ? a : b;
#endif
}

// A place in a row: a vector of elements, or the first few of one where the row begins or ends.
// Calling it with an array over the row reads what lies there.
template <class T>
struct Place {
  using Vector = typename Native<T>::type;
  std::int64_t i;

  BNEXT_INLINE Vector operator()(const T* row) const { return load_vector<Vector>(row + i); }
  BNEXT_INLINE void write(Vector v, T* __restrict row) const {
    __builtin_memcpy(row + i, &v, sizeof v);
  }
};
template <class T>
struct PartialPlace {
  using Vector = typename Native<T>::type;
  std::int64_t i, count;

  BNEXT_INLINE Vector operator()(const T* row) const {
    return load_vector_first(row + i, count, T{0});
  }
  BNEXT_INLINE void write(Vector v, T* __restrict row) const {
    store_vector_first(v, count, row + i);
  }
};

// Elements from p to the first line that begins there or later.
template <class T>
BNEXT_INLINE std::int64_t until_next_line(const T* p) {
  const auto begun = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(p) / sizeof(T));
  return -begun & (line_length<T> - 1);
}

// Calls body(place) for elements [i, end).
template <class T, class Body>
BNEXT_INLINE void each_place(std::int64_t i, std::int64_t end, Body body) {
  for (; i + vector_length<T> <= end; i += vector_length<T>) body(Place<T>{i});
  if (i < end) body(PartialPlace<T>{i, end - i});
}

// The line that two neighbouring rows share: put together here, it can be streamed too. A store of
// a part of it would have to wait for memory, and all later ones with it.
template <class T>
struct SharedLine {
  bool begun = false;      // by the row before this one
  bool continues = false;  // in the row after this one, which is no shorter than a line
  alignas(64) T values[line_length<T>];
};

template <class T>
constexpr SharedLine<T>* no_shared_line = nullptr;

// Writes value(k, place, row), k = coefficients(place), to each place of `rows` rows of `length`
// elements, `stride` apart: rows that share coefficients are written together. With `streaming`
// past the caches: worth it where nothing will read the result before it would have left them
// anyway. fetch(i, count) is called before elements [i, i + count) are asked for. More than one row
// needs a stride of whole lines, and no shared line.
template <int rows, class T, class Coefficients, class Value, class Fetch>
BNEXT_INLINE void write(T* __restrict to, std::int64_t stride, std::int64_t length, bool streaming,
                        SharedLine<T>* shared, Coefficients coefficients, Value value,
                        Fetch fetch) {
  constexpr std::int64_t line = line_length<T>, block = 8 / rows * line;
  const auto write_at = [&](auto place, T* __restrict at) __attribute__((always_inline)) {
    const auto k = coefficients(place);
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row) place.write(value(k, place, row), at + row * stride);
  };
  const auto write_range = [&](std::int64_t begin, std::int64_t end,
                               T* __restrict at) __attribute__((always_inline)) {
    each_place<T>(begin, end,
                  [&](auto place) __attribute__((always_inline)) { write_at(place, at); });
  };
  const auto stream = [](T* __restrict at, typename Native<T>::type v)
                          __attribute__((always_inline)) { stream_vector(at, (u32v)v); };

  // Whole lines first to last: a store across two of them costs twice, and cannot be streamed.
  std::int64_t i = until_next_line(to);
  if (i > length) i = length;
  if (streaming && shared != nullptr && shared->begun) {
    write_range(0, i, shared->values + line - i);
    for (std::int64_t k = 0; k < line; k += vector_length<T>)
      stream(to + i - line + k, Place<T>{k}(shared->values));
    shared->begun = false;
  } else {
    write_range(0, i, to);
  }
  if (streaming) {
    // A line at a time, so that reads and writes are under way together.
    for (; i + line <= length; i += line) {
      fetch(i, line);
      for (int row = 0; row < rows; ++row)
#pragma GCC unroll 8
        for (std::int64_t at = i; at < i + line; at += vector_length<T>) {
          const Place<T> place{at};
          stream(to + row * stride + at, value(coefficients(place), place, row));
        }
    }
    if (shared != nullptr && shared->continues && i < length) {
      write_range(i, length, shared->values - i);
      shared->begun = true;
      return;
    }
  } else {
    for (; i + block <= length; i += block) {
      fetch(i, block);
#pragma GCC unroll 8
      for (std::int64_t at = 0; at < block; at += vector_length<T>) write_at(Place<T>{i + at}, to);
    }
    if (i < length) fetch(i, length - i);
  }
  write_range(i, length, to);
}

template <class T>
BNEXT_INLINE void copy(const T* from, T* to, std::int64_t count) {
  each_place<T>(0, count, [&](auto at) __attribute__((always_inline)) {
    at.write(at(from), to);
    __asm__ volatile("");  // or GCC makes it a `rep movs`, which takes longer to start than to copy
  });
}

// `count` values that were computed at `staged`, to where they belong.
template <class T, class Fetch>
BNEXT_INLINE void write_staged(const T* staged, T* to, std::int64_t count, bool streaming,
                               SharedLine<T>* shared, Fetch fetch) {
  write<1>(
      to, 0, count, streaming, shared, [](auto) { return 0; },
      [&](int, auto at, int) __attribute__((always_inline)) { return at(staged); }, fetch);
}

}  // namespace
}  // namespace bnext
