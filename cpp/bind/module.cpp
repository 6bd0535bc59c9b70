#include <pybind11/pybind11.h>

#include <exception>

#include "bnext/runtime.hpp"
#include "bnext/types.hpp"

namespace py = pybind11;

void bind_batch_norm(py::module_& m);
void bind_device(py::module_& m);
void bind_dropout(py::module_& m);
void bind_im2col(py::module_& m);
void bind_pooling(py::module_& m);
void bind_random(py::module_& m);
void bind_runtime(py::module_& m);
void bind_tasks(py::module_& m);
void bind_winograd(py::module_& m);

PYBIND11_MODULE(_core, m) {
  m.doc() = "The C++ core of bnext. Use it through bnext and bnext.functional.";
  m.attr("__version__") = bnext::version();

  // std::invalid_argument is a ValueError already.
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const bnext::DTypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what());
    }
  });

  bind_random(m);  // first: Generator is in the signatures of the others
  bind_batch_norm(m);
  bind_device(m);
  bind_dropout(m);
  bind_im2col(m);
  bind_pooling(m);
  bind_runtime(m);
  bind_tasks(m);
  bind_winograd(m);
}
