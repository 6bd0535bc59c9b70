// Dropout: masks of Philox bits, which are those of the CPU.
#pragma once

#include "core/args.hpp"
#include "core/philox.hpp"
#include "cuda/device.cuh"

namespace bnext {
namespace cuda {

// Elements whose mask one warp draws at once: two spans, for each of whose 32 blocks of random
// numbers there is a thread.
constexpr int mask_tile = 2 * MaskLayout::span;
constexpr int mask_words = mask_tile / 32;

__device__ inline std::uint64_t seed_of(const MaskDraw& draw) {
  return draw.seed_at != nullptr ? *draw.seed_at : draw.seed;
}

// Whether elements of a tile are kept: thread w, modulo the number of words, gets those of elements
// 32 w to 32 w + 31, one bit each. All threads of the warp take part.
__device__ inline unsigned mask_word(const MaskDraw& draw, std::uint64_t seed, std::int64_t tile) {
  const auto lane = static_cast<int>(threadIdx.x % warp_threads);
  const auto upper = static_cast<std::uint32_t>(draw.threshold >> 16);
  const auto lower = static_cast<std::uint32_t>(draw.threshold & 0xFFFFu);
  const std::uint64_t number = static_cast<std::uint64_t>(tile) * warp_threads + lane;
  const PhiloxBlock block = mask_block(seed, draw.offset, number, false);
  unsigned word = 0;
#pragma unroll
  for (int w = 0; w < 8; ++w) {
    const std::uint32_t bits = w < 4 ? block.word[w] & 0xFFFFu : block.word[w - 4] >> 16;
    bool kept = bits > upper || (bits == upper && lower == 0);
    if (bits == upper && lower != 0) {
      const std::uint64_t element = static_cast<std::uint64_t>(tile) * mask_tile +
                                    lane / MaskLayout::lanes * MaskLayout::span +
                                    w * MaskLayout::lanes + lane % MaskLayout::lanes;
      kept = mask_half(seed, draw.offset, element, true) >= lower;
    }
    // Elements 16 w to 16 w + 15 of the first span, and of the second.
    const unsigned both = __ballot_sync(full_warp, kept);
    const unsigned mine = lane % mask_words < mask_words / 2 ? both & 0xFFFFu : both >> 16;
    if (lane % (mask_words / 2) == w / 2) word |= mine << (w % 2 * 16);
  }
  return word;
}

// Bits of all elements, for passes that cannot draw them.
__global__ void __launch_bounds__(block_threads)
    draw_mask(MaskDraw draw, std::int64_t size, std::uint32_t* words) {
  const std::uint64_t seed = seed_of(draw);
  const std::int64_t tiles = (size + mask_tile - 1) / mask_tile;
  const auto lane = static_cast<int>(threadIdx.x % warp_threads);
  const std::int64_t warps = blockDim.x / warp_threads;
  for (std::int64_t tile = blockIdx.x * warps + threadIdx.x / warp_threads; tile < tiles;
       tile += gridDim.x * warps) {
    const unsigned word = mask_word(draw, seed, tile);
    if (lane < mask_words) words[tile * mask_words + lane] = word;
  }
}

// The number of the bit that an element shares with others.
__device__ inline std::int64_t bit_of(const MaskMap& map, std::int64_t element) {
  const std::int64_t period = map.units * map.run;
  return element / (map.repeats * period) * map.units + element % period / map.run;
}

// With `words`, the bits are there; else each element has one of its own, drawn here.
template <class S>
__global__ void __launch_bounds__(block_threads)
    dropout(DropoutArgs a, const std::uint32_t* words, bool wide) {
  using T = Compute<S>;
  constexpr int width = width_of<S>, steps = mask_tile / warp_threads / width;
  constexpr int together = steps >= 4 ? 1 : 4 / steps;  // tiles: four accesses are under way
  const auto* x = static_cast<const S*>(a.x);
  auto* y = static_cast<S*>(a.y);
  const T scale = static_cast<T>(a.draw.scale), shift = static_cast<T>(a.shift);
  const T dropped = static_cast<T>(a.dropped);
  const bool shifted = a.shift != 0 || a.dropped != 0;  // to add 0 is to change the sign of -0
  const std::uint64_t seed = words != nullptr ? 0 : seed_of(a.draw);
  const std::int64_t tiles = (a.size + mask_tile - 1) / mask_tile;
  const auto lane = static_cast<int>(threadIdx.x % warp_threads);
  const std::int64_t warps = blockDim.x / warp_threads;

  const auto slot_of = [&](std::int64_t tile, int step) {
    const std::int64_t first = tile * mask_tile + (step * warp_threads + lane) * width;
    const std::int64_t left = a.size - first;
    return Slot{first, 0, left >= width ? width : left > 0 ? static_cast<int>(left) : 0};
  };
  for (std::int64_t tile = (blockIdx.x * warps + threadIdx.x / warp_threads) * together;
       tile < tiles; tile += gridDim.x * warps * together) {
    Stored<S> stored[together][steps];
#pragma unroll
    for (int t = 0; t < together; ++t)
#pragma unroll
      for (int q = 0; q < steps; ++q) {
        const Slot slot = slot_of(tile + t, q);
        if (slot.end > 0) stored[t][q] = load(x, slot, a.size, wide);
      }
#pragma unroll
    for (int t = 0; t < together; ++t) {
      const unsigned word = words != nullptr ? 0 : mask_word(a.draw, seed, tile + t);
#pragma unroll
      for (int q = 0; q < steps; ++q) {
        const Slot slot = slot_of(tile + t, q);
        const int in_tile = (q * warp_threads + lane) * width;
        unsigned kept = __shfl_sync(full_warp, word, in_tile / 32) >> in_tile % 32;
        if (slot.end == 0) continue;
        if (words != nullptr) {
          kept = 0;
          for (int e = 0; e < slot.end; ++e) {
            const std::int64_t bit = bit_of(a.map, slot.first + e);
            kept |= (words[bit / 32] >> bit % 32 & 1u) << e;
          }
        }
        T values[width];
#pragma unroll
        for (int e = 0; e < width; ++e) {
          const T scaled = stored[t][q][e] * scale;
          values[e] = kept >> e & 1u ? (shifted ? scaled + shift : scaled) : dropped;
        }
        store(y, slot, values, wide);
      }
    }
  }
}

}  // namespace cuda
}  // namespace bnext
