#include "core/im2col.hpp"

#include <algorithm>

namespace bnext {
namespace {

using std::int64_t;

// Calls plane(rows, columns, start) for every plane of cols in order. Its elements (p, q) in
// rows x columns go with element start + p * stride_h * width + q * stride_w of x.
template <class Plane>
void for_each_plane(const Images& images, const Window& window, Plane plane) {
  for (int64_t n = 0; n < images.samples; ++n)
    for (int64_t c = 0; c < images.channels; ++c)
      for (int64_t i = 0; i < window.kernel[0]; ++i)
        for (int64_t j = 0; j < window.kernel[1]; ++j) {
          const int64_t down = i * window.dilation[0], right = j * window.dilation[1];
          plane(inside(window, 0, down, images.height), inside(window, 1, right, images.width),
                n * images.sample_stride +
                    (c * images.height + down - window.padding[0]) * images.width + right -
                    window.padding[1]);
        }
}

}  // namespace

int64_t Window::positions(int axis, int64_t size) const {
  const int64_t room = size + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1;
  return room < 0 ? 0 : room / stride[axis] + 1;
}

Range inside(const Window& window, int axis, int64_t offset, int64_t size) {
  const int64_t stride = window.stride[axis], positions = window.positions(axis, size);
  const int64_t first = std::max<int64_t>(0, window.padding[axis] - offset);
  const int64_t last = size - 1 + window.padding[axis] - offset;
  const int64_t end = last < 0 ? 0 : std::min(positions, last / stride + 1);
  return {std::min((first + stride - 1) / stride, end), end};
}

template <class T>
void im2col(const T* x, const Images& images, const Window& window, T* cols) {
  const int64_t height = window.positions(0, images.height);
  const int64_t width = window.positions(1, images.width);
  const int64_t row_step = window.stride[0] * images.width, step = window.stride[1];
  // Planes of the same width, element after element: one long copy, then zeros over the elements
  // that it took from a neighbouring row. Several times faster than many short rows.
  const bool aligned = step == 1 && row_step == width;

  for_each_plane(images, window, [&](Range rows, Range columns, int64_t start) {
    T* const out = cols;
    cols += height * width;
    if (rows.begin >= rows.end || columns.begin >= columns.end) {
      std::fill(out, cols, T(0));
      return;
    }
    const int64_t begin = rows.begin * width + columns.begin;
    const int64_t end = (rows.end - 1) * width + columns.end;
    if (aligned) std::copy(x + start + begin, x + start + end, out + begin);
    std::fill(out, out + begin, T(0));
    for (int64_t p = rows.begin; p < rows.end; ++p) {
      T* const row = out + p * width;
      if (!aligned) {
        const T* const from = x + start + p * row_step;
        for (int64_t q = columns.begin; q < columns.end; ++q) row[q] = from[q * step];
      }
      if (p > rows.begin) std::fill(row, row + columns.begin, T(0));
      if (p < rows.end - 1) std::fill(row + columns.end, row + width, T(0));
    }
    std::fill(out + end, cols, T(0));
  });
}

template <class T>
void col2im(const T* cols, const Images& images, const Window& window, T* x) {
  const int64_t height = window.positions(0, images.height);
  const int64_t width = window.positions(1, images.width);
  const int64_t row_step = window.stride[0] * images.width, step = window.stride[1];
  for (int64_t n = 0; n < images.samples; ++n)
    std::fill_n(x + n * images.sample_stride, images.channels * images.height * images.width, T(0));

  for_each_plane(images, window, [&](Range rows, Range columns, int64_t start) {
    for (int64_t p = rows.begin; p < rows.end; ++p) {
      const T* const row = cols + p * width;
      T* const to = x + start + p * row_step;
      if (step == 1)
        for (int64_t q = columns.begin; q < columns.end; ++q) to[q] += row[q];
      else
        for (int64_t q = columns.begin; q < columns.end; ++q) to[q * step] += row[q];
    }
    cols += height * width;
  });
}

template void im2col(const float*, const Images&, const Window&, float*);
template void im2col(const double*, const Images&, const Window&, double*);
template void col2im(const float*, const Images&, const Window&, float*);
template void col2im(const double*, const Images&, const Window&, double*);

}  // namespace bnext
