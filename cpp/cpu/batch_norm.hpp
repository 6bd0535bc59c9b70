// Batch Normalization over one tile of a Grid: serial loops, written once, compiled once per
// instruction set. No std templates here: their inline code would be offered to the linker for
// processors that cannot run it.
#pragma once

#include "cpu/launch.hpp"
#include "cpu/simd.hpp"

namespace bnext {
namespace {

// -- rows: one channel, in runs of contiguous values ---------------------------------------------

// Calls run(offset, length) for the contiguous runs of a tile.
template <class Run>
inline __attribute__((always_inline)) void for_each_run(const Grid& grid, std::int64_t channel,
                                                        std::int64_t chunk, Run run) {
  const Problem& p = grid.problem;
  std::int64_t value = grid.chunk_begin(chunk);
  const std::int64_t end = grid.chunk_end(chunk);
  std::int64_t n = value / p.s, i = value % p.s;
  while (value < end) {
    const std::int64_t length = p.s - i < end - value ? p.s - i : end - value;
    run((n * p.c + channel) * p.s + i, length);
    value += length;
    ++n;
    i = 0;
  }
}

template <class T>
inline __attribute__((always_inline)) void pad(const T* from, std::int64_t length, T fill, T* to) {
  for (std::int64_t l = 0; l < lanes; ++l) to[l] = l < length ? from[l] : fill;
}

template <class T>
void moments_rows(const Grid& grid, std::int64_t channel, std::int64_t chunk, const T* x,
                  Moments* partials) {
  const Problem& p = grid.problem;
  const std::int64_t begin = grid.chunk_begin(chunk);
  const T shift = x[(begin / p.s * p.c + channel) * p.s + begin % p.s];
  const auto center = static_cast<double>(shift);
  Wide total{}, squares{};
  const auto add = [&](const T* values) __attribute__((always_inline)) {
    const Wide v = load(values);
    const f64x8 low = v.low - center, high = v.high - center;
    total.low += low;
    total.high += high;
    squares.low += low * low;
    squares.high += high * high;
  };
  for_each_run(grid, channel, chunk, [&](std::int64_t offset, std::int64_t length) {
    const T* run = x + offset;
    std::int64_t i = 0;
    for (; i + lanes <= length; i += lanes) add(run + i);
    if (i < length) {
      T padded[lanes];  // with the shift, which adds nothing
      pad(run + i, length - i, shift, padded);
      add(padded);
    }
  });
  const auto count = static_cast<double>(grid.chunk_end(chunk) - begin);
  partials[channel * grid.chunks + chunk] =
      moments_from_shifted(count, center, sum(total), sum(squares));
}

template <class T, class Epilogue>
void apply_rows(const Grid& grid, std::int64_t channel, std::int64_t chunk, const T* x,
                const Affine<T>* forward, T slope, T* y) {
  const Affine<T> f = forward[channel];
  for_each_run(grid, channel, chunk, [&](std::int64_t offset, std::int64_t length) {
    const T* from = x + offset;
    T* to = y + offset;
#pragma omp simd
    for (std::int64_t i = 0; i < length; ++i) to[i] = Epilogue::value(apply(f, from[i]), slope);
  });
}

template <class T, class Epilogue>
void grad_sums_rows(const Grid& grid, std::int64_t channel, std::int64_t chunk, const T* grad_y,
                    const T* x, const double* mean, const Affine<T>* forward, T slope,
                    GradSums* partials) {
  const double center = mean[channel];
  const Affine<T> f = forward[channel];
  Wide total{}, products{};
  const auto add = [&](const T* g, const T* values) __attribute__((always_inline)) {
    T scaled[lanes];
    for (std::int64_t l = 0; l < lanes; ++l)
      scaled[l] = g[l] * Epilogue::derivative(apply(f, values[l]), slope);
    const Wide dg = load(scaled), v = load(values);
    total.low += dg.low;
    total.high += dg.high;
    products.low += dg.low * (v.low - center);
    products.high += dg.high * (v.high - center);
  };
  for_each_run(grid, channel, chunk, [&](std::int64_t offset, std::int64_t length) {
    std::int64_t i = 0;
    for (; i + lanes <= length; i += lanes) add(grad_y + offset + i, x + offset + i);
    if (i < length) {
      T padded_g[lanes], padded_x[lanes];
      pad(grad_y + offset + i, length - i, T{0}, padded_g);
      pad(x + offset + i, length - i, f.mean, padded_x);
      add(padded_g, padded_x);
    }
  });
  partials[channel * grid.chunks + chunk] = {sum(total), sum(products)};
}

template <class T, class Epilogue>
void apply_grad_rows(const Grid& grid, std::int64_t channel, std::int64_t chunk, const T* grad_y,
                     const T* x, const Affine<T>* forward, const GradAffine<T>* backward, T slope,
                     T* grad_x) {
  const Affine<T> f = forward[channel];
  const GradAffine<T> b = backward[channel];
  for_each_run(grid, channel, chunk, [&](std::int64_t offset, std::int64_t length) {
    const T* g = grad_y + offset;
    const T* values = x + offset;
    T* to = grad_x + offset;
#pragma omp simd
    for (std::int64_t i = 0; i < length; ++i)
      to[i] = apply(b, g[i] * Epilogue::derivative(apply(f, values[i]), slope), values[i]);
  });
}

// -- columns: some channels, as columns of a matrix ----------------------------------------------

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

// Calls column(w, channel) for w in [0, width), channels counted from the group's first.
template <class Column>
inline __attribute__((always_inline)) void for_each_column(const Grid& grid, const Columns& columns,
                                                           Column column) {
  std::int64_t w = 0;
  if (grid.problem.channels_last) {
    for (std::int64_t r = 0; r < grid.replicas; ++r)
      for (std::int64_t c = 0; c < columns.channels; ++c) column(w++, c);
  } else {
    for (std::int64_t c = 0; c < columns.channels; ++c)
      for (std::int64_t i = 0; i < grid.problem.s; ++i) column(w++, c);
  }
}

// Columns of this group that row r has.
inline std::int64_t row_width(const Grid& grid, const Columns& columns, std::int64_t r) {
  return r + 1 < grid.rows || grid.replicas == 1 ? columns.width : grid.last_width;
}

// Calls body(r, width, count) for runs of `count` rows, 4 where possible, of equal width.
template <class Body>
inline __attribute__((always_inline)) void for_each_rows(const Grid& grid, const Columns& columns,
                                                         std::int64_t chunk, Body body) {
  std::int64_t r = grid.chunk_begin(chunk);
  const std::int64_t end = grid.chunk_end(chunk);
  while (r < end) {
    const bool four = r + 4 <= end && row_width(grid, columns, r + 3) == columns.width;
    body(r, row_width(grid, columns, r), four ? 4 : 1);
    r += four ? 4 : 1;
  }
}

template <class T>
void moments_columns(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* x,
                     Moments* partials) {
  const Columns columns(grid, group);
  double center[Grid::max_group_width], total[Grid::max_group_width],
      squares[Grid::max_group_width];
  // Shift by the first value of each channel in this tile.
  const T* head = x + grid.chunk_begin(chunk) * grid.width + columns.first;
  const std::int64_t stride = grid.problem.channels_last ? 1 : grid.problem.s;
  for_each_column(grid, columns, [&](std::int64_t w, std::int64_t c) {
    center[w] = static_cast<double>(head[c * stride]);
    total[w] = 0;
    squares[w] = 0;
  });
  for_each_rows(grid, columns, chunk, [&](std::int64_t r, std::int64_t width, int count) {
    const T* row = x + r * grid.width + columns.first;
    if (count == 4) {
      const T *row1 = row + grid.width, *row2 = row1 + grid.width, *row3 = row2 + grid.width;
#pragma omp simd
      for (std::int64_t w = 0; w < width; ++w) {
        const double a = row[w] - center[w], b = row1[w] - center[w], c = row2[w] - center[w],
                     d = row3[w] - center[w];
        total[w] += (a + b) + (c + d);
        squares[w] += (a * a + b * b) + (c * c + d * d);
      }
      return;
    }
#pragma omp simd
    for (std::int64_t w = 0; w < width; ++w) {
      const double a = row[w] - center[w];
      total[w] += a;
      squares[w] += a * a;
    }
  });
  double sums[Grid::max_group_width], sumsqs[Grid::max_group_width], centers[Grid::max_group_width];
  for (std::int64_t c = 0; c < columns.channels; ++c) sums[c] = sumsqs[c] = 0;
  for_each_column(grid, columns, [&](std::int64_t w, std::int64_t c) {
    sums[c] += total[w];
    sumsqs[c] += squares[w];
    centers[c] = center[w];
  });
  // Values of one channel in this tile: a short last row has fewer.
  const std::int64_t rows = grid.chunk_end(chunk) - grid.chunk_begin(chunk);
  const std::int64_t missing = columns.width - row_width(grid, columns, grid.chunk_end(chunk) - 1);
  const auto count = static_cast<double>((rows * columns.width - missing) / columns.channels);
  for (std::int64_t c = 0; c < columns.channels; ++c)
    partials[(columns.first_channel + c) * grid.chunks + chunk] =
        moments_from_shifted(count, centers[c], sums[c], sumsqs[c]);
}

// Coefficients of each column, one array per field so that loops over columns are vectors.
template <class T>
struct ColumnAffine {
  T mean[Grid::max_group_width], scale[Grid::max_group_width], shift[Grid::max_group_width];

  ColumnAffine(const Grid& grid, const Columns& columns, const Affine<T>* forward) {
    for_each_column(grid, columns, [&](std::int64_t w, std::int64_t c) {
      const Affine<T>& f = forward[columns.first_channel + c];
      mean[w] = f.mean;
      scale[w] = f.scale;
      shift[w] = f.shift;
    });
  }

  inline __attribute__((always_inline)) Affine<T> operator[](std::int64_t w) const {
    return {mean[w], scale[w], shift[w]};
  }
};

template <class T, class Epilogue>
void apply_columns(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* x,
                   const Affine<T>* forward, T slope, T* y) {
  const Columns columns(grid, group);
  const ColumnAffine<T> f(grid, columns, forward);
  for (std::int64_t r = grid.chunk_end(chunk); r-- > grid.chunk_begin(chunk);) {
    const T* from = x + r * grid.width + columns.first;
    T* to = y + r * grid.width + columns.first;
    const std::int64_t width = row_width(grid, columns, r);
#pragma omp simd
    for (std::int64_t w = 0; w < width; ++w) to[w] = Epilogue::value(apply(f[w], from[w]), slope);
  }
}

template <class T, class Epilogue>
void grad_sums_columns(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* grad_y,
                       const T* x, const double* mean, const Affine<T>* forward, T slope,
                       GradSums* partials) {
  const Columns columns(grid, group);
  const ColumnAffine<T> f(grid, columns, forward);
  double center[Grid::max_group_width], total[Grid::max_group_width],
      products[Grid::max_group_width];
  for_each_column(grid, columns, [&](std::int64_t w, std::int64_t c) {
    center[w] = mean[columns.first_channel + c];
    total[w] = 0;
    products[w] = 0;
  });
  for (std::int64_t r = grid.chunk_begin(chunk); r < grid.chunk_end(chunk); ++r) {
    const T* g = grad_y + r * grid.width + columns.first;
    const T* values = x + r * grid.width + columns.first;
    const std::int64_t width = row_width(grid, columns, r);
#pragma omp simd
    for (std::int64_t w = 0; w < width; ++w) {
      const double dg = g[w] * Epilogue::derivative(apply(f[w], values[w]), slope);
      total[w] += dg;
      products[w] += dg * (values[w] - center[w]);
    }
  }
  GradSums sums[Grid::max_group_width];
  for (std::int64_t c = 0; c < columns.channels; ++c) sums[c] = {0, 0};
  for_each_column(grid, columns, [&](std::int64_t w, std::int64_t c) {
    sums[c].g += total[w];
    sums[c].gx += products[w];
  });
  for (std::int64_t c = 0; c < columns.channels; ++c)
    partials[(columns.first_channel + c) * grid.chunks + chunk] = sums[c];
}

template <class T, class Epilogue>
void apply_grad_columns(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* grad_y,
                        const T* x, const Affine<T>* forward, const GradAffine<T>* backward,
                        T slope, T* grad_x) {
  const Columns columns(grid, group);
  const ColumnAffine<T> f(grid, columns, forward);
  T g_mean[Grid::max_group_width], g_scale[Grid::max_group_width], x_scale[Grid::max_group_width],
      shift[Grid::max_group_width];
  for_each_column(grid, columns, [&](std::int64_t w, std::int64_t c) {
    const GradAffine<T>& b = backward[columns.first_channel + c];
    g_mean[w] = b.g_mean;
    g_scale[w] = b.g_scale;
    x_scale[w] = b.x_scale;
    shift[w] = b.shift;
  });
  for (std::int64_t r = grid.chunk_end(chunk); r-- > grid.chunk_begin(chunk);) {
    const T* g = grad_y + r * grid.width + columns.first;
    const T* values = x + r * grid.width + columns.first;
    T* to = grad_x + r * grid.width + columns.first;
    const std::int64_t width = row_width(grid, columns, r);
#pragma omp simd
    for (std::int64_t w = 0; w < width; ++w) {
      const GradAffine<T> b{g_mean[w], g_scale[w], f.mean[w], x_scale[w], shift[w]};
      to[w] = apply(b, g[w] * Epilogue::derivative(apply(f[w], values[w]), slope), values[w]);
    }
  }
}

// -- the choice between the two ------------------------------------------------------------------

template <class T>
void moments(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* x,
             Moments* partials) {
  (grid.columns ? moments_columns<T> : moments_rows<T>)(grid, group, chunk, x, partials);
}

template <class T, class Epilogue>
void apply(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* x,
           const Affine<T>* forward, T slope, T* y) {
  (grid.columns ? apply_columns<T, Epilogue> : apply_rows<T, Epilogue>)(grid, group, chunk, x,
                                                                        forward, slope, y);
}

template <class T, class Epilogue>
void grad_sums(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* grad_y,
               const T* x, const double* mean, const Affine<T>* forward, T slope,
               GradSums* partials) {
  (grid.columns ? grad_sums_columns<T, Epilogue>
                : grad_sums_rows<T, Epilogue>)(grid, group, chunk, grad_y, x, mean, forward, slope,
                                               partials);
}

template <class T, class Epilogue>
void apply_grad(const Grid& grid, std::int64_t group, std::int64_t chunk, const T* grad_y,
                const T* x, const Affine<T>* forward, const GradAffine<T>* backward, T slope,
                T* grad_x) {
  (grid.columns ? apply_grad_columns<T, Epilogue>
                : apply_grad_rows<T, Epilogue>)(grid, group, chunk, grad_y, x, forward, backward,
                                                slope, grad_x);
}

}  // namespace
}  // namespace bnext
