#include "core/pooling.hpp"

#include <algorithm>
#include <type_traits>
#include <vector>

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

// largest[q] = x[start + q * step] where that is larger or the first NaN; best[q] = its place.
template <class T>
void take_larger(const T* x, int64_t start, int64_t step, Range columns, T* __restrict largest,
                 std::int32_t* __restrict best) {
  const auto loop = [&](auto known_step) {
    for (int64_t q = columns.begin; q < columns.end; ++q) {
      const int64_t place = start + q * known_step;
      const T value = x[place], old = largest[q];
      const bool larger = (value > old) | ((value != value) & (old == old));
      largest[q] = larger ? value : old;
      best[q] = larger ? static_cast<std::int32_t>(place) : best[q];
    }
  };
  // A step known to the compiler lets it take several elements at a time.
  if (step == 2) return loop(std::integral_constant<int64_t, 2>());
  if (step == 1) return loop(std::integral_constant<int64_t, 1>());
  loop(step);
}

}  // namespace

template <class T>
void max_pool(const T* x, const Images& images, const Window& window, T* y, std::int32_t* index) {
  const int64_t height = window.positions(0, images.height);
  const int64_t width = window.positions(1, images.width);
  std::vector<int64_t> first(static_cast<std::size_t>(width));  // column that a window covers
  for (int64_t q = 0; q < width; ++q)
    first[static_cast<std::size_t>(q)] = span(window, 1, q, images.width).begin;
  std::vector<Range> columns;  // windows that cover anything with their column j
  for (int64_t j = 0; j < window.kernel[1]; ++j)
    columns.push_back(inside(window, 1, j, images.width));
  for_each_plane(images, window, [&](int64_t x_start, int64_t y_start) {
    std::vector<std::int32_t> unused(index == nullptr ? static_cast<std::size_t>(width) : 0);
    for (int64_t p = 0; p < height; ++p) {
      const Span rows = span(window, 0, p, images.height);
      T* const largest = y + y_start + p * width;
      std::int32_t* const best = index == nullptr ? unused.data() : index + y_start + p * width;
      for (int64_t q = 0; q < width; ++q) {
        const int64_t place = rows.begin * images.width + first[static_cast<std::size_t>(q)];
        largest[q] = x[x_start + place];
        best[q] = static_cast<std::int32_t>(place);
      }
      for (int64_t h = rows.begin; h < rows.end; ++h)
        for (int64_t j = 0; j < window.kernel[1]; ++j) {
          const int64_t start = h * images.width + j - window.padding[1];
          take_larger(x + x_start, start, window.stride[1], columns[static_cast<std::size_t>(j)],
                      largest, best);
        }
    }
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
