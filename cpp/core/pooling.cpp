#include "core/pooling.hpp"

#include <algorithm>

#include "cpu/parallel.hpp"

namespace bnext {
namespace {

using std::int64_t;

// The part [begin, end) of an axis that a window covers, and its length with the padding.
struct Span {
  int64_t begin, end, padded;
};

Span span(const Window& window, int axis, int64_t position, int64_t size) {
  const int64_t padding = window.padding[axis];
  const int64_t begin = position * window.stride[axis] - padding;
  const int64_t end = begin + window.kernel[axis];
  return {std::max<int64_t>(begin, 0), std::min(end, size), std::min(end, size + padding) - begin};
}

// Calls plane(first element of the plane in x, in y) for every channel of every sample, in
// parallel. A plane has its own part of each array, so the order does not matter.
template <class Plane>
void for_each_plane(const Images& images, const Window& window, Plane plane) {
  const int64_t size = images.height * images.width;
  const int64_t positions = window.positions(0, images.height) * window.positions(1, images.width);
  const int64_t planes = images.samples * images.channels;
  // Several planes a task: one alone may be too small to be worth handing out.
  const int64_t step = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, size));
  parallel_for((planes + step - 1) / step, planes * size, [&](int64_t task) {
    const int64_t end = std::min(planes, (task + 1) * step);
    for (int64_t i = task * step; i < end; ++i) plane(i * size, i * positions);
  });
}

// Calls window(rows, columns) for the windows of a plane in order.
template <class Visit>
void for_each_window(const Images& images, const Window& window, Visit visit) {
  const int64_t height = window.positions(0, images.height);
  const int64_t width = window.positions(1, images.width);
  for (int64_t p = 0; p < height; ++p) {
    const Span rows = span(window, 0, p, images.height);
    for (int64_t q = 0; q < width; ++q) visit(rows, span(window, 1, q, images.width));
  }
}

int64_t elements(Span rows, Span columns, bool count_padding) {
  return count_padding ? rows.padded * columns.padded
                       : (rows.end - rows.begin) * (columns.end - columns.begin);
}

}  // namespace

template <class T>
void max_pool(const T* x, const Images& images, const Window& window, T* y, std::int32_t* index) {
  for_each_plane(images, window, [&](int64_t x_start, int64_t y_start) {
    const T* const from = x + x_start;
    int64_t out = y_start;
    for_each_window(images, window, [&](Span rows, Span columns) {
      int64_t best = rows.begin * images.width + columns.begin;
      T largest = from[best];
      for (int64_t h = rows.begin; h < rows.end; ++h)
        for (int64_t w = columns.begin; w < columns.end; ++w) {
          const T value = from[h * images.width + w];
          if (value > largest || (value != value && largest == largest)) {
            largest = value;
            best = h * images.width + w;
          }
        }
      y[out] = largest;
      if (index != nullptr) index[out] = static_cast<std::int32_t>(best);
      ++out;
    });
  });
}

template <class T>
void max_pool_backward(const T* grad_y, const std::int32_t* index, const Images& images,
                       const Window& window, T* grad_x) {
  const int64_t size = images.height * images.width;
  const int64_t positions = window.positions(0, images.height) * window.positions(1, images.width);
  for_each_plane(images, window, [&](int64_t x_start, int64_t y_start) {
    T* const to = grad_x + x_start;
    std::fill(to, to + size, T(0));
    for (int64_t i = y_start; i < y_start + positions; ++i) to[index[i]] += grad_y[i];
  });
}

template <class T>
void avg_pool(const T* x, const Images& images, const Window& window, bool count_padding, T* y) {
  for_each_plane(images, window, [&](int64_t x_start, int64_t y_start) {
    const T* const from = x + x_start;
    T* out = y + y_start;
    for_each_window(images, window, [&](Span rows, Span columns) {
      T sum = 0;
      for (int64_t h = rows.begin; h < rows.end; ++h)
        for (int64_t w = columns.begin; w < columns.end; ++w) sum += from[h * images.width + w];
      *out++ = sum / static_cast<T>(elements(rows, columns, count_padding));
    });
  });
}

template <class T>
void avg_pool_backward(const T* grad_y, const Images& images, const Window& window,
                       bool count_padding, T* grad_x) {
  const int64_t size = images.height * images.width;
  for_each_plane(images, window, [&](int64_t x_start, int64_t y_start) {
    T* const to = grad_x + x_start;
    std::fill(to, to + size, T(0));
    const T* in = grad_y + y_start;
    for_each_window(images, window, [&](Span rows, Span columns) {
      const T share = *in++ / static_cast<T>(elements(rows, columns, count_padding));
      for (int64_t h = rows.begin; h < rows.end; ++h)
        for (int64_t w = columns.begin; w < columns.end; ++w) to[h * images.width + w] += share;
    });
  });
}

#define BNEXT_INSTANTIATE(T)                                                                   \
  template void max_pool(const T*, const Images&, const Window&, T*, std::int32_t*);           \
  template void max_pool_backward(const T*, const std::int32_t*, const Images&, const Window&, \
                                  T*);                                                         \
  template void avg_pool(const T*, const Images&, const Window&, bool, T*);                    \
  template void avg_pool_backward(const T*, const Images&, const Window&, bool, T*);
BNEXT_INSTANTIATE(float)
BNEXT_INSTANTIATE(double)
#undef BNEXT_INSTANTIATE

}  // namespace bnext
