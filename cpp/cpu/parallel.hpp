// Threads and caches of this machine. parallel.cpp is the only file that knows of OpenMP.
#pragma once

#include <cstdint>

namespace bnext {

// Calls body(context, i) for i in [0, count), on several threads if `work` (elements touched in
// all) is worth it. Which thread takes which i is not fixed: bodies must not depend on it.
void parallel_for(std::int64_t count, std::int64_t work,
                  void (*body)(void* context, std::int64_t i), void* context);

// As above, for anything callable.
template <class Body>
void parallel_for(std::int64_t count, std::int64_t work, Body body) {
  parallel_for(
      count, work, [](void* context, std::int64_t i) { (*static_cast<Body*>(context))(i); }, &body);
}

// Bytes of the largest cache.
std::int64_t cache_bytes();

}  // namespace bnext
