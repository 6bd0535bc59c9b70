// Dropout over a run of spans: serial, compiled once per instruction set.
#pragma once

#include "core/args.hpp"
#include "core/philox.hpp"

namespace bnext {
namespace {

// Words of the 16 Philox blocks of one span, lanes side by side.
inline __attribute__((always_inline)) void span_words(const DropoutArgs& a, std::int64_t span,
                                                      std::uint32_t word[4][MaskLayout::lanes]) {
  const std::uint64_t first = static_cast<std::uint64_t>(span) * MaskLayout::lanes;
#pragma omp simd
  for (int l = 0; l < MaskLayout::lanes; ++l) {
    const PhiloxBlock block =
        mask_block(a.seed, a.offset, first + static_cast<std::uint64_t>(l), false);
    word[0][l] = block.word[0];
    word[1][l] = block.word[1];
    word[2][l] = block.word[2];
    word[3][l] = block.word[3];
  }
}

// Elements whose 16 bits equal the upper half of the threshold: the second draw decides.
template <class T>
void settle_ties(const DropoutArgs& a, std::int64_t begin, std::int64_t count,
                 const std::uint32_t* bits, T* y) {
  const auto high = static_cast<std::uint32_t>(a.threshold >> 16);
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
  const auto high = static_cast<std::uint32_t>(a.threshold >> 16);  // up to 2^16
  const bool ties_matter = (a.threshold & 0xFFFFu) != 0;

  for (std::int64_t span = first_span; span < last_span; ++span) {
    std::uint32_t word[4][MaskLayout::lanes];
    span_words(a, span, word);
    std::uint32_t bits[span_size];
    for (int w = 0; w < 4; ++w) {
#pragma omp simd
      for (int l = 0; l < MaskLayout::lanes; ++l) {
        bits[w * MaskLayout::lanes + l] = word[w][l] & 0xFFFFu;
        bits[span_size / 2 + w * MaskLayout::lanes + l] = word[w][l] >> 16;
      }
    }
    const std::int64_t begin = span * span_size;
    const std::int64_t count = a.size - begin < span_size ? a.size - begin : span_size;
    std::uint32_t ties = 0;
    if (count == span_size) {
#pragma omp simd reduction(| : ties)
      for (int e = 0; e < span_size; ++e) {
        y[begin + e] = bits[e] < high ? 0 : x[begin + e] * scale;
        ties |= bits[e] == high;
      }
    } else {
      for (std::int64_t e = 0; e < count; ++e) {
        y[begin + e] = bits[e] < high ? 0 : x[begin + e] * scale;
        ties |= bits[e] == high;
      }
    }
    if (ties && ties_matter) settle_ties(a, begin, count, bits, y);
  }
}

}  // namespace
}  // namespace bnext
