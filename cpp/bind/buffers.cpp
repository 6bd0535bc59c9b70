#include "bind/buffers.hpp"

#include <cstdlib>
#include <list>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bnext::bind {
namespace {

constexpr std::size_t line = 64, page = 4096, huge_page = std::size_t{2} << 20;

struct Kept {
  void* memory;
  std::size_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::list<Kept> kept;  // last used first
  BufferStatistics statistics{std::int64_t{1} << 30, 0, 0, 0};

  void shrink() {
    while (statistics.kept > statistics.limit) {
      std::free(kept.back().memory);
      statistics.kept -= static_cast<std::int64_t>(kept.back().bytes);
      kept.pop_back();
    }
  }
};

// Never destroyed: arrays may outlive everything else at exit.
Pool& pool() {
  static Pool& pool = *new Pool;
  return pool;
}

// Sizes are rounded up, so that similar ones share memory.
std::size_t rounded(std::size_t bytes) {
  const std::size_t unit = bytes >= huge_page ? huge_page : bytes >= page ? page : line;
  return (bytes + unit - 1) / unit * unit;
}

}  // namespace

void ReturnBuffer::operator()(void* memory) const {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  try {
    p.kept.push_front({memory, bytes});
  } catch (const std::bad_alloc&) {
    std::free(memory);
    return;
  }
  p.statistics.kept += static_cast<std::int64_t>(bytes);
  p.shrink();
}

Buffer take_buffer(std::size_t bytes) {
  const std::size_t size = rounded(bytes == 0 ? 1 : bytes);
  if (size < bytes) throw std::bad_alloc();
  Pool& p = pool();
  {
    const std::lock_guard<std::mutex> lock(p.mutex);
    for (auto it = p.kept.begin(); it != p.kept.end(); ++it)
      if (it->bytes == size) {
        void* const memory = it->memory;
        p.kept.erase(it);
        p.statistics.kept -= static_cast<std::int64_t>(size);
        ++p.statistics.reused;
        return Buffer(memory, ReturnBuffer{size});
      }
    ++p.statistics.made;
  }
  void* const memory = std::aligned_alloc(size >= huge_page ? huge_page : line, size);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (size >= huge_page) madvise(memory, size, MADV_HUGEPAGE);
#endif
  return Buffer(memory, ReturnBuffer{size});
}

BufferStatistics buffer_statistics() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  return p.statistics;
}

void set_buffer_limit(std::int64_t bytes) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.statistics.limit = bytes;
  p.shrink();
}

}  // namespace bnext::bind
