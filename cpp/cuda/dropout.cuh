// Dropout: masks of Philox bits, which are those of the CPU.
#pragma once

#include "core/args.hpp"
#include "core/philox.hpp"
#include "cuda/device.cuh"

namespace bnext {
namespace cuda {

// Elements of which a warp drops some at once: each of its threads draws a word of their mask.
constexpr int mask_tile = warp_threads * mask_word_size;

__device__ inline std::uint64_t seed_of(const MaskDraw& draw) {
  return draw.seed_at != nullptr ? *draw.seed_at : draw.seed;
}

// Bits of all elements, for passes that cannot draw them.
__global__ void __launch_bounds__(block_threads)
    draw_mask(MaskDraw draw, std::int64_t count, std::uint32_t* words) {
  const std::uint64_t seed = seed_of(draw);
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t w = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; w < count;
       w += threads)
    words[w] = mask_word(seed, draw.offset, draw.threshold, static_cast<std::uint64_t>(w));
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
  constexpr int width = width_of<S>, steps = mask_word_size / width;
  constexpr int together = 4;  // accesses that are under way
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
  for (std::int64_t tile = blockIdx.x * warps + threadIdx.x / warp_threads; tile < tiles;
       tile += gridDim.x * warps) {
    std::uint32_t word = 0;
#pragma unroll 1
    for (int begin = 0; begin < steps; begin += together) {
      Stored<S> stored[together];
#pragma unroll
      for (int q = 0; q < together; ++q) {
        const Slot slot = slot_of(tile, begin + q);
        if (slot.end > 0) stored[q] = load(x, slot, a.size, wide);
      }
      if (begin == 0 && words == nullptr)
        word = mask_word(seed, a.draw.offset, a.draw.threshold,
                         static_cast<std::uint64_t>(tile * warp_threads + lane));
#pragma unroll
      for (int q = 0; q < together; ++q) {
        const Slot slot = slot_of(tile, begin + q);
        const int e = ((begin + q) * warp_threads + lane) * width;  // of the tile
        unsigned kept = __shfl_sync(full_warp, word, e / mask_word_size) >> e % mask_word_size;
        if (slot.end == 0) continue;
        if (words != nullptr) {
          kept = 0;
#pragma unroll 1
          for (int k = 0; k < slot.end; ++k) {
            const std::int64_t bit = bit_of(a.map, slot.first + k);
            kept |= (words[bit / 32] >> bit % 32 & 1u) << k;
          }
        }
        T values[width];
#pragma unroll
        for (int k = 0; k < width; ++k) {
          const T scaled = stored[q][k] * scale;
          values[k] = kept >> k & 1u ? (shifted ? scaled + shift : scaled) : dropped;
        }
        store(y, slot, values, wide);
      }
    }
  }
}

}  // namespace cuda
}  // namespace bnext
