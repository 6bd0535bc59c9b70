#include "bnext/runtime.hpp"

#include "bind/arrays.hpp"
#include "bind/buffers.hpp"
#include "core/check.hpp"

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

py::dict buffer_stats() {
  const BufferStatistics s = buffer_statistics();
  py::dict stats;
  stats["limit"] = s.limit;
  stats["kept"] = s.kept;
  stats["reused"] = s.reused;
  stats["made"] = s.made;
  return stats;
}

py::array empty_like(py::handle x) {
  const py::array like = input("empty_like", "x", x);
  return new_array(like.dtype(), shape_of(like));
}

void set_limit(py::handle bytes) {
  const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(bytes.ptr()));
  if (!index) {
    PyErr_Clear();
    throw py::type_error("set_buffer_limit: bytes: expected an integer, got " + type_name(bytes));
  }
  const long long value = PyLong_AsLongLong(index.ptr());
  if (PyErr_Occurred() || value < 0) {
    PyErr_Clear();
    throw py::value_error("set_buffer_limit: bytes: expected 0 or more, got " +
                          py::str(index).cast<std::string>());
  }
  set_buffer_limit(value);
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
  m.def("buffer_stats", buffer_stats,
        R"(Memory of results that is used again once the array that held it is gone.

Returns
-------
dict
    Bytes: ``limit``, at most so many are kept for their next use; ``kept``, so many are.
    Counts: ``reused``, results that took used memory; ``made``, those that took new memory.)");
  m.def("empty_like", empty_like, py::arg("x"),
        "An array for results like x, not initialized, in memory that is used again.");
  m.def("set_buffer_limit", set_limit, py::arg("bytes"),
        R"(Keep at most `bytes` of the memory of results for their next use, by default 1 GiB.

0 turns the reuse off; what is above the limit is freed at once.

Raises
------
ValueError
    If `bytes` is negative.
TypeError
    If it is no integer.)");
  m.def("cache_bytes", bnext::cache_bytes,
        "Bytes of the largest cache, as the system reports them or BNEXT_CACHE_BYTES says.");
  m.def("cuda_unavailable_reason", bnext::cuda_unavailable_reason,
        "Why the backend for GPUs is not available; empty if it is.");
  m.def("has_openmp", bnext::has_openmp, "Whether bnext was compiled with OpenMP.");
  m.def("pause_threads", bnext::pause_threads, "To be called before os.fork().");
  m.def("copy_count", copy_count,
        "Input arrays that had to be copied so far, because they were not C-contiguous, aligned "
        "and of native byte order.");
}
