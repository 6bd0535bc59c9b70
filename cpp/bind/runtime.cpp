#include "bnext/runtime.hpp"

#include "bind/arrays.hpp"

namespace bnext::bind {
namespace {

py::list list_backends() {
  py::list list;
  for (const BackendInfo& info : backends()) list.append(py::make_tuple(info.name, info.available));
  return list;
}

void set_threads(py::handle n) {
  set_num_threads(integer("set_num_threads", "n", n));
}

}  // namespace
}  // namespace bnext::bind

void bind_runtime(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace bnext::bind;
  m.def("backends", list_backends,
        "(name, available) of every backend that was compiled, best last.");
  m.def("backend", bnext::backend, "Name of the backend in use.");
  m.def("set_backend", bnext::set_backend, py::arg("name"),
        "Use another backend from the next call on; ValueError if it cannot run here.");
  m.def("get_num_threads", bnext::num_threads,
        R"(Number of threads that operations on large arrays use.

The default is what OMP_NUM_THREADS says, else the processors that the affinity mask and the
container's quota leave.)");
  m.def("set_num_threads", set_threads, py::arg("n"),
        R"(Use `n` threads from the next call on. Results do not depend on it.

Raises
------
ValueError
    If `n` is below 1.
TypeError
    If `n` is no integer.)");
  m.def("has_openmp", bnext::has_openmp, "Whether bnext was compiled with OpenMP.");
  m.def("pause_threads", bnext::pause_threads, "To be called before os.fork().");
  m.def("copy_count", copy_count,
        "Input arrays that had to be copied so far, because they were not C-contiguous, aligned "
        "and of native byte order.");
}
