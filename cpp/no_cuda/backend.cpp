// The table of the CUDA backend in a build without it.
#include "cuda/backend.hpp"

namespace bnext {
namespace cuda {

const std::string& unavailable_reason() {
  static const std::string reason =
      "not compiled in; build with CUDA's compiler: pip install . -C cmake.define.BNEXT_CUDA=ON";
  return reason;
}

namespace {

[[noreturn]] void refuse() {
  throw DeviceError("CUDA: " + unavailable_reason());
}

template <class Args>
void launch(const Args&) {
  refuse();
}

}  // namespace

void fill_bytes(const Place&, void*, int, std::size_t) {
  refuse();
}
void copy_bytes(const Place&, void*, const void*, std::size_t) {
  refuse();
}
void* allocate(const Place&, std::size_t) {
  refuse();
}
void release(const Place&, void*) noexcept {}
void order(const Place&, Stream) {
  refuse();
}
int device_of(const void*) {
  refuse();
}

}  // namespace cuda

#define BNEXT_LAUNCHER(name, type, compute) cuda::launch,
#define BNEXT_ROW(op, args) {BNEXT_DTYPES(BNEXT_LAUNCHER)},
const Backend backend_cuda{"cuda", DeviceKind::cuda, BNEXT_OPS(BNEXT_ROW)};

}  // namespace bnext
