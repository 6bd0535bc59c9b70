#include "core/dispatch.hpp"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "bnext/runtime.hpp"
#include "cpu/launch.hpp"
#include "cuda/backend.hpp"

namespace bnext {

// One row per instruction set, worst first: BNEXT_ISA(id, name, condition). CMake writes the file.
#define BNEXT_ISA(id, name, condition) extern const IsaKernels kernels_##id;
#include "bnext_isas.inc"
#undef BNEXT_ISA

namespace {

template <const IsaKernels& kernels, class S, class Args>
void run(const Args& args) {
  launch(args, static_cast<const Kernels<S>&>(kernels));
}

#define BNEXT_LAUNCHER(name, type, compute) run<kernels, type>,
#define BNEXT_ROW(op, args) {BNEXT_DTYPES(BNEXT_LAUNCHER)},
template <const IsaKernels& kernels>
Backend backend_with(const char* name) {
  return {name, DeviceKind::cpu, BNEXT_OPS(BNEXT_ROW)};
}
#undef BNEXT_ROW
#undef BNEXT_LAUNCHER

struct Row {
  Backend backend;
  bool available;
};

// The questions to the processor are asked here, by code that every processor can run.
const std::vector<Row>& rows() {
  static const std::vector<Row> list{
#define BNEXT_ISA(id, name, condition) {backend_with<kernels_##id>(name), condition},
#include "bnext_isas.inc"
#undef BNEXT_ISA
  };
  return list;
}

const Backend* best() {
  const Backend* found = nullptr;
  for (const Row& row : rows())
    if (row.available) found = &row.backend;
  return found;
}

bool cuda_available() {
  return cuda::unavailable_reason().empty();
}

const Backend* find(const std::string& name) {
  std::string names;
  for (const Row& row : rows()) {
    if (!row.available) continue;
    if (name == row.backend.name) return &row.backend;
    names += (names.empty() ? "" : ", ") + std::string(row.backend.name);
  }
  std::string why;
  if (name == backend_cuda.name) {
    if (cuda_available()) return &backend_cuda;
    why = " (" + cuda::unavailable_reason() + ")";
  } else if (cuda_available()) {
    names += std::string(", ") + backend_cuda.name;
  }
  throw std::invalid_argument("backend: no backend '" + name + "' on this machine" + why +
                              "; available: " + names);
}

// Null until first use: a bad BNEXT_BACKEND must be an exception that a caller can catch, not the
// end of the process while it loads.
std::atomic<const Backend*> current{nullptr};

const Backend& current_backend() {
  const Backend* backend = current.load(std::memory_order_acquire);
  if (backend == nullptr) {
    const char* forced = std::getenv("BNEXT_BACKEND");
    backend = forced != nullptr && *forced != '\0' ? find(forced) : best();
    current.store(backend, std::memory_order_release);
  }
  return *backend;
}

}  // namespace

const Backend& backend_for(const Device& device) {
  return device.kind == DeviceKind::cuda ? backend_cuda : current_backend();
}

std::vector<BackendInfo> backends() {
  std::vector<BackendInfo> list;
  for (const Row& row : rows()) list.push_back({row.backend.name, row.available});
  list.push_back({backend_cuda.name, cuda_available()});
  return list;
}

std::string backend() {
  return current_backend().name;
}

void set_backend(const std::string& name) {
  current.store(find(name), std::memory_order_release);
}

std::string cuda_unavailable_reason() {
  return cuda::unavailable_reason();
}

std::string version() {
  return BNEXT_VERSION;
}

}  // namespace bnext
