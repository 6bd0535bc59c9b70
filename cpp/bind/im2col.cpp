#include "core/im2col.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "bind/windows.hpp"

namespace bnext::bind {
namespace {

template <class T>
void check_cols(const std::string& operation, const py::array_t<T>& cols, const Images& images,
                const Window& window) {
  const std::int64_t size = images.channels * window.kernel[0] * window.kernel[1] * images.samples *
                            window.positions(0, images.height) * window.positions(1, images.width);
  if (!(cols.flags() & py::array::c_style) || cols.size() != size)
    throw py::value_error(operation + ": cols: expected " + std::to_string(size) +
                          " contiguous elements, got " + std::to_string(cols.size()));
}

template <class T>
void im2col(const py::array_t<T, 0>& x, py::array_t<T, 0> cols, const Pair& kernel,
            const Pair& stride, const Pair& padding, const Pair& dilation) {
  const Images images = view_images("im2col", x);
  const Window window = make_window("im2col", kernel, stride, padding, dilation);
  check_cols<T>("im2col", cols, images, window);
  const T* const from = x.data();
  T* const to = cols.mutable_data();
  const py::gil_scoped_release release;
  bnext::im2col(from, images, window, to);
}

template <class T>
void col2im(const py::array_t<T, 0>& cols, py::array_t<T, 0> x, const Pair& kernel,
            const Pair& stride, const Pair& padding, const Pair& dilation) {
  const Images images = view_images("col2im", x);
  const Window window = make_window("col2im", kernel, stride, padding, dilation);
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
        "cols[n, c, i, j, p, q] = x[n, c, p*stride - padding + i*dilation, ...], 0 outside of x");
  m.def("col2im", &col2im<T>, py::arg("cols").noconvert(), py::arg("x").noconvert(),
        py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
        "The transpose of im2col: sums every element of cols into the place it came from");
}

}  // namespace
}  // namespace bnext::bind

void bind_im2col(pybind11::module_& m) {
  bnext::bind::define<float>(m);
  bnext::bind::define<double>(m);
}
