#include "cuda/memory.hpp"

#include <algorithm>
#include <list>
#include <map>
#include <mutex>
#include <new>
#include <string>

#include "cuda/backend.hpp"

namespace bnext {
namespace cuda {
namespace {

class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string what) : what_(std::move(what)) {}
  const char* what() const noexcept override { return what_.c_str(); }

 private:
  std::string what_;
};

struct Kept {
  int device;
  unsigned long long stream;  // its number: handles are used again
  unsigned char* memory;
  std::size_t bytes;
  unsigned char* letters;
  std::size_t letter_bytes;
  unsigned launches;
};

constexpr std::size_t most_kept = 32;                         // workspaces
constexpr std::size_t worth_keeping = std::size_t{64} << 20;  // bytes of one

struct Cache {
  std::mutex mutex;
  std::list<Kept> kept;  // last used first
};

// Never destroyed: at exit the driver may be gone before.
Cache& cache() {
  static Cache& cache = *new Cache;
  return cache;
}

cudaStream_t stream_of(const Place& place) {
  return static_cast<cudaStream_t>(place.stream);
}

bool capturing(const Place& place) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_of(place), &status), "asking for the state of a stream");
  return status != cudaStreamCaptureStatusNone;
}

unsigned char* allocate_bytes(const Place& place, std::size_t bytes) {
  void* memory = nullptr;
  check(cudaMallocAsync(&memory, bytes, stream_of(place)), "allocating memory");
  return static_cast<unsigned char*>(memory);
}

std::string find_unavailable_reason() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {
    cudaGetLastError();
    return "no driver for NVIDIA GPUs on this machine, or one too old";
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    cudaGetLastError();
    return "no NVIDIA GPU on this machine that may be used";
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(error);
  }
  return "";
}

}  // namespace

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  const std::string message = std::string("CUDA: ") + what + ": " + cudaGetErrorString(error);
  if (error == cudaErrorMemoryAllocation) throw OutOfMemory(message);
  throw DeviceError(message);
}

const std::string& unavailable_reason() {
  static const std::string reason = find_unavailable_reason();
  return reason;
}

const Limits& limits_of(int device) {
  static std::mutex mutex;
  static std::map<int, Limits>& known = *new std::map<int, Limits>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  int shared = 0, multiprocessors = 0;
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "asking for a device's limits");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "asking for a device's limits");
  return known[device] = {shared, multiprocessors};
}

DeviceGuard::DeviceGuard(int device) {
  if (!unavailable_reason().empty()) throw DeviceError("CUDA: " + unavailable_reason());
  int now = 0;
  check(cudaGetDevice(&now), "asking for the current device");
  if (now == device) return;
  check(cudaSetDevice(device), "choosing a device");
  before_ = now;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

Workspace::Workspace(const Place& place, std::size_t bytes, std::size_t zeros_needed,
                     std::size_t letter_bytes)
    : place_(place) {
  if (bytes + zeros_needed + letter_bytes == 0) return;
  const auto clear = [&](void* memory, std::size_t count) {
    check(cudaMemsetAsync(memory, 0, count, stream_of(place)), "clearing memory");
  };
  if (bytes > worth_keeping || letter_bytes > worth_keeping || zeros_needed > zeros ||
      capturing(place)) {
    const std::size_t cleared = (letter_bytes + zeros_needed + 255) / 256 * 256;
    letters_ = own_ = allocate_bytes(place, cleared + bytes);
    zeroed_ = own_ + letter_bytes;
    next_ = own_ + cleared;
    if (cleared > 0) clear(own_, letter_bytes + zeros_needed);
    return;
  }
  unsigned long long stream = 0;
  check(cudaStreamGetId(stream_of(place), &stream), "asking for the number of a stream");
  Cache& c = cache();
  const std::lock_guard<std::mutex> lock(c.mutex);
  auto found = std::find_if(c.kept.begin(), c.kept.end(), [&](const Kept& k) {
    return k.device == place.device && k.stream == stream;
  });
  if (found == c.kept.end()) {
    if (c.kept.size() >= most_kept) {
      // Its stream may be gone: this waits for the device, once in a long while.
      const DeviceGuard guard(c.kept.back().device);
      cudaFree(c.kept.back().memory);
      cudaFree(c.kept.back().letters);
      c.kept.pop_back();
    }
    c.kept.push_front({place.device, stream, nullptr, 0, nullptr, 0, 0});
  } else {
    c.kept.splice(c.kept.begin(), c.kept, found);
  }
  Kept& kept = c.kept.front();
  const auto grow = [&](unsigned char*& memory, std::size_t& now, std::size_t needed) {
    if (now >= needed) return false;
    std::size_t rounded = std::size_t{1} << 20;
    while (rounded < needed) rounded *= 2;
    if (memory != nullptr) cudaFreeAsync(memory, stream_of(place));
    memory = nullptr;
    now = 0;
    memory = allocate_bytes(place, rounded);
    now = rounded;
    return true;
  };
  if (grow(kept.memory, kept.bytes, zeros + bytes)) clear(kept.memory, zeros);
  if (grow(kept.letters, kept.letter_bytes, letter_bytes) || kept.launches + 1 == 0) {
    clear(kept.letters, kept.letter_bytes);
    kept.launches = 0;
  }
  zeroed_ = kept.memory;
  next_ = kept.memory + zeros;
  letters_ = kept.letters;
  launch_ = ++kept.launches;
}

Workspace::~Workspace() {
  if (own_ != nullptr) cudaFreeAsync(own_, stream_of(place_));
}

void fill_bytes(const Place& place, void* to, int byte, std::size_t count) {
  const DeviceGuard guard(place.device);
  check(cudaMemsetAsync(to, byte, count, stream_of(place)), "filling memory");
}

void copy_bytes(const Place& place, void* to, const void* from, std::size_t count) {
  const DeviceGuard guard(place.device);
  check(cudaMemcpyAsync(to, from, count, cudaMemcpyDeviceToDevice, stream_of(place)),
        "copying memory");
}

void* allocate(const Place& place, std::size_t count) {
  const DeviceGuard guard(place.device);
  return allocate_bytes(place, std::max<std::size_t>(count, 1));
}

void release(const Place& place, void* memory) noexcept {
  try {
    const DeviceGuard guard(place.device);
    cudaFreeAsync(memory, stream_of(place));
  } catch (const std::exception&) {  // the driver is gone, and the memory with it
  }
}

void order(const Place& place, Stream waiting) {
  if (place.stream == waiting) return;
  const DeviceGuard guard(place.device);
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
  cudaError_t error = cudaEventRecord(event, stream_of(place));
  if (error == cudaSuccess)
    error = cudaStreamWaitEvent(static_cast<cudaStream_t>(waiting), event, 0);
  cudaEventDestroy(event);  // once it has happened
  check(error, "ordering two streams");
}

int device_of(const void* data) {
  if (!unavailable_reason().empty()) throw DeviceError("CUDA: " + unavailable_reason());
  cudaPointerAttributes attributes{};
  check(cudaPointerGetAttributes(&attributes, data), "asking where memory is");
  if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged)
    throw std::invalid_argument("CUDA: expected memory of a GPU");
  return attributes.device;
}

}  // namespace cuda
}  // namespace bnext
