// As much of AVX-512 as cpp/cpu/simd.hpp uses, on processors with AVX2: compilers make vectors of
// 64 bytes of shorter ones, and the intrinsics are those of halves. So kernels can be tested where
// no processor has the instructions; it shows nothing of speed, nor what a compiler makes of them.
#pragma once

#include_next <immintrin.h>

#include <cstdint>

// Code asks for it after the headers of the compiler have.
#define __AVX512F__ 1

namespace bnext_emulated_avx512 {

#define BNEXT_EMULATED inline __attribute__((always_inline))

template <class V>
constexpr int lanes_of = sizeof(V) / sizeof(V{}[0]);

typedef std::int64_t Longs __attribute__((vector_size(64), may_alias));
typedef std::int32_t Ints __attribute__((vector_size(64), may_alias));
typedef std::uint16_t Words __attribute__((vector_size(64), may_alias));
typedef std::uint16_t HalfWords __attribute__((vector_size(32), may_alias));

// Half a vector, the lower one or the upper one; and back.
template <class Half, class V>
BNEXT_EMULATED Half half_of(V v, int upper) {
  Half half;
  __builtin_memcpy(&half, reinterpret_cast<const char*>(&v) + 32 * upper, sizeof half);
  return half;
}
template <class V, class Half>
BNEXT_EMULATED V joined(Half low, Half high) {
  V v;
  __builtin_memcpy(&v, &low, sizeof low);
  __builtin_memcpy(reinterpret_cast<char*>(&v) + 32, &high, sizeof high);
  return v;
}

// Out of line what takes much code.
#define BNEXT_EMULATED_ONCE static __attribute__((noinline))

template <class V, class E>
BNEXT_EMULATED_ONCE V load_masked(unsigned mask, const E* p) {
  E values[lanes_of<V>]{};
  for (int l = 0; l < lanes_of<V>; ++l)
    if ((mask >> l & 1) != 0) values[l] = p[l];
  V v;
  __builtin_memcpy(&v, values, sizeof v);
  return v;
}
template <class E, class V>
BNEXT_EMULATED_ONCE void store_masked(void* to, unsigned mask, V v) {
  E values[lanes_of<V>];
  __builtin_memcpy(values, &v, sizeof v);
  for (int l = 0; l < lanes_of<V>; ++l)
    if ((mask >> l & 1) != 0) static_cast<E*>(to)[l] = values[l];
}
// b where the bit of a lane is set, a elsewhere.
template <class V>
BNEXT_EMULATED_ONCE V blend(unsigned mask, V a, V b) {
  decltype(a < b) bit;
  for (int l = 0; l < lanes_of<V>; ++l) bit[l] = 1 << l;
  return (bit & static_cast<int>(mask)) != 0 ? b : a;
}
BNEXT_EMULATED unsigned negative_lanes(Ints v) {
  return static_cast<unsigned>(_mm256_movemask_ps(half_of<__m256>(v, 0)) |
                               _mm256_movemask_ps(half_of<__m256>(v, 1)) << 8);
}
BNEXT_EMULATED unsigned negative_lanes(Longs v) {
  return static_cast<unsigned>(_mm256_movemask_pd(half_of<__m256d>(v, 0)) |
                               _mm256_movemask_pd(half_of<__m256d>(v, 1)) << 4);
}
BNEXT_EMULATED __m512 multiply_add(__m512 a, __m512 b, __m512 c) {
  const auto half = [&](int k) __attribute__((always_inline)) {
    return _mm256_fmadd_ps(half_of<__m256>(a, k), half_of<__m256>(b, k), half_of<__m256>(c, k));
  };
  return joined<__m512>(half(0), half(1));
}
BNEXT_EMULATED __m512d multiply_add(__m512d a, __m512d b, __m512d c) {
  const auto half = [&](int k) __attribute__((always_inline)) {
    return _mm256_fmadd_pd(half_of<__m256d>(a, k), half_of<__m256d>(b, k), half_of<__m256d>(c, k));
  };
  return joined<__m512d>(half(0), half(1));
}
BNEXT_EMULATED __m512i multiply(__m512i a, __m512i b) {
  const auto half = [&](int k) __attribute__((always_inline)) {
    return _mm256_mul_epu32(half_of<__m256i>(a, k), half_of<__m256i>(b, k));
  };
  return joined<__m512i>(half(0), half(1));
}
BNEXT_EMULATED __m512 from_half(__m256i v) {
  return joined<__m512>(_mm256_cvtph_ps(_mm256_castsi256_si128(v)),
                        _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)));
}
template <int rounding>
BNEXT_EMULATED __m256i to_half(__m512 v) {
  return _mm256_set_m128i(_mm256_cvtps_ph(half_of<__m256>(v, 1), rounding),
                          _mm256_cvtps_ph(half_of<__m256>(v, 0), rounding));
}
BNEXT_EMULATED __m512d widened(__m256 v) {
  return joined<__m512d>(_mm256_cvtps_pd(_mm256_castps256_ps128(v)),
                         _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
}
BNEXT_EMULATED_ONCE __m512i words_of_two(__m512i a, __m512i from, __m512i b) {
  std::uint16_t words[64], places[32], taken[32];
  __builtin_memcpy(words, &a, sizeof a);
  __builtin_memcpy(words + 32, &b, sizeof b);
  __builtin_memcpy(places, &from, sizeof from);
  for (int l = 0; l < 32; ++l) taken[l] = words[places[l] % 64];
  __builtin_memcpy(&a, taken, sizeof a);
  return a;
}
BNEXT_EMULATED_ONCE __m512i words_from(unsigned mask, __m512i from, __m512i v) {
  Words bit;
  for (int l = 0; l < 32; ++l) bit[l] = (mask >> l & 1) != 0 ? 0xFFFF : 0;
  return words_of_two(v, from, v) & (__m512i)bit;
}
BNEXT_EMULATED void stream(void* to, __m512i v) {
  _mm256_stream_si256(static_cast<__m256i*>(to), half_of<__m256i>(v, 0));
  _mm256_stream_si256(static_cast<__m256i*>(to) + 1, half_of<__m256i>(v, 1));
}

}  // namespace bnext_emulated_avx512

// Some are macros of the compiler's headers, where it does not optimise.
#undef _mm512_inserti64x4
#undef _mm512_extractf64x4_pd
#undef _mm512_extractf32x8_ps
#undef _mm512_cvtps_ph
#define BNEXT_OF(name) bnext_emulated_avx512::name
#define _mm512_maskz_loadu_ps BNEXT_OF(load_masked<__m512>)
#define _mm512_maskz_loadu_pd BNEXT_OF(load_masked<__m512d>)
#define _mm256_maskz_loadu_epi16(mask, p) \
  ((__m256i)BNEXT_OF(load_masked<BNEXT_OF(HalfWords)>)(mask, p))
#define _mm512_mask_storeu_ps BNEXT_OF(store_masked<float>)
#define _mm512_mask_storeu_pd BNEXT_OF(store_masked<double>)
#define _mm256_mask_storeu_epi16(to, mask, v) \
  BNEXT_OF(store_masked<std::uint16_t>)(to, mask, (BNEXT_OF(HalfWords))(v))
#define _mm512_mask_blend_ps BNEXT_OF(blend<__m512>)
#define _mm512_mask_blend_pd BNEXT_OF(blend<__m512d>)
#define _mm512_set1_epi32(value) ((__m512i)((value) + BNEXT_OF(Ints){}))
#define _mm512_set1_epi64(value) ((value) + __m512i{})
#define _mm512_castsi256_si512(v) BNEXT_OF(joined<__m512i>)(v, __m256i{})
#define _mm512_castps512_ps256(v) BNEXT_OF(half_of<__m256>)(v, 0)
#define _mm512_castpd512_pd256(v) BNEXT_OF(half_of<__m256d>)(v, 0)
#define _mm512_inserti64x4(low, high, part) \
  BNEXT_OF(joined<__m512i>)(BNEXT_OF(half_of<__m256i>)(low, 0), high)
#define _mm512_extractf64x4_pd BNEXT_OF(half_of<__m256d>)
#define _mm512_extractf32x8_ps BNEXT_OF(half_of<__m256>)
#define _mm512_cvtph_ps BNEXT_OF(from_half)
#define _mm512_cvtps_ph(v, rounding) BNEXT_OF(to_half<rounding>)(v)
#define _mm512_maskz_permutexvar_epi16 BNEXT_OF(words_from)
#define _mm512_permutex2var_epi16 BNEXT_OF(words_of_two)
#define _mm512_test_epi32_mask(a, b) \
  BNEXT_OF(negative_lanes)((BNEXT_OF(Ints))((BNEXT_OF(Ints))((a) & (b)) != 0))
#define _mm512_add_epi32(a, b) ((__m512i)((BNEXT_OF(Ints))(a) + (BNEXT_OF(Ints))(b)))
#define _mm512_mask_add_epi32(other, mask, a, b) \
  ((__m512i)BNEXT_OF(blend)(mask, (BNEXT_OF(Ints))(other), (BNEXT_OF(Ints))_mm512_add_epi32(a, b)))
#define _mm512_mul_epu32 BNEXT_OF(multiply)
#define _mm512_cvtps_pd BNEXT_OF(widened)
#define _mm512_fmadd_pd BNEXT_OF(multiply_add)
#define _mm512_fmadd_ps BNEXT_OF(multiply_add)
#define _mm512_movepi32_mask(v) BNEXT_OF(negative_lanes)((BNEXT_OF(Ints))(v))
#define _mm512_movepi64_mask(v) BNEXT_OF(negative_lanes)((BNEXT_OF(Longs))(v))
#define _mm512_stream_si512 BNEXT_OF(stream)
