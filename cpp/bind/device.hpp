// Arrays of GPUs at the border: what is one, and who takes it from there.
#pragma once

#include "bind/arrays.hpp"
#include "bnext/batch_norm.hpp"

namespace bnext::bind {

// Whether `object` says that its memory is that of a GPU, by __cuda_array_interface__ or DLPack.
bool is_on_device(py::handle object);

// Whether `saved` came from an operation on such an array.
bool is_of_device(py::handle saved);

// The function of bnext._device that does for arrays of a GPU what `operation` does for NumPy's.
py::object device_operation(const char* operation);

// Arguments that both kinds of arrays share.
Activation activation_of(const char* operation, py::handle object);
Shape shape_argument(const char* operation, const char* argument, py::handle object);

}  // namespace bnext::bind
