#include "core/pooling.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>

#include "bind/windows.hpp"

namespace bnext::bind {
namespace {

using Index = py::array_t<std::int32_t, 0>;

Window pooling_window(const std::string& operation, const Images& images, const Pair& kernel,
                      const Pair& stride, const Pair& padding) {
  const Window window = make_window(operation, kernel, stride, padding, {1, 1});
  // Then no window lies in the padding alone.
  for (const std::size_t axis : {0, 1})
    if (2 * padding[axis] > kernel[axis])
      throw py::value_error(operation + ": padding: expected at most half the kernel");
  if (images.height * images.width > std::numeric_limits<std::int32_t>::max())
    throw py::value_error(operation + ": x: expected planes of less than 2^31 elements");
  return window;
}

// `array` must be contiguous and have one element for each window.
void check_outputs(const std::string& operation, const char* name, const py::array& array,
                   const Images& images, const Window& window) {
  const std::int64_t size = images.samples * images.channels * window.positions(0, images.height) *
                            window.positions(1, images.width);
  if (!(array.flags() & py::array::c_style) || array.size() != size)
    throw py::value_error(operation + ": " + name + ": expected " + std::to_string(size) +
                          " contiguous elements, got " + std::to_string(array.size()));
}

Images view_contiguous(const std::string& operation, const py::array& x) {
  if (!(x.flags() & py::array::c_style))
    throw py::value_error(operation + ": x: expected a contiguous array");
  return view_images(operation, x);
}

template <class T>
void max_pool(const py::array_t<T, 0>& x, py::array_t<T, 0> y, std::optional<Index> index,
              const Pair& kernel, const Pair& stride, const Pair& padding) {
  const Images images = view_contiguous("max_pool", x);
  const Window window = pooling_window("max_pool", images, kernel, stride, padding);
  check_outputs("max_pool", "y", y, images, window);
  if (index) check_outputs("max_pool", "index", *index, images, window);
  const T* const from = x.data();
  T* const to = y.mutable_data();
  std::int32_t* const where = index ? index->mutable_data() : nullptr;
  const py::gil_scoped_release release;
  bnext::max_pool(from, images, window, to, where);
}

template <class T>
void max_pool_backward(const py::array_t<T, 0>& grad_y, const Index& index,
                       py::array_t<T, 0> grad_x, const Pair& kernel, const Pair& stride,
                       const Pair& padding) {
  const char* const operation = "max_pool_backward";
  const Images images = view_contiguous(operation, grad_x);
  const Window window = pooling_window(operation, images, kernel, stride, padding);
  check_outputs(operation, "grad_y", grad_y, images, window);
  check_outputs(operation, "index", index, images, window);
  const T* const from = grad_y.data();
  const std::int32_t* const where = index.data();
  // An index from elsewhere must not write outside of grad_x.
  const std::int64_t plane = images.height * images.width;
  if (!std::all_of(where, where + index.size(),
                   [&](std::int32_t i) { return i >= 0 && i < plane; }))
    throw py::value_error(std::string(operation) + ": index: expected positions in the plane");
  T* const to = grad_x.mutable_data();
  const py::gil_scoped_release release;
  bnext::max_pool_backward(from, where, images, window, to);
}

template <class T>
void avg_pool(const py::array_t<T, 0>& x, py::array_t<T, 0> y, const Pair& kernel,
              const Pair& stride, const Pair& padding, bool count_padding) {
  const Images images = view_contiguous("avg_pool", x);
  const Window window = pooling_window("avg_pool", images, kernel, stride, padding);
  check_outputs("avg_pool", "y", y, images, window);
  const T* const from = x.data();
  T* const to = y.mutable_data();
  const py::gil_scoped_release release;
  bnext::avg_pool(from, images, window, count_padding, to);
}

template <class T>
void avg_pool_backward(const py::array_t<T, 0>& grad_y, py::array_t<T, 0> grad_x,
                       const Pair& kernel, const Pair& stride, const Pair& padding,
                       bool count_padding) {
  const char* const operation = "avg_pool_backward";
  const Images images = view_contiguous(operation, grad_x);
  const Window window = pooling_window(operation, images, kernel, stride, padding);
  check_outputs(operation, "grad_y", grad_y, images, window);
  const T* const from = grad_y.data();
  T* const to = grad_x.mutable_data();
  const py::gil_scoped_release release;
  bnext::avg_pool_backward(from, images, window, count_padding, to);
}

template <class T>
void define(py::module_& m) {
  // noconvert: a converted copy would leave the caller's output unwritten.
  const auto array = [](const char* name) { return py::arg(name).noconvert(); };
  m.def("max_pool", &max_pool<T>, array("x"), array("y"), array("index").none(true),
        py::arg("kernel"), py::arg("stride"), py::arg("padding"),
        "y = largest element of each window; index, if not None, where in its plane it is");
  m.def("max_pool_backward", &max_pool_backward<T>, array("grad_y"), array("index"),
        array("grad_x"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
        "grad_x = grad_y at each index, summed, and 0 elsewhere");
  m.def("avg_pool", &avg_pool<T>, array("x"), array("y"), py::arg("kernel"), py::arg("stride"),
        py::arg("padding"), py::arg("count_padding"), "y = mean of each window");
  m.def("avg_pool_backward", &avg_pool_backward<T>, array("grad_y"), array("grad_x"),
        py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("count_padding"),
        "The transpose of avg_pool");
}

}  // namespace
}  // namespace bnext::bind

void bind_pooling(pybind11::module_& m) {
  bnext::bind::define<float>(m);
  bnext::bind::define<double>(m);
}
