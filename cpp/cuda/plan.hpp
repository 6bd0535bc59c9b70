// How an operation is cut into blocks of threads: pure arithmetic, from the shape and the kind of
// device alone, so that the order of every sum, and with it every bit, is fixed. The functions that
// say which block and thread visits what are the kernels' own, and are tested on the host.
#pragma once

#include <cstdint>

#include "core/args.hpp"
#include "core/math.hpp"

namespace bnext {
namespace cuda {

// What the largest block may use; the same for all devices of one compute capability.
struct Limits {
  std::int64_t shared_bytes;  // of a block
  int cluster;                // blocks of a cluster; 1: no clusters
};

constexpr int access_bytes = 16;  // of the widest load and store
constexpr int block_threads = 256;
constexpr int most_threads = 512;  // of a resident block that has no neighbour to fill its gaps

// Paths of batch normalization.
//   resident: one launch; the blocks of a cluster hold a channel in their shared memory between the
//     sums and what follows from them, so that memory is read once.
//   rows: channels-first, in two launches: sums of (channel, chunk), then the rest.
//   columns: a matrix of rows, which is summed by columns: channels-last, and channels-first where
//     the rows of a channel are too short to be accesses of their own. Two launches.
//   columns_once: the same in one launch, for few rows.
enum class Path { resident, rows, columns, columns_once };

// rows, resident: a chunk is some whole samples of a channel or a piece of one of them; its runs of
//   contiguous values are cut into slots, which are aligned places of memory of 16 bytes, counted
//   over all runs of the chunk.
// columns: column j of the matrix belongs to channel j % channel_columns / per. `replicas`
//   positions lie side by side in a row, so that rows are whole accesses also for odd numbers of
//   channels; the last row may be short.
struct Plan {
  Problem problem;
  Path path;
  int vector;           // values of one access
  int threads;          // of a block
  std::int64_t chunks;  // rows, resident: of each channel; columns: of the rows
  std::int64_t rows_per_chunk;
  // rows, resident
  std::int64_t run;            // values of a piece of a sample
  std::int64_t pieces;         // of each sample
  std::int64_t slots_per_run;  // at most
  int cluster;                 // resident: blocks; those beyond `chunks` only wait
  // columns
  std::int64_t rows, width, channel_columns, per;
  std::int64_t tile_vectors, tiles;  // accesses side by side of one block, and how many such blocks
  bool own_tiles;                    // every channel lies in one tile

  std::int64_t shared_bytes;
  std::int64_t partials;  // sums that pass between launches
  std::int64_t tickets;   // counters of blocks that are done
};

// For an operation whose `resident` path keeps `tensors` tensors of `item` bytes a value.
Plan make_plan(const Problem& problem, int item, int tensors, const Limits& limits);

// Blocks of a walk over `size` values, of which one block takes `per_block` at a time.
std::int64_t blocks_for(std::int64_t size, std::int64_t per_block);

// -- what a thread visits -------------------------------------------------------------------------

// Values [first + begin, first + end) in the order of memory, inside an aligned access at `first`.
struct Slot {
  std::int64_t first;
  int begin, end;

  BNEXT_HD bool has(int e) const { return e >= begin && e < end; }
  BNEXT_HD unsigned mask() const { return ((1u << end) - 1u) & ~((1u << begin) - 1u); }
};

// The slots of one thread in chunk `chunk` of channel `channel`: number `thread`, and then each
// `threads`-th after it.
class RowSlots {
 public:
  BNEXT_HD RowSlots(const Plan& plan, std::int64_t channel, std::int64_t chunk, int thread,
                    int threads)
      : slots_(plan.slots_per_run), number_(thread), threads_(threads), vector_(plan.vector) {
    const Problem& p = plan.problem;
    const std::int64_t first_row = chunk / plan.pieces * plan.rows_per_chunk;
    std::int64_t last_row = first_row + plan.rows_per_chunk;
    if (last_row > p.n) last_row = p.n;
    const std::int64_t begin = chunk % plan.pieces * plan.run;
    length_ = p.s - begin < plan.run ? p.s - begin : plan.run;
    between_ = p.c * p.s;
    start_ = (first_row * p.c + channel) * p.s + begin;
    rows_ = chunk < plan.chunks && last_row > first_row ? last_row - first_row : 0;
    row_ = thread / slots_;
    slot_ = thread % slots_;
    row_step_ = threads / slots_;
    slot_step_ = threads % slots_;
  }

  BNEXT_HD bool valid() const { return row_ < rows_; }
  // Among those of the chunk: where a resident block keeps it.
  BNEXT_HD std::int64_t number() const { return number_; }
  BNEXT_HD std::int64_t values() const { return rows_ * length_; }
  BNEXT_HD Slot get() const {
    const std::int64_t begin = start_ + row_ * between_, end = begin + length_;
    const std::int64_t first = (begin / vector_ + slot_) * vector_;
    const std::int64_t from = begin - first, to = end - first;
    const int low = from > 0 ? static_cast<int>(from) : 0;
    const int high = to < vector_ ? static_cast<int>(to) : vector_;
    return {first, low, high > low ? high : low};
  }
  BNEXT_HD void next() {
    number_ += threads_;
    row_ += row_step_;
    slot_ += slot_step_;
    if (slot_ < slots_) return;
    slot_ -= slots_;
    ++row_;
  }

 private:
  std::int64_t slots_, number_, threads_, start_, between_, length_, rows_, row_, slot_, row_step_,
      slot_step_;
  int vector_;
};

// The places of one thread in tile `tile` of chunk `chunk`: an access of its own in each row.
class ColumnSlots {
 public:
  BNEXT_HD ColumnSlots(const Plan& plan, std::int64_t tile, std::int64_t chunk, int thread,
                       int threads)
      : width_(plan.width), size_(plan.problem.size()), vector_(plan.vector) {
    const std::int64_t across = plan.tile_vectors;
    down_ = threads / across;
    const std::int64_t x = thread % across;
    column_ = (tile * across + x) * vector_;
    row_ = chunk * plan.rows_per_chunk + thread / across;
    end_ = (chunk + 1) * plan.rows_per_chunk;
    if (end_ > plan.rows) end_ = plan.rows;
    if (thread >= across * down_ || column_ >= width_) row_ = end_;
  }

  BNEXT_HD bool valid() const { return row_ < end_; }
  BNEXT_HD std::int64_t column() const { return column_; }
  BNEXT_HD Slot get() const {
    const std::int64_t first = row_ * width_ + column_;
    std::int64_t count = width_ - column_ < size_ - first ? width_ - column_ : size_ - first;
    if (count > vector_) count = vector_;
    return {first, 0, count > 0 ? static_cast<int>(count) : 0};
  }
  BNEXT_HD void next() { row_ += down_; }

 private:
  std::int64_t width_, size_, row_, end_, column_, down_;
  int vector_;
};

BNEXT_HD inline std::int64_t channel_of_column(const Plan& plan, std::int64_t column) {
  return column % plan.channel_columns / plan.per;
}

}  // namespace cuda
}  // namespace bnext
