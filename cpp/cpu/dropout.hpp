// Dropout over a run of elements: serial, compiled once per instruction set.
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

// The keys of its rounds, as vectors in memory: as operands from there they cost nothing.
struct PhiloxKeys {
  static constexpr int rounds = 10;
  u64v first[rounds], second[rounds];

  explicit PhiloxKeys(std::uint64_t seed) {
    auto k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < rounds; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      first[round] = k0 - u64v{};
      second[round] = k1 - u64v{};
    }
  }
};

// Replaces the low halves of counters in word[0] by random words; the second words of the counters
// are `high`. That half of the state is equal in all lanes for two rounds saves a tenth of the
// work.
template <int chains>
BNEXT_INLINE void philox_vectors(PhiloxVectors<chains>& state, const std::uint32_t (&high)[chains],
                                 std::uint64_t offset, const PhiloxKeys& keys) {
  const u64v zero{};
  u64v(&c)[4][chains] = state.word;
  for (int v = 0; v < chains; ++v) {
    c[1][v] = zero + high[v];
    c[2][v] = zero + (offset & 0xFFFFFFFFu);
    c[3][v] = zero + (offset >> 32);
  }
#pragma GCC unroll 10
  for (int round = 0; round < PhiloxKeys::rounds; ++round) {
#pragma GCC unroll 8
    for (int v = 0; v < chains; ++v) {
      const u64v p0 = multiply_low(c[0][v], 0xD2511F53u), p1 = multiply_low(c[2][v], 0xCD9E8D57u);
      c[0][v] = (p1 >> 32) ^ c[1][v] ^ keys.first[round];
      c[1][v] = p1;
      c[2][v] = (p0 >> 32) ^ c[3][v] ^ keys.second[round];
      c[3][v] = p0;
    }
  }
}

// Draws words of a mask, a bit for each element that is kept. See core/philox.hpp.
class MaskWords {
 public:
  // Words that one call draws at most.
  static constexpr int most = 64;

  explicit MaskWords(const MaskDraw& draw)
      : keys_(draw.seed),
        offset_(draw.offset),
        all_(draw.threshold >> 32 != 0),
        threshold_(static_cast<std::uint32_t>(draw.threshold)) {}

  // Words [first, first + count), and up to spare_mask_words after them.
  __attribute__((noinline)) void draw(std::uint64_t first, std::int64_t count, std::uint8_t* to) {
    // The upper half of all counters is one.
    const std::uint64_t left = (std::uint64_t{1} << 32) - (first & 0xFFFFFFFFu);
    if (static_cast<std::uint64_t>(count) > left) {
      draw(first, static_cast<std::int64_t>(left), to);
      draw(first + left, count - static_cast<std::int64_t>(left), to + left * mask_word_bytes);
      return;
    }
    const int vectors = static_cast<int>((count + wide - 1) / wide);
    if (all_)
      __builtin_memset(to, 0, static_cast<std::size_t>(vectors * wide * mask_word_bytes));
    else if (threshold_ << mask_draw_bits == 0)
      decide_vectors<1>(first, vectors, to);
    else
      decide_vectors<2>(first, vectors, to);
    if (threshold_ << 2 * mask_draw_bits != 0) settle(first, vectors * wide, to);
  }

 private:
  static constexpr int wide = vector_bytes / 8;  // words of one vector, in lanes of 64 bits
  static_assert(wide <= spare_mask_words + 1 && most % wide == 0);

  // By the first `draws` draws; what they leave undecided is kept.
  template <int draws>
  BNEXT_INLINE void decide_vectors(std::uint64_t first, int vectors, std::uint8_t* to) {
    int v = 0;
#pragma GCC unroll 1
    for (; v + 2 <= vectors; v += 2) decide_some<draws, 2>(first, v * wide, to);
    if (v < vectors) decide_some<draws, 1>(first, v * wide, to);
  }
  // Words from `first` + w on, of `vectors` vectors.
  template <int draws, int vectors>
  BNEXT_INLINE void decide_some(std::uint64_t first, int w, std::uint8_t* to) {
    // Else compilers fetch all keys before they know how many draws there are, and put them aside.
    const PhiloxKeys* keys = &keys_;
    __asm__("" : "+r"(keys));
    u64v lane;
    for (int l = 0; l < wide; ++l) lane[l] = static_cast<std::uint64_t>(l);
    PhiloxVectors<vectors * draws> random;
    std::uint32_t high[vectors * draws];
    for (int c = 0; c < vectors * draws; ++c) {
      random.word[0][c] = lane + (first + static_cast<std::uint64_t>(w + c / draws * wide));
      high[c] = mask_counter_high(first, c % draws);
    }
    philox_vectors(random, high, offset_, *keys);
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      u64v kept{}, undecided = ~kept;
#pragma GCC unroll 2
      for (int d = 0; d < draws; ++d) {
        u64v bits[mask_draw_bits];
        for (int k = 0; k < mask_draw_bits; ++k) bits[k] = random.word[k][v * draws + d];
        decide(kept, undecided, bits, threshold_ << d * mask_draw_bits);
      }
      store_vector(__builtin_convertvector(kept | undecided, half_u32v),
                   to + (w + v * wide) * mask_word_bytes);
      store_vector(undecided, undecided_ + w + v * wide);
    }
  }

  // What two draws leave undecided: in one word of nine.
  __attribute__((noinline)) void settle(std::uint64_t first, int words, std::uint8_t* to) {
    int list[most], count = 0;
    for (int w = 0; w < words; ++w) {
      list[count] = w;
      count += static_cast<std::uint32_t>(undecided_[w]) != 0;
    }
    for (int start = 0; start < count; start += wide) {
      u64v counter, kept{}, undecided;
      for (int l = 0; l < wide; ++l) {
        const int w = list[start + l < count ? start + l : start];
        counter[l] = first + static_cast<std::uint64_t>(w);
        undecided[l] = static_cast<std::uint32_t>(undecided_[w]);
      }
      auto rest = threshold_ << 2 * mask_draw_bits;
      for (int draw = 2; rest != 0 && mask_of_lanes(undecided != 0) != 0; ++draw) {
        PhiloxVectors<1> random;
        random.word[0][0] = counter;
        philox_vectors(random, {mask_counter_high(first, draw)}, offset_, keys_);
        u64v bits[mask_draw_bits];
        for (int k = 0; k < mask_draw_bits; ++k) bits[k] = random.word[k][0];
        decide(kept, undecided, bits, rest);
        rest <<= mask_draw_bits;
      }
      kept |= undecided;
      for (int l = 0; l < wide && start + l < count; ++l) {
        std::uint8_t* place = to + list[start + l] * mask_word_bytes;
        std::uint32_t word;
        __builtin_memcpy(&word, place, sizeof word);
        word &= static_cast<std::uint32_t>(~undecided_[list[start + l]] | kept[l]);
        __builtin_memcpy(place, &word, sizeof word);
      }
    }
  }

  PhiloxKeys keys_;
  std::uint64_t offset_;
  bool all_;  // are dropped
  std::uint32_t threshold_;
  alignas(64) std::uint64_t undecided_[most];  // in the low halves
};

// The bits of elements that share them.
class SharedBits {
 public:
  // Elements that are asked for at once, and bits that are drawn.
  static constexpr std::int64_t batch = MaskWords::most * mask_word_size;

  explicit SharedBits(const MaskMap& map) : map_(map) {}

  // Those of `count` elements, up to a batch, from `first` on.
  const std::uint8_t* of(MaskWords& mask, std::int64_t first, std::int64_t count) {
    const std::int64_t period = map_.units * map_.run, size = map_.repeats * period;
    std::int64_t sample = first / size, left = size - first % size;
    std::int64_t unit = first % period / map_.run, in_run = first % map_.run;
    word_ = 0;
    filled_ = 0;
    next_ = words_;
    for (std::int64_t k = 0; k < count;) {
      const std::int64_t number = sample * map_.units + unit, place = number % batch;
      if (number / batch != drawn_) {
        drawn_ = number / batch;
        mask.draw(static_cast<std::uint64_t>(drawn_) * MaskWords::most, MaskWords::most, kept_);
      }
      const Bits bits{kept_, place};
      std::int64_t n = count - k;
      if (map_.run == 1) {
        n = least(n, least(map_.units - unit, batch - place));
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
  std::uint32_t words_[MaskWords::most + 2];  // Bits reads on
  std::int64_t drawn_ = -1;                   // the batch of those in kept_
  std::uint8_t kept_[batch / 8 + 4];          // Bits reads on
};

template <class S>
void dropout(const DropoutArgs& a, std::int64_t first, std::int64_t end, bool streaming) {
  const auto* x = static_cast<const S*>(a.x);
  auto* y = static_cast<S*>(a.y);
  const auto scale = static_cast<Compute<S>>(a.draw.scale);
  const bool shifted = a.shift != 0 || a.dropped != 0;
  const auto shift = static_cast<Compute<S>>(a.shift);
  const Vector<S> dropped = static_cast<Compute<S>>(a.dropped) - Vector<S>{};
  MaskWords mask(a.draw);
  SharedBits shared(a.map);
  const S* from = x + first;
  // Elements are asked for in bursts, between which the processor alone would not fetch any.
  const Ahead ahead{a.size - first, -a.size, prefetch_distance<S>};

  constexpr std::int64_t batch = SharedBits::batch;
  std::uint8_t kept[dropout_run / 8 + 4];  // Bits reads on
  static_assert(dropout_run % batch == 0);
  Bits bits{kept, 0};
  std::int64_t drawn = 0;
  const auto draw = [&]() {
    const std::int64_t begin = first + drawn, count = end - begin < batch ? end - begin : batch;
    std::uint8_t* to = kept + drawn / 8;
    if (a.map.shares())
      __builtin_memcpy(to, shared.of(mask, begin, count), batch / 8);
    else
      mask.draw(static_cast<std::uint64_t>(begin / mask_word_size),
                (count + mask_word_size - 1) / mask_word_size, to);
    drawn += batch;
  };
  const auto write_values = [&](auto value) __attribute__((always_inline)) {
    write<false, false, true>(y + first, end - first, end - first, streaming,
                              one_channel([](auto) { return 0; }), value,
                              [&](std::int64_t e, std::int64_t n) __attribute__((always_inline)) {
                                ahead.fetch(from, e, n);
                                bits.vectors_from(e);
                                while (drawn < e + n) draw();
                              });
  };
  // Not one loop for both: to add 0 is to change the sign of -0.
  if (shifted)
    write_values([&](int, auto at) __attribute__((always_inline)) {
      return at.select(bits, at(from) * scale + shift, dropped);
    });
  else
    write_values([&](int, auto at) __attribute__((always_inline)) {
      return at.select(bits, at(from) * scale, Vector<S>{});
    });
}

}  // namespace
}  // namespace bnext
