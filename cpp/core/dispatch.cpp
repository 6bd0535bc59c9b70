#include "core/dispatch.hpp"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "bnext/runtime.hpp"

namespace bnext {

// One row per instruction set, worst first: BNEXT_ISA(id). CMake writes the file.
#define BNEXT_ISA(id) extern const Backend backend_##id;
#include "bnext_isas.inc"
#undef BNEXT_ISA

namespace {

const Backend* const all[] = {
#define BNEXT_ISA(id) &backend_##id,
#include "bnext_isas.inc"
#undef BNEXT_ISA
};

const Backend* best() {
  const Backend* found = all[0];
  for (const Backend* backend : all)
    if (backend->available()) found = backend;
  return found;
}

const Backend* find(const std::string& name) {
  std::string names;
  for (const Backend* backend : all) {
    if (!backend->available()) continue;
    if (name == backend->name) return backend;
    names += (names.empty() ? "" : ", ") + std::string(backend->name);
  }
  throw std::invalid_argument("backend: no backend '" + name +
                              "' on this machine; available: " + names);
}

// Null until first use: a bad BNEXT_BACKEND must be an exception that a caller can catch, not the
// end of the process while it loads.
std::atomic<const Backend*> current{nullptr};

}  // namespace

const Backend& current_backend() {
  const Backend* backend = current.load(std::memory_order_acquire);
  if (backend == nullptr) {
    const char* forced = std::getenv("BNEXT_BACKEND");
    backend = forced != nullptr && *forced != '\0' ? find(forced) : best();
    current.store(backend, std::memory_order_release);
  }
  return *backend;
}

std::vector<BackendInfo> backends() {
  std::vector<BackendInfo> list;
  for (const Backend* backend : all) list.push_back({backend->name, backend->available()});
  return list;
}

std::string backend() { return current_backend().name; }

void set_backend(const std::string& name) { current.store(find(name), std::memory_order_release); }

std::string version() { return BNEXT_VERSION; }

}  // namespace bnext
