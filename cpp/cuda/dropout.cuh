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

// Which elements of a tile are kept: bits 0 to 15 of word w are elements 16 w to 16 w + 15 of the
// first span, the others those of the second.
struct MaskTile {
  unsigned word[MaskLayout::span / MaskLayout::lanes];

  // Of a word that is the thread's own choice.
  __device__ unsigned operator[](int w) const {
    const unsigned a = w & 1 ? word[1] : word[0], b = w & 1 ? word[3] : word[2];
    const unsigned c = w & 1 ? word[5] : word[4], d = w & 1 ? word[7] : word[6];
    const unsigned ab = w & 2 ? b : a, cd = w & 2 ? d : c;
    return w & 4 ? cd : ab;
  }
  // Element `e` of the tile, and in higher bits those after it, up to a multiple of 16.
  __device__ unsigned from(int e) const {
    return (*this)[e % MaskLayout::span / MaskLayout::lanes] >>
           (e / MaskLayout::span * MaskLayout::lanes + e % MaskLayout::lanes);
  }
};

// All threads of the warp take part, and get all of it.
__device__ inline MaskTile mask_of_tile(const MaskDraw& draw, std::uint64_t seed,
                                        std::int64_t tile) {
  const auto lane = static_cast<int>(threadIdx.x % warp_threads);
  const auto upper = static_cast<std::uint32_t>(draw.threshold >> 16);
  const auto lower = static_cast<std::uint32_t>(draw.threshold & 0xFFFFu);
  const std::uint64_t number = static_cast<std::uint64_t>(tile) * warp_threads + lane;
  const PhiloxBlock block = mask_block(seed, draw.offset, number, false);
  const std::uint32_t least = lower == 0 ? upper : upper + 1;
  MaskTile kept;
  unsigned tied = 0;  // a bit for each w
#pragma unroll
  for (int w = 0; w < 8; ++w) {
    const std::uint32_t bits = w < 4 ? block.word[w] & 0xFFFFu : block.word[w - 4] >> 16;
    kept.word[w] = __ballot_sync(full_warp, bits >= least);
    tied |= bits == upper ? 1u << w : 0u;
  }
  if (lower == 0 || __ballot_sync(full_warp, tied != 0) == 0) return kept;
#pragma unroll 1
  for (int w = 0; w < 8; ++w) {
    bool also = false;
    if (tied >> w & 1u) {
      const std::uint64_t element = static_cast<std::uint64_t>(tile) * mask_tile +
                                    lane / MaskLayout::lanes * MaskLayout::span +
                                    w * MaskLayout::lanes + lane % MaskLayout::lanes;
      also = mask_half(seed, draw.offset, element, true) >= lower;
    }
    const unsigned all = __ballot_sync(full_warp, also);
#pragma unroll
    for (int k = 0; k < 8; ++k) kept.word[k] |= k == w ? all : 0u;
  }
  return kept;
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
    const MaskTile kept = mask_of_tile(draw, seed, tile);
    const int first = lane % mask_words * 32;
    const unsigned low = kept.from(first) & 0xFFFFu, high = kept.from(first + 16) << 16;
    if (lane < mask_words) words[tile * mask_words + lane] = low | high;
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
      MaskTile tile_kept{};
      if (words == nullptr) tile_kept = mask_of_tile(a.draw, seed, tile + t);
#pragma unroll
      for (int q = 0; q < steps; ++q) {
        const Slot slot = slot_of(tile + t, q);
        unsigned kept = tile_kept.from((q * warp_threads + lane) * width);
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
