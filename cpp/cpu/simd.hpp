// Vectors of the instruction set that this file is compiled for, in packs of sixteen lanes: sums
// are accumulated in sixteen lanes whatever the length of a vector, so that the order of additions,
// and with it the result, is the same for all instruction sets.
#pragma once

#include <cstdint>

#include "bnext/types.hpp"

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

// Short vectors take many times the code of long ones, on processors where it matters least: what
// is large is not inlined there.
constexpr bool compact = vector_bytes == 16;

// 32, not 16: a loop has room for more sums than it writes results from.
constexpr bool many_registers = vector_bytes == 64;

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
typedef std::uint32_t half_u32v __attribute__((vector_size(vector_bytes / 2)));
typedef std::uint16_t half_u16v __attribute__((vector_size(vector_bytes / 2)));

// One of two types.
template <bool first, class A, class B>
struct Choice {
  using type = A;
};
template <class A, class B>
struct Choice<false, A, B> {
  using type = B;
};

// Values of type S in a vector: it holds them as what they are computed in.
template <class S>
using Vector = typename Native<Compute<S>>::type;
template <class S>
constexpr std::int64_t vector_length = vector_bytes / sizeof(Compute<S>);

// -- one vector -----------------------------------------------------------------------------------

template <class V>
BNEXT_INLINE V load_vector(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
BNEXT_INLINE void store_vector(V v, void* p) {
  __builtin_memcpy(p, &v, sizeof v);
}

// The first n elements at p, zero bits in the other lanes; and back.
template <class V, class E>
BNEXT_INLINE V load_vector_first(const E* p, std::int64_t n) {
  constexpr std::int64_t all = sizeof(V) / sizeof(E);
  if (n >= all) return load_vector<V>(p);
  E values[all]{};
  for (std::int64_t l = 0; l < n; ++l) values[l] = p[l];
  return load_vector<V>(values);
}
template <class V, class E>
BNEXT_INLINE void store_vector_first(V v, std::int64_t n, E* p) {
  constexpr std::int64_t all = sizeof(V) / sizeof(E);
  if (n >= all) {
    store_vector(v, p);
    return;
  }
  E values[all];
  store_vector(v, values);
  const E* from = values;
#pragma GCC unroll 8
  for (std::int64_t some = all / 2; some > 0; some /= 2)
    if ((n & some) != 0) {
      __builtin_memcpy(p, from, static_cast<std::size_t>(some) * sizeof(E));
      p += some;
      from += some;
    }
}

BNEXT_INLINE u16v joined(half_u16v low, half_u16v high) {
#if defined(__AVX512F__)
  return (u16v)_mm512_inserti64x4(_mm512_castsi256_si512((__m256i)low), (__m256i)high, 1);
#elif defined(__AVX2__)
  return (u16v)_mm256_set_m128i((__m128i)high, (__m128i)low);
#else
  const half_u16v both[2] = {low, high};
  return load_vector<u16v>(both);
#endif
}

#if defined(__AVX512F__)
// The first n of `lanes` lanes.
BNEXT_INLINE unsigned first_lanes(std::int64_t n, unsigned all) {
  return n >= 16 ? all : n > 0 ? ((1u << n) - 1) & all : 0;
}
template <>
BNEXT_INLINE f32v load_vector_first<f32v>(const float* p, std::int64_t n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_lanes(n, 0xFFFF)), p);
}
template <>
BNEXT_INLINE f64v load_vector_first<f64v>(const double* p, std::int64_t n) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(n, 0xFF)), p);
}
template <>
BNEXT_INLINE half_u16v load_vector_first<half_u16v>(const std::uint16_t* p, std::int64_t n) {
  return (half_u16v)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_lanes(n, 0xFFFF)), p);
}
template <>
BNEXT_INLINE void store_vector_first<f32v>(f32v v, std::int64_t n, float* p) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>(first_lanes(n, 0xFFFF)), v);
}
template <>
BNEXT_INLINE void store_vector_first<f64v>(f64v v, std::int64_t n, double* p) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(n, 0xFF)), v);
}
template <>
BNEXT_INLINE void store_vector_first<half_u16v>(half_u16v v, std::int64_t n, std::uint16_t* p) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(first_lanes(n, 0xFFFF)), (__m256i)v);
}
BNEXT_INLINE f32v from_half(half_u16v v) {
  return _mm512_cvtph_ps((__m256i)v);
}
BNEXT_INLINE u16v to_half(f32v a, f32v b) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return joined((half_u16v)_mm512_cvtps_ph(a, nearest), (half_u16v)_mm512_cvtps_ph(b, nearest));
}
// One instruction takes 16 bits from any place to any place.
BNEXT_INLINE f32v from_bfloat(half_u16v v) {
  const u16v from = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                     0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  return (f32v)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, (__m512i)from,
                                              _mm512_castsi256_si512((__m256i)v));
}
// In the upper halves of 32 bits. To nearest, ties to even. A NaN has a lower half of zeros: it
// comes out of the data, which has no more than the upper one, or out of `narrowed`.
BNEXT_INLINE __m512i round_to_bfloat(f32v v) {
  const auto bits = (__m512i)v;
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
  return _mm512_mask_add_epi32(rounded, odd, rounded, _mm512_set1_epi32(1));
}
BNEXT_INLINE u16v to_bfloat(f32v a, f32v b) {
  const u16v from = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return (u16v)_mm512_permutex2var_epi16(round_to_bfloat(a), (__m512i)from, round_to_bfloat(b));
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
BNEXT_INLINE f32v multiply_add(f32v a, f32v b, f32v c) {
  return _mm512_fmadd_ps(a, b, c);
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
BNEXT_INLINE void stream_vector(void* to, u32v v) {
  _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)v);
}
#elif defined(__AVX2__)
template <>
BNEXT_INLINE f32v load_vector_first<f32v>(const float* p, std::int64_t n) {
  return _mm256_maskload_ps(p,
                            _mm256_cmpgt_epi32(_mm256_set1_epi32(n > 8 ? 8 : static_cast<int>(n)),
                                               _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
}
template <>
BNEXT_INLINE f64v load_vector_first<f64v>(const double* p, std::int64_t n) {
  return _mm256_maskload_pd(
      p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)));
}
BNEXT_INLINE f32v from_half(half_u16v v) {
  return _mm256_cvtph_ps((__m128i)v);
}
BNEXT_INLINE u16v to_half(f32v a, f32v b) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return joined((half_u16v)_mm256_cvtps_ph(a, nearest), (half_u16v)_mm256_cvtps_ph(b, nearest));
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
BNEXT_INLINE f32v multiply_add(f32v a, f32v b, f32v c) {
  return _mm256_fmadd_ps(a, b, c);
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
template <class V>
BNEXT_INLINE V multiply_add(V a, V b, V c) {
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
template <class V>
BNEXT_INLINE V multiply_add(V a, V b, V c) {
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
BNEXT_INLINE void stream_vector(void* to, u32v v) {
  store_vector(v, to);
}
#endif

#if !defined(__AVX512F__)
#if defined(__AVX2__)
// Bytes can be moved in one instruction, but not from one half of a vector to the other.
BNEXT_INLINE f32v from_bfloat(half_u16v v) {
  const auto both = _mm256_broadcastsi128_si256((__m128i)v);
  return (f32v)_mm256_shuffle_epi8(
      both, _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                             -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15));
}
// The low words of the lanes of `low`, the high ones of `high`.
BNEXT_INLINE u16v words_of(u32v low, u32v high) {
  return (u16v)_mm256_blend_epi16((__m256i)low, (__m256i)high, 0xAA);
}
// (a + b + 1) / 2
BNEXT_INLINE u16v average(u16v a, u16v b) {
  return (u16v)_mm256_avg_epu16((__m256i)a, (__m256i)b);
}
// All low words, then all high ones.
BNEXT_INLINE u16v low_before_high(u16v words) {
  const auto of_halves = _mm256_shuffle_epi8(
      (__m256i)words, _mm256_broadcastsi128_si256(
                          _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)));
  return (u16v)_mm256_permute4x64_epi64(of_halves, 0xD8);
}
#else
BNEXT_INLINE f32v from_bfloat(half_u16v v) {
  return (f32v)(__builtin_convertvector(v, u32v) << 16);
}
BNEXT_INLINE u16v words_of(u32v low, u32v high) {
  return (u16v)((low & 0xFFFFu) | (high & 0xFFFF0000u));
}
BNEXT_INLINE u16v average(u16v a, u16v b) {
#if defined(__SSE2__)
  return (u16v)_mm_avg_epu16((__m128i)a, (__m128i)b);
#else
  return (a | b) - ((a ^ b) >> 1);
#endif
}
BNEXT_INLINE u16v low_before_high(u16v words) {
  const u32v both = (u32v)words;
  return joined(__builtin_convertvector(both & 0xFFFFu, half_u16v),
                __builtin_convertvector(both >> 16, half_u16v));
}
#endif
// To nearest, ties to even, by what is carried out of the lower word of a value when 0x7FFF is
// added and what the upper one is odd by: the words of a and b in turns. Nothing is of a NaN, whose
// lower word is zero: it comes out of the data, which has no more than the upper one, or of
// `narrowed`.
BNEXT_INLINE u16v round_to_bfloats(f32v a, f32v b) {
  const u16v upper = words_of((u32v)a >> 16, (u32v)b), lower = words_of((u32v)a, (u32v)b << 16);
  return upper + (average(lower, (upper & 1) + 0x7FFE) >> 15);
}
BNEXT_INLINE u16v to_bfloat(f32v a, f32v b) {
  return low_before_high(round_to_bfloats(a, b));
}
#endif

#if !defined(__F16C__)
// IEEE half precision by integers, as the processors that have instructions for it do it.
__attribute__((noinline)) f32v from_half(half_u16v v) {
  const u32v bits = __builtin_convertvector(v, u32v);
  const u32v magnitude = (bits & 0x7FFFu) << 13;
  // As a number 2^112 too small, subnormals included; infinities and NaN keep their exponent.
  const f32v scaled = (f32v)magnitude * 0x1p112f;
  const u32v quiet = (magnitude & 0x7FFFFFu) != 0 ? u32v{} + 0x400000u : u32v{};
  const u32v special = magnitude | 0x7F800000u | quiet;
  const u32v value = magnitude >= 0x0F800000u ? special : (u32v)scaled;
  return (f32v)(value | (bits & 0x8000u) << 16);
}
__attribute__((noinline)) half_u16v to_half(f32v v) {
  const u32v bits = (u32v)v, sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  const u32v nan = (magnitude >> 13 & 0x3FFu) | 0x7E00u;
  // To the nearest multiple of 2^-24, half of which is what 0.5 has no room for.
  const u32v small = (u32v)((f32v)magnitude + 0.5f) - 0x3F000000u;
  const u32v normal = (magnitude + 0xC8000FFFu + (magnitude >> 13 & 1u)) >> 13;
  const u32v finite = magnitude < 0x38800000u ? small : normal;
  const u32v limited = magnitude >= 0x47800000u ? u32v{} + 0x7C00u : finite;
  return __builtin_convertvector((magnitude > 0x7F800000u ? nan : limited) | sign, half_u16v);
}
BNEXT_INLINE u16v to_half(f32v a, f32v b) {
  return joined(to_half(a), to_half(b));
}
#endif

// -- values in memory and vectors of them ---------------------------------------------------------

// How a dtype lies in memory: as vectors of what it is computed in, or as 16 bits to be converted.
// `encode_whole` fills a vector in memory with those that f gives for the elements from 0, ... on.
// `alternates`: every other element is taken from a vector in memory, and put there, with less work
// than one half of it after the other.
template <class S>
struct Storage {
  static constexpr bool alternates = false;
  using Bits = Vector<S>;
  using Element = S;
  static BNEXT_INLINE Vector<S> decode(Bits v) { return v; }
  static BNEXT_INLINE Bits encode(Vector<S> v) { return v; }
  template <class F>
  static BNEXT_INLINE u32v encode_whole(F f) {
    return (u32v)f(0);
  }
};
template <f32v (*from)(half_u16v), u16v (*to)(f32v, f32v)>
struct HalfStorage {
  static constexpr bool alternates = false;
  using Bits = half_u16v;
  using Element = std::uint16_t;
  static BNEXT_INLINE f32v decode(Bits v) { return from(v); }
  static BNEXT_INLINE Bits encode(f32v v) {
    const u16v twice = to(v, v);
    return load_vector<Bits>(&twice);
  }
  template <class F>
  static BNEXT_INLINE u32v encode_whole(F f) {
    const f32v first = f(0);
    return (u32v)to(first, f(vector_length<float>));
  }
};
template <>
struct Storage<float16> : HalfStorage<from_half, to_half> {};
template <>
struct Storage<bfloat16> : HalfStorage<from_bfloat, to_bfloat> {
#if !defined(__AVX512F__)
  static constexpr bool alternates = true;
  // From the first on, or the second.
  static BNEXT_INLINE f32v decode_every_other(u16v v, bool second) {
    return (f32v)(second ? (u32v)v & 0xFFFF0000u : (u32v)v << 16);
  }
  static BNEXT_INLINE u32v encode_alternating(f32v first, f32v second) {
    return (u32v)round_to_bfloats(first, second);
  }
#endif
};

template <class S>
BNEXT_INLINE Vector<S> load_values(const S* p) {
  return Storage<S>::decode(load_vector<typename Storage<S>::Bits>(p));
}
template <class S>
BNEXT_INLINE void store_values(Vector<S> v, S* p) {
  store_vector(Storage<S>::encode(v), p);
}
// The first n only; zero in the other lanes.
template <class S>
BNEXT_INLINE Vector<S> load_values_first(const S* p, std::int64_t n) {
  using Memory = Storage<S>;
  return Memory::decode(load_vector_first<typename Memory::Bits>(
      reinterpret_cast<const typename Memory::Element*>(p), n));
}
template <class S>
BNEXT_INLINE void store_values_first(Vector<S> v, std::int64_t n, S* p) {
  using Memory = Storage<S>;
  store_vector_first(Memory::encode(v), n, reinterpret_cast<typename Memory::Element*>(p));
}

// The lanes of a where the bit of a lane is set, of b elsewhere.
template <class V>
BNEXT_INLINE V select_lanes(std::uint32_t mask, V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof a[0] == 4)
    return _mm512_mask_blend_ps(static_cast<__mmask16>(mask), b, a);
  else
    return _mm512_mask_blend_pd(static_cast<__mmask8>(mask), b, a);
#else
  using Lanes = decltype(a < b);
  Lanes bits{};
  for (std::int64_t l = 0; l < static_cast<std::int64_t>(sizeof(V) / sizeof a[0]); ++l)
    bits[l] = 1 << l;
  return (bits & static_cast<int>(mask)) == bits ? a : b;
#endif
}

// The first n lanes of v, those of `rest` after them.
template <class V>
BNEXT_INLINE V first_lanes_of(V v, std::int64_t n, V rest) {
#if defined(__AVX512F__)
  return select_lanes((1u << (n < 0 ? 0 : n > 16 ? 16 : n)) - 1, v, rest);
#else
  decltype(v < v) lane{};
  for (int l = 0; l < static_cast<int>(sizeof v / sizeof v[0]); ++l) lane[l] = l;
  return lane < static_cast<int>(n) ? v : rest;
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
template <class V>
BNEXT_INLINE Vectors<V, 1> multiply_add(Vectors<V, 1> a, Vectors<V, 1> b, Vectors<V, 1> c) {
  return {multiply_add(a.only, b.only, c.only)};
}
template <class V, int n>
BNEXT_INLINE Vectors<V, n> multiply_add(Vectors<V, n> a, Vectors<V, n> b, Vectors<V, n> c) {
  return {multiply_add(a.low, b.low, c.low), multiply_add(a.high, b.high, c.high)};
}

// The same value, unknown to the compiler.
template <class T>
BNEXT_INLINE T unknown(T value) {
#if defined(__SSE2__)
  __asm__("" : "+x"(value));
#endif
  return value;
}
template <class T>
BNEXT_INLINE const T* unknown(const T* value) {
  __asm__("" : "+r"(value));
  return value;
}

// a + b, by units that multiply, which have nothing to do where those that add have too much.
using Ones = f64v;
BNEXT_INLINE Ones unknown_ones() {
  return unknown(1.0) - f64v{};
}
BNEXT_INLINE f64v add_by_multiplying(f64v a, Ones ones, f64v b) {
#if defined(__AVX2__)
  return multiply_add(a, ones, b);
#else
  (void)ones;
  return a + b;
#endif
}
BNEXT_INLINE Vectors<f64v, 1> add_by_multiplying(Vectors<f64v, 1> a, Ones ones,
                                                 Vectors<f64v, 1> b) {
  return {add_by_multiplying(a.only, ones, b.only)};
}
template <int n>
BNEXT_INLINE Vectors<f64v, n> add_by_multiplying(Vectors<f64v, n> a, Ones ones,
                                                 Vectors<f64v, n> b) {
  return {add_by_multiplying(a.low, ones, b.low), add_by_multiplying(a.high, ones, b.high)};
}

// Elements of the lower half of n vectors.
template <class V, int n>
constexpr std::int64_t half_length = n / 2 * static_cast<std::int64_t>(sizeof(V) / sizeof(V{}[0]));

template <class P>
struct Access;

template <class V>
struct Access<Vectors<V, 1>> {
  template <class T>
  static BNEXT_INLINE Vectors<V, 1> broadcast(T value) {
    return {value - V{}};
  }
  static BNEXT_INLINE Vectors<V, 1> widened(const float* p) { return {load_widened(p)}; }
  template <class T>
  static BNEXT_INLINE void store(Vectors<V, 1> v, T* to) {
    store_vector(v.only, to);
  }
  // The vectors that f(i) gives for the elements from i on.
  template <class F>
  static BNEXT_INLINE Vectors<V, 1> each(std::int64_t i, F f) {
    return {f(i)};
  }
};

template <class V, int n>
struct Access<Vectors<V, n>> {
  using Half = Access<Vectors<V, n / 2>>;
  static constexpr std::int64_t half = half_length<V, n>;
  template <class T>
  static BNEXT_INLINE Vectors<V, n> broadcast(T value) {
    return {Half::broadcast(value), Half::broadcast(value)};
  }
  static BNEXT_INLINE Vectors<V, n> widened(const float* p) {
    return {Half::widened(p), Half::widened(p + half)};
  }
  template <class T>
  static BNEXT_INLINE void store(Vectors<V, n> v, T* to) {
    Half::store(v.low, to);
    Half::store(v.high, to + half);
  }
  template <class F>
  static BNEXT_INLINE Vectors<V, n> each(std::int64_t i, F f) {
    const auto low = Half::each(i, f);
    return {low, Half::each(i + half, f)};
  }
};

template <class V>
BNEXT_INLINE V first_vector(Vectors<V, 1> v) {
  return v.only;
}
template <class V, int n>
BNEXT_INLINE V first_vector(Vectors<V, n> v) {
  return first_vector(v.low);
}

// Calls f(i, vectors...) with `some` vectors at once of some packs that belong together, of the
// elements from i on: done vector after vector, a step takes fewer registers than pack after pack.
template <int some, class F, class V, int n, class... Others>
BNEXT_INLINE void by_vectors(std::int64_t i, F f, Vectors<V, n>& first, Others&... others) {
  if constexpr (n == some) {
    f(i, first, others...);
  } else {
    by_vectors<some>(i, f, first.low, others.low...);
    by_vectors<some>(i + half_length<V, n>, f, first.high, others.high...);
  }
}
template <class F, class V, int n, class... Others>
BNEXT_INLINE void by_vector(std::int64_t i, F f, Vectors<V, n>& first, Others&... others) {
  by_vectors<1>(
      i,
      [&](std::int64_t k, auto&... vectors)
          __attribute__((always_inline)) { f(k, vectors.only...); },
      first, others...);
}

// Sixteen values of type S from memory.
template <class S>
BNEXT_INLINE Pack<Compute<S>> load(const S* p) {
  return Access<Pack<Compute<S>>>::each(
      0, [p](std::int64_t i) __attribute__((always_inline)) { return load_values(p + i); });
}
// The first n of sixteen values, zero for the rest.
template <class S>
BNEXT_INLINE Pack<Compute<S>> load_first(const S* p, std::int64_t n) {
  return Access<Pack<Compute<S>>>::each(0, [=](std::int64_t i) __attribute__((always_inline)) {
    return load_values_first(p + i, n - i);
  });
}
// Vectors as they are in memory.
template <class P, class T>
BNEXT_INLINE P load_vectors(const T* p) {
  return Access<P>::each(0, [p](std::int64_t i) __attribute__((always_inline)) {
    return load_vector<decltype(first_vector(P{}))>(p + i);
  });
}
template <class T>
BNEXT_INLINE Pack<T> broadcast(T value) {
  return Access<Pack<T>>::broadcast(value);
}
template <class T>
BNEXT_INLINE void store(Pack<T> v, T* to) {
  Access<Pack<T>>::store(v, to);
}

template <int n>
BNEXT_INLINE Vectors<f64v, n> widen(Vectors<f64v, n> v) {
  return v;
}
BNEXT_INLINE Vectors<f64v, 2> widen(Vectors<f32v, 1> v) {
  return {{widen_low(v.only)}, {widen_high(v.only)}};
}
template <int n>
BNEXT_INLINE Vectors<f64v, 2 * n> widen(Vectors<f32v, n> v) {
  return {widen(v.low), widen(v.high)};
}

// A vector of doubles, from memory.
BNEXT_INLINE f64v load_wide_vector(const float* p) {
  return load_widened(p);
}
BNEXT_INLINE f64v load_wide_vector(const double* p) {
  return load_vector<f64v>(p);
}

template <class V>
BNEXT_INLINE Vectors<V, 1> first_lanes_of(Vectors<V, 1> v, std::int64_t n, Vectors<V, 1> rest) {
  return {first_lanes_of(v.only, n, rest.only)};
}
template <class V, int count>
BNEXT_INLINE Vectors<V, count> first_lanes_of(Vectors<V, count> v, std::int64_t n,
                                              Vectors<V, count> rest) {
  return {first_lanes_of(v.low, n, rest.low),
          first_lanes_of(v.high, n - half_length<V, count>, rest.high)};
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

// -- bits -----------------------------------------------------------------------------------------

// A bit for each of some elements, from bit `first` of `bytes` on. Words are read whole: there must
// be four bytes after the last.
struct Bits {
  const std::uint8_t* bytes = nullptr;
  std::int64_t first = 0;
  // How far to shift a word for each lane of a whole vector, or of every other element.
  u32v to_sign, every_other_to_sign;

  Bits() = default;
  BNEXT_INLINE Bits(const std::uint8_t* bytes_, std::int64_t first_)
      : bytes(bytes_), first(first_) {}

  // Those of the elements from i on, lowest first; at least 16 of them.
  BNEXT_INLINE std::uint32_t at(std::int64_t i) const {
    return word_at(i) >> (static_cast<std::uint64_t>(first + i) % 8);
  }
  // Whole vectors follow that begin some whole bytes after element i.
  BNEXT_INLINE void vectors_from(std::int64_t i) {
    u32v lane;
    for (int l = 0; l < vector_bytes / 4; ++l) lane[l] = static_cast<std::uint32_t>(l);
    to_sign = 31 - static_cast<std::uint32_t>(static_cast<std::uint64_t>(first + i) % 8) - lane;
    every_other_to_sign = to_sign - lane;
  }
  // a for the elements of a whole vector whose bit is set, b for the others: a lane takes its bit
  // as its sign where no mask of lanes is to be had. `step`: of Place.
  template <class V>
  BNEXT_INLINE V select(std::int64_t i, std::int64_t step, V a, V b) const {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (sizeof a[0] == 4) return select_by_sign(i, step, to_sign, a, b);
#else
    (void)step;
#endif
    return select_lanes(at(i), a, b);
  }
  // The same for every other element, from the first or the second on.
  BNEXT_INLINE f32v select_every_other(std::int64_t i, std::int64_t step, bool second, f32v a,
                                       f32v b) const {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return select_by_sign(i, step, second ? every_other_to_sign - 1 : every_other_to_sign, a, b);
#else
    (void)step;
    u32v bit;
    for (int l = 0; l < vector_bytes / 4; ++l) bit[l] = (second ? 2u : 1u) << 2 * l;
    return (bit & at(i)) != 0 ? a : b;
#endif
  }

 private:
#if defined(__AVX2__) && !defined(__AVX512F__)
  BNEXT_INLINE f32v select_by_sign(std::int64_t i, std::int64_t step, u32v shifts, f32v a,
                                   f32v b) const {
    const auto word = _mm256_set1_epi32(static_cast<int>(word_at(i - step, step)));
    // Of a known zero, compilers make two instructions.
    return _mm256_blendv_ps(unknown(b), a,
                            _mm256_castsi256_ps(_mm256_sllv_epi32(word, (__m256i)shifts)));
  }
#endif
  // Some whole bytes after element i.
  BNEXT_INLINE std::uint32_t word_at(std::int64_t i, std::int64_t step = 0) const {
    std::uint32_t word;
    __builtin_memcpy(&word, bytes + static_cast<std::uint64_t>(first + i) / 8 + step / 8,
                     sizeof word);
    return word;
  }
};

// -- reading ahead --------------------------------------------------------------------------------

// Some processors fetch too little ahead from memory, or stop at every page: the kernels do it
// themselves where a tensor exceeds the caches.
template <class T>
constexpr std::int64_t prefetch_distance = 4096 / sizeof(T);

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

// What is to be fetched for element i of a block of memory: that which lies `distance` elements
// after it. Past the end of the block, `jump` elements further, in the next one, lies what comes
// then; blocks are no shorter than the distance. No distance: nothing is to be fetched.
struct Ahead {
  std::int64_t end = 0, jump = 0, distance = 0;

  // Where that lies: at i itself, where there is nothing.
  BNEXT_INLINE std::int64_t of(std::int64_t i) const {
    i += distance;
    return i >= end ? i + jump : i;
  }
  template <class T>
  BNEXT_INLINE void fetch(const T* block, std::int64_t i, std::int64_t count) const {
    if (distance > 0) bnext::fetch(block + of(i), count);
  }
};

// Fetches the lines that begin in a pack at p, the k-th of some: between other instructions that is
// cheaper than all lines at once.
template <class T>
BNEXT_INLINE void fetch_pack(const T* p, std::int64_t k) {
#pragma GCC unroll 16
  for (std::int64_t i = 0; i < lanes; ++i)
    if ((k * lanes + i) % line_length<T> == 0) __builtin_prefetch(p + i);
}

// -- writing results ------------------------------------------------------------------------------

// A place in a row: a vector of elements, or the first few of one where the row begins or ends.
// Calling it with an array over the row reads what lies there.
template <class S>
struct Place {
  static constexpr bool whole = true;
  static constexpr std::int64_t count = vector_length<S>;
  std::int64_t i;
  // How much of i the compiler knows, where loops are unrolled.
  std::int64_t step = 0;

  BNEXT_INLINE void go_on(std::int64_t elements) {
    i += elements;
    step += elements;
  }
  // Lanes of elements before `end`, if that is among them.
  BNEXT_INLINE std::int64_t lanes_before(std::int64_t end) const { return end - i; }
  template <class E>
  BNEXT_INLINE Vector<E> operator()(const E* row) const {
    return load_values(row + i);
  }
  BNEXT_INLINE void write(Vector<S> v, S* __restrict row) const { store_values(v, row + i); }
  BNEXT_INLINE Vector<S> select(const Bits& bits, Vector<S> a, Vector<S> b) const {
    return bits.select(i, step, a, b);
  }
};
// Every other one of twice as many elements, from the first or the second on.
template <class S>
struct EveryOtherPlace {
  static constexpr std::int64_t count = vector_length<S>;
  std::int64_t i, step;
  bool second;

  BNEXT_INLINE std::int64_t lanes_before(std::int64_t end) const {
    return (end - i + (second ? 0 : 1)) >> 1;
  }
  BNEXT_INLINE Vector<S> operator()(const S* row) const {
    return Storage<S>::decode_every_other(load_vector<u16v>(row + i), second);
  }
  BNEXT_INLINE Vector<S> select(const Bits& bits, Vector<S> a, Vector<S> b) const {
    return bits.select_every_other(i, step, second, a, b);
  }
};
template <class S>
struct PartialPlace {
  static constexpr bool whole = false;
  std::int64_t i, count;

  BNEXT_INLINE std::int64_t lanes_before(std::int64_t end) const { return end - i; }
  template <class E>
  BNEXT_INLINE Vector<E> operator()(const E* row) const {
    return load_values_first(row + i, count);
  }
  BNEXT_INLINE void write(Vector<S> v, S* __restrict row) const {
    store_values_first(v, count, row + i);
  }
  BNEXT_INLINE Vector<S> select(const Bits& bits, Vector<S> a, Vector<S> b) const {
    return select_lanes(bits.at(i), a, b);
  }
};

// Lines of another result, put together while those of one are streamed: parts of two in turns take
// many times as long, and whole lines of two up to twice as long, if their addresses differ by
// whole pages (Zen 3).
constexpr std::int64_t other_lines = 8;
template <class S>
struct OtherLines {
  S* to = nullptr;
  alignas(64) S values[other_lines * line_length<S>];
};

// Writes a line past the caches, if it is one of theirs.
template <class S>
BNEXT_INLINE void write_line(const S* values, S* to) {
  constexpr std::int64_t vectors = 64 / vector_bytes, part = line_length<S> / vectors;
  const bool aligned = reinterpret_cast<std::uintptr_t>(to) % 64 == 0;
  for (std::int64_t k = 0; k < vectors; ++k) {
    const auto v = load_vector<u32v>(values + k * part);
    if (aligned)
      stream_vector(to + k * part, v);
    else
      store_vector(v, to + k * part);
  }
}

// A place in lines that are streamed, which began at `begin`.
template <class S>
struct StreamedPlace : Place<S> {
  std::int64_t begin;
  OtherLines<S>* other;

  BNEXT_INLINE void write(Vector<S> v, S* __restrict row) const {
    other->to = row + begin;
    store_values(v, other->values + (this->i - begin));
  }
};

// Elements from p to the first line that begins there or later.
template <class S>
BNEXT_INLINE std::int64_t until_next_line(const S* p) {
  const auto begun = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(p) / sizeof(S));
  return -begun & (line_length<S> - 1);
}

// What writes a row calls a channel: values that share coefficients. A row of one, and its
// coefficients at each place.
template <class Coefficients>
struct OneChannel {
  Coefficients coefficients;

  BNEXT_INLINE void reach(std::int64_t) {}
  BNEXT_INLINE const Coefficients& of(std::int64_t) const { return coefficients; }
  BNEXT_INLINE const Coefficients& around(std::int64_t, std::int64_t) const { return coefficients; }
};
template <class Coefficients>
BNEXT_INLINE OneChannel<Coefficients> one_channel(Coefficients coefficients) {
  return {coefficients};
}

// The longest step that `write` takes at once, in elements.
template <class S>
constexpr std::int64_t longest_step = 16 * line_length<S>;

// Writes value(k, place), k the coefficients of a place, to each place of a row of `length`
// elements. channels.of(c) gives the coefficients of places within channel c, each of
// `channel_length` elements and no shorter than a line; channels.around(c, begin) those around the
// begin of one. With `streaming` past the caches: worth it where nothing will read the result
// before it would have left them anyway. channels.reach(i) and before(i, count) are called before
// elements [i, i + count) are asked for, in rising order without gaps, at most longest_step at
// once. `much`: the values take so much code that there should be few copies of it. `two`: value()
// may write another result to its place. `any_order`: places may also be every other element.
template <bool much, bool two, bool any_order, class S, class Channels, class Value, class Before>
BNEXT_INLINE void write(S* __restrict to, std::int64_t length, std::int64_t channel_length,
                        bool streaming, Channels channels, Value value, Before before) {
  // Not unrolled.
  constexpr bool large = much || compact || sizeof(S) == 8;
  constexpr std::int64_t line = line_length<S>;
  constexpr std::int64_t block = (large ? 2 : 4) * line;
  // A few lines at a time are streamed, so that reads and writes are under way together.
  constexpr bool few = much || compact || many_registers;
  constexpr std::int64_t streamed_step = two ? other_lines * line : (few ? 2 : 8) * line;
  constexpr std::int64_t streamed_block = streamed_step < block ? streamed_step : block;
  const std::int64_t step = streaming ? streamed_step : 4 * block;
  static_assert(4 * block <= longest_step<S>);
  // The places that one vector in memory has.
  constexpr std::int64_t whole_length = vector_bytes / sizeof(S);
  const auto write_whole = [&](const auto& coefficients, auto place,
                               bool past_caches) __attribute__((always_inline)) {
    const auto value_at = [&](auto at) __attribute__((always_inline)) {
      return value(coefficients(at), at);
    };
    u32v bits;
    if constexpr (any_order && Storage<S>::alternates)
      bits =
          Storage<S>::encode_alternating(value_at(EveryOtherPlace<S>{place.i, place.step, false}),
                                         value_at(EveryOtherPlace<S>{place.i, place.step, true}));
    else
      bits = Storage<S>::encode_whole([&](std::int64_t k) __attribute__((always_inline)) {
        auto at = place;
        at.go_on(k);
        return value_at(at);
      });
    if (past_caches)
      stream_vector(to + place.i, bits);
    else
      store_vector(bits, to + place.i);
  };
  // Parts of a line one after the other, and of nothing else in between.
  const auto stream_lines = [&](const auto& coefficients, std::int64_t begin,
                                std::int64_t end) __attribute__((always_inline)) {
    OtherLines<S> other;
    const auto part = [&](std::int64_t i, std::int64_t at) __attribute__((always_inline)) {
      write_whole(coefficients, StreamedPlace<S>{{i + at, at}, begin, &other}, true);
    };
#pragma GCC unroll 1
    for (std::int64_t i = begin; i < end; i += line)
      if constexpr (large)
#pragma GCC unroll 1
        for (std::int64_t at = 0; at < line; at += whole_length) part(i, at);
      else
#pragma GCC unroll 4
        for (std::int64_t at = 0; at < line; at += whole_length) part(i, at);
    if (other.to == nullptr) return;
#pragma GCC unroll 1
    for (std::int64_t at = 0; at < end - begin; at += line)
      write_line(other.values + at, other.to + at);
  };
  const auto write_blocks = [&](const auto& coefficients, std::int64_t begin,
                                std::int64_t end) __attribute__((always_inline)) {
    std::int64_t i = begin;
    if (two && streaming) return i;  // stream_lines has written all
    if (streaming)
      for (; i + streamed_block <= end; i += streamed_block)
#pragma GCC unroll 8
        for (std::int64_t at = 0; at < streamed_block; at += whole_length)
          write_whole(coefficients, Place<S>{i + at, at}, true);
    else
      for (; i + block <= end; i += block)
#pragma GCC unroll 8
        for (std::int64_t at = 0; at < block; at += whole_length)
          write_whole(coefficients, Place<S>{i + at, at}, false);
    return i;
  };
  const auto write_a_line = [&](const auto& k, std::int64_t i) __attribute__((always_inline)) {
    if (two && streaming) return stream_lines(k, i, i + line);
#pragma GCC unroll 4
    for (std::int64_t at = 0; at < line; at += whole_length)
      write_whole(k, Place<S>{i + at, at}, streaming);
  };

  // Whole lines between the edges: a store across two of them costs twice, and cannot be streamed.
  std::int64_t i = 0, end = until_next_line(to) < length ? until_next_line(to) : length;
#pragma GCC unroll 1
  for (std::int64_t c = 0; i < length; ++c) {
    if (i < end) {
      // An end of the row, or the line that two channels share: that is put together first, since
      // it is streamed with the others.
      channels.reach(i);
      before(i, end - i);
      const auto& coefficients = channels.around(c, c * channel_length);
      const bool all = end - i == line;
      if (!large && all) {
        if constexpr (!large) write_a_line(coefficients, i);
      } else {
        const bool streamed = streaming && all;
        alignas(64) S values[line];
#pragma GCC unroll 1
        for (std::int64_t at = i; at < end; at += vector_length<S>) {
          const PartialPlace<S> place{at,
                                      end - at < vector_length<S> ? end - at : vector_length<S>};
          place.write(value(coefficients(place), place), streamed ? values - i : to);
        }
        if (streamed) write_line(values, to + i);
      }
      i = end;
    }
    if (i == length) break;
    const auto& coefficients = channels.of(c);
    const std::int64_t channel_end = (c + 1) * channel_length;
    const std::int64_t whole = i + (channel_end - i) / line * line;
    while (i < whole) {
      const std::int64_t count = whole - i < step ? whole - i : step;
      channels.reach(i);
      before(i, count);
      const std::int64_t until = i + count;
      if constexpr (!large) {
        if (two && streaming) {
          stream_lines(coefficients, i, until);
          i = until;
        }
        i = write_blocks(coefficients, i, until);
#pragma GCC unroll 1
        for (; i < until; i += line) write_a_line(coefficients, i);
      } else if (streaming) {
        stream_lines(coefficients, i, until);
        i = until;
      } else {
#pragma GCC unroll 1
        for (; i < until; i += whole_length) write_whole(coefficients, Place<S>{i}, false);
      }
    }
    end = whole == channel_end ? whole : whole + line < length ? whole + line : length;
  }
}

}  // namespace
}  // namespace bnext
