// Dropout over a run of spans: serial, compiled once per instruction set.
#pragma once

#include "core/args.hpp"
#include "core/philox.hpp"
#include "cpu/simd.hpp"

namespace bnext {
namespace {

// Vectors of blocks that are computed side by side: one round has to wait for the one before, so
// there must be others to do, even more than there are registers for.
constexpr int chains = 8;

// Words of Philox4x32-10 in the low halves of 64-bit lanes; what the high halves hold never reaches
// them, so nothing clears it.
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
BNEXT_INLINE void philox_vectors(PhiloxVectors& state, std::uint64_t high, std::uint64_t offset,
                                 const PhiloxKeys& keys) {
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

// Spans whose bits are made at once.
constexpr std::int64_t spans_at_once = vector_bytes == 64 ? 4 : 2;

// The 16 bits of each of the 128 elements of each span; see MaskLayout. Whether any are `tie`.
BNEXT_INLINE bool span_bits(const PhiloxKeys& keys, std::uint64_t offset, std::int64_t span,
                            std::uint16_t tie, std::int32_t* bits) {
  constexpr int wide = vector_bytes / 8, half = MaskLayout::span / 2;
  constexpr int blocks = static_cast<int>(spans_at_once) * MaskLayout::lanes;
  const std::uint64_t first = static_cast<std::uint64_t>(span) * MaskLayout::lanes;
  u64v twice;
  for (int l = 0; l < wide; ++l) twice[l] = static_cast<std::uint64_t>(2 * l);
  const u16v ties = tie - u16v{};
  u16v found{};
  for (int start = 0; start < blocks; start += chains * wide) {
    PhiloxVectors random;
    // Blocks with even and with odd numbers: put together, 32-bit lanes are in order.
    for (int v = 0; v < chains; ++v)
      random.word[0][v] =
          twice + (first + static_cast<std::uint64_t>(start + v / 2 * 2 * wide + v % 2));
    philox_vectors(random, first >> 32, offset, keys);
#pragma GCC unroll 4
    for (int pair = 0; pair < chains; pair += 2) {
      const int block = start + pair * wide;
      std::int32_t* const to =
          bits + block / MaskLayout::lanes * MaskLayout::span + block % MaskLayout::lanes;
#pragma GCC unroll 8
      for (int w = 0; w < 4; ++w) {
        const u32v word = interleave_low(random.word[w][pair], random.word[w][pair + 1]);
        const u32v low = word & 0xFFFFu, high = word >> 16;
        __builtin_memcpy(to + w * MaskLayout::lanes, &low, sizeof low);
        __builtin_memcpy(to + w * MaskLayout::lanes + half, &high, sizeof high);
        found |= (u16v)((u16v)word == ties);
      }
    }
  }
  const u64v any = (u64v)found;
  std::uint64_t all = 0;
  for (int l = 0; l < wide; ++l) all |= any[l];
  return all != 0;
}

// Whether elements are dropped, some spans at a time.
class MaskBits {
 public:
  static constexpr std::int64_t batch = spans_at_once * MaskLayout::span;

  explicit MaskBits(const MaskDraw& draw)
      : high(static_cast<std::int32_t>(draw.threshold >> 16)), draw_(draw), keys_(draw.seed) {}

  // An element is dropped where its 16 bits are below this, up to 2^16.
  const std::int32_t high;

  // v where the bits say that an element is kept, 0 where it is dropped.
  template <class T>
  BNEXT_INLINE typename Native<T>::type keep(typename Native<T>::type v,
                                             const std::int32_t* bits) const {
    return load_integers<T>(bits) < high ? decltype(v){} : v;
  }
  template <class T>
  BNEXT_INLINE typename Native<T>::type keep_or(typename Native<T>::type v,
                                                typename Native<T>::type dropped,
                                                const std::int32_t* bits) const {
    return load_integers<T>(bits) < high ? dropped : v;
  }

  // The bits of the batch that `element` is in.
  BNEXT_INLINE const std::int32_t* of(std::int64_t element) {
    const std::int64_t number = element / batch;
    if (number != number_) make(number);
    return bits_;
  }

 private:
  BNEXT_INLINE void make(std::int64_t number) {
    number_ = number;
    if (!span_bits(keys_, draw_.offset, number * spans_at_once, static_cast<std::uint16_t>(high),
                   bits_))
      return;
    // Where the 16 bits equal the upper half of the threshold, the second draw decides.
    const auto low = static_cast<std::uint32_t>(draw_.threshold & 0xFFFFu);
    if (low == 0) return;
    for (std::int64_t e = 0; e < batch; ++e)
      if (bits_[e] == high && mask_half(draw_.seed, draw_.offset,
                                        static_cast<std::uint64_t>(number * batch + e), true) < low)
        bits_[e] = high - 1;
  }

  MaskDraw draw_;
  PhiloxKeys keys_;
  std::int64_t number_ = -1;
  alignas(64) std::int32_t bits_[batch + lanes];  // room for a whole vector at the end
};

// The bits of elements that share them.
class SharedBits {
 public:
  explicit SharedBits(const MaskMap& map) : map_(map) {}

  // Those of `count` elements, up to a batch, from `first` on.
  const std::int32_t* of(MaskBits& mask, std::int64_t first, std::int64_t count) {
    const std::int64_t size = map_.repeats * map_.units * map_.run;
    std::int64_t sample = first / size, begin = first % size;
    for (std::int64_t k = 0; k < count; ++sample, begin = 0) {
      const std::int64_t n = count - k < size - begin ? count - k : size - begin;
      fill(mask, sample, begin, n, bits_ + k);
      k += n;
    }
    return bits_;
  }

 private:
  // Elements [begin, begin + count) of a sample.
  void fill(MaskBits& mask, std::int64_t sample, std::int64_t begin, std::int64_t count,
            std::int32_t* to) const {
    const std::int64_t period = map_.units * map_.run;
    const std::int64_t once = count < period ? count : period;
    std::int64_t unit = begin % period / map_.run, run = map_.run - begin % map_.run;
    for (std::int64_t k = 0; k < once;) {
      if (unit == map_.units) unit = 0;
      const std::int64_t number = sample * map_.units + unit;
      const std::int64_t place = number % MaskBits::batch;
      const std::int32_t* const bits = mask.of(number) + place;
      std::int64_t n = once - k;
      if (map_.run == 1) {
        if (n > map_.units - unit) n = map_.units - unit;
        if (n > MaskBits::batch - place) n = MaskBits::batch - place;
        __builtin_memcpy(to + k, bits, static_cast<std::size_t>(n) * sizeof *to);
        unit += n;
      } else {
        if (n > run) n = run;
        for (std::int64_t i = 0; i < n; ++i) to[k + i] = *bits;
        ++unit;
        run = map_.run;
      }
      k += n;
    }
    // What follows repeats it.
    for (std::int64_t k = once; k < count;) {
      const std::int64_t n = count - k < k ? count - k : k;
      __builtin_memcpy(to + k, to, static_cast<std::size_t>(n) * sizeof *to);
      k += n;
    }
  }

  MaskMap map_;
  alignas(64) std::int32_t bits_[MaskBits::batch + lanes];
};

template <class T>
void dropout(const DropoutArgs& a, std::int64_t first_span, std::int64_t last_span,
             bool streaming) {
  const auto* x = static_cast<const T*>(a.x);
  auto* y = static_cast<T*>(a.y);
  const auto scale = static_cast<T>(a.draw.scale);
  const std::int64_t end =
      last_span * MaskLayout::span < a.size ? last_span * MaskLayout::span : a.size;
  const auto shift = static_cast<T>(a.shift), dropped = static_cast<T>(a.dropped);
  MaskBits mask(a.draw);
  SharedBits shared(a.map);
  // Elements are asked for in bursts, between which the processor alone would not fetch any.
  const Ahead<T> ahead{x + a.size, x};

  for (std::int64_t begin = first_span * MaskLayout::span; begin < end; begin += MaskBits::batch) {
    const std::int64_t count = end - begin < MaskBits::batch ? end - begin : MaskBits::batch;
    const std::int32_t* const bits =
        a.map.shares() ? shared.of(mask, begin, count) : mask.of(begin);
    const T* from = x + begin;
    const auto write_values = [&](auto value) __attribute__((always_inline)) {
      write<1>(
          y + begin, 0, count, streaming, no_shared_line<T>, [](auto) { return 0; }, value,
          [&](std::int64_t e, std::int64_t n) { ahead.fetch(from + e, n); });
    };
    if (dropped != 0)
      write_values([&](int, auto at, int) __attribute__((always_inline)) {
        const auto v = at(from) * scale + shift;
        return mask.template keep_or<T>(v, dropped - decltype(v){}, bits + at.i);
      });
    else
      write_values([&](int, auto at, int) __attribute__((always_inline)) {
        return mask.template keep<T>(at(from) * scale, bits + at.i);
      });
  }
}

}  // namespace
}  // namespace bnext
