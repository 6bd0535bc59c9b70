// As much of CUDA as cpp/cuda uses, on the processor: threads of a block are fibers that run until
// they meet others, so that kernels can be tested, and traced with a debugger, without a GPU. It
// shows wrong indices, sums, barriers and masks; not speed, and no race between two barriers.
//
// The order in which threads and blocks run is turned round from launch to launch: what depends on
// it gives other bits in the next one.
//
// Environment, read at the first use: BNEXT_EMULATED_DEVICES (1), BNEXT_EMULATED_MEMORY (bytes that
// can be allocated, without limit), BNEXT_EMULATED_SHARED (KiB of shared memory of a block, 227).
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#define BNEXT_CUDA_EMULATED

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

struct uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// -- threads --------------------------------------------------------------------------------------

inline dim3 blockDim, gridDim;

namespace emulated {

constexpr int warp_threads = 32;
constexpr std::size_t stack_bytes = 64 << 10;

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Barrier barrier;
  std::uint64_t slot[warp_threads];
};

struct Block {
  dim3 index;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<std::uint64_t> shared;
};

struct Fiber {
  void* stack_pointer;
  dim3 thread;
  Block* block;
  bool done;
};

struct Machine {
  std::mutex mutex;  // one launch at a time
  std::vector<Fiber> fibers;
  std::vector<unsigned char*> stacks;
  std::vector<Block> blocks;  // that run at the same time
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  void (*call)(void*) = nullptr;
  void* kernel = nullptr;
  bool turned = false;
};

inline Machine& machine() {
  static Machine& machine = *new Machine;
  return machine;
}

#if !defined(__x86_64__)
#error "the emulation of CUDA switches stacks as x86-64 does"
#endif
extern "C" void bnext_emulated_switch(void** save, void* load);
asm(R"(
.text
.weak bnext_emulated_switch
bnext_emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

inline void yield() {
  Machine& m = machine();
  bnext_emulated_switch(&m.current->stack_pointer, m.scheduler);
}

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void fiber_main() {
  Machine& m = machine();
  m.call(m.kernel);
  m.current->done = true;
  yield();
  std::abort();
}

inline void prepare(Fiber& fiber, unsigned char* stack) {
  auto* top = reinterpret_cast<void**>(stack + stack_bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // registers
  fiber.stack_pointer = top;
  fiber.done = false;
}

inline void run_blocks(unsigned first, unsigned count, std::size_t shared) {
  Machine& m = machine();
  const unsigned threads = blockDim.x;
  m.blocks.assign(count, Block{});
  m.fibers.assign(std::size_t{count} * threads, Fiber{});
  while (m.stacks.size() < m.fibers.size())
    m.stacks.push_back(static_cast<unsigned char*>(
        mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
  for (unsigned b = 0; b < count; ++b) {
    Block& block = m.blocks[b];
    block.index = dim3(first + b);
    block.barrier = {static_cast<int>(threads), 0, 0};
    block.warps.assign(threads / warp_threads, Warp{});
    for (Warp& warp : block.warps) warp.barrier.expected = warp_threads;
    block.shared.assign(shared / 8 + 1, ~std::uint64_t{0});  // NaN
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = m.fibers[std::size_t{b} * threads + t];
      fiber.thread = dim3(t);
      fiber.thread.y = fiber.thread.z = 0;
      fiber.block = &block;
      prepare(fiber, m.stacks[std::size_t{b} * threads + t]);
    }
  }
  for (std::size_t left = m.fibers.size(); left > 0;) {
    for (std::size_t i = 0; i < m.fibers.size(); ++i) {
      Fiber& fiber = m.fibers[m.turned ? m.fibers.size() - 1 - i : i];
      if (fiber.done) continue;
      m.current = &fiber;
      bnext_emulated_switch(&m.scheduler, fiber.stack_pointer);
      left -= fiber.done;
    }
  }
}

inline unsigned char* block_memory() {
  return reinterpret_cast<unsigned char*>(machine().current->block->shared.data());
}
template <class T>
T shuffle(T value, int from) {
  static_assert(sizeof(T) <= 8);
  const Fiber& fiber = *machine().current;
  const unsigned lane = fiber.thread.x % warp_threads;
  Warp& warp = fiber.block->warps[fiber.thread.x / warp_threads];
  std::memcpy(&warp.slot[lane], &value, sizeof value);
  wait(warp.barrier);
  std::memcpy(&value, &warp.slot[from], sizeof value);
  wait(warp.barrier);
  return value;
}

}  // namespace emulated

#define threadIdx (::emulated::machine().current->thread)
#define blockIdx (::emulated::machine().current->block->index)

inline void __syncthreads() {
  emulated::wait(emulated::machine().current->block->barrier);
}
inline void __threadfence() {}
using std::min;
template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return emulated::shuffle(value, static_cast<int>(threadIdx.x % 32) ^ lanes);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulated::shuffle(value, lane % 32);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const emulated::Fiber& fiber = *emulated::machine().current;
  emulated::Warp& warp = fiber.block->warps[fiber.thread.x / 32];
  warp.slot[fiber.thread.x % 32] = predicate;
  emulated::wait(warp.barrier);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= (warp.slot[lane] != 0 ? 1u : 0u) << lane;
  emulated::wait(warp.barrier);
  return bits;
}
inline unsigned atomicAdd(unsigned* at, unsigned value) {
  return std::exchange(*at, *at + value);
}
inline unsigned atomicOr(unsigned* at, unsigned value) {
  return std::exchange(*at, *at | value);
}

// -- the runtime ----------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaMemoryType {
  cudaMemoryTypeUnregistered,
  cudaMemoryTypeHost,
  cudaMemoryTypeDevice,
  cudaMemoryTypeManaged
};
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount,
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
constexpr unsigned cudaStreamNonBlocking = 1;
using cudaStream_t = void*;
using cudaEvent_t = void*;
constexpr unsigned cudaEventDisableTiming = 2;
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emulated {

inline long long setting(const char* name, long long otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::atoll(text) : otherwise;
}

struct Allocation {
  std::size_t bytes;
  int device;
};
struct Runtime {
  std::mutex mutex;
  std::map<const unsigned char*, Allocation> memory;
  long long used = 0;
  const long long limit = setting("BNEXT_EMULATED_MEMORY", 1LL << 60);
  const int devices = static_cast<int>(setting("BNEXT_EMULATED_DEVICES", 1));
  const int shared = static_cast<int>(setting("BNEXT_EMULATED_SHARED", 227)) << 10;
};
inline Runtime& runtime() {
  static Runtime& runtime = *new Runtime;
  return runtime;
}
inline int& current_device() {
  static thread_local int device = 0;
  return device;
}
inline cudaError_t& last_error() {
  static thread_local cudaError_t error = cudaSuccess;
  return error;
}
inline cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error() = error;
  return error;
}

}  // namespace emulated

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    default:
      return "invalid argument";
  }
}
inline cudaError_t cudaGetLastError() {
  return std::exchange(emulated::last_error(), cudaSuccess);
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = emulated::runtime().devices;
  return *count > 0 ? cudaSuccess : emulated::report(cudaErrorNoDevice);
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulated::current_device();
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulated::runtime().devices)
    return emulated::report(cudaErrorInvalidDevice);
  emulated::current_device() = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  constexpr int multiprocessors = 2;
  *value =
      attribute == cudaDevAttrMultiProcessorCount ? multiprocessors : emulated::runtime().shared;
  return cudaSuccess;
}
template <class T>
cudaError_t cudaMalloc(T** memory, std::size_t bytes) {
  emulated::Runtime& r = emulated::runtime();
  const std::lock_guard<std::mutex> lock(r.mutex);
  if (r.used + static_cast<long long>(bytes) > r.limit)
    return emulated::report(cudaErrorMemoryAllocation);
  const std::size_t rounded = (bytes + 255) / 256 * 256 + 256;
  auto* made = static_cast<unsigned char*>(std::aligned_alloc(256, rounded));
  std::memset(made, 0xFF, rounded);
  r.memory[made] = {bytes, emulated::current_device()};
  r.used += static_cast<long long>(bytes);
  *memory = reinterpret_cast<T*>(made);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) {
  emulated::Runtime& r = emulated::runtime();
  const std::lock_guard<std::mutex> lock(r.mutex);
  const auto found = r.memory.find(static_cast<unsigned char*>(memory));
  if (found == r.memory.end()) return emulated::report(cudaErrorInvalidValue);
  r.used -= static_cast<long long>(found->second.bytes);
  // Whoever writes beyond the end has written here.
  const unsigned char* end = found->first + found->second.bytes;
  for (int i = 0; i < 256; ++i)
    if (end[i] != 0xFF) {
      std::fprintf(stderr, "emulated CUDA: memory was written beyond its end\n");
      std::abort();
    }
  r.memory.erase(found);
  std::free(memory);
  return cudaSuccess;
}
template <class T>
cudaError_t cudaMallocAsync(T** memory, std::size_t bytes, cudaStream_t) {
  return cudaMalloc(memory, bytes);
}
inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t) {
  return cudaFree(memory);
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, std::size_t bytes, cudaStream_t) {
  std::memset(to, byte, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* at) {
  emulated::Runtime& r = emulated::runtime();
  const std::lock_guard<std::mutex> lock(r.mutex);
  *attributes = {cudaMemoryTypeUnregistered, 0};
  const auto* p = static_cast<const unsigned char*>(at);
  auto next = r.memory.upper_bound(p);
  if (next == r.memory.begin()) return cudaSuccess;
  --next;
  if (p < next->first + next->second.bytes)
    *attributes = {cudaMemoryTypeDevice, next->second.device};
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  *id = reinterpret_cast<std::uintptr_t>(stream);
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = reinterpret_cast<cudaStream_t>(std::uintptr_t{64});
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned) {
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t) {
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class... Parameters, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Args&&... args) {
  std::tuple<Parameters...> values(args...);
  auto call = [&] { std::apply(kernel, values); };
  using Call = decltype(call);
  emulated::Machine& m = emulated::machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  m.kernel = &call;
  m.call = [](void* it) { (*static_cast<Call*>(it))(); };
  m.turned = !m.turned;
  if (gridDim.x == 0 ||
      config->dynamicSmemBytes > static_cast<std::size_t>(emulated::runtime().shared))
    return emulated::report(cudaErrorInvalidValue);
  // All at the same time, or one after the other.
  const unsigned together = config->numAttrs > 0 ? gridDim.x : 1, steps = gridDim.x / together;
  for (unsigned k = 0; k < steps; ++k)
    emulated::run_blocks((m.turned ? steps - 1 - k : k) * together, together,
                         config->dynamicSmemBytes);
  return cudaSuccess;
}
