#include "cpu/grid.hpp"

#include <algorithm>
#include <numeric>

#include "bnext/runtime.hpp"
#include "cpu/parallel.hpp"

namespace bnext {
namespace {

constexpr std::int64_t short_row = 65;        // rows below it are taken as columns,
constexpr std::int64_t few_samples = 2;       // unless so few have them
constexpr std::int64_t shortest_row = 33;     // and they are as long as this
constexpr std::int64_t chunk_values = 16384;  // of one channel, in rows
constexpr std::int64_t chunk_area = 65536;    // of all columns of a group, at least
constexpr std::int64_t enough_chunks = 32;    // more only cost time to merge
constexpr std::int64_t long_run = 4096;  // values; shorter ones are over before prefetch starts
constexpr std::int64_t enough_groups = 32;
constexpr std::int64_t fewest_groups = 8;
constexpr std::int64_t vector_width = 16;
constexpr std::int64_t merge_values = 256;      // of one channel; fewer are not worth merging
constexpr std::int64_t small_size = 1 << 18;    // values
constexpr std::int64_t few_shares = 2;          // for as many threads
constexpr std::int64_t wide_enough = 64;        // columns that keep a loop over them busy
constexpr std::int64_t line_bytes = 64;         // of the caches
constexpr std::int64_t long_enough_run = 8192;  // bytes
constexpr std::int64_t wide_row = 256;          // columns of positions side by side

std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

void Grid::cut(std::int64_t rows_of_a_chunk) {
  rows_per_chunk = rows_of_a_chunk;
  chunks = divide_up(rows, rows_per_chunk) * pieces;
}

bool worth_streaming(std::int64_t bytes) {
  // A quarter: the caches also hold what comes before and after in a network, and on a shared
  // machine what others do. Measured, docs/performance.md.
  return bytes > cache_bytes() / 4;
}

Grid make_grid(const Problem& p, std::int64_t tensors, std::int64_t item) {
  Grid grid{};
  grid.problem = p;
  grid.replicas = grid.pieces = 1;
  grid.streaming = worth_streaming(tensors * p.size() * item);
  grid.far = tensors * p.size() * item > core_cache_bytes();
  if (p.s == 1) grid.problem.channels_last = true;  // the same memory
  grid.columns =
      grid.problem.channels_last || p.s < (p.n <= few_samples ? shortest_row : short_row);

  if (!grid.columns) {
    // Neighbouring channels make long contiguous runs, as long as the second pass still finds
    // them in the cache and there are groups enough for every thread.
    const std::int64_t channel_bytes = std::max<std::int64_t>(1, p.per_channel() * tensors * item);
    grid.group_channels =
        std::min({divide_up(long_run, p.s), core_cache_bytes() / 2 / channel_bytes,
                  p.c / enough_groups, Grid::max_group_channels});
    grid.group_channels = std::max<std::int64_t>(1, grid.group_channels);
    // Whole lines, or at least long runs: what is streamed of a line must be all of it, and runs of
    // a page or less are over before memory has answered.
    const std::int64_t whole = line_bytes / std::gcd(p.s * item, line_bytes);
    if (grid.group_channels % whole != 0 && grid.group_channels * p.s * item < long_enough_run) {
      if (whole * channel_bytes <= cache_bytes() / 8 && whole * fewest_groups <= p.c)
        grid.group_channels = std::max(whole, grid.group_channels / whole * whole);
      else
        grid.streaming = false;
    }
    grid.groups = divide_up(p.c, grid.group_channels);
    grid.group_inputs = grid.group_channels * (channel_bytes / tensors) * (tensors - 1);
    // Two groups at a time, for each of some threads; results are not in the cache then. Where it
    // holds the inputs there is nothing to hide.
    grid.sum_next = grid.streaming && tensors * p.size() * item > cache_bytes() &&
                    grid.group_inputs <= cache_bytes() / 8;
    grid.rows = p.n;
    grid.pieces = divide_up(p.s, chunk_values);
    grid.cut(std::max<std::int64_t>(1, chunk_values / p.s));
    return grid;
  }

  std::int64_t columns_per_channel = p.s;
  std::int64_t positions = p.n;  // rows, before positions are put side by side
  if (grid.problem.channels_last) {
    columns_per_channel = 1;
    positions = p.per_channel();
    // Enough vectors, and whole ones, if that makes no more than one group.
    std::int64_t replicas = vector_width / std::gcd(p.c, vector_width);
    replicas *= divide_up(wide_row, p.c * replicas);
    if (p.c * replicas > Grid::max_group_width) replicas = divide_up(wide_row, p.c);
    grid.replicas = std::min(replicas, positions);
  }
  grid.rows = divide_up(positions, grid.replicas);
  grid.width = p.c * columns_per_channel * grid.replicas;
  grid.last_width = grid.width - (grid.rows * grid.replicas - positions) * p.c;

  // What fits into the caches is shared out by groups, so that the threads need not meet; less, by
  // rows, since some columns use only some sets of a cache, if that leaves each enough to sum.
  const bool by_rows = p.size() <= small_size && p.per_channel() >= merge_values;
  if (grid.replicas > 1) {
    grid.group_channels = p.c;
  } else {
    // Beyond the caches long rows matter most.
    const std::int64_t share =
        divide_up(grid.width, p.per_channel() < merge_values ? few_shares : 1);
    const std::int64_t width = std::clamp(share, wide_enough, Grid::max_group_width);
    const std::int64_t most = std::max<std::int64_t>(1, width / columns_per_channel);
    grid.group_channels = divide_up(p.c, divide_up(p.c, most));
    // Whole vectors, where that is no great difference.
    const std::int64_t whole = vector_width / std::gcd(columns_per_channel, vector_width);
    if (grid.group_channels < p.c && grid.group_channels > whole)
      grid.group_channels -= grid.group_channels % whole;
  }
  grid.groups = divide_up(p.c, grid.group_channels);
  grid.fetch_rows = grid.streaming && grid.groups == 1;
  const std::int64_t group_width = grid.group_channels * columns_per_channel * grid.replicas;
  const std::int64_t fewest_rows =
      by_rows ? vector_width
              : std::max(divide_up(merge_values, columns_per_channel * grid.replicas),
                         chunk_area / group_width);
  grid.cut(std::max(fewest_rows, divide_up(grid.rows, by_rows ? few_shares : enough_chunks)));
  return grid;
}

}  // namespace bnext
