#include "core/winograd.hpp"

#include <algorithm>
#include <vector>

namespace bnext {
namespace {

using std::int64_t;

// Planes are held as four, by the parity of row and column, so that all elements (i, j) of the
// tiles of a plane lie side by side and every loop below runs over contiguous memory.
template <class T>
struct Parities {
  int64_t rows, columns;
  std::vector<T> values;

  Parities(int64_t rows_, int64_t columns_)
      : rows(rows_), columns(columns_), values(static_cast<std::size_t>(4 * rows_ * columns_)) {}

  T* plane(int64_t row_parity, int64_t column_parity) {
    return values.data() + (2 * row_parity + column_parity) * rows * columns;
  }
  T* at(int64_t row, int64_t column_parity) {
    return plane(row % 2, column_parity) + row / 2 * columns;
  }
};

// Elements outside of x are left alone.
template <class T>
void split(const T* x, const Images& images, const int64_t padding[2], Parities<T>& planes) {
  for (int64_t i = 0; i < images.height; ++i)
    for (const int64_t parity : {0, 1}) {
      T* const to = planes.at(i + padding[0], parity);
      const int64_t start = (parity + padding[1]) % 2;
      T* __restrict out = to + (start + padding[1]) / 2;
      const T* __restrict from = x + i * images.width + start;
      const int64_t count = (images.width - start + 1) / 2;
      for (int64_t k = 0; k < count; ++k) out[k] = from[2 * k];
    }
}

template <class T>
void join(Parities<T>& planes, const Images& images, const int64_t padding[2], T* x) {
  for (int64_t i = 0; i < images.height; ++i)
    for (const int64_t parity : {0, 1}) {
      const T* const from = planes.at(i + padding[0], parity);
      const int64_t start = (parity + padding[1]) % 2;
      const T* __restrict in = from + (start + padding[1]) / 2;
      T* __restrict out = x + i * images.width + start;
      const int64_t count = (images.width - start + 1) / 2;
      for (int64_t k = 0; k < count; ++k) out[2 * k] = in[k];
    }
}

// Calls plane(x of the plane, its tiles' element 0) for every plane; element k of the tiles lies
// k * step further.
template <class T, class Plane>
void for_each_plane(T* x, const Images& images, int64_t tiles, Plane plane) {
  for (int64_t c = 0; c < images.channels; ++c)
    for (int64_t n = 0; n < images.samples; ++n)
      plane(x + n * images.sample_stride + c * images.height * images.width,
            (c * images.samples + n) * tiles);
}

constexpr int64_t no_padding[2] = {0, 0};

}  // namespace

template <class T>
void winograd_input(const T* x, const Images& images, const Tiling& tiling, T* tiles) {
  const int64_t rows = tiling.tiles(0, images.height), columns = tiling.tiles(1, images.width);
  const int64_t wide = columns + 1, step = images.channels * images.samples * rows * columns;
  Parities<T> planes(rows + 1, wide);  // its padding stays zero
  std::vector<T> scratch(static_cast<std::size_t>(8 * rows * wide));

  for_each_plane(x, images, rows * columns, [&](const T* plane, int64_t offset) {
    split(plane, images, tiling.padding, planes);
    for (const int64_t parity : {0, 1}) {
      const T* __restrict d0 = planes.plane(0, parity);
      const T* __restrict d1 = planes.plane(1, parity);
      T* __restrict to = scratch.data() + 4 * parity * rows * wide;
      const int64_t size = rows * wide;
      for (int64_t k = 0; k < size; ++k) {
        const T d2 = d0[k + wide], d3 = d1[k + wide];
        to[k] = d0[k] - d2;
        to[k + size] = d1[k] + d2;
        to[k + 2 * size] = d2 - d1[k];
        to[k + 3 * size] = d1[k] - d3;
      }
    }
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t p = 0; p < rows; ++p) {
        const T* __restrict even = scratch.data() + (i * rows + p) * wide;
        const T* __restrict odd = even + 4 * rows * wide;
        T* __restrict to0 = tiles + 4 * i * step + offset + p * columns;
        T* __restrict to1 = to0 + step;
        T* __restrict to2 = to1 + step;
        T* __restrict to3 = to2 + step;
        for (int64_t q = 0; q < columns; ++q) {
          to0[q] = even[q] - even[q + 1];
          to1[q] = odd[q] + even[q + 1];
          to2[q] = even[q + 1] - odd[q];
          to3[q] = odd[q] - odd[q + 1];
        }
      }
  });
}

template <class T>
void winograd_input_transpose(const T* tiles, const Images& images, const Tiling& tiling, T* x) {
  const int64_t rows = tiling.tiles(0, images.height), columns = tiling.tiles(1, images.width);
  const int64_t wide = columns + 1, size = rows * wide;
  const int64_t step = images.channels * images.samples * rows * columns;
  Parities<T> planes(rows + 1, wide);
  std::vector<T> scratch(static_cast<std::size_t>(8 * size));

  for_each_plane(x, images, rows * columns, [&](T* plane, int64_t offset) {
    for (int64_t i = 0; i < 4; ++i)
      for (int64_t p = 0; p < rows; ++p) {
        T* __restrict even = scratch.data() + (i * rows + p) * wide;
        T* __restrict odd = even + 4 * size;
        const T* __restrict v0 = tiles + 4 * i * step + offset + p * columns;
        const T* __restrict v1 = v0 + step;
        const T* __restrict v2 = v1 + step;
        const T* __restrict v3 = v2 + step;
        even[0] = v0[0];
        odd[0] = v1[0] - v2[0] + v3[0];
        for (int64_t q = 1; q < columns; ++q) {
          even[q] = v0[q] + (v1[q - 1] + v2[q - 1] - v0[q - 1]);
          odd[q] = (v1[q] - v2[q] + v3[q]) - v3[q - 1];
        }
        even[columns] = v1[columns - 1] + v2[columns - 1] - v0[columns - 1];
        odd[columns] = -v3[columns - 1];
      }
    for (const int64_t parity : {0, 1}) {
      const T* __restrict v0 = scratch.data() + 4 * parity * size;
      const T* __restrict v1 = v0 + size;
      const T* __restrict v2 = v1 + size;
      const T* __restrict v3 = v2 + size;
      T* __restrict d0 = planes.plane(0, parity);
      T* __restrict d1 = planes.plane(1, parity);
      for (int64_t k = 0; k < size; ++k) {
        d0[k] = v0[k];
        d1[k] = v1[k] - v2[k] + v3[k];
      }
      std::fill(d0 + size, d0 + size + wide, T(0));
      std::fill(d1 + size, d1 + size + wide, T(0));
      for (int64_t k = 0; k < size; ++k) {
        d0[k + wide] += v1[k] + v2[k] - v0[k];
        d1[k + wide] -= v3[k];
      }
    }
    join(planes, images, tiling.padding, plane);
  });
}

template <class T>
void winograd_output(const T* tiles, const Images& images, T* y) {
  const int64_t rows = (images.height + 1) / 2, columns = (images.width + 1) / 2;
  const int64_t size = rows * columns, step = images.channels * images.samples * size;
  Parities<T> planes(rows, columns);
  std::vector<T> scratch(static_cast<std::size_t>(8 * size));

  for_each_plane(y, images, size, [&](T* plane, int64_t offset) {
    for (int64_t j = 0; j < 4; ++j) {
      const T* __restrict m0 = tiles + j * step + offset;
      const T* __restrict m1 = m0 + 4 * step;
      const T* __restrict m2 = m1 + 4 * step;
      const T* __restrict m3 = m2 + 4 * step;
      T* __restrict upper = scratch.data() + j * size;
      T* __restrict lower = upper + 4 * size;
      for (int64_t k = 0; k < size; ++k) {
        upper[k] = m0[k] + m1[k] + m2[k];
        lower[k] = m1[k] - m2[k] - m3[k];
      }
    }
    for (const int64_t parity : {0, 1}) {
      const T* __restrict m0 = scratch.data() + 4 * parity * size;
      const T* __restrict m1 = m0 + size;
      const T* __restrict m2 = m1 + size;
      const T* __restrict m3 = m2 + size;
      T* __restrict even = planes.plane(parity, 0);
      T* __restrict odd = planes.plane(parity, 1);
      for (int64_t k = 0; k < size; ++k) {
        even[k] = m0[k] + m1[k] + m2[k];
        odd[k] = m1[k] - m2[k] - m3[k];
      }
    }
    join(planes, images, no_padding, plane);
  });
}

template <class T>
void winograd_output_transpose(const T* y, const Images& images, T* tiles) {
  const int64_t rows = (images.height + 1) / 2, columns = (images.width + 1) / 2;
  const int64_t size = rows * columns, step = images.channels * images.samples * size;
  Parities<T> planes(rows, columns);  // what an odd size leaves of the last tiles stays zero
  std::vector<T> scratch(static_cast<std::size_t>(8 * size));

  for_each_plane(y, images, size, [&](const T* plane, int64_t offset) {
    split(plane, images, no_padding, planes);
    for (const int64_t parity : {0, 1}) {
      const T* __restrict even = planes.plane(parity, 0);
      const T* __restrict odd = planes.plane(parity, 1);
      T* __restrict m0 = scratch.data() + 4 * parity * size;
      T* __restrict m1 = m0 + size;
      T* __restrict m2 = m1 + size;
      T* __restrict m3 = m2 + size;
      for (int64_t k = 0; k < size; ++k) {
        m0[k] = even[k];
        m1[k] = even[k] + odd[k];
        m2[k] = even[k] - odd[k];
        m3[k] = -odd[k];
      }
    }
    for (int64_t j = 0; j < 4; ++j) {
      const T* __restrict upper = scratch.data() + j * size;
      const T* __restrict lower = upper + 4 * size;
      T* __restrict m0 = tiles + j * step + offset;
      T* __restrict m1 = m0 + 4 * step;
      T* __restrict m2 = m1 + 4 * step;
      T* __restrict m3 = m2 + 4 * step;
      for (int64_t k = 0; k < size; ++k) {
        m0[k] = upper[k];
        m1[k] = upper[k] + lower[k];
        m2[k] = upper[k] - lower[k];
        m3[k] = -lower[k];
      }
    }
  });
}

#define BNEXT_INSTANTIATE(T)                                                          \
  template void winograd_input(const T*, const Images&, const Tiling&, T*);           \
  template void winograd_input_transpose(const T*, const Images&, const Tiling&, T*); \
  template void winograd_output(const T*, const Images&, T*);                         \
  template void winograd_output_transpose(const T*, const Images&, T*);
BNEXT_INSTANTIATE(float)
BNEXT_INSTANTIATE(double)
#undef BNEXT_INSTANTIATE

}  // namespace bnext
