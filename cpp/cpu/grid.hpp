// How a tensor is cut into tiles: from its shape alone, so that the order of every sum, and with
// it every bit of every result, is the same for any number of threads.
#pragma once

#include <cstdint>

#include "core/args.hpp"

namespace bnext {

// A tile is (group, chunk): some channels, and a part of the values of each.
//
// rows: a group is one channel; its n rows of s contiguous values, taken together, are cut into
//   chunks of chunk_length values.
// columns: the tensor is a matrix of `rows` rows and `width` columns; a group is a run of columns
//   with the whole of some channels, a chunk is chunk_length rows. Used where the rows of a
//   channel are too short for vectors: channels-first with small s (column = channel * s + i), and
//   channels-last (column = channel, or, for few channels, `replicas` times the channels: that
//   many positions side by side, so that 3 channels fill vectors as well as 64 do).
struct Grid {
  Problem problem;
  bool columns;
  std::int64_t rows;        // columns: rows of the matrix
  std::int64_t width;       // columns: its width
  std::int64_t last_width;  // columns: width of its last row, which can be shorter
  std::int64_t replicas;
  std::int64_t group_channels;  // channels of every group but perhaps the last
  std::int64_t groups;
  std::int64_t chunk_length;
  std::int64_t chunks;
  bool streaming;  // results go past the caches

  static constexpr std::int64_t max_group_width = 1024;  // columns of one group

  std::int64_t first_channel(std::int64_t group) const { return group * group_channels; }
  std::int64_t last_channel(std::int64_t group) const {
    const std::int64_t end = (group + 1) * group_channels;
    return end < problem.c ? end : problem.c;
  }
  std::int64_t chunk_begin(std::int64_t chunk) const { return chunk * chunk_length; }
  std::int64_t chunk_end(std::int64_t chunk) const {
    const std::int64_t total = columns ? rows : problem.per_channel();
    const std::int64_t end = (chunk + 1) * chunk_length;
    return end < total ? end : total;
  }
};

Grid make_grid(const Problem& problem);

}  // namespace bnext
