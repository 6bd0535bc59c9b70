#include "cuda/plan.hpp"

#include <algorithm>
#include <numeric>

namespace bnext {
namespace cuda {
namespace {

constexpr std::int64_t enough_blocks = 2048;  // some for each multiprocessor of a large device
constexpr std::int64_t fewest_values = 4096;  // of a chunk; fewer are not worth a block
constexpr std::int64_t most_chunks = 512;     // more only cost time to merge
constexpr std::int64_t most_partials = 1 << 17;
constexpr std::int64_t short_row_bytes = 64;  // below it, rows are columns
constexpr std::int64_t most_blocks = 1 << 20;
constexpr std::int64_t tile_width = 32;         // accesses: one for each thread of a warp
constexpr std::int64_t rows_at_once = 64;       // in one launch: for each thread of a column
constexpr std::int64_t busy_blocks = 264;       // two for each multiprocessor of a large device
constexpr std::int64_t good_share = 100 << 10;  // shared bytes of a block that has a neighbour
constexpr std::int64_t small_share = 32 << 10;  // of which several fit beside each other
constexpr std::int64_t small_size = 1 << 17;    // values; below it, a launch is what takes time

std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

// Cuts each channel into about so many chunks.
void cut_rows(Plan& plan, std::int64_t wanted) {
  const Problem& p = plan.problem;
  if (wanted <= p.n) {
    plan.run = p.s;
    plan.rows_per_chunk = divide_up(p.n, wanted);
  } else {
    plan.rows_per_chunk = 1;
    const std::int64_t piece = divide_up(p.s, std::max<std::int64_t>(1, wanted / p.n));
    plan.run = std::min(p.s, divide_up(piece, plan.vector) * plan.vector);
  }
  plan.pieces = divide_up(p.s, plan.run);
  plan.chunks = divide_up(p.n, plan.rows_per_chunk) * plan.pieces;
  const std::int64_t slots = divide_up(plan.run, plan.vector);
  plan.slots_per_run = p.s % plan.vector == 0 ? slots : slots + 1;
}

bool try_resident(Plan& plan, int tensors, const Limits& limits) {
  const Problem& p = plan.problem;
  for (int cluster = 1; cluster <= limits.cluster; cluster *= 2) {
    Plan cut = plan;
    cut_rows(cut, cluster);
    if (cut.chunks > cluster) continue;
    cut.shared_bytes = cut.rows_per_chunk * cut.slots_per_run * access_bytes * tensors;
    const bool last = cluster * 2 > limits.cluster;
    const std::int64_t values = cut.rows_per_chunk * cut.run;
    if (cut.shared_bytes > (last ? limits.shared_bytes : std::min(good_share, limits.shared_bytes)))
      continue;
    // More blocks, while there are few and each has enough to do.
    if (p.c * cluster < busy_blocks && values >= 2 * fewest_values && !last) continue;
    // Of few channels the whole device should read.
    if (p.c * cluster < busy_blocks / 4 && p.size() > small_size) continue;
    cut.path = Path::resident;
    if (cut.shared_bytes > small_share) cut.threads = most_threads;
    cut.cluster = cluster;
    plan = cut;
    return true;
  }
  return false;
}

void plan_columns(Plan& plan) {
  const Problem& p = plan.problem;
  plan.per = p.channels_last ? 1 : p.s;
  plan.channel_columns = p.c * plan.per;
  const std::int64_t positions = p.channels_last ? p.per_channel() : p.n;
  const std::int64_t replicas = std::min<std::int64_t>(
      plan.vector / std::gcd<std::int64_t>(plan.vector, plan.channel_columns), positions);
  plan.width = plan.channel_columns * replicas;
  plan.rows = divide_up(positions, replicas);
  const std::int64_t vectors = divide_up(plan.width, plan.vector);
  plan.tile_vectors = std::min(vectors, tile_width);
  plan.tiles = divide_up(vectors, plan.tile_vectors);
  const std::int64_t down = block_threads / plan.tile_vectors;
  plan.own_tiles = plan.tiles == 1 || (plan.per == 1 && replicas == 1);

  if (plan.own_tiles && plan.rows <= rows_at_once * down && p.size() <= small_size * 4) {
    plan.path = Path::columns_once;
    plan.chunks = 1;
    plan.rows_per_chunk = plan.rows;
    return;
  }
  plan.path = Path::columns;
  const std::int64_t wanted = std::clamp<std::int64_t>(
      std::min(enough_blocks / plan.tiles, most_partials / plan.width), 1, most_chunks);
  plan.rows_per_chunk = std::max(8 * down, divide_up(plan.rows, wanted));
  plan.chunks = divide_up(plan.rows, plan.rows_per_chunk);
  plan.partials = plan.chunks * plan.width;
  plan.tickets = plan.own_tiles ? plan.tiles : 1;
}

}  // namespace

Plan make_plan(const Problem& problem, int item, int tensors, const Limits& limits) {
  Plan plan{};
  plan.problem = problem;
  plan.vector = access_bytes / item;
  plan.threads = block_threads;
  plan.pieces = plan.cluster = 1;
  if (problem.s == 1) plan.problem.channels_last = true;  // the same memory
  if (plan.problem.channels_last || problem.s * item < short_row_bytes) {
    plan_columns(plan);
    return plan;
  }
  if (try_resident(plan, tensors, limits)) return plan;
  plan.path = Path::rows;
  const std::int64_t wanted = std::clamp<std::int64_t>(
      std::min(divide_up(enough_blocks, problem.c), problem.per_channel() / fewest_values), 1,
      most_chunks);
  cut_rows(plan, wanted);
  plan.partials = plan.chunks * problem.c;
  plan.tickets = problem.c;
  return plan;
}

std::int64_t blocks_for(std::int64_t size, std::int64_t per_block) {
  return std::clamp<std::int64_t>(divide_up(size, per_block), 1, most_blocks);
}

}  // namespace cuda
}  // namespace bnext
