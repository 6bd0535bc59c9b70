// Philox4x32-10 and the masks of dropout, for host and device.
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

// The random bits of a mask. Word w of a mask is elements 32 w to 32 w + 31, bit b of it element
// 32 w + b. Each element has a number of 32 random bits, and is dropped where that is below the
// threshold, p 2^32. Bit b of the 32 words of eight Philox blocks, which are the draws 0 to 7 for
// word w, is that number, its highest bit first.
//
// Numbers are compared from the highest bit down, those of all elements of a word at once, and most
// are decided soon: a draw, four bits, decides 15 of 16 elements for good. So a word takes two
// draws, one word in nine a third; where the threshold has no more than four bits, as for p = 0.5
// and 0.25, one. That is an eighth to a quarter of a word of random bits for each element, and the
// keep probability is still exact to 2^-32.
constexpr int mask_word_size = 32;
constexpr int mask_word_bytes = mask_word_size / 8;
constexpr int mask_draw_bits = 4;

// The second word of the counter of a draw; the first is the lower half of `word`.
BNEXT_HD static inline std::uint32_t mask_counter_high(std::uint64_t word, int draw) {
  return static_cast<std::uint32_t>(word >> 32) | static_cast<std::uint32_t>(draw) << 29;
}
// Draw `draw` for word `word` of the call numbered `offset`.
BNEXT_HD static inline PhiloxBlock mask_block(std::uint64_t seed, std::uint64_t offset,
                                              std::uint64_t word, int draw) {
  return philox(static_cast<std::uint32_t>(word), mask_counter_high(word, draw),
                static_cast<std::uint32_t>(offset), static_cast<std::uint32_t>(offset >> 32),
                static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
}

// Compares the next bits of the numbers with those of the threshold, which are its highest ones
// here. `kept`: the numbers that are above it; `undecided`: those that equal it so far.
template <class Word>
BNEXT_HD static inline void decide(Word& kept, Word& undecided, const Word (&bits)[mask_draw_bits],
                                   std::uint32_t threshold) {
  for (int k = 0; k < mask_draw_bits; ++k) {
    if ((threshold << k & 0x80000000u) != 0) {
      undecided &= bits[k];
    } else {
      kept |= undecided & bits[k];
      undecided &= ~bits[k];
    }
  }
}

// Which elements of a word are kept, `threshold` being up to 2^32.
BNEXT_HD static inline std::uint32_t mask_word(std::uint64_t seed, std::uint64_t offset,
                                               std::uint64_t threshold, std::uint64_t word) {
  if (threshold >> 32 != 0) return 0;
  std::uint32_t kept = 0, undecided = ~std::uint32_t{0};
  auto rest = static_cast<std::uint32_t>(threshold);
  for (int draw = 0; rest != 0 && undecided != 0; ++draw, rest <<= mask_draw_bits)
    decide(kept, undecided, mask_block(seed, offset, word, draw).word, rest);
  return kept | undecided;
}

// Neighbouring blocks, side by side: compilers make vectors of these loops.
template <int lanes>
static inline void neighbour_blocks(std::uint64_t seed, std::uint64_t offset, std::uint64_t first,
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

}  // namespace bnext
