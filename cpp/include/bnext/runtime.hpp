// Which kernels run, and on how many threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace bnext {

struct BackendInfo {
  std::string name;
  bool available;  // this machine can run it
};

// Every backend: those of the processor that were compiled, best last, and then "cuda". Arrays of
// a GPU are always for that one. Where it is set for arrays in main memory, they are copied to the
// GPU and back: a check of results, not a way to be fast. It is never the default.
std::vector<BackendInfo> backends();

// The backend in use: the best one available, or the one that BNEXT_BACKEND named at load.
std::string backend();

// Use another backend from the next call on. Throws std::invalid_argument if there is none of
// that name or this processor cannot run it, listing those there are.
void set_backend(const std::string& name);

// Threads that operations on large arrays use. The default respects OMP_NUM_THREADS, the affinity
// mask and the cgroup quota. Without OpenMP it is always 1.
int num_threads();
void set_num_threads(int n);  // n >= 1, else std::invalid_argument

// Bytes of the largest cache, as the system reports them or BNEXT_CACHE_BYTES says (else than a
// positive number: std::invalid_argument). Operations whose arrays exceed it write their results
// past the caches; what they are does not depend on it.
std::int64_t cache_bytes();

bool has_openmp();

// Why "cuda" is not available: not compiled, no driver, no device; empty if it is.
std::string cuda_unavailable_reason();

// Lets a forked child use threads again: call in the parent, before fork.
void pause_threads();

std::string version();

}  // namespace bnext
