// Batch Normalization over one tile of a Grid: serial loops, written once, compiled once per
// instruction set. No std templates here: their inline code would be offered to the linker for
// processors that cannot run it.
#pragma once

#include "cpu/fusion.hpp"
#include "cpu/launch.hpp"
#include "cpu/simd.hpp"

namespace bnext {
namespace {

// In place of an epilogue: whatever the fusion says, in stretches, where the others stay in
// registers.
struct staged {
  static constexpr bool linear = true;  // what the loops read has been through it
};
template <class Epilogue>
constexpr bool is_staged = false;
template <>
constexpr bool is_staged<staged> = true;

// -- sums -----------------------------------------------------------------------------------------

// Sums of x - center and of its square.
struct ShiftedSums {
  double total, squares;
};

// float32 needs no center as a rule: products of two floats are exact in float64, and what cancels
// in sum x^2 - (sum x)^2 / n is at most 30 of its 53 bits. Where more would, the sums are made
// again around the mean. float64 has no such reserve and is always centered.
template <class T>
constexpr bool exact_products = sizeof(T) == 4;

// The center that sums of `count` values around zero ask for; 0 if they are good enough.
template <class T>
double wanted_center(const ShiftedSums& s, double count) {
  const bool good = s.squares - s.total * (s.total / count) > 1e-9 * s.squares;
  return good ? 0 : static_cast<double>(static_cast<T>(s.total / count));
}

// Accumulates packs of one channel.
template <class T, bool centered>
struct MomentSums {
  Pack<double> center, total, even, odd;

  MomentSums() = default;  // leaves everything undefined
  explicit BNEXT_INLINE MomentSums(double center_)
      : center(broadcast(center_)), total{}, even{}, odd{} {}

  // `count` packs at p.
  BNEXT_INLINE void add(const T* p, std::int64_t count) {
    std::int64_t k = 0;
    for (; k + 2 <= count; k += 2, p += 2 * lanes) {
      const Pack<double> a = shifted(load_wide(p)), b = shifted(load_wide(p + lanes));
      total = total + (a + b);
      even = square_add(a, even);
      odd = square_add(b, odd);
    }
    if (k < count) add(load_wide(p));
  }
  BNEXT_INLINE void add(Pack<double> x) {
    const Pack<double> a = shifted(x);
    total = total + a;
    even = square_add(a, even);
  }
  // Rows of the same columns: one sum of squares, not two.
  BNEXT_INLINE void add(Pack<double> x, Pack<double> y) {
    const Pack<double> a = shifted(x), b = shifted(y);
    total = total + (a + b);
    even = square_add(b, square_add(a, even));
  }
  BNEXT_INLINE ShiftedSums sums() const { return {sum(total), sum(even + odd)}; }

 private:
  BNEXT_INLINE Pack<double> shifted(Pack<double> x) const {
    if constexpr (centered) return x - center;
    return x;
  }
  static BNEXT_INLINE Pack<double> square_add(Pack<double> a, Pack<double> sum) {
    if constexpr (centered) return a * a + sum;
    return multiply_add(a, a, sum);
  }
};

// Accumulates gradients g and g x, or g (x - mean) where products are not exact.
template <class T>
struct GradientSums {
  Pack<double> mean, total, even, odd;

  GradientSums() = default;  // leaves everything undefined
  explicit BNEXT_INLINE GradientSums(double mean_)
      : mean(broadcast(mean_)), total{}, even{}, odd{} {}

  // Packs [k, end) of values x and of gradients, which gradients(k) reads.
  template <class Gradients>
  BNEXT_INLINE void add(const T* x, std::int64_t k, std::int64_t end, Gradients gradients) {
    for (; k + 2 <= end; k += 2) {
      const Pack<double> a = gradients(k), b = gradients(k + 1);
      total = total + (a + b);
      even = product_add(a, load_wide(x + k * lanes), even);
      odd = product_add(b, load_wide(x + (k + 1) * lanes), odd);
    }
    if (k < end) add(gradients(k), load_wide(x + k * lanes));
  }
  BNEXT_INLINE void add(Pack<double> g, Pack<double> x) {
    total = total + g;
    even = product_add(g, x, even);
  }
  // For a channel whose mean is `mean`.
  BNEXT_INLINE GradSums sums(double of_mean) const {
    return centered_sums(sum(total), sum(even + odd), of_mean);
  }
  static BNEXT_INLINE GradSums centered_sums(double g, double gx, double of_mean) {
    return {g, exact_products<T> ? gx - of_mean * g : gx};
  }
  BNEXT_INLINE Pack<double> product_add(Pack<double> g, Pack<double> x, Pack<double> sum) const {
    if constexpr (exact_products<T>) return multiply_add(g, x, sum);
    return g * (x - mean) + sum;
  }
};

// The gradients at the normalised values, as doubles, for gradients g at the results and values x.
template <class Epilogue, class T>
BNEXT_INLINE Pack<double> through_epilogue(Pack<T> g, Pack<T> x, const Affine<Pack<T>>& f,
                                           T slope) {
  if constexpr (Epilogue::linear) {
    return widen(g);
  } else {
    using V = typename Native<T>::type;
    return widen(each_vector(
        [slope](V g_, V x_, V mean, V scale, V shift) __attribute__((always_inline)) {
          return Epilogue::gradient(g_, apply(Affine<V>{mean, scale, shift}, x_), slope);
        },
        g, x, f.mean, f.scale, f.shift));
  }
}

// -- rows: some channels, in runs of contiguous values --------------------------------------------

// The runs of a tile: in each of `blocks` samples, `length` values of each of `channels` channels.
struct Runs {
  std::int64_t first_channel, channels, length, blocks;

  Runs(const Grid& grid, std::int64_t group, std::int64_t chunk)
      : first_channel(grid.first_channel(group)),
        channels(grid.last_channel(group) - first_channel),
        length(grid.last_value(chunk) - grid.first_value(chunk)),
        blocks(grid.last_row(chunk) - grid.first_row(chunk)),
        between_channels(grid.problem.s),
        between_samples(grid.problem.c * grid.problem.s),
        start(grid.first_row(chunk) * between_samples + first_channel * between_channels +
              grid.first_value(chunk)) {}

  std::int64_t offset(std::int64_t block, std::int64_t channel) const {
    return start + block * between_samples + channel * between_channels;
  }
  std::int64_t values() const { return blocks * length; }  // of each channel
  // Calls body(first, last, channel) for the runs of a channel in some samples, and for all
  // channels before it goes on to the next samples: few streams of memory, and few times that the
  // sums of a channel are taken up and put down.
  template <class Body>
  BNEXT_INLINE void each_some(std::int64_t some, Body body) const {
    for (std::int64_t b = 0; b < blocks; b += some)
      for (std::int64_t c = 0; c < channels; ++c) body(b, b + some < blocks ? b + some : blocks, c);
  }
  // Whether the line in which the run of a channel ends goes on in that of the next channel.
  template <class T>
  bool lines_continue(std::int64_t channel) const {
    return channel + 1 < channels && length == between_channels && length >= line_length<T>;
  }
  // What the end of a block is followed by, going forwards.
  template <class T>
  Ahead<T> ahead(const Grid& grid, const T* x, std::int64_t block) const {
    if (!grid.fetch_ahead) return {nullptr, nullptr};
    const T* end = x + offset(block, channels - 1) + length;
    return {end, block + 1 < blocks ? x + offset(block + 1, 0) : end};
  }
  // The same going backwards, for an array that may be none.
  template <class T>
  Ahead<T> ahead_backwards(const T* x, std::int64_t block) const {
    if (x == nullptr) return {nullptr, nullptr};
    const T* end = x + offset(block, channels - 1) + length;
    return {end, block > 0 ? x + offset(block - 1, 0) : end};
  }

 private:
  std::int64_t between_channels, between_samples, start;
};

// The tile that the second pass over this one fetches on the way, so that memory does not only take
// results: in the next group, and in the mirrored place, since the first pass over it goes forwards
// and the second pass over this one backwards.
class NextTile {
 public:
  NextTile(const Grid& grid, std::int64_t group, std::int64_t chunk)
      : exists_(grid.fetch_next && group + 1 < grid.groups),
        runs_(grid, exists_ ? group + 1 : group, grid.chunks - 1 - chunk) {}

  // What lies there in the place of the run of `channel` in `block`.
  template <class T>
  BNEXT_INLINE Next<T> next(const T* x, std::int64_t block, std::int64_t channel) const {
    const std::int64_t mirrored = runs_.blocks - 1 - block;
    if (!exists_ || mirrored < 0 || channel >= runs_.channels) return {nullptr};
    return {x + runs_.offset(mirrored, channel)};
  }

 private:
  bool exists_;
  Runs runs_;
};

// Where nothing has fetched a run before the only or the second pass over it.
template <class T>
Ahead<T> within(const Grid& grid, const T* run, std::int64_t length) {
  if (!grid.fetch_ahead || grid.fetch_next) return {nullptr, nullptr};
  return {run + length, run + length};
}

// Values between two looks ahead.
constexpr std::int64_t stretch = 128;

template <class T, bool centered>
void shifted_sums_rows(const Grid& grid, const Runs& runs, const T* x, const double* center,
                       ShiftedSums* sums) {
  MomentSums<T, centered> channel_sums[Grid::max_group_channels];
  for (std::int64_t c = 0; c < runs.channels; ++c)
    channel_sums[c] = MomentSums<T, centered>(centered ? center[c] : 0);
  runs.each_some(grid.fetch_ahead ? 4 : 16,
                 [&](std::int64_t first, std::int64_t last, std::int64_t c) {
                   MomentSums<T, centered> s = channel_sums[c];
                   for (std::int64_t b = first; b < last; ++b) {
                     const T* run = x + runs.offset(b, c);
                     const Ahead<T> ahead = runs.ahead(grid, x, b);
                     std::int64_t i = 0;
                     for (; grid.fetch_ahead && i + stretch <= runs.length; i += stretch) {
                       ahead.fetch(run + i, stretch);
                       s.add(run + i, stretch / lanes);
                     }
                     const std::int64_t count = runs.length - i, rest = count % lanes;
                     ahead.fetch(run + i, count);
                     s.add(run + i, count / lanes);
                     if (rest > 0)
                       s.add(widen(load_first(run + runs.length - rest, rest,
                                              static_cast<T>(centered ? center[c] : 0))));
                   }
                   channel_sums[c] = s;
                 });
  for (std::int64_t c = 0; c < runs.channels; ++c) sums[c] = channel_sums[c].sums();
}

template <class T>
void moments_rows(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* x,
                  Moments* partials) {
  const Runs runs(grid, group, chunk);
  const auto count = static_cast<double>(runs.values());
  double center[Grid::max_group_channels];
  ShiftedSums sums[Grid::max_group_channels], centered[Grid::max_group_channels];
  bool again = !exact_products<T>;
  if constexpr (exact_products<T>) shifted_sums_rows<T, false>(grid, runs, x, center, sums);
  for (std::int64_t c = 0; c < runs.channels; ++c) {
    if constexpr (exact_products<T>)
      center[c] = wanted_center<T>(sums[c], count);
    else
      center[c] = static_cast<double>(x[runs.offset(0, c)]);
    again |= !(center[c] == 0);
  }
  if (again) shifted_sums_rows<T, true>(grid, runs, x, center, centered);
  for (std::int64_t c = 0; c < runs.channels; ++c) {
    // What one channel needs changes nothing in another.
    const ShiftedSums& s = exact_products<T> && center[c] == 0 ? sums[c] : centered[c];
    partials[chunk * grid.problem.c + runs.first_channel + c] =
        moments_from_shifted(count, center[c], s.total, s.squares);
  }
}

template <class T, class Epilogue>
void apply_rows(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* x,
                const Affine<T>* forward, const Fusion& fusion, T* y) {
  const Runs runs(grid, group, chunk);
  const NextTile next_tile(grid, group, chunk);
  const T slope = static_cast<T>(fusion.negative_slope);
  SharedLine<T> shared;
  for (std::int64_t b = runs.blocks; b-- > 0;)
    for (std::int64_t c = 0; c < runs.channels; ++c) {
      const Affine<T> f = forward[runs.first_channel + c];
      const std::int64_t offset = runs.offset(b, c);
      const Next<T> next = next_tile.next(x, b, c);
      const T* from = x + offset;
      const Ahead<T> ahead = within(grid, from, runs.length);
      shared.continues = runs.lines_continue<T>(c);
      write<1>(
          y + offset, 0, runs.length, grid.streaming, &shared, [&](auto) { return f; },
          [&](const auto& affine, auto at, int) __attribute__((always_inline)) {
            return Epilogue::value(apply(affine, at(from)), slope);
          },
          [&](std::int64_t i, std::int64_t count) {
            ahead.fetch(from + i, count);
            next.fetch(i, count);
          });
    }
}

template <class T>
void apply_rows_staged(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* x,
                       const Affine<T>* forward, const Fusion& fusion, T* y) {
  const Runs runs(grid, group, chunk);
  const NextTile next_tile(grid, group, chunk);
  Stage<T> stage(fusion);
  const auto* residual = static_cast<const T*>(fusion.residual);
  alignas(64) T z[stage_length];
  SharedLine<T> shared;
  for (std::int64_t b = runs.blocks; b-- > 0;)
    for (std::int64_t c = 0; c < runs.channels; ++c) {
      const Affine<T> f = forward[runs.first_channel + c];
      const Next<T> next = next_tile.next(x, b, c);
      const Ahead<T> ahead = within(grid, x + runs.offset(b, c), runs.length);
      // Nothing has read the residual before.
      const Ahead<T> ahead_residual = runs.ahead_backwards(residual, b);
      for (std::int64_t i = 0, count; i < runs.length; i += count) {
        const std::int64_t offset = runs.offset(b, c) + i;
        const T* from = x + offset;
        count = stage_count(y + offset, runs.length - i);
        ahead.fetch(from, count);
        if (residual != nullptr) ahead_residual.fetch(residual + offset, count);
        each_place<T>(0, count, [&](auto at) __attribute__((always_inline)) {
          at.write(apply(f, at(from)), z);
        });
        stage.forward(z, offset, count);
        shared.continues = i + count == runs.length && runs.lines_continue<T>(c);
        write_staged(z, y + offset, count, grid.streaming, &shared,
                     [&](std::int64_t k, std::int64_t n) { next.fetch(i + k, n); });
      }
    }
}

template <class T, class Epilogue>
void grad_sums_rows(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* grad_y,
                    const T* x, const double* mean, const Affine<T>* forward, const Fusion& fusion,
                    GradSums* partials) {
  const Runs runs(grid, group, chunk);
  const T slope = static_cast<T>(fusion.negative_slope);
  mean += runs.first_channel;
  forward += runs.first_channel;
  GradientSums<T> channel_sums[Grid::max_group_channels];
  for (std::int64_t c = 0; c < runs.channels; ++c) channel_sums[c] = GradientSums<T>(mean[c]);
  runs.each_some(
      grid.fetch_ahead ? 4 : 16, [&](std::int64_t first, std::int64_t last, std::int64_t c) {
        const Affine<T> f = forward[c];
        const Affine<Pack<T>> packs{broadcast(f.mean), broadcast(f.scale), broadcast(f.shift)};
        GradientSums<T> s = channel_sums[c];
        for (std::int64_t b = first; b < last; ++b) {
          const std::int64_t offset = runs.offset(b, c);
          const T *g = grad_y + offset, *values = x + offset;
          const Ahead<T> ahead_g = runs.ahead(grid, grad_y, b), ahead_x = runs.ahead(grid, x, b);
          const auto gradients = [&](std::int64_t k) __attribute__((always_inline)) {
            if constexpr (Epilogue::linear) return load_wide(g + k * lanes);
            return through_epilogue<Epilogue>(load(g + k * lanes), load(values + k * lanes), packs,
                                              slope);
          };
          const std::int64_t whole = runs.length / lanes, rest = runs.length % lanes;
          std::int64_t k = 0;
          for (; grid.fetch_ahead && k + stretch / lanes <= whole; k += stretch / lanes) {
            ahead_g.fetch(g + k * lanes, stretch);
            ahead_x.fetch(values + k * lanes, stretch);
            s.add(values, k, k + stretch / lanes, gradients);
          }
          ahead_g.fetch(g + k * lanes, runs.length - k * lanes);
          ahead_x.fetch(values + k * lanes, runs.length - k * lanes);
          s.add(values, k, whole, gradients);
          if (rest > 0) {
            const Pack<T> last_x = load_first(values + whole * lanes, rest, f.mean);
            const Pack<T> last_g = load_first(g + whole * lanes, rest, T{0});
            s.add(through_epilogue<Epilogue>(last_g, last_x, packs, slope), widen(last_x));
          }
        }
        channel_sums[c] = s;
      });
  for (std::int64_t c = 0; c < runs.channels; ++c)
    partials[chunk * grid.problem.c + runs.first_channel + c] = channel_sums[c].sums(mean[c]);
}

template <class T>
void grad_sums_rows_staged(const Grid& grid, std::int64_t group, std::int64_t chunk,
                           const T* grad_y, const T* x, const double* mean,
                           const Affine<T>* forward, const Fusion& fusion, GradSums* partials) {
  const Runs runs(grid, group, chunk);
  mean += runs.first_channel;
  forward += runs.first_channel;
  Stage<T> stage(fusion);
  alignas(64) T g[stage_length];
  GradientSums<T> channel_sums[Grid::max_group_channels];
  for (std::int64_t c = 0; c < runs.channels; ++c) channel_sums[c] = GradientSums<T>(mean[c]);
  // In the order of memory, in which masks are drawn.
  runs.each_some(1, [&](std::int64_t first, std::int64_t last, std::int64_t c) {
    const Affine<T> f = forward[c];
    GradientSums<T> s = channel_sums[c];
    for (std::int64_t b = first; b < last; ++b) {
      for (std::int64_t i = 0; i < runs.length; i += stage_length) {
        const std::int64_t count = runs.length - i < stage_length ? runs.length - i : stage_length;
        const std::int64_t offset = runs.offset(b, c) + i, whole = count / lanes;
        const T* values = x + offset;
        // What is next in memory: between two stretches processors lose track of it.
        fetch(grad_y + offset + count, stage_length);
        fetch(values + count, stage_length);
        copy(grad_y + offset, g, count);
        stage.backward_first(g, offset, count, [&](auto at) __attribute__((always_inline)) {
          return apply(f, at(values));
        });
        s.add(values, 0, whole, [&](std::int64_t k) __attribute__((always_inline)) {
          return load_wide(g + k * lanes);
        });
        if (const std::int64_t rest = count % lanes; rest > 0)
          s.add(widen(load_first(g + whole * lanes, rest, T{0})),
                widen(load_first(values + whole * lanes, rest, f.mean)));
      }
    }
    channel_sums[c] = s;
  });
  for (std::int64_t c = 0; c < runs.channels; ++c)
    partials[chunk * grid.problem.c + runs.first_channel + c] = channel_sums[c].sums(mean[c]);
}

template <class T, class Epilogue>
void apply_grad_rows(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* grad_y,
                     const T* x, const Affine<T>* forward, const GradAffine<T>* backward,
                     const Fusion& fusion, T* grad_x, T*) {
  const Runs runs(grid, group, chunk);
  const T slope = static_cast<T>(fusion.negative_slope);
  const NextTile next_tile(grid, group, chunk);
  SharedLine<T> shared;
  for (std::int64_t b = runs.blocks; b-- > 0;)
    for (std::int64_t c = 0; c < runs.channels; ++c) {
      const Affine<T> f = forward[runs.first_channel + c];
      const GradAffine<T> k = backward[runs.first_channel + c];
      const std::int64_t offset = runs.offset(b, c);
      const Next<T> next_g = next_tile.next(grad_y, b, c), next_x = next_tile.next(x, b, c);
      const T *g = grad_y + offset, *values = x + offset;
      const Ahead<T> ahead_g = within(grid, g, runs.length);
      const Ahead<T> ahead_x = within(grid, values, runs.length);
      shared.continues = runs.lines_continue<T>(c);
      write<1>(
          grad_x + offset, 0, runs.length, grid.streaming, &shared, [&](auto) { return k; },
          [&](const auto& affine, auto at, int) __attribute__((always_inline)) {
            const auto v = at(values);
            return apply(affine, Epilogue::gradient(at(g), apply(f, v), slope), v);
          },
          [&](std::int64_t i, std::int64_t count) {
            ahead_g.fetch(g + i, count);
            ahead_x.fetch(values + i, count);
            next_g.fetch(i, count);
            next_x.fetch(i, count);
          });
    }
}

template <class T>
void apply_grad_rows_staged(const Grid& grid, std::int64_t group, std::int64_t chunk,
                            const T* grad_y, const T* x, const Affine<T>* forward,
                            const GradAffine<T>* backward, const Fusion& fusion, T* grad_x,
                            T* grad_residual) {
  const Runs runs(grid, group, chunk);
  const NextTile next_tile(grid, group, chunk);
  Stage<T> stage(fusion);
  alignas(64) T g[stage_length];
  SharedLine<T> shared, shared_residual;
  for (std::int64_t b = runs.blocks; b-- > 0;)
    for (std::int64_t c = 0; c < runs.channels; ++c) {
      const Affine<T> f = forward[runs.first_channel + c];
      const GradAffine<T> k = backward[runs.first_channel + c];
      const Next<T> next_g = next_tile.next(grad_y, b, c), next_x = next_tile.next(x, b, c);
      for (std::int64_t i = 0, count; i < runs.length; i += count) {
        const std::int64_t offset = runs.offset(b, c) + i;
        const T* values = x + offset;
        count = stage_count(grad_x + offset, runs.length - i);
        copy(grad_y + offset, g, count);
        stage.backward_again(g, offset, count, [&](auto at) __attribute__((always_inline)) {
          return apply(f, at(values));
        });
        shared.continues = i + count == runs.length && runs.lines_continue<T>(c);
        shared_residual.continues = shared.continues;
        if (grad_residual != nullptr)
          write_staged(g, grad_residual + offset, count, grid.streaming, &shared_residual,
                       [](std::int64_t, std::int64_t) {});
        write<1>(
            grad_x + offset, 0, count, grid.streaming, &shared, [&](auto) { return k; },
            [&](const auto& affine, auto at, int)
                __attribute__((always_inline)) { return apply(affine, at(g), at(values)); },
            [&](std::int64_t n, std::int64_t length) {
              next_g.fetch(i + n, length);
              next_x.fetch(i + n, length);
            });
      }
    }
}

// -- columns: some channels, as columns of a matrix -----------------------------------------------

// The columns of one group: where they start, how many, and the channel of each.
struct Columns {
  std::int64_t first, width, first_channel, channels;

  Columns(const Grid& grid, std::int64_t group) {
    first_channel = grid.first_channel(group);
    channels = grid.last_channel(group) - first_channel;
    const std::int64_t per_channel = grid.problem.channels_last ? grid.replicas : grid.problem.s;
    first = grid.problem.channels_last ? first_channel : first_channel * per_channel;
    width = channels * per_channel;
  }
};

// Arrays over the columns of a group, with room for a whole pack at the end.
constexpr std::int64_t max_columns = Grid::max_group_width + lanes;

// to[w] = value(channel) for each column w, channels counted from the group's first.
template <class T, class Value>
BNEXT_INLINE void spread(const Grid& grid, const Columns& columns, T* __restrict to, Value value) {
  if (grid.problem.channels_last) {
    for (std::int64_t c = 0; c < columns.channels; ++c) to[c] = value(c);
    for (std::int64_t w = columns.channels; w < columns.width; ++w)
      to[w] = to[w - columns.channels];
  } else {
    // Whole packs: what one channel writes too much, the next one and the end overwrite.
    const std::int64_t s = grid.problem.s;
    for (std::int64_t c = 0; c < columns.channels; ++c) {
      const Pack<T> v = broadcast(value(c));
      for (std::int64_t i = 0; i < s; i += lanes) store(v, to + c * s + i);
    }
  }
  for (std::int64_t w = columns.width; w < columns.width + lanes; ++w) to[w] = 0;
}

// sums[c] = the sum of the columns of channel c.
BNEXT_INLINE void gather(const Grid& grid, const Columns& columns,
                         const double* __restrict columns_of, double* __restrict sums) {
  if (grid.problem.channels_last) {
    for (std::int64_t c = 0; c < columns.channels; ++c) sums[c] = columns_of[c];
    for (std::int64_t w = columns.channels; w < columns.width; w += columns.channels)
      for (std::int64_t c = 0; c < columns.channels; ++c) sums[c] += columns_of[w + c];
    return;
  }
  const std::int64_t s = grid.problem.s;
  for (std::int64_t c = 0; c < columns.channels; ++c) {
    Pack<double> total{};
    std::int64_t i = 0;
    for (; i + lanes <= s; i += lanes) total = total + load(columns_of + c * s + i);
    if (i < s) total = total + load_first(columns_of + c * s + i, s - i, 0.0);
    sums[c] = sum(total);
  }
}

// Columns of this group that row r has.
inline std::int64_t row_width(const Grid& grid, const Columns& columns, std::int64_t r) {
  return r + 1 < grid.rows || grid.replicas == 1 ? columns.width : grid.last_width;
}

// Rows whose sums stay in registers.
constexpr std::int64_t row_block = 4;

// Calls body(r, count, width) for blocks of rows [r, r + count) of equal width.
template <class Body>
BNEXT_INLINE void for_each_rows(const Grid& grid, const Columns& columns, std::int64_t chunk,
                                Body body) {
  const std::int64_t end = grid.last_row(chunk);
  const bool short_end = row_width(grid, columns, end - 1) != columns.width;
  const std::int64_t whole = short_end ? end - 1 : end;
  std::int64_t r = grid.first_row(chunk);
  for (; r + row_block <= whole; r += row_block) body(r, row_block, columns.width);
  if (r < whole) body(r, whole - r, columns.width);
  if (short_end) body(end - 1, 1, row_width(grid, columns, end - 1));
}

// Rows [0, count) of sixteen columns, added to the columns' sums. `read` loads a pack.
template <class T, bool centered, class Read>
BNEXT_INLINE void add_columns(std::int64_t count, const double* center, Read read, double* total,
                              double* squares) {
  MomentSums<T, centered> sums(0);
  if constexpr (centered) sums.center = load(center);
  sums.total = load(total);
  sums.even = load(squares);
  std::int64_t k = 0;
  for (; k + 2 <= count; k += 2) sums.add(read(k), read(k + 1));
  if (k < count) sums.add(read(k));
  store(sums.total, total);
  store(sums.even, squares);
}

template <class T, bool centered>
void shifted_sums_columns(const Grid& grid, const Columns& columns, std::int64_t chunk, const T* x,
                          const double* center, double* total, double* squares) {
  for (std::int64_t w = 0; w < columns.width + lanes; ++w) total[w] = squares[w] = 0;
  for_each_rows(grid, columns, chunk, [&](std::int64_t r, std::int64_t count, std::int64_t width) {
    const T* row = x + r * grid.width + columns.first;
    std::int64_t w = 0;
    for (; w + lanes <= width; w += lanes) {
      const auto read = [&](std::int64_t k) __attribute__((always_inline)) {
        return load_wide(row + k * grid.width + w);
      };
      if (grid.fetch_rows) fetch(row + count * (width + w), count * lanes);
      if (count == row_block)
        add_columns<T, centered>(row_block, center + w, read, total + w, squares + w);
      else
        add_columns<T, centered>(count, center + w, read, total + w, squares + w);
    }
    for (; w < width; ++w)
      for (std::int64_t k = 0; k < count; ++k) {
        double d = static_cast<double>(row[k * grid.width + w]);
        if constexpr (centered) d -= center[w];
        total[w] += d;
        squares[w] += d * d;
      }
  });
}

template <class T>
void moments_columns(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* x,
                     Moments* partials) {
  const Columns columns(grid, group);
  double center[max_columns], total[max_columns], squares[max_columns];
  double centers[Grid::max_group_width], sums[Grid::max_group_width], sumsqs[Grid::max_group_width];
  const std::int64_t begin = grid.first_row(chunk), rows = grid.last_row(chunk) - begin;
  // Values of one channel in this tile: a short last row has fewer.
  const std::int64_t missing = columns.width - row_width(grid, columns, begin + rows - 1);
  const auto count = static_cast<double>((rows * columns.width - missing) / columns.channels);

  bool again = !exact_products<T>;
  if constexpr (exact_products<T>) {
    shifted_sums_columns<T, false>(grid, columns, chunk, x, center, total, squares);
    gather(grid, columns, total, sums);
    gather(grid, columns, squares, sumsqs);
    for (std::int64_t c = 0; c < columns.channels; ++c) {
      centers[c] = wanted_center<T>({sums[c], sumsqs[c]}, count);
      again |= !(centers[c] == 0);
    }
  } else {
    const std::int64_t step = grid.problem.channels_last ? 1 : grid.problem.s;
    const T* head = x + begin * grid.width + columns.first;
    for (std::int64_t c = 0; c < columns.channels; ++c)
      centers[c] = static_cast<double>(head[c * step]);
  }
  if (again) {
    spread(grid, columns, center, [&](std::int64_t c) { return centers[c]; });
    double centered_sums[Grid::max_group_width], centered_sumsqs[Grid::max_group_width];
    shifted_sums_columns<T, true>(grid, columns, chunk, x, center, total, squares);
    gather(grid, columns, total, centered_sums);
    gather(grid, columns, squares, centered_sumsqs);
    for (std::int64_t c = 0; c < columns.channels; ++c) {
      // What one channel needs changes nothing in another.
      if (exact_products<T> && centers[c] == 0) continue;
      sums[c] = centered_sums[c];
      sumsqs[c] = centered_sumsqs[c];
    }
  }
  for (std::int64_t c = 0; c < columns.channels; ++c)
    partials[chunk * grid.problem.c + columns.first_channel + c] =
        moments_from_shifted(count, centers[c], sums[c], sumsqs[c]);
}

// Coefficients of each column, one array per field so that loops over columns are vectors.
template <class T>
struct ColumnAffine {
  T mean[max_columns], scale[max_columns], shift[max_columns];

  ColumnAffine(const Grid& grid, const Columns& columns, const Affine<T>* forward) {
    const Affine<T>* f = forward + columns.first_channel;
    spread(grid, columns, mean, [&](std::int64_t c) { return f[c].mean; });
    spread(grid, columns, scale, [&](std::int64_t c) { return f[c].scale; });
    spread(grid, columns, shift, [&](std::int64_t c) { return f[c].shift; });
  }

  template <class Place>
  BNEXT_INLINE Affine<typename Place::Vector> at(Place place) const {
    return {place(mean), place(scale), place(shift)};
  }
  BNEXT_INLINE Affine<Pack<T>> packs(std::int64_t w) const {
    return {load(mean + w), load(scale + w), load(shift + w)};
  }
};

template <class T>
struct ColumnGradAffine {
  T g_mean[max_columns], g_scale[max_columns], x_mean[max_columns], x_scale[max_columns],
      shift[max_columns];

  ColumnGradAffine(const Grid& grid, const Columns& columns, const GradAffine<T>* backward) {
    const GradAffine<T>* k = backward + columns.first_channel;
    spread(grid, columns, g_mean, [&](std::int64_t c) { return k[c].g_mean; });
    spread(grid, columns, g_scale, [&](std::int64_t c) { return k[c].g_scale; });
    spread(grid, columns, x_mean, [&](std::int64_t c) { return k[c].x_mean; });
    spread(grid, columns, x_scale, [&](std::int64_t c) { return k[c].x_scale; });
    spread(grid, columns, shift, [&](std::int64_t c) { return k[c].shift; });
  }

  template <class Place>
  BNEXT_INLINE GradAffine<typename Place::Vector> at(Place place) const {
    return {place(g_mean), place(g_scale), place(x_mean), place(x_scale), place(shift)};
  }
};

// Of both directions.
template <class F, class K>
struct BothAffine {
  F forward;
  K backward;
};

// A number that the compiler knows.
template <int n>
struct Constant {
  static constexpr int value = n;
};

// Calls body(rows, r, width), rows a Constant, for the rows of a chunk from the last to the first:
// some at once where their lines lie side by side.
template <class T, class Body>
BNEXT_INLINE void for_each_rows_backwards(const Grid& grid, const Columns& columns,
                                          std::int64_t chunk, Body body) {
  constexpr int together = 4;
  const std::int64_t first = grid.first_row(chunk);
  std::int64_t r = grid.last_row(chunk);
  const std::int64_t end_width = row_width(grid, columns, r - 1);
  if (end_width != columns.width) body(Constant<1>{}, --r, end_width);
  // Rows a multiple of a page apart would get into each other's way in the cache.
  if (grid.width % line_length<T> == 0 && grid.width % (64 * line_length<T>) != 0)
    while (r - together >= first) body(Constant<together>{}, r -= together, columns.width);
  while (r > first) body(Constant<1>{}, --r, columns.width);
}

template <class T, class Epilogue>
void apply_columns(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* x,
                   const Affine<T>* forward, const Fusion& fusion, T* y) {
  const Columns columns(grid, group);
  const ColumnAffine<T> f(grid, columns, forward);
  const T slope = static_cast<T>(fusion.negative_slope);
  for_each_rows_backwards<T>(
      grid, columns, chunk, [&](auto rows, std::int64_t r, std::int64_t width) {
        const std::int64_t offset = r * grid.width + columns.first;
        const T* from = x + offset;
        write<decltype(rows)::value>(
            y + offset, grid.width, width, grid.streaming, no_shared_line<T>,
            [&](auto at) __attribute__((always_inline)) { return f.at(at); },
            [&](const auto& affine, auto at, int row) __attribute__((always_inline)) {
              return Epilogue::value(apply(affine, at(from + row * grid.width)), slope);
            },
            [](std::int64_t, std::int64_t) {});
      });
}

template <class T>
void apply_columns_staged(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* x,
                          const Affine<T>* forward, const Fusion& fusion, T* y) {
  const Columns columns(grid, group);
  const ColumnAffine<T> f(grid, columns, forward);
  Stage<T> stage(fusion);
  alignas(64) T z[max_columns];
  for (std::int64_t r = grid.last_row(chunk); r-- > grid.first_row(chunk);) {
    const std::int64_t offset = r * grid.width + columns.first;
    const std::int64_t width = row_width(grid, columns, r);
    const T* from = x + offset;
    each_place<T>(0, width, [&](auto at) __attribute__((always_inline)) {
      at.write(apply(f.at(at), at(from)), z);
    });
    stage.forward(z, offset, width);
    write_staged(z, y + offset, width, grid.streaming, no_shared_line<T>,
                 [](std::int64_t, std::int64_t) {});
  }
}

// Rows [0, count) of sixteen columns of gradients and values, added to the columns' sums.
template <class T, class ReadG, class ReadX>
BNEXT_INLINE void add_grad_columns(std::int64_t count, const double* mean, ReadG read_g,
                                   ReadX read_x, double* total, double* products) {
  GradientSums<T> sums(0);
  if constexpr (!exact_products<T>) sums.mean = load(mean);
  sums.total = load(total);
  sums.even = load(products);
  for (std::int64_t k = 0; k < count; ++k) sums.add(read_g(k), read_x(k));
  store(sums.total, total);
  store(sums.even, products);
}

// Gradients of some rows, staged where that is `needed`.
template <class T, bool needed>
struct StagedRows {
  explicit StagedRows(const Fusion& fusion) : stage(fusion) {}

  Stage<T> stage;
  alignas(64) T values[row_block][max_columns];
};
template <class T>
struct StagedRows<T, false> {
  explicit StagedRows(const Fusion&) {}
};

// The normalised values of a row of columns.
template <class T>
BNEXT_INLINE auto normalised(const ColumnAffine<T>& f, const T* x) {
  return [&f, x](auto at) __attribute__((always_inline)) { return apply(f.at(at), at(x)); };
}

template <class T, class Epilogue>
void grad_sums_columns(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* grad_y,
                       const T* x, const double* mean, const Affine<T>* forward,
                       const Fusion& fusion, GradSums* partials) {
  const Columns columns(grid, group);
  const T slope = static_cast<T>(fusion.negative_slope);
  double center[max_columns], total[max_columns], products[max_columns],
      sums_g[Grid::max_group_width], sums_gx[Grid::max_group_width];
  mean += columns.first_channel;
  if constexpr (!exact_products<T>)
    spread(grid, columns, center, [&](std::int64_t c) { return mean[c]; });
  const ColumnAffine<T> f(grid, columns, forward);
  for (std::int64_t w = 0; w < columns.width + lanes; ++w) total[w] = products[w] = 0;
  StagedRows<T, is_staged<Epilogue>> staged_rows(fusion);

  for_each_rows(grid, columns, chunk, [&](std::int64_t r, std::int64_t count, std::int64_t width) {
    const T* values = x + r * grid.width + columns.first;
    const T* g = grad_y + r * grid.width + columns.first;
    std::int64_t g_stride = grid.width;
    if constexpr (is_staged<Epilogue>) {
      for (std::int64_t k = 0; k < count; ++k) {
        T* const row = staged_rows.values[k];
        copy(g + k * grid.width, row, width);
        staged_rows.stage.backward_first(row, (r + k) * grid.width + columns.first, width,
                                         normalised(f, values + k * grid.width));
      }
      g = staged_rows.values[0];
      g_stride = max_columns;
    }
    std::int64_t w = 0;
    const auto read_x = [&](std::int64_t k) __attribute__((always_inline)) {
      return load_wide(values + k * grid.width + w);
    };
    const auto read_g = [&](std::int64_t k) __attribute__((always_inline)) {
      const T* from = g + k * g_stride + w;
      if constexpr (Epilogue::linear)
        return load_wide(from);
      else
        return through_epilogue<Epilogue>(load(from), load(values + k * grid.width + w), f.packs(w),
                                          slope);
    };
    for (; w + lanes <= width; w += lanes) {
      if (grid.fetch_rows) {
        fetch(grad_y + r * grid.width + count * (width + w), count * lanes);
        fetch(values + count * (width + w), count * lanes);
      }
      if (count == row_block)
        add_grad_columns<T>(row_block, center + w, read_g, read_x, total + w, products + w);
      else
        add_grad_columns<T>(count, center + w, read_g, read_x, total + w, products + w);
    }
    if (w == width) return;
    const auto rest_x = [&](std::int64_t k) {
      return load_first(values + k * grid.width + w, width - w, T{0});
    };
    add_grad_columns<T>(
        count, center + w,
        [&](std::int64_t k) {
          const Pack<T> rest_g = load_first(g + k * g_stride + w, width - w, T{0});
          return through_epilogue<Epilogue>(rest_g, rest_x(k), f.packs(w), slope);
        },
        [&](std::int64_t k) { return widen(rest_x(k)); }, total + w, products + w);
  });
  gather(grid, columns, total, sums_g);
  gather(grid, columns, products, sums_gx);
  for (std::int64_t c = 0; c < columns.channels; ++c)
    partials[chunk * grid.problem.c + columns.first_channel + c] =
        GradientSums<T>::centered_sums(sums_g[c], sums_gx[c], mean[c]);
}

template <class T, class Epilogue>
void apply_grad_columns(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* grad_y,
                        const T* x, const Affine<T>* forward, const GradAffine<T>* backward,
                        const Fusion& fusion, T* grad_x, T*) {
  const Columns columns(grid, group);
  const T slope = static_cast<T>(fusion.negative_slope);
  const ColumnAffine<T> f(grid, columns, forward);
  const ColumnGradAffine<T> k(grid, columns, backward);
  for_each_rows_backwards<T>(
      grid, columns, chunk, [&](auto rows, std::int64_t r, std::int64_t width) {
        const std::int64_t offset = r * grid.width + columns.first;
        write<decltype(rows)::value>(
            grad_x + offset, grid.width, width, grid.streaming, no_shared_line<T>,
            [&](auto at) __attribute__((always_inline)) {
              return BothAffine<decltype(f.at(at)), decltype(k.at(at))>{f.at(at), k.at(at)};
            },
            [&](const auto& affine, auto at, int row) __attribute__((always_inline)) {
              const auto g = at(grad_y + offset + row * grid.width);
              const auto v = at(x + offset + row * grid.width);
              return apply(affine.backward, Epilogue::gradient(g, apply(affine.forward, v), slope),
                           v);
            },
            [](std::int64_t, std::int64_t) {});
      });
}

template <class T>
void apply_grad_columns_staged(const Grid& grid, std::int64_t group, std::int64_t chunk,
                               const T* grad_y, const T* x, const Affine<T>* forward,
                               const GradAffine<T>* backward, const Fusion& fusion, T* grad_x,
                               T* grad_residual) {
  const Columns columns(grid, group);
  const ColumnAffine<T> f(grid, columns, forward);
  const ColumnGradAffine<T> k(grid, columns, backward);
  Stage<T> stage(fusion);
  alignas(64) T g[max_columns];
  for (std::int64_t r = grid.last_row(chunk); r-- > grid.first_row(chunk);) {
    const std::int64_t offset = r * grid.width + columns.first;
    const std::int64_t width = row_width(grid, columns, r);
    copy(grad_y + offset, g, width);
    stage.backward_again(g, offset, width, normalised(f, x + offset));
    if (grad_residual != nullptr)
      write_staged(g, grad_residual + offset, width, grid.streaming, no_shared_line<T>,
                   [](std::int64_t, std::int64_t) {});
    write<1>(
        grad_x + offset, 0, width, grid.streaming, no_shared_line<T>,
        [&](auto at) __attribute__((always_inline)) { return k.at(at); },
        [&](const auto& affine, auto at, int)
            __attribute__((always_inline)) { return apply(affine, at(g), at(x + offset)); },
        [](std::int64_t, std::int64_t) {});
  }
}

// -- the choice between the two -------------------------------------------------------------------

template <class T>
void moments(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* x,
             Moments* partials) {
  (grid.columns ? moments_columns<T> : moments_rows<T>)(grid, group, chunk, x, partials);
}

template <class T, class Epilogue>
void apply(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* x,
           const Affine<T>* forward, const Fusion& fusion, T* y) {
  if constexpr (is_staged<Epilogue>)
    (grid.columns ? apply_columns_staged<T> : apply_rows_staged<T>)(grid, group, chunk, x, forward,
                                                                    fusion, y);
  else
    (grid.columns ? apply_columns<T, Epilogue> : apply_rows<T, Epilogue>)(grid, group, chunk, x,
                                                                          forward, fusion, y);
}

template <class T, class Epilogue>
void grad_sums(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* grad_y,
               const T* x, const double* mean, const Affine<T>* forward, const Fusion& fusion,
               GradSums* partials) {
  if (grid.columns)
    grad_sums_columns<T, Epilogue>(grid, group, chunk, grad_y, x, mean, forward, fusion, partials);
  else if constexpr (is_staged<Epilogue>)
    grad_sums_rows_staged<T>(grid, group, chunk, grad_y, x, mean, forward, fusion, partials);
  else
    grad_sums_rows<T, Epilogue>(grid, group, chunk, grad_y, x, mean, forward, fusion, partials);
}

template <class T, class Epilogue>
void apply_grad(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* grad_y,
                const T* x, const Affine<T>* forward, const GradAffine<T>* backward,
                const Fusion& fusion, T* grad_x, T* grad_residual) {
  if constexpr (is_staged<Epilogue>)
    (grid.columns ? apply_grad_columns_staged<T>
                  : apply_grad_rows_staged<T>)(grid, group, chunk, grad_y, x, forward, backward,
                                               fusion, grad_x, grad_residual);
  else
    (grid.columns ? apply_grad_columns<T, Epilogue>
                  : apply_grad_rows<T, Epilogue>)(grid, group, chunk, grad_y, x, forward, backward,
                                                  fusion, grad_x, grad_residual);
}

}  // namespace
}  // namespace bnext
