// Memory of results, used again once the array that held it is gone: fresh memory costs a page
// fault for every 4 KiB, more than an operation takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace bnext::bind {

// Memory goes back here when its owner is destroyed. Aligned to 64 bytes, on huge pages where the
// system has them.
struct ReturnBuffer {
  std::size_t bytes;
  void operator()(void* memory) const;
};
using Buffer = std::unique_ptr<void, ReturnBuffer>;

// At least `bytes` of uninitialized memory. Throws std::bad_alloc.
Buffer take_buffer(std::size_t bytes);

struct BufferStatistics {
  std::int64_t limit;   // bytes that may wait for their next use
  std::int64_t kept;    // bytes that do
  std::int64_t reused;  // requests served with used memory
  std::int64_t made;    // requests served with new memory
};
BufferStatistics buffer_statistics();

// Frees what is above the limit at once; 0 turns the reuse off.
void set_buffer_limit(std::int64_t bytes);

}  // namespace bnext::bind
