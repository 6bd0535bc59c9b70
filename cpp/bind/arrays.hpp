// NumPy arrays at the border: what is accepted, what is copied, what is returned.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>

#include "bnext/types.hpp"

namespace bnext::bind {

namespace py = pybind11;

// An array argument that may be absent.
using OptionalArray = std::optional<py::array>;

// `object` as a C-contiguous, aligned array of native byte order: itself if it is one, else one
// copy, which is counted. Anything that NumPy can make an array of is accepted; TypeError for
// dtypes that bnext has not, and for masked arrays with masked values.
py::array input(const char* operation, const char* argument, py::handle object);

// As input, for values per channel: None is none, and a list or tuple takes the dtype of `like`.
OptionalArray per_channel(const char* operation, const char* argument, py::handle object,
                          const py::dtype& like);

// A new array like `like`, or `out` if that is not None: it is written in place, so it must be a
// C-contiguous, aligned, writable array of native byte order.
py::array output(const char* operation, py::handle out, const py::array& like);

Shape shape_of(const py::array& array);

py::array new_array(const py::dtype& dtype, const Shape& shape);

// Of weight, bias, statistics and their gradients where the data are x.
py::dtype parameter_dtype(const py::array& x);

// What the core takes; the array must outlive it.
Array view(const py::array& array);
Array view(const OptionalArray& array);

// Inputs that had to be copied so far.
std::int64_t copy_count();

// Numbers, with an error that names operation and argument.
double number(const char* operation, const char* argument, py::handle object);
// Of the size of a C++ int.
int integer(const char* operation, const char* argument, py::handle object);

// The type's name, for messages.
std::string type_name(py::handle object);

}  // namespace bnext::bind
