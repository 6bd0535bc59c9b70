// Threads and caches of this machine. parallel.cpp is the only file that knows of OpenMP.
#pragma once

#include <cstdint>

namespace bnext {

// Bytes of the cache that a core has to itself, as the system reports them; else 1 MiB.
std::int64_t core_cache_bytes();

// Calls of body(context, i) for i in [0, count), by each thread in rising order or, `backwards`, in
// falling order. Which thread takes which i is not fixed: bodies must not depend on it. But phases
// of equal counts share them out alike, so that a thread finds in the cache of its own core what it
// met in the phase before.
struct Phase {
  std::int64_t count;
  void (*body)(void* context, std::int64_t i);
  void* context;
  bool backwards;
};

// One phase after another, each on several threads if `work` (elements touched in all) is worth it.
void parallel_phases(std::int64_t work, const Phase* phases, int count);

// How many threads share `count` pieces of `work` elements in all.
std::int64_t parallel_threads(std::int64_t count, std::int64_t work);

// A phase that calls body(i), which must outlive it.
template <class Body>
Phase phase(std::int64_t count, Body& body, bool backwards = false) {
  return {count, [](void* context, std::int64_t i) { (*static_cast<Body*>(context))(i); }, &body,
          backwards};
}

// A single phase.
template <class Body>
void parallel_for(std::int64_t count, std::int64_t work, Body body) {
  const Phase only = phase(count, body);
  parallel_phases(work, &only, 1);
}

// Calls of body(begin, end), by each thread for the part of [0, count) that is its own.
template <class Body>
void parallel_shares(std::int64_t count, std::int64_t work, Body body) {
  const std::int64_t shares = parallel_threads(count, work);
  parallel_for(shares, work, [&](std::int64_t share) {
    body(count * share / shares, count * (share + 1) / shares);
  });
}

}  // namespace bnext
