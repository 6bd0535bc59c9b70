// What the core asks of the CUDA backend beside its table. cpp/cuda/ answers, or, in a build
// without CUDA, cpp/no_cuda/.
#pragma once

#include <cstddef>
#include <string>

#include "core/dispatch.hpp"

namespace bnext {

extern const Backend backend_cuda;

namespace cuda {

// Why there is nothing to run on; empty if there is something. Asked of the driver once.
const std::string& unavailable_reason();
// In the order of the stream.
void fill_bytes(const Place& place, void* to, int byte, std::size_t count);
void copy_bytes(const Place& place, void* to, const void* from, std::size_t count);
// Memory of a device in the order of the stream; std::bad_alloc if there is none left.
void* allocate(const Place& place, std::size_t count);
void release(const Place& place, void* memory) noexcept;
// What comes after in `waiting` waits for what is in the stream of `place` now.
void order(const Place& place, Stream waiting);
// Which GPU's memory `data` points to; std::invalid_argument if it is no GPU's.
int device_of(const void* data);

}  // namespace cuda
}  // namespace bnext
