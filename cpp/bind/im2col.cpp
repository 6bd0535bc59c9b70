#include "core/im2col.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

namespace py = pybind11;

namespace {

using Pair = std::array<std::int64_t, 2>;

// A view of images whose last three dimensions are contiguous.
bnext::Images view_images(const std::string& operation, const py::array& x) {
  const py::ssize_t item = x.itemsize();
  if (x.ndim() != 4)
    throw py::value_error(operation + ": x: expected (N, C, H, W), got " +
                          std::to_string(x.ndim()) + " dimensions");
  const bool contiguous = x.strides(3) == item && x.strides(2) == x.shape(3) * item &&
                          x.strides(1) == x.shape(2) * x.shape(3) * item &&
                          x.strides(0) % item == 0;
  if (x.size() > 0 && !contiguous)
    throw py::value_error(operation + ": x: expected contiguous (C, H, W) dimensions");
  return {x.shape(0), x.shape(1), x.shape(2), x.shape(3), x.strides(0) / item};
}

bnext::Window make_window(const std::string& operation, const Pair& kernel, const Pair& stride,
                          const Pair& padding, const Pair& dilation) {
  for (const std::size_t axis : {0, 1})
    if (kernel[axis] < 1 || stride[axis] < 1 || padding[axis] < 0 || dilation[axis] < 1)
      throw py::value_error(operation + ": window: expected kernel, stride and dilation >= 1 and "
                            "padding >= 0");
  return {{kernel[0], kernel[1]}, {stride[0], stride[1]}, {padding[0], padding[1]},
          {dilation[0], dilation[1]}};
}

template <class T>
void check_cols(const std::string& operation, const py::array_t<T>& cols,
                const bnext::Images& images, const bnext::Window& window) {
  const std::int64_t size = images.channels * window.kernel[0] * window.kernel[1] *
                            images.samples * window.positions(0, images.height) *
                            window.positions(1, images.width);
  if (!(cols.flags() & py::array::c_style) || cols.size() != size)
    throw py::value_error(operation + ": cols: expected " + std::to_string(size) +
                          " contiguous elements, got " + std::to_string(cols.size()));
}

template <class T>
void im2col(const py::array_t<T, 0>& x, py::array_t<T, 0> cols, const Pair& kernel,
            const Pair& stride, const Pair& padding, const Pair& dilation) {
  const bnext::Images images = view_images("im2col", x);
  const bnext::Window window = make_window("im2col", kernel, stride, padding, dilation);
  check_cols<T>("im2col", cols, images, window);
  const T* const from = x.data();
  T* const to = cols.mutable_data();
  const py::gil_scoped_release release;
  bnext::im2col(from, images, window, to);
}

template <class T>
void col2im(const py::array_t<T, 0>& cols, py::array_t<T, 0> x, const Pair& kernel,
            const Pair& stride, const Pair& padding, const Pair& dilation) {
  const bnext::Images images = view_images("col2im", x);
  const bnext::Window window = make_window("col2im", kernel, stride, padding, dilation);
  check_cols<T>("col2im", cols, images, window);
  const T* const from = cols.data();
  T* const to = x.mutable_data();
  const py::gil_scoped_release release;
  bnext::col2im(from, images, window, to);
}

template <class T>
void define(py::module_& m) {
  // noconvert: a converted copy would leave the caller's output unwritten.
  m.def("im2col", &im2col<T>, py::arg("x").noconvert(), py::arg("cols").noconvert(),
        py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
        "cols[c, i, j, n, p, q] = x[n, c, p*stride - padding + i*dilation, ...], 0 outside of x");
  m.def("col2im", &col2im<T>, py::arg("cols").noconvert(), py::arg("x").noconvert(),
        py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
        "The transpose of im2col: sums every element of cols into the place it came from");
}

}  // namespace

void bind_im2col(py::module_& m) {
  define<float>(m);
  define<double>(m);
}
