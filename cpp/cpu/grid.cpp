#include "cpu/grid.hpp"

#include <algorithm>
#include <numeric>

namespace bnext {
namespace {

constexpr std::int64_t short_row = 64;        // rows below it are taken as columns
constexpr std::int64_t chunk_values = 16384;  // of one channel, in rows
constexpr std::int64_t chunk_area = 65536;    // of all columns of a group
constexpr std::int64_t vector_width = 16;
constexpr std::int64_t wide_enough = 64;  // columns that keep a loop over them busy

std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

Grid make_grid(const Problem& p) {
  Grid grid{};
  grid.problem = p;
  grid.replicas = 1;
  grid.columns = p.channels_last || p.s < short_row;

  if (!grid.columns) {
    grid.group_channels = 1;
    grid.groups = p.c;
    grid.chunk_length = chunk_values;
    grid.chunks = divide_up(p.per_channel(), grid.chunk_length);
    return grid;
  }

  std::int64_t columns_per_channel = p.s;
  std::int64_t positions = p.n;  // rows, before positions are put side by side
  if (p.channels_last) {
    columns_per_channel = 1;
    positions = p.per_channel();
    // Whole vectors, and enough of them.
    std::int64_t replicas = vector_width / std::gcd(p.c, vector_width);
    replicas *= divide_up(wide_enough, p.c * replicas);
    if (p.c * replicas <= Grid::max_group_width) grid.replicas = std::min(replicas, positions);
  }
  grid.rows = divide_up(positions, grid.replicas);
  grid.width = p.c * columns_per_channel * grid.replicas;
  grid.last_width = grid.width - (grid.rows * grid.replicas - positions) * p.c;

  if (grid.replicas > 1) {
    grid.group_channels = p.c;
  } else {
    const std::int64_t most =
        std::max<std::int64_t>(1, Grid::max_group_width / columns_per_channel);
    grid.group_channels = divide_up(p.c, divide_up(p.c, most));
  }
  grid.groups = divide_up(p.c, grid.group_channels);
  const std::int64_t group_width = grid.group_channels * columns_per_channel * grid.replicas;
  grid.chunk_length = std::max<std::int64_t>(vector_width, chunk_area / group_width);
  grid.chunks = divide_up(grid.rows, grid.chunk_length);
  return grid;
}

}  // namespace bnext
