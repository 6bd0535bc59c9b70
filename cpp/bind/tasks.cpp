#include <pybind11/pybind11.h>

#include <cstdint>
#include <exception>
#include <mutex>

#include "cpu/parallel.hpp"

namespace py = pybind11;

namespace {

// On the threads that the core's own operations use: others would compete with them for the
// processors, since an idle thread of OpenMP spins for a while before it sleeps.
void run_tasks(const py::function& task, std::int64_t count) {
  std::exception_ptr error;
  std::mutex mutex;
  {
    const py::gil_scoped_release release;
    bnext::parallel_for(count, INT64_MAX, [&](std::int64_t i) {
      const py::gil_scoped_acquire acquire;
      try {
        task(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
      }
    });
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace

void bind_tasks(py::module_& m) {
  m.def("run_tasks", &run_tasks, py::arg("task"), py::arg("count"),
        "Call task(0) ... task(count - 1), on several threads; the first exception is raised at "
        "the end.");
}
