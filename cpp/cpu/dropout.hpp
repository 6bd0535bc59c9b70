// Dropout over a run of spans: serial, compiled once per instruction set.
#pragma once

#include "core/args.hpp"
#include "core/philox.hpp"
#include "cpu/launch.hpp"
#include "cpu/simd.hpp"

namespace bnext {
namespace {

// Words of Philox4x32-10 in the low halves of 64-bit lanes; what the high halves hold never reaches
// them, so nothing clears it. `chains`: vectors of blocks that are computed side by side, since one
// round has to wait for the one before.
template <int chains>
struct PhiloxVectors {
  u64v word[4][chains];
};

// The keys of its rounds, in memory: from there a vector of one costs nothing.
struct PhiloxKeys {
  static constexpr int rounds = 10;
  std::uint64_t first[rounds], second[rounds];

  explicit PhiloxKeys(std::uint64_t seed) {
    auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < rounds; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
      first[round] = k0, second[round] = k1;
  }
};

// Replaces the low halves of block numbers in word[0] by random words; the upper halves are `high`.
// That half of the state is equal in all lanes for two rounds saves a tenth of the work.
template <int chains>
BNEXT_INLINE void philox_vectors(PhiloxVectors<chains>& state, std::uint64_t high,
                                 std::uint64_t offset, const PhiloxKeys& keys) {
  const u64v zero{};
  u64v(&c)[4][chains] = state.word;
  for (int v = 0; v < chains; ++v) {
    c[1][v] = zero + high;
    c[2][v] = zero + (offset & 0xFFFFFFFFu);
    c[3][v] = zero + (offset >> 32);
  }
#pragma GCC unroll 10
  for (int round = 0; round < PhiloxKeys::rounds; ++round) {
#pragma GCC unroll 8
    for (int v = 0; v < chains; ++v) {
      const u64v p0 = multiply_low(c[0][v], 0xD2511F53u), p1 = multiply_low(c[2][v], 0xCD9E8D57u);
      c[0][v] = (p1 >> 32) ^ c[1][v] ^ (zero + keys.first[round]);
      c[1][v] = p1;
      c[2][v] = (p0 >> 32) ^ c[3][v] ^ (zero + keys.second[round]);
      c[3][v] = p0;
    }
  }
}

// Whether each of the 128 elements of each of `spans` spans is kept, a bit for each: its 16 random
// bits are at least `threshold`. See MaskLayout. Nonzero if any of them equal it.
template <int spans>
BNEXT_INLINE unsigned span_bits(const PhiloxKeys& keys, std::uint64_t offset, std::int64_t span,
                                std::int32_t threshold, std::uint16_t* kept) {
  constexpr int wide = vector_bytes / 8;
  constexpr int blocks = spans * MaskLayout::lanes;
  constexpr int most_chains = 8;  // more than there are registers for, but it pays
  constexpr int chains = blocks / wide < most_chains ? blocks / wide : most_chains;
  const std::uint64_t first = static_cast<std::uint64_t>(span) * MaskLayout::lanes;
  u64v twice;
  for (int l = 0; l < wide; ++l) twice[l] = static_cast<std::uint64_t>(2 * l);
  const u16v ties = static_cast<std::uint16_t>(threshold) - u16v{};
  unsigned found = 0;
  for (std::int64_t i = 0; i < spans * MaskLayout::span / 16; ++i) kept[i] = 0;
  for (int start = 0; start < blocks; start += chains * wide) {
    PhiloxVectors<chains> random;
    // Blocks with even and with odd numbers: put together, 32-bit lanes are in order.
    for (int v = 0; v < chains; ++v)
      random.word[0][v] =
          twice + (first + static_cast<std::uint64_t>(start + v / 2 * 2 * wide + v % 2));
    philox_vectors(random, first >> 32, offset, keys);
#pragma GCC unroll 4
    for (int pair = 0; pair < chains; pair += 2) {
      const int block = start + pair * wide, lane = block % MaskLayout::lanes;
      std::uint16_t* const of_span = kept + block / MaskLayout::lanes * 8;
#pragma GCC unroll 8
      for (int w = 0; w < 4; ++w) {
        const u32v word = interleave_low(random.word[w][pair], random.word[w][pair + 1]);
        const unsigned low = lanes_at_least(word & 0xFFFFu, threshold);
        const unsigned high = lanes_at_least(word >> 16, threshold);
        of_span[w] = static_cast<std::uint16_t>(of_span[w] | low << lane);
        of_span[w + 4] = static_cast<std::uint16_t>(of_span[w + 4] | high << lane);
        found |= any_equal(word, ties);
      }
    }
  }
  return found;
}

// Whether elements are kept, `spans` spans at a time: some are faster than one, one is better among
// other work, which the processor can then do at the same time.
template <int spans>
class MaskBits {
 public:
  static constexpr std::int64_t batch = spans * MaskLayout::span;

  explicit MaskBits(const MaskDraw& draw) : draw_(draw), keys_(draw.seed) {}

  // The bits of the batch that `element` is in.
  BNEXT_INLINE const std::uint8_t* of(std::int64_t element) {
    const std::int64_t number = element / batch;
    if (number != number_) make(number);
    return reinterpret_cast<const std::uint8_t*>(kept_);
  }

 private:
  __attribute__((noinline)) void make(std::int64_t number) {
    number_ = number;
    const auto high = static_cast<std::int32_t>(draw_.threshold >> 16);
    const bool found = span_bits<spans>(keys_, draw_.offset, number * spans, high, kept_) != 0;
    if (found && (draw_.threshold & 0xFFFFu) != 0) settle(number);
  }

  // Where the 16 bits equal the upper half of the threshold, the second draw decides.
  __attribute__((noinline)) void settle(std::int64_t number) {
    const auto high = static_cast<std::uint32_t>(draw_.threshold >> 16);
    const auto low = static_cast<std::uint32_t>(draw_.threshold & 0xFFFFu);
    const auto first = static_cast<std::uint64_t>(number * spans) * MaskLayout::lanes;
    for (int b = 0; b < spans * MaskLayout::lanes; ++b) {
      const PhiloxBlock block =
          mask_block(draw_.seed, draw_.offset, first + static_cast<unsigned>(b), false);
      for (int w = 0; w < 8; ++w) {
        const std::uint32_t bits = w < 4 ? block.word[w] & 0xFFFFu : block.word[w - 4] >> 16;
        if (bits != high) continue;
        const int word = b / MaskLayout::lanes * 8 + w, lane = b % MaskLayout::lanes;
        const std::int64_t element = number * batch + word * 16 + lane;
        if (mask_half(draw_.seed, draw_.offset, static_cast<std::uint64_t>(element), true) < low)
          kept_[word] = static_cast<std::uint16_t>(kept_[word] & ~(1u << lane));
      }
    }
  }

  MaskDraw draw_;
  PhiloxKeys keys_;
  std::int64_t number_ = -1;
  alignas(64) std::uint16_t kept_[batch / 16 + 2];  // Bits reads on
};

// The bits of elements that share them.
class SharedBits {
 public:
  using Mask = MaskBits<4>;

  explicit SharedBits(const MaskMap& map) : map_(map) {}

  // Those of `count` elements, up to a batch, from `first` on.
  const std::uint8_t* of(Mask& mask, std::int64_t first, std::int64_t count) {
    const std::int64_t period = map_.units * map_.run, size = map_.repeats * period;
    std::int64_t sample = first / size, left = size - first % size;
    std::int64_t unit = first % period / map_.run, in_run = first % map_.run;
    word_ = 0;
    filled_ = 0;
    next_ = words_;
    for (std::int64_t k = 0; k < count;) {
      const std::int64_t number = sample * map_.units + unit, place = number % Mask::batch;
      const Bits bits{mask.of(number), place};
      std::int64_t n = count - k;
      if (map_.run == 1) {
        n = least(n, least(map_.units - unit, Mask::batch - place));
        constexpr std::int64_t most = 24;  // bits that are there from any bit of a byte on
        for (std::int64_t i = 0; i < n; i += most) append(bits.at(i), least(n - i, most));
        unit += n;
      } else {
        n = least(n, map_.run - in_run);
        const std::uint32_t all = (bits.at(0) & 1) != 0 ? ~std::uint32_t{0} : 0;
        for (std::int64_t i = 0; i < n; i += 32) append(all, least(n - i, 32));
        in_run = (in_run + n) % map_.run;
        unit += in_run == 0;
      }
      if (unit == map_.units) unit = 0;
      k += n;
      left -= n;
      if (left > 0) continue;
      left = size;
      ++sample;
    }
    *next_ = static_cast<std::uint32_t>(word_);
    return reinterpret_cast<const std::uint8_t*>(words_);
  }

 private:
  static std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

  // The lowest n bits, up to 32.
  BNEXT_INLINE void append(std::uint32_t bits, std::int64_t n) {
    word_ |= (bits & ((std::uint64_t{1} << n) - 1)) << filled_;
    filled_ += n;
    if (filled_ < 32) return;
    *next_++ = static_cast<std::uint32_t>(word_);
    word_ >>= 32;
    filled_ -= 32;
  }

  MaskMap map_;
  std::uint64_t word_;
  std::int64_t filled_;
  std::uint32_t* next_;
  std::uint32_t words_[Mask::batch / 32 + 2];  // Bits reads on
};

template <class S>
void dropout(const DropoutArgs& a, std::int64_t first_span, std::int64_t last_span,
             bool streaming) {
  const auto* x = static_cast<const S*>(a.x);
  auto* y = static_cast<S*>(a.y);
  const auto scale = static_cast<Compute<S>>(a.draw.scale);
  const std::int64_t first = first_span * MaskLayout::span;
  const std::int64_t end =
      last_span * MaskLayout::span < a.size ? last_span * MaskLayout::span : a.size;
  const bool shifted = a.shift != 0 || a.dropped != 0;
  const auto shift = static_cast<Compute<S>>(a.shift);
  const Vector<S> dropped = static_cast<Compute<S>>(a.dropped) - Vector<S>{};
  SharedBits::Mask mask(a.draw);
  SharedBits shared(a.map);
  const S* from = x + first;
  // Elements are asked for in bursts, between which the processor alone would not fetch any.
  const Ahead<S> ahead{x + a.size, x};

  constexpr std::int64_t batch = SharedBits::Mask::batch;
  std::uint8_t kept[dropout_spans * MaskLayout::span / 8 + batch / 8 + 4];  // Bits reads on
  const Bits bits{kept, 0};
  std::int64_t drawn = 0;
  const auto draw = [&]() {
    const std::int64_t begin = first + drawn;
    const std::int64_t count = end - begin < batch ? end - begin : batch;
    __builtin_memcpy(kept + drawn / 8,
                     a.map.shares() ? shared.of(mask, begin, count) : mask.of(begin), batch / 8);
    drawn += batch;
  };
  const auto write_values = [&](auto value) __attribute__((always_inline)) {
    write<1, false>(
        y + first, 0, end - first, streaming, no_shared_line<S>, [](auto) { return 0; }, value,
        [&](std::int64_t e, std::int64_t n) {
          ahead.fetch(from + e, n);
          while (drawn < e + n) draw();
        });
  };
  // Not one loop for both: to add 0 is to change the sign of -0.
  if (shifted)
    write_values([&](int, auto at, int) __attribute__((always_inline)) {
      return select_lanes(bits.at(at.i), at(from) * scale + shift, dropped);
    });
  else
    write_values([&](int, auto at, int) __attribute__((always_inline)) {
      return select_lanes(bits.at(at.i), at(from) * scale, Vector<S>{});
    });
}

}  // namespace
}  // namespace bnext
