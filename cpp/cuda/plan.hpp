// How an operation is cut into blocks of threads: pure arithmetic, from the shape and the kind of
// device alone, so that the order of every sum, and with it every bit, is fixed. The functions that
// say which block and thread visits what are the kernels' own, and are tested on the host.
#pragma once

#include <cstdint>

#include "core/args.hpp"
#include "core/math.hpp"

namespace bnext {
namespace cuda {

// What a device has.
struct Limits {
  std::int64_t shared_bytes;  // of a block, at most, and of all blocks of a multiprocessor
  int multiprocessors;
};

constexpr int access_bytes = 16;  // of the widest load and store
constexpr int warp_threads = 32;
constexpr int block_threads = 256;
constexpr int most_across = 8;  // accesses side by side in a tile: 128 bytes, a line of the cache

// How values are visited.
//   rows: channels-first. A group is a channel; a chunk of it is some whole samples or a piece of
//     one of them. Each of its runs of contiguous values is cut into slots, which are aligned
//     places of memory of 16 bytes.
//   columns: a matrix of rows, which is summed by columns: channels-last, and channels-first where
//     the runs of a channel are too short to be accesses of their own. Column j of the matrix
//     belongs to channel j % channel_columns / per: `width / channel_columns` positions may lie
//     side by side in a row, where there are few channels; the last row may be short. A group is a
//     tile of columns that has all columns of its channels, a chunk of it is some rows.
enum class Layout { rows, columns };

// How often memory is read.
//   once: one launch. Blocks that all run at the same time take item after item, a chunk of a group
//     each, and keep them in shared memory between the sums and what follows from them.
//   twice: a launch for the sums and one for the rest.
enum class Reads { once, twice };

// Of blocks that keep what they read, so many tensors of it, and how many of them a multiprocessor
// runs at the same time: as registers allow.
constexpr int keeping_threads(Layout layout, int tensors) {
  return layout == Layout::rows && tensors == 1 ? 128 : 256;
}
constexpr int keeping_blocks(Layout layout, int tensors) {
  return 512 / keeping_threads(layout, tensors);
}

struct Plan {
  Problem problem;
  Layout layout;
  Reads reads;
  int vector;           // values of one access
  bool whole;           // all slots are whole accesses, of values that 32 bits count
  int threads;          // of a block
  std::int64_t groups;  // channels, or tiles
  std::int64_t group_channels;
  std::int64_t chunks;  // of each group
  std::int64_t rows_per_chunk;
  // rows
  std::int64_t between;        // values from one sample to the next
  std::int64_t run;            // values of a piece of a sample
  std::int64_t pieces;         // of each sample
  std::int64_t slots_per_run;  // at most
  // columns; of rows, one that is one channel
  std::int64_t rows, width, channel_columns, per;
  std::int64_t tile_columns;
  int across;  // accesses of a tile's row, a power of two
  int phases;  // rows after which one begins at the same place of an access again, a power of two
  // once
  int blocks_per_multiprocessor;
  int ahead;                  // items that are on their way; 0 or 1
  int lag;                    // items between the sums of one and its results
  std::int64_t places;        // slots of an item, those of all threads
  std::int64_t shared_bytes;  // for the values of ahead + lag + 1 items

  // What passes between blocks: reading twice, sums and counters of blocks that are done; once,
  // letters.
  std::int64_t partials, tickets, letters;

  BNEXT_HD std::int64_t items() const { return groups * chunks; }
  BNEXT_HD int stages() const { return ahead + lag + 1; }
  // Sums of an item: the columns of a tile.
  BNEXT_HD std::int64_t sums_per_item() const { return layout == Layout::rows ? 1 : tile_columns; }
};

// For an operation that keeps `tensors` tensors of `item` bytes a value; `summed`: that needs sums.
Plan make_plan(const Problem& problem, int item, int tensors, bool summed, const Limits& limits);

// Blocks of a walk over `size` values, of which one block takes `per_block` at a time.
std::int64_t blocks_for(std::int64_t size, std::int64_t per_block);

// -- what a thread visits -------------------------------------------------------------------------

// Values [first + begin, first + end) in the order of memory, inside an aligned access at `first`.
struct Slot {
  static constexpr bool is_whole = false;
  std::int64_t first;
  int begin, end;

  BNEXT_HD bool has(int e) const { return e >= begin && e < end; }
  BNEXT_HD bool any() const { return end > begin; }
  BNEXT_HD bool whole(int vector) const { return begin == 0 && end == vector; }
  BNEXT_HD unsigned mask() const { return ((1u << end) - 1u) & ~((1u << begin) - 1u); }
};

// All `vector` values of an access, of memory that 32 bits count.
template <int vector>
struct WholeSlot {
  static constexpr bool is_whole = true;
  static constexpr int begin = 0, end = vector;
  int first;

  BNEXT_HD constexpr bool has(int) const { return true; }
  BNEXT_HD constexpr bool any() const { return true; }
  BNEXT_HD constexpr bool whole(int) const { return true; }
  BNEXT_HD constexpr unsigned mask() const { return (1u << vector) - 1u; }
};

// The slots of one thread in a chunk of a channel: number `thread`, and then each `threads`-th
// after it. For one item after another: what is the same for all is found once. `Index` counts
// values.
template <class Index>
class RowSlots {
 public:
  BNEXT_HD RowSlots(const Plan& plan, int thread, int threads)
      : plan_(plan), thread_(thread), threads_(threads) {
    const auto slots = static_cast<unsigned>(plan.slots_per_run);
    slots_ = static_cast<int>(slots);
    first_row_ = static_cast<int>(static_cast<unsigned>(thread) / slots);
    first_slot_ = thread - first_row_ * slots_;
    const auto rows = static_cast<int>(static_cast<unsigned>(threads) / slots);
    slot_step_ = threads - rows * slots_;
    between_ = static_cast<Index>(plan.between);
    step_ = rows * between_;
  }
  BNEXT_HD void start(unsigned channel, unsigned chunk) {
    const auto n = static_cast<Index>(plan_.problem.n), s = static_cast<Index>(plan_.problem.s);
    const auto pieces = static_cast<unsigned>(plan_.pieces);
    Index row = static_cast<Index>(chunk), begin = 0;
    if (pieces > 1) {
      row = static_cast<Index>(chunk / pieces);
      begin = (static_cast<Index>(chunk) - row * static_cast<Index>(pieces)) *
              static_cast<Index>(plan_.run);
    }
    const auto most_rows = static_cast<Index>(plan_.rows_per_chunk);
    row *= most_rows;
    const Index left = n - row, length = s - begin, run = static_cast<Index>(plan_.run);
    length_ = length < run ? length : run;
    total_ = static_cast<int>(left < most_rows ? left : most_rows) * slots_;
    // The last piece is shorter.
    if (plan_.whole && pieces > 1)
      total_ =
          static_cast<int>(static_cast<unsigned>(length_) / static_cast<unsigned>(plan_.vector));
    begin_ = (row + first_row_) * between_ + static_cast<Index>(channel) * s + begin;
    number_ = thread_;
    slot_ = first_slot_;
  }

  BNEXT_HD bool valid() const { return number_ < total_; }
  // Among those of the chunk: where a block keeps it.
  BNEXT_HD int number() const { return number_; }
  BNEXT_HD Index first_if_whole() const { return begin_ + slot_ * plan_.vector; }
  BNEXT_HD Slot get() const {
    const int vector = plan_.vector, offset = slot_ * vector;
    const std::int64_t aligned = begin_ & -static_cast<std::int64_t>(vector);
    const auto from = static_cast<int>(begin_ - aligned) - offset;
    const std::int64_t to = from + length_;
    const int low = from > 0 ? from : 0;
    const int high = to < vector ? static_cast<int>(to) : vector;
    return {aligned + offset, low, high > low ? high : low};
  }
  // Of the group, that of value e of the slot.
  BNEXT_HD int column(int) const { return 0; }
  BNEXT_HD void next() {
    number_ += threads_;
    slot_ += slot_step_;
    begin_ += step_;
    if (slot_ < slots_) return;
    slot_ -= slots_;
    begin_ += between_;
  }

 private:
  const Plan& plan_;
  int thread_, threads_, slots_, first_row_, first_slot_, slot_step_;
  Index between_, step_, begin_ = 0, length_ = 0;
  int number_ = 0, total_ = 0, slot_ = 0;
};

// The places of one thread in a chunk of a tile: an access in each row that is its own. The rows of
// a warp begin at the same place of an access, so that each value of a thread stays in one column.
template <class Index>
class ColumnSlots {
 public:
  BNEXT_HD ColumnSlots(const Plan& plan, int thread, int threads)
      : plan_(plan), thread_(thread), threads_(threads) {
    const int warp = thread / warp_threads, lane = thread % warp_threads;
    const int across = plan.across, together = warp_threads / across;
    width_ = static_cast<Index>(plan.width);
    down_ = threads / across;
    step_ = down_ * width_;
    offset_ = (lane & (across - 1)) * plan.vector;
    first_row_ = warp % plan.phases + plan.phases * (warp / plan.phases * together + lane / across);
  }
  BNEXT_HD void start(unsigned tile, unsigned chunk) {
    const auto per_chunk = static_cast<Index>(plan_.rows_per_chunk);
    const auto rows = static_cast<Index>(plan_.rows), most = static_cast<Index>(plan_.tile_columns);
    const Index row = static_cast<Index>(chunk) * per_chunk + first_row_;
    Index end = static_cast<Index>(chunk + 1) * per_chunk;
    if (end > rows) end = rows;
    const Index first_column = static_cast<Index>(tile) * most;
    Index columns = width_ - first_column;
    if (columns > most) columns = most;
    const Index begin = row * width_ + first_column;
    first_ = (begin & -static_cast<Index>(plan_.vector)) + offset_;
    const auto from = static_cast<int>(begin - first_);
    const Index to = from + columns;
    column_ = -from;
    low_ = from > 0 ? from : 0;
    high_ = to < plan_.vector ? static_cast<int>(to) : plan_.vector;
    left_ = row < end && high_ > low_
                ? static_cast<int>(static_cast<unsigned>(end - row + down_ - 1) /
                                   static_cast<unsigned>(down_))
                : 0;
    number_ = thread_;
  }

  BNEXT_HD bool valid() const { return left_ > 0; }
  BNEXT_HD int number() const { return number_; }
  BNEXT_HD Index first_if_whole() const { return first_; }
  BNEXT_HD Slot get() const {
    const std::int64_t left = plan_.problem.size() - first_;
    const int high = high_ < left ? high_ : static_cast<int>(left);
    return {first_, low_, high > low_ ? high : low_};
  }
  // Of the tile, that of value e of the slot; the same for all slots.
  BNEXT_HD int column(int e) const { return column_ + e; }
  BNEXT_HD bool has(int e) const { return e >= low_ && e < high_; }
  BNEXT_HD void next() {
    number_ += threads_;
    first_ += step_;
    --left_;
  }

 private:
  const Plan& plan_;
  int thread_, threads_, offset_, first_row_, down_;
  Index width_, step_, first_ = 0;
  int left_ = 0, number_ = 0, column_ = 0, low_ = 0, high_ = 0;
};

// The channels of a group: the first, and how many.
BNEXT_HD inline std::int64_t first_channel(const Plan& plan, std::int64_t group) {
  return group * plan.group_channels;
}
BNEXT_HD inline int channels_of(const Plan& plan, std::int64_t group) {
  const std::int64_t left = plan.problem.c - first_channel(plan, group);
  return static_cast<int>(left < plan.group_channels ? left : plan.group_channels);
}
// The channel of a column of a group, counted from its first one.
BNEXT_HD inline int channel_of_column(const Plan& plan, int column) {
  auto channel = static_cast<unsigned>(column);
  if (channel >= plan.channel_columns) channel %= static_cast<unsigned>(plan.channel_columns);
  return static_cast<int>(plan.per == 1 ? channel : channel / static_cast<unsigned>(plan.per));
}

// -- shared memory of a block, beside the values it keeps -----------------------------------------

constexpr int letter_bytes = 16;  // of what one says

// What is known of a channel, at most: for float64, and float32.
BNEXT_HD inline int most_coefficients(const Plan& plan) {
  return plan.vector == 2 ? 64 : 32;
}
// Sums: of its warps, and of all its threads and then the number of its arrival; or, in turns from
// step to step, of its warps, and of columns.
BNEXT_HD inline std::int64_t scratch_sums(const Plan& plan) {
  const std::int64_t columns = plan.sums_per_item();
  const std::int64_t of_warps = plan.threads / warp_threads * columns;
  if (plan.reads == Reads::once) return 2 * of_warps + columns;
  return (of_warps > plan.threads ? of_warps : plan.threads) + 1;
}
// With the coefficients of a group, in turns.
BNEXT_HD inline std::int64_t bytes_beside(const Plan& plan) {
  constexpr int sums_bytes = 16;
  return scratch_sums(plan) * sums_bytes + 2 * plan.group_channels * most_coefficients(plan);
}

}  // namespace cuda
}  // namespace bnext
