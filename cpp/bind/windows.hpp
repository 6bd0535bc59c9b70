// What the bindings of im2col and of pooling share: images and windows from Python.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "bind/arrays.hpp"
#include "core/im2col.hpp"

namespace bnext::bind {

using Pair = std::array<std::int64_t, 2>;

// A view of images whose last three dimensions are contiguous.
inline Images view_images(const std::string& operation, const py::array& x) {
  if (x.ndim() != 4)
    throw py::value_error(operation + ": x: expected (N, C, H, W), got " +
                          std::to_string(x.ndim()) + " dimensions");
  // NumPy leaves the stride of a dimension of size 1 undefined.
  const py::ssize_t item = x.itemsize();
  py::ssize_t expected = item;
  bool contiguous = x.shape(0) <= 1 || x.strides(0) % item == 0;
  for (int axis = 3; axis > 0; --axis) {
    contiguous = contiguous && (x.shape(axis) == 1 || x.strides(axis) == expected);
    expected *= x.shape(axis);
  }
  if (x.size() > 0 && !contiguous)
    throw py::value_error(operation + ": x: expected contiguous (C, H, W) dimensions");
  return {x.shape(0), x.shape(1), x.shape(2), x.shape(3), x.strides(0) / item};
}

inline Window make_window(const std::string& operation, const Pair& kernel, const Pair& stride,
                          const Pair& padding, const Pair& dilation) {
  for (const std::size_t axis : {0, 1})
    if (kernel[axis] < 1 || stride[axis] < 1 || padding[axis] < 0 || dilation[axis] < 1)
      throw py::value_error(operation +
                            ": window: expected kernel, stride and dilation >= 1 and "
                            "padding >= 0");
  return {{kernel[0], kernel[1]},
          {stride[0], stride[1]},
          {padding[0], padding[1]},
          {dilation[0], dilation[1]}};
}

}  // namespace bnext::bind
