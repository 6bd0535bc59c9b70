// Philox4x32-10 and the random bits of a dropout mask, for host and device.
#pragma once

#include <cstdint>

#include "core/math.hpp"

namespace bnext {

struct PhiloxBlock {
  std::uint32_t word[4];
};

// Salmon et al., SC 2011; constants of Random123.
BNEXT_HD static inline PhiloxBlock philox(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2,
                                          std::uint32_t c3, std::uint32_t k0, std::uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c0;
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c2;
    const auto hi0 = static_cast<std::uint32_t>(p0 >> 32), lo0 = static_cast<std::uint32_t>(p0);
    const auto hi1 = static_cast<std::uint32_t>(p1 >> 32), lo1 = static_cast<std::uint32_t>(p1);
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// How a mask is laid out. A span of 128 elements uses 16 consecutive Philox blocks; element e of
// the span is half h = e / 64, word w = e / 16 % 4, lane l = e % 16: it owns 16 bits (the low half
// of the word for h = 0, the high one for h = 1) of word w of block 16 span + l. Neighbours thus
// come from neighbouring blocks, which is what vector units and GPU warps compute side by side.
//
// These 16 bits are the upper half of the element's 32 random bits. The lower half only matters
// where the upper one equals that of the threshold (one element in 65,536), so it comes from a
// second draw that is made only then, with the top bit of the block number set: half the
// multiplications, and the keep probability is still exact to 2^-32.
struct MaskLayout {
  static constexpr int lanes = 16;
  static constexpr int span = 128;
};

// Draw `second` of the block numbered `block`, of the call numbered `offset`.
BNEXT_HD static inline PhiloxBlock mask_block(std::uint64_t seed, std::uint64_t offset,
                                              std::uint64_t block, bool second) {
  return philox(static_cast<std::uint32_t>(block),
                static_cast<std::uint32_t>(block >> 32) | (second ? 0x80000000u : 0u),
                static_cast<std::uint32_t>(offset), static_cast<std::uint32_t>(offset >> 32),
                static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
}

// The first draws of neighbouring blocks, side by side: compilers make vectors of these loops.
template <int lanes>
static inline void mask_blocks(std::uint64_t seed, std::uint64_t offset, std::uint64_t first,
                               std::uint32_t (&word)[4][lanes]) {
  for (int lane = 0; lane < lanes; ++lane) {
    const std::uint64_t block = first + static_cast<std::uint64_t>(lane);
    word[0][lane] = static_cast<std::uint32_t>(block);
    word[1][lane] = static_cast<std::uint32_t>(block >> 32);
    word[2][lane] = static_cast<std::uint32_t>(offset);
    word[3][lane] = static_cast<std::uint32_t>(offset >> 32);
  }
  auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int lane = 0; lane < lanes; ++lane) {
      const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * word[0][lane];
      const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * word[2][lane];
      word[0][lane] = static_cast<std::uint32_t>(p1 >> 32) ^ word[1][lane] ^ k0;
      word[1][lane] = static_cast<std::uint32_t>(p1);
      word[2][lane] = static_cast<std::uint32_t>(p0 >> 32) ^ word[3][lane] ^ k1;
      word[3][lane] = static_cast<std::uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The 16 bits that element `index` owns in its block.
BNEXT_HD static inline std::uint32_t mask_half(std::uint64_t seed, std::uint64_t offset,
                                               std::uint64_t index, bool second) {
  const std::uint64_t span = index / MaskLayout::span;
  const auto e = static_cast<std::uint32_t>(index % MaskLayout::span);
  const PhiloxBlock block =
      mask_block(seed, offset, span * MaskLayout::lanes + e % MaskLayout::lanes, second);
  const std::uint32_t word = block.word[e / MaskLayout::lanes % 4];
  return e >= MaskLayout::span / 2 ? word >> 16 : word & 0xFFFFu;
}

}  // namespace bnext
