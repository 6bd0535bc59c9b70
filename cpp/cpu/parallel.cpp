#include "cpu/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>

#include "bnext/runtime.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace bnext {
namespace {

// Below this many elements, a second thread costs more than it saves: measured,
// docs/performance.md.
constexpr std::int64_t serial_work = 32768;

#ifdef _OPENMP
// Processors that the cgroup's quota pays for; a container may see more than it may use.
int cgroup_limit() {
  std::string quota = "max";
  double period = 0;
  if (std::ifstream v2("/sys/fs/cgroup/cpu.max"); v2 >> quota >> period) {
    if (quota == "max") return 0;
  } else {
    std::ifstream v1_quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
    std::ifstream v1_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
    if (!(v1_quota >> quota) || !(v1_period >> period)) return 0;
  }
  const double processors = period > 0 ? std::atof(quota.c_str()) / period : 0;
  return processors > 0 ? std::max(1, static_cast<int>(processors + 0.999)) : 0;
}

int default_threads() {
  // omp_get_num_procs respects the affinity mask, omp_get_max_threads OMP_NUM_THREADS.
  if (std::getenv("OMP_NUM_THREADS") != nullptr) return omp_get_max_threads();
  const int limit = cgroup_limit();
  const int processors = omp_get_num_procs();
  return limit > 0 ? std::min(limit, processors) : processors;
}
#else
int default_threads() {
  return 1;
}
#endif

std::atomic<int>& thread_count() {
  static std::atomic<int> count{default_threads()};
  return count;
}

// The part of a phase that one of some threads does.
void run_share(const Phase& phase, std::int64_t thread, std::int64_t threads) {
  const std::int64_t begin = phase.count * thread / threads;
  const std::int64_t end = phase.count * (thread + 1) / threads;
  for (std::int64_t i = begin; i < end; ++i)
    phase.body(phase.context, phase.backwards ? begin + end - 1 - i : i);
#if defined(__SSE2__)
  // What kernels wrote past the caches becomes visible to other threads. Once for all of it: each
  // time the thread waits for memory.
  _mm_sfence();
#endif
}

// Of level 2 or 3, as the system reports it; 0 if it does not. What sysconf says counts the caches
// of processors that are not ours.
std::int64_t bytes_of_cache(int level) {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(level) + "/size");
  std::int64_t kilobytes = 0;
  return file >> kilobytes ? kilobytes << 10 : 0;
}

}  // namespace

std::int64_t cache_bytes() {
  static const std::int64_t bytes = [] {
    if (const char* forced = std::getenv("BNEXT_CACHE_BYTES"); forced != nullptr && *forced) {
      char* end = nullptr;
      const long long value = std::strtoll(forced, &end, 10);
      if (*end != '\0' || value < 1)
        throw std::invalid_argument(std::string("BNEXT_CACHE_BYTES: expected bytes, got '") +
                                    forced + "'");
      return static_cast<std::int64_t>(value);
    }
    const std::int64_t largest = std::max(bytes_of_cache(2), bytes_of_cache(3));
    return largest > 0 ? largest : std::int64_t{32} << 20;
  }();
  return bytes;
}

std::int64_t core_cache_bytes() {
  static const std::int64_t bytes = [] {
    const std::int64_t size = bytes_of_cache(2);
    return size > 0 ? size : std::int64_t{1} << 20;
  }();
  return bytes;
}

int num_threads() {
  return thread_count();
}

void set_num_threads(int n) {
  if (n < 1)
    throw std::invalid_argument("set_num_threads: n: expected 1 or more, got " + std::to_string(n));
#ifdef _OPENMP
  thread_count() = n;
#endif
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

void pause_threads() {
// GCC has had the function since version 9, before it claimed OpenMP 5.0.
#if defined(_OPENMP) && (_OPENMP >= 201811 || (defined(__GNUC__) && !defined(__clang__)))
  // A child of fork has no worker threads, but libgomp in it believes it has; without this the
  // child's first parallel region waits for them forever.
  omp_pause_resource_all(omp_pause_soft);
#endif
}

std::int64_t parallel_threads(std::int64_t count, std::int64_t work) {
  return work >= serial_work ? std::min<std::int64_t>(num_threads(), count) : 1;
}

void parallel_phases(std::int64_t work, const Phase* phases, int count) {
#ifdef _OPENMP
  std::int64_t most = 0;
  for (int k = 0; k < count; ++k) most = std::max(most, phases[k].count);
  const auto threads = static_cast<int>(parallel_threads(most, work));
  if (threads > 1) {
    // One region for all: a barrier between phases costs a fraction of waking the threads again.
#pragma omp parallel num_threads(threads)
    for (int k = 0; k < count; ++k) {
      run_share(phases[k], omp_get_thread_num(), omp_get_num_threads());
#pragma omp barrier
    }
    return;
  }
#else
  (void)work;
#endif
  for (int k = 0; k < count; ++k) run_share(phases[k], 0, 1);
}

}  // namespace bnext
