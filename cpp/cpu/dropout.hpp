// Dropout over a run of spans: serial, compiled once per instruction set.
#pragma once

#include "core/args.hpp"
#include "core/philox.hpp"
#include "cpu/simd.hpp"

namespace bnext {
namespace {

// Philox4x32-10 of as many blocks as a vector has 64-bit lanes. Words live in the low halves of the
// lanes; what the high halves hold never reaches them, so nothing clears it.
struct PhiloxVectors {
  u64v word[4];
};

BNEXT_INLINE PhiloxVectors philox_vectors(u64v block, const DropoutArgs& a) {
  const u64v zero{};
  u64v c0 = block, c1 = block >> 32, c2 = zero + (a.offset & 0xFFFFFFFFu),
       c3 = zero + (a.offset >> 32);
  auto k0 = static_cast<std::uint32_t>(a.seed), k1 = static_cast<std::uint32_t>(a.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const u64v p0 = multiply_low(c0, 0xD2511F53u), p1 = multiply_low(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ (zero + k0);
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ (zero + k1);
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The 16 bits of each of the 128 elements of a span; see MaskLayout.
BNEXT_INLINE void span_bits(const DropoutArgs& a, std::int64_t span, std::int32_t* bits) {
  constexpr int wide = vector_bytes / 8, half = MaskLayout::span / 2;
  const std::uint64_t first = static_cast<std::uint64_t>(span) * MaskLayout::lanes;
  u64v twice;
  for (int l = 0; l < wide; ++l) twice[l] = static_cast<std::uint64_t>(2 * l);
  for (int start = 0; start < MaskLayout::lanes; start += 2 * wide) {
    // Blocks with even and with odd numbers: put together, 32-bit lanes are in order.
    const u64v number = twice + (first + static_cast<std::uint64_t>(start));
    const PhiloxVectors even = philox_vectors(number, a), odd = philox_vectors(number + 1, a);
    for (int w = 0; w < 4; ++w) {
      const u32v word = (u32v)((even.word[w] & 0xFFFFFFFFu) | (odd.word[w] << 32));
      const u32v low = word & 0xFFFFu, high = word >> 16;
      std::int32_t* const to = bits + w * MaskLayout::lanes + start;
      __builtin_memcpy(to, &low, sizeof low);
      __builtin_memcpy(to + half, &high, sizeof high);
    }
  }
}

// Elements whose 16 bits equal the upper half of the threshold: the second draw decides.
template <class T>
void settle_ties(const DropoutArgs& a, std::int64_t begin, std::int64_t count,
                 const std::int32_t* bits, T* y) {
  const auto high = static_cast<std::int32_t>(a.threshold >> 16);
  const auto low = static_cast<std::uint32_t>(a.threshold & 0xFFFFu);
  for (std::int64_t e = 0; e < count; ++e)
    if (bits[e] == high &&
        mask_half(a.seed, a.offset, static_cast<std::uint64_t>(begin + e), true) < low)
      y[begin + e] = 0;
}

template <class T>
void dropout(const DropoutArgs& a, std::int64_t first_span, std::int64_t last_span) {
  constexpr int span_size = MaskLayout::span;
  const auto* x = static_cast<const T*>(a.x);
  auto* y = static_cast<T*>(a.y);
  const auto scale = static_cast<T>(a.scale);
  const auto high = static_cast<std::int32_t>(a.threshold >> 16);  // up to 2^16
  const bool ties_matter = (a.threshold & 0xFFFFu) != 0;

  const Ahead<T> ahead{x + a.size, a.streaming ? x : nullptr};

  for (std::int64_t span = first_span; span < last_span; ++span) {
    alignas(64) std::int32_t bits[span_size];
    span_bits(a, span, bits);
    const std::int64_t begin = span * span_size;
    const std::int64_t count = a.size - begin < span_size ? a.size - begin : span_size;
    std::int32_t ties = 0;
#pragma omp simd reduction(| : ties)
    for (int e = 0; e < span_size; ++e) ties |= bits[e] == high;
    const T* from = x + begin;
    write(
        y + begin, count, a.streaming,
        [&](std::int64_t e) { return bits[e] < high ? T{0} : from[e] * scale; },
        [&](std::int64_t e, std::int64_t n) { ahead.fetch(from + e, n); });
    if (ties && ties_matter) settle_ties(a, begin, count, bits, y);
  }
  if (a.streaming) finish_streaming();
}

}  // namespace
}  // namespace bnext
