// Errors, devices and memory of the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "core/args.hpp"
#include "cuda/plan.hpp"

namespace bnext {
namespace cuda {

// Throws DeviceError, or std::bad_alloc for want of memory, and clears the error of this thread, so
// that the next call does not meet it.
void check(cudaError_t error, const char* what);

// What `device` can do; asked once.
const Limits& limits_of(int device);

// Makes `device` the current one of this thread, until the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;
};

// Scratch memory in the order of a stream. That of earlier calls on the same stream is taken up
// again; it grows as needed. More than is worth keeping, and all while a stream is captured into a
// graph, belongs to the call alone.
class Workspace {
 public:
  static constexpr std::size_t zeros = 1 << 16;

  // `bytes` to take from, as many bytes as are needed that are 0 (kernels leave them so), and bytes
  // for letters, which bear the numbers of earlier launches than this one, or 0.
  Workspace(const Place& place, std::size_t bytes, std::size_t zeros_needed,
            std::size_t letter_bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  template <class T>
  T* zeroed() const {
    return reinterpret_cast<T*>(zeroed_);
  }
  template <class T>
  T* letters() const {
    return reinterpret_cast<T*>(letters_);
  }
  unsigned launch() const { return launch_; }
  template <class T>
  T* take(std::int64_t count) {
    T* const block = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return block;
  }
  template <class T>
  static std::size_t bytes(std::int64_t count) {
    return (static_cast<std::size_t>(count) * sizeof(T) + 255) / 256 * 256;
  }

 private:
  Place place_;
  unsigned char* own_ = nullptr;  // to be freed
  unsigned char* zeroed_ = nullptr;
  unsigned char* letters_ = nullptr;
  unsigned launch_ = 1;
  unsigned char* next_ = nullptr;
};

}  // namespace cuda
}  // namespace bnext
