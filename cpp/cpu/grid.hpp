// How a tensor is cut into tiles: from its shape alone, so that the order of every sum, and with
// it every bit of every result, is the same for any number of threads.
#pragma once

#include <cstdint>

#include "core/args.hpp"
#include "core/philox.hpp"

namespace bnext {

// Bytes for the words of a mask that a run has bits of, which may begin anywhere in a word. Whole
// vectors of words are written: there must be room for as many more as the longest ones have.
constexpr std::int64_t spare_mask_words = 7;
constexpr std::int64_t mask_room(std::int64_t run) {
  return (run / mask_word_size + 2 + spare_mask_words) * mask_word_bytes;
}

// A tile is (group, chunk): some channels, and a part of the values of each.
//
// rows: a chunk is some whole samples, or, where one has many values, a piece of one sample. A
// group
//   is some neighbouring channels, so that the tile has a contiguous run in each sample.
// columns: the tensor is a matrix of `rows` rows and `width` columns; a group is a run of columns
//   with the whole of some channels, a chunk is some rows. Used where the rows of a channel are too
//   short for vectors: channels-first with small s (column = channel * s + i), and channels-last
//   (column = channel, or, for few channels, `replicas` times the channels: that many positions
//   side by side, so that 3 channels fill vectors as well as 64 do).
struct Grid {
  Problem problem;
  bool columns;
  std::int64_t rows;            // samples, or rows of the matrix
  std::int64_t width;           // columns: of the matrix
  std::int64_t last_width;      // columns: of the last row, which can be shorter
  std::int64_t replicas;        // columns
  std::int64_t group_channels;  // channels of every group but perhaps the last
  std::int64_t groups;
  std::int64_t group_inputs;    // rows: bytes that are read of a group
  std::int64_t rows_per_chunk;  // of every chunk but perhaps the last
  std::int64_t pieces;          // rows: of each sample; more than 1 only with 1 row a chunk
  std::int64_t chunks;
  bool streaming;      // results go past the caches, and inputs come from memory
  bool far;            // inputs lie beyond the cache of a core, and are asked for early
  bool sum_next;       // rows: the sums of the next group are made on the way of writing this one
  bool summed_before;  // sums have just been made, so that their inputs are in the cache
  bool fetch_rows;     // columns: sums fetch the rows that are next, contiguous ones

  static constexpr std::int64_t max_group_width = 1024;   // columns of one group
  static constexpr std::int64_t max_group_channels = 64;  // rows: channels of one group

  std::int64_t first_channel(std::int64_t group) const { return group * group_channels; }
  std::int64_t last_channel(std::int64_t group) const {
    const std::int64_t end = (group + 1) * group_channels;
    return end < problem.c ? end : problem.c;
  }
  // Cuts every piece of the rows into chunks of so many.
  void cut(std::int64_t rows_of_a_chunk);

  std::int64_t first_row(std::int64_t chunk) const { return chunk / pieces * rows_per_chunk; }
  std::int64_t last_row(std::int64_t chunk) const {
    const std::int64_t end = first_row(chunk) + rows_per_chunk;
    return end < rows ? end : rows;
  }
  // Whether the rows of a chunk lie side by side.
  bool one_run() const { return columns && groups == 1; }
  // Runs of contiguous values of tiles, and how long they are at most.
  std::int64_t runs() const {
    return one_run() ? chunks : columns ? rows * groups : problem.n * groups * pieces;
  }
  std::int64_t longest_run() const {
    return one_run() ? rows_per_chunk * width
           : columns ? (width < max_group_width ? width : max_group_width)
                     : group_channels * ((problem.s + pieces - 1) / pieces);
  }
  std::int64_t noted_bytes() const { return mask_room(longest_run()); }
  // Where in each row of a channel the runs of a chunk begin and end, in rows.
  std::int64_t first_value(std::int64_t chunk) const { return chunk % pieces * problem.s / pieces; }
  std::int64_t last_value(std::int64_t chunk) const {
    return (chunk % pieces + 1) * problem.s / pieces;
  }
};

// Whether to write past the caches: a result would not stay there until somebody reads it, and
// would push out the input, which a second pass reads again. `bytes` are those of inputs and
// results.
bool worth_streaming(std::int64_t bytes);

// For an operation that takes `tensors` tensors of `item` bytes a value through the caches.
Grid make_grid(const Problem& problem, std::int64_t tensors, std::int64_t item);

}  // namespace bnext
