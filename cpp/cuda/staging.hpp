// Arrays in main memory on the GPU and back, for BNEXT_BACKEND=cuda: what every test of backends
// needs, and nobody who wants to be fast.
#pragma once

#include <vector>

#include "bnext/batch_norm.hpp"
#include "cuda/memory.hpp"

namespace bnext {
namespace cuda {

// Copies of arrays on the current device. It waits for all that it does.
class Staging {
 public:
  Staging() {
    check(cudaGetDevice(&place_.device), "asking for the current device");
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream");
    place_.stream = stream_;
  }
  ~Staging() {
    for (const Copy& copy : copies_) cudaFree(copy.there);
    cudaStreamDestroy(stream_);
  }
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  const Place& place() const { return place_; }

  // An array that is read there.
  template <class T>
  const T* in(const T* here, std::int64_t bytes) {
    return here == nullptr ? nullptr : static_cast<const T*>(add(here, nullptr, bytes));
  }
  // One that is written, and copied back at the end.
  template <class T>
  T* out(T* here, std::int64_t bytes) {
    return here == nullptr ? nullptr : static_cast<T*>(add(nullptr, here, bytes));
  }
  void finish() {
    for (const Copy& copy : copies_)
      if (copy.here != nullptr)
        check(cudaMemcpyAsync(copy.here, copy.there, copy.bytes, cudaMemcpyDeviceToHost, stream_),
              "copying results");
    check(cudaStreamSynchronize(stream_), "waiting for results");
  }

 private:
  struct Copy {
    void* here;
    void* there;
    std::size_t bytes;
  };

  void* add(const void* from, void* here, std::int64_t count) {
    const auto bytes = static_cast<std::size_t>(count);
    void* there = nullptr;
    check(cudaMalloc(&there, bytes), "allocating memory");
    copies_.push_back({here, there, bytes});
    if (from != nullptr)
      check(cudaMemcpyAsync(there, from, bytes, cudaMemcpyHostToDevice, stream_),
            "copying arguments");
    return there;
  }

  Place place_;
  cudaStream_t stream_ = nullptr;
  std::vector<Copy> copies_;
};

template <class S, class Run>
void staged(BatchNormForwardArgs a, Run run) {
  Staging to;
  const std::int64_t c = a.problem.c, data = a.problem.size() * static_cast<int>(sizeof(S));
  const std::int64_t parameter = c * static_cast<int>(sizeof(Compute<S>)), statistic = c * 8;
  a.x = to.in(a.x, data);
  a.weight = to.in(a.weight, parameter);
  a.bias = to.in(a.bias, parameter);
  a.fusion.residual = to.in(a.fusion.residual, data);
  a.fusion.passes = to.out(a.fusion.passes, passes_bytes(a.problem.size()));
  a.y = to.out(a.y, data);
  a.mean = to.out(a.mean, statistic);
  a.var = to.out(a.var, statistic);
  a.inv_std = to.out(a.inv_std, statistic);
  a.place = to.place();
  run(a);
  to.finish();
}

template <class S, class Run>
void staged(BatchNormBackwardArgs a, Run run) {
  Staging to;
  const std::int64_t c = a.problem.c, data = a.problem.size() * static_cast<int>(sizeof(S));
  const std::int64_t parameter = c * static_cast<int>(sizeof(Compute<S>)), statistic = c * 8;
  a.grad_y = to.in(a.grad_y, data);
  a.x = to.in(a.x, data);
  a.weight = to.in(a.weight, parameter);
  a.bias = to.in(a.bias, parameter);
  a.mean = to.in(a.mean, statistic);
  a.inv_std = to.in(a.inv_std, statistic);
  a.fusion.residual = to.in(a.fusion.residual, data);
  a.fusion.passes = const_cast<std::uint8_t*>(
      to.in(static_cast<const std::uint8_t*>(a.fusion.passes), passes_bytes(a.problem.size())));
  a.grad_x = to.out(a.grad_x, data);
  a.grad_residual = to.out(a.grad_residual, data);
  a.grad_weight = to.out(a.grad_weight, parameter);
  a.grad_bias = to.out(a.grad_bias, parameter);
  a.place = to.place();
  run(a);
  to.finish();
}

template <class S, class Run>
void staged(BatchNormInferenceArgs a, Run run) {
  Staging to;
  const std::int64_t c = a.problem.c, data = a.problem.size() * static_cast<int>(sizeof(S));
  const std::int64_t parameter = c * static_cast<int>(sizeof(Compute<S>));
  a.x = to.in(a.x, data);
  a.mean = to.in(a.mean, parameter);
  a.var = to.in(a.var, parameter);
  a.weight = to.in(a.weight, parameter);
  a.bias = to.in(a.bias, parameter);
  a.fusion.residual = to.in(a.fusion.residual, data);
  a.y = to.out(a.y, data);
  a.place = to.place();
  run(a);
  to.finish();
}

template <class S, class Run>
void staged(DropoutArgs a, Run run) {
  Staging to;
  const std::int64_t data = a.size * static_cast<int>(sizeof(S));
  a.x = to.in(a.x, data);
  a.y = to.out(a.y, data);
  a.place = to.place();
  run(a);
  to.finish();
}

}  // namespace cuda
}  // namespace bnext
