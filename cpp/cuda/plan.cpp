#include "cuda/plan.hpp"

#include <algorithm>
#include <numeric>

namespace bnext {
namespace cuda {
namespace {

constexpr std::int64_t enough_blocks = 2048;  // some for each multiprocessor of a large device
constexpr std::int64_t most_blocks = 1 << 20;
constexpr std::int64_t short_row_bytes = 64;  // below it, rows are columns
// Reading twice
constexpr std::int64_t fewest_values = 4096;  // of a chunk; fewer are not worth a block
constexpr std::int64_t most_chunks = 512;     // more only cost time to merge
// Reading once
constexpr std::int64_t whole_bytes = 50 << 10;   // of a group that one block takes whole
constexpr std::int64_t whole_anyway = 32 << 10;  // the same, however few groups there are
constexpr std::int64_t fewest_bytes = 4 << 10;   // of a chunk of a group
constexpr std::int64_t reserve = 1 << 10;        // shared bytes that each block takes besides
constexpr int ahead_of_sums = 1, least_lag = 2, most_lag = 12;

std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}
std::int64_t round_up(std::int64_t a, std::int64_t b) {
  return divide_up(a, b) * b;
}

// In 32 bits, with some more for threads beyond the end.
bool is_counted(const Problem& problem) {
  return problem.size() < std::int64_t{1} << 30;
}

void lay_rows(Plan& plan) {
  plan.layout = Layout::rows;
  plan.groups = plan.problem.c;
  plan.group_channels = plan.per = plan.channel_columns = 1;
  plan.between = plan.problem.c * plan.problem.s;
  plan.whole = plan.problem.s % plan.vector == 0 && is_counted(plan.problem);
}

void lay_columns(Plan& plan) {
  const Problem& p = plan.problem;
  const std::int64_t widest = most_across * plan.vector;
  plan.layout = Layout::columns;
  plan.per = p.channels_last ? 1 : p.s;
  plan.channel_columns = p.c * plan.per;
  const std::int64_t positions = p.channels_last ? p.per_channel() : p.n;
  // Rows that begin with an access, as wide as a tile.
  const std::int64_t period =
      plan.vector / std::gcd<std::int64_t>(plan.vector, plan.channel_columns);
  const std::int64_t replicas =
      std::min(widest / plan.channel_columns, positions) / period * period;
  const bool narrow = replicas > 0;
  plan.width = narrow ? plan.channel_columns * replicas : plan.channel_columns;
  plan.rows = narrow ? divide_up(positions, replicas) : positions;
  plan.phases = narrow ? 1 : static_cast<int>(period);
  if (narrow) {
    plan.groups = 1;
    plan.group_channels = p.c;
    plan.tile_columns = plan.width;
  } else {
    // Tiles of about the same width, of whole channels, that begin with an access if rows do.
    const std::int64_t whole =
        plan.phases == 1 ? std::lcm<std::int64_t>(plan.vector, plan.per) : plan.per;
    const std::int64_t unit = whole <= widest ? whole : plan.per;
    const std::int64_t most =
        plan.phases == 1 && unit % plan.vector == 0 ? widest : widest - plan.vector + 1;
    const std::int64_t tiles = divide_up(plan.channel_columns, most / unit * unit);
    plan.tile_columns = round_up(divide_up(plan.channel_columns, tiles), unit);
    plan.groups = divide_up(plan.channel_columns, plan.tile_columns);
    plan.group_channels = plan.tile_columns / plan.per;
  }
  const bool aligned = plan.phases == 1 && plan.tile_columns % plan.vector == 0;
  const std::int64_t accesses = aligned ? plan.tile_columns / plan.vector
                                        : (plan.tile_columns + plan.vector - 2) / plan.vector + 1;
  plan.whole = aligned && plan.rows * plan.width == p.size() && is_counted(p);
  plan.across = 1;
  while (plan.across < accesses) plan.across *= 2;
}

// Rows of a tile that a block takes at a time.
std::int64_t rows_at_once(const Plan& plan) {
  return plan.threads / plan.across;
}

// Cuts each group into about so many chunks.
void cut(Plan& plan, std::int64_t wanted) {
  const Problem& p = plan.problem;
  wanted = std::max<std::int64_t>(1, wanted);
  if (plan.layout == Layout::columns) {
    plan.rows_per_chunk = round_up(divide_up(plan.rows, wanted), rows_at_once(plan));
    plan.chunks = divide_up(plan.rows, plan.rows_per_chunk);
    return;
  }
  if (wanted <= p.n) {
    plan.run = p.s;
    plan.rows_per_chunk = divide_up(p.n, wanted);
  } else {
    plan.rows_per_chunk = 1;
    const std::int64_t piece = divide_up(p.s, std::max<std::int64_t>(1, wanted / p.n));
    plan.run = std::min(p.s, round_up(piece, plan.vector));
  }
  plan.pieces = divide_up(p.s, plan.run);
  plan.chunks = divide_up(p.n, plan.rows_per_chunk) * plan.pieces;
  const std::int64_t slots = divide_up(plan.run, plan.vector);
  plan.slots_per_run = plan.whole ? slots : slots + 1;
}

// Bytes in which a block keeps an item.
std::int64_t kept_bytes(Plan& plan, int tensors) {
  plan.places = plan.layout == Layout::rows ? plan.rows_per_chunk * plan.slots_per_run
                                            : plan.rows_per_chunk * plan.across;
  return plan.places * access_bytes * tensors;
}

// Whole groups: nothing passes between blocks.
bool keep_whole(Plan& plan, int tensors, const Limits& limits) {
  plan.threads = keeping_threads(plan.layout, tensors);
  cut(plan, 1);
  const std::int64_t bytes = kept_bytes(plan, tensors);
  if (bytes > whole_bytes) return false;
  if (plan.groups < limits.multiprocessors / 2 && bytes > whole_anyway) return false;
  const std::int64_t needed = divide_up(plan.groups, limits.multiprocessors);
  plan.lag = 0;
  for (plan.ahead = 1; plan.ahead >= 0; --plan.ahead) {
    plan.shared_bytes = bytes * (plan.ahead + 1);
    const std::int64_t fitting = std::min<std::int64_t>(
        (limits.shared_bytes + reserve) / (plan.shared_bytes + bytes_beside(plan) + reserve),
        keeping_blocks(plan.layout, tensors));
    plan.blocks_per_multiprocessor = static_cast<int>(std::min(fitting, needed));
    // To look ahead, some must follow.
    if (fitting > 0 && (plan.ahead == 0 || needed > fitting)) return true;
  }
  return false;
}

// Cuts rows into chunks of about `target` bytes, and at most so many: some samples of a channel, or
// a piece of one.
void cut_to(Plan& plan, int tensors, std::int64_t target, std::int64_t most) {
  const Problem& p = plan.problem;
  const std::int64_t slot_bytes = std::int64_t{access_bytes} * tensors, edge = plan.whole ? 0 : 1;
  const std::int64_t slots = divide_up(p.s, plan.vector), row_bytes = (slots + edge) * slot_bytes;
  const auto fitting = [&](std::int64_t bytes) {
    return std::clamp<std::int64_t>(divide_up(target, bytes), 1,
                                    std::max<std::int64_t>(1, most / bytes));
  };
  if (row_bytes <= most)
    cut(plan, divide_up(p.n, fitting(row_bytes)));
  else
    cut(plan, p.n * divide_up(slots, std::max<std::int64_t>(1, fitting(slot_bytes) - edge)));
}

// Chunks of groups, whose sums meet. Tiles of columns have too many sums for that to be faster than
// to read twice.
bool keep_chunks(Plan& plan, int tensors, const Limits& limits) {
  if (plan.layout == Layout::columns) return false;
  const int per_multiprocessor = keeping_blocks(plan.layout, tensors);
  const std::int64_t blocks = std::int64_t{per_multiprocessor} * limits.multiprocessors;
  cut(plan, 1);
  const std::int64_t group = kept_bytes(plan, tensors);
  plan.ahead = ahead_of_sums;
  plan.blocks_per_multiprocessor = per_multiprocessor;
  for (plan.lag = least_lag; plan.lag <= most_lag; ++plan.lag) {
    const std::int64_t stage =
        ((limits.shared_bytes + reserve) / per_multiprocessor - reserve - bytes_beside(plan)) /
        plan.stages();
    if (stage < access_bytes * plan.threads * tensors) return false;
    // Some items for each block, but no more of one group than there are blocks, if that can be.
    const std::int64_t target = std::max(
        {fewest_bytes * tensors, group * plan.groups / (4 * blocks), divide_up(group, blocks)});
    cut_to(plan, tensors, std::min(target, stage), stage);
    // The items of a group are in so many steps and one more, and it is finished in the one after
    // that, at the latest.
    if (divide_up(plan.chunks, blocks) + 1 > plan.lag) continue;
    plan.shared_bytes = kept_bytes(plan, tensors) * plan.stages();
    return true;
  }
  return false;
}

}  // namespace

Plan make_plan(const Problem& problem, int item, int tensors, bool summed, const Limits& limits) {
  Plan plan{};
  Problem& p = plan.problem;
  p = problem;
  // Other names for the same memory.
  if (p.c == 1) p = {1, 1, p.n * p.s, false};
  if (p.s == 1) p.channels_last = true;
  plan.vector = access_bytes / item;
  plan.threads = block_threads;
  plan.phases = plan.across = 1;
  plan.pieces = 1;
  if (p.channels_last || p.s * item < short_row_bytes)
    lay_columns(plan);
  else
    lay_rows(plan);

  plan.reads = Reads::once;
  if (!summed || !(keep_whole(plan, tensors, limits) || keep_chunks(plan, tensors, limits))) {
    plan.reads = Reads::twice;
    plan.threads = block_threads;
    plan.shared_bytes = plan.ahead = plan.lag = 0;
    const std::int64_t of_group =
        plan.layout == Layout::rows ? p.per_channel() : plan.rows * plan.tile_columns;
    cut(plan, std::clamp<std::int64_t>(
                  std::min(divide_up(enough_blocks, plan.groups), of_group / fewest_values), 1,
                  summed ? most_chunks : most_blocks));
  }
  if (summed && plan.chunks > 1) {
    if (plan.reads == Reads::once) {
      plan.letters = plan.items() + plan.groups * most_coefficients(plan) / letter_bytes;
    } else {
      plan.partials = plan.items() * plan.sums_per_item();
      plan.tickets = plan.groups;
    }
  }
  return plan;
}

std::int64_t blocks_for(std::int64_t size, std::int64_t per_block) {
  return std::clamp<std::int64_t>(divide_up(size, per_block), 1, most_blocks);
}

}  // namespace cuda
}  // namespace bnext
