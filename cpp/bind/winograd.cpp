#include "core/winograd.hpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "bind/windows.hpp"

namespace bnext::bind {
namespace {

template <class T>
void check_tiles(const std::string& operation, const py::array_t<T, 0>& tiles, const Images& images,
                 std::int64_t rows, std::int64_t columns) {
  const std::int64_t size = 16 * images.channels * images.samples * rows * columns;
  if (!(tiles.flags() & py::array::c_style) || tiles.size() != size)
    throw py::value_error(operation + ": tiles: expected " + std::to_string(size) +
                          " contiguous elements, got " + std::to_string(tiles.size()));
}

template <class T>
Tiling input_tiling(const std::string& operation, const py::array_t<T, 0>& tiles,
                    const Images& images, const Pair& padding) {
  const Tiling tiling{{padding[0], padding[1]}};
  if (padding[0] < 0 || padding[1] < 0 || tiling.output(0, images.height) < 1 ||
      tiling.output(1, images.width) < 1)
    throw py::value_error(operation + ": x: expected room for a 3x3 window");
  check_tiles(operation, tiles, images, tiling.tiles(0, images.height),
              tiling.tiles(1, images.width));
  return tiling;
}

template <class T>
Images output_images(const std::string& operation, const py::array_t<T, 0>& tiles,
                     const py::array_t<T, 0>& y) {
  const Images images = view_images(operation, y);
  check_tiles(operation, tiles, images, (images.height + 1) / 2, (images.width + 1) / 2);
  return images;
}

template <class T>
void input(const py::array_t<T, 0>& x, py::array_t<T, 0> tiles, const Pair& padding) {
  const Images images = view_images("winograd_input", x);
  const Tiling tiling = input_tiling("winograd_input", tiles, images, padding);
  const T* const from = x.data();
  T* const to = tiles.mutable_data();
  const py::gil_scoped_release release;
  winograd_input(from, images, tiling, to);
}

template <class T>
void input_transpose(const py::array_t<T, 0>& tiles, py::array_t<T, 0> x, const Pair& padding) {
  const Images images = view_images("winograd_input_transpose", x);
  const Tiling tiling = input_tiling("winograd_input_transpose", tiles, images, padding);
  const T* const from = tiles.data();
  T* const to = x.mutable_data();
  const py::gil_scoped_release release;
  winograd_input_transpose(from, images, tiling, to);
}

template <class T>
void output(const py::array_t<T, 0>& tiles, py::array_t<T, 0> y) {
  const Images images = output_images("winograd_output", tiles, y);
  const T* const from = tiles.data();
  T* const to = y.mutable_data();
  const py::gil_scoped_release release;
  winograd_output(from, images, to);
}

template <class T>
void output_transpose(const py::array_t<T, 0>& y, py::array_t<T, 0> tiles) {
  const Images images = output_images("winograd_output_transpose", tiles, y);
  const T* const from = y.data();
  T* const to = tiles.mutable_data();
  const py::gil_scoped_release release;
  winograd_output_transpose(from, images, to);
}

template <class T>
void define(py::module_& m) {
  // noconvert: a converted copy would leave the caller's output unwritten.
  const auto array = [](const char* name) { return py::arg(name).noconvert(); };
  m.def("winograd_input", &input<T>, array("x"), array("tiles"), py::arg("padding"),
        "tiles[4*i + j, c, n, p, q] = (B^T d B)[i, j] of the 4x4 tile (p, q) of x[n, c]");
  m.def("winograd_input_transpose", &input_transpose<T>, array("tiles"), array("x"),
        py::arg("padding"), "The transpose of winograd_input");
  m.def("winograd_output", &output<T>, array("tiles"), array("y"),
        "y[n, c], whose 2x2 tile (p, q) is A^T tiles[:, c, n, p, q] A");
  m.def("winograd_output_transpose", &output_transpose<T>, array("y"), array("tiles"),
        "The transpose of winograd_output");
}

}  // namespace
}  // namespace bnext::bind

void bind_winograd(pybind11::module_& m) {
  bnext::bind::define<float>(m);
  bnext::bind::define<double>(m);
}
