#include "bind/arrays.hpp"

#include <atomic>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>

#include "bind/buffers.hpp"
#include "bnext/lists.hpp"
#include "core/check.hpp"

namespace bnext::bind {
namespace {

std::atomic<std::int64_t> copies{0};

std::string where(const char* operation, const char* argument) {
  return std::string(operation) + ": " + argument + ": ";
}

std::string dtype_name(const py::dtype& dtype) {
  return py::str(dtype).cast<std::string>();
}

// The numbers by which NumPy knows the dtypes; -1 for one that nobody has registered yet. Those it
// does not come with, such as bfloat16, are known by their names (ml_dtypes registers them).
struct Known {
  DType dtype;
  const char* name;
  std::atomic<int> number;
};

std::optional<DType> known(const py::dtype& dtype) {
  static Known all[] = {
#define BNEXT_KNOWN(name, type, compute) {DType::name, #name, -1},
      BNEXT_DTYPES(BNEXT_KNOWN)
#undef BNEXT_KNOWN
  };
  const int number = dtype.num();
  for (const Known& k : all)
    if (k.number == number) return k.dtype;
  const std::string name = dtype.attr("name").cast<std::string>();
  for (Known& k : all)
    if (name == k.name && dtype.itemsize() == dtype_size(k.dtype)) {
      k.number = number;
      return k.dtype;
    }
  return std::nullopt;
}

bool is_native(const py::dtype& dtype) {
  return dtype.byteorder() == '=';
}

bool is_usable(const py::array& array) {
  constexpr int needed =
      py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  return (array.flags() & needed) == needed && is_native(array.dtype());
}

// Exact arrays are the usual case; only others can be masked.
bool is_exact(py::handle object) {
  return Py_TYPE(object.ptr()) == py::detail::npy_api::get().PyArray_Type_;
}

void refuse_masked(const char* operation, const char* argument, py::handle object) {
  if (is_exact(object)) return;
  const py::module_ masked = py::module_::import("numpy.ma");
  if (!py::isinstance(object, masked.attr("MaskedArray"))) return;
  if (masked.attr("is_masked")(object).cast<bool>())
    throw py::type_error(where(operation, argument) +
                         "expected an array without masked values, got a masked array; its "
                         "mask would be ignored");
}

std::string dtype_names() {
  const char* const names[] = {
#define BNEXT_NAME(name, type, compute) #name,
      BNEXT_DTYPES(BNEXT_NAME)
#undef BNEXT_NAME
  };
  std::string list;
  const std::size_t count = std::size(names);
  for (std::size_t i = 0; i < count; ++i)
    list += std::string(i == 0 ? "" : i + 1 < count ? ", " : " or ") + names[i];
  return list;
}

// What NumPy makes of an object.
py::array as_array(const char* operation, const char* argument, py::handle object) {
  try {
    return py::module_::import("numpy").attr("asarray")(object);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ValueError)) throw;
    throw py::value_error(where(operation, argument) + "expected an array, got a " +
                          type_name(object) +
                          " that is none: " + py::str(error.value()).cast<std::string>());
  }
}

}  // namespace

Shape shape_of(const py::array& array) {
  return Shape(array.shape(), array.shape() + array.ndim());
}

py::array input(const char* operation, const char* argument, py::handle object) {
  const bool exact = is_exact(object);
  if (exact) {
    auto array = py::reinterpret_borrow<py::array>(object);
    if (is_usable(array) && known(array.dtype())) return array;
  }
  const bool plain = exact || py::isinstance<py::array>(object);
  refuse_masked(operation, argument, object);
  const py::array array = as_array(operation, argument, object);
  if (!known(array.dtype()))
    throw py::type_error(where(operation, argument) + "expected dtype " + dtype_names() + ", got " +
                         dtype_name(array.dtype()));
  if (is_usable(array)) return array;
  if (plain) ++copies;
  const py::object native = array.dtype().attr("newbyteorder")("=");
  return array.attr("astype")(native, py::arg("order") = "C", py::arg("copy") = true);
}

OptionalArray per_channel(const char* operation, const char* argument, py::handle object,
                          const py::dtype& like) {
  if (object.is_none()) return std::nullopt;
  if (py::isinstance<py::list>(object) || py::isinstance<py::tuple>(object)) {
    const py::array array = as_array(operation, argument, object);
    // Numbers of any kind become the parameters'; input refuses the rest.
    const bool numbers =
        std::strchr("biuf", array.dtype().kind()) != nullptr || known(array.dtype());
    return input(operation, argument, numbers ? py::array(array.attr("astype")(like)) : array);
  }
  return input(operation, argument, object);
}

py::array output(const char* operation, py::handle out, const py::array& like) {
  if (out.is_none()) return new_array(like.dtype(), shape_of(like));
  if (!py::isinstance<py::array>(out))
    throw py::type_error(where(operation, "out") + "expected a NumPy array, got " + type_name(out));
  refuse_masked(operation, "out", out);
  auto array = py::reinterpret_borrow<py::array>(out);
  if (!known(array.dtype()))
    throw py::type_error(where(operation, "out") + "expected dtype " + dtype_name(like.dtype()) +
                         ", got " + dtype_name(array.dtype()));
  if (!array.writeable())
    throw py::value_error(where(operation, "out") +
                          "expected a writable array, got a read-only one");
  if (!is_usable(array))
    throw py::value_error(where(operation, "out") +
                          "expected a C-contiguous, aligned array of native byte order");
  return array;
}

py::array new_array(const py::dtype& dtype, const Shape& shape) {
  std::size_t bytes = static_cast<std::size_t>(dtype.itemsize());
  for (const std::int64_t size : shape) bytes *= static_cast<std::size_t>(size);
  // NumPy's own allocator is quicker for what fits into its caches.
  constexpr std::size_t worth_keeping = 1 << 16;
  if (bytes < worth_keeping) return py::array(dtype, shape);
  Buffer buffer = take_buffer(bytes);
  const auto give_back = [](void* owner) { delete static_cast<Buffer*>(owner); };
  auto owner = std::make_unique<Buffer>(std::move(buffer));
  void* const memory = owner->get();
  const py::capsule capsule(owner.get(), give_back);
  owner.release();
  return py::array(dtype, shape, memory, capsule);
}

py::dtype parameter_dtype(const py::array& x) {
  const std::optional<DType> dtype = known(x.dtype());
  if (!dtype) return x.dtype();
  switch (bnext::parameter_dtype(*dtype)) {
    case DType::float64:
      return py::dtype::of<double>();
    default:
      return py::dtype::of<float>();
  }
}

Array view(const py::array& array) {
  // Inputs are never written; outputs have been checked to be writable.
  return {const_cast<void*>(array.data()), *known(array.dtype()), shape_of(array)};
}

Array view(const OptionalArray& array) {
  return array ? view(*array) : Array();
}

std::int64_t copy_count() {
  return copies;
}

double number(const char* operation, const char* argument, py::handle object) {
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    throw py::type_error(where(operation, argument) + "expected a number, got " +
                         type_name(object));
  }
  return value;
}

int integer(const char* operation, const char* argument, py::handle object) {
  const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!index) {
    PyErr_Clear();
    throw py::type_error(where(operation, argument) + "expected an integer, got " +
                         type_name(object));
  }
  const long value = PyLong_AsLong(index.ptr());
  const bool overflow = value == -1 && PyErr_Occurred();
  if (overflow || value < std::numeric_limits<int>::min() ||
      value > std::numeric_limits<int>::max()) {
    PyErr_Clear();
    throw py::value_error(where(operation, argument) +
                          "out of range: " + py::str(index).cast<std::string>());
  }
  return static_cast<int>(value);
}

std::string type_name(py::handle object) {
  return Py_TYPE(object.ptr())->tp_name;
}

}  // namespace bnext::bind
