// What every operation takes: dtypes, arrays that somebody else owns, errors.
#pragma once

#include <bnext/lists.hpp>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

namespace bnext {

// float32, float64, float16, bfloat16
enum class DType {
#define BNEXT_ENUMERATOR(name, type, compute) name,
  BNEXT_DTYPES(BNEXT_ENUMERATOR)
#undef BNEXT_ENUMERATOR
};

template <class T>
constexpr DType dtype_of();
#define BNEXT_DTYPE_OF(name, type, compute) \
  template <>                               \
  constexpr DType dtype_of<type>() {        \
    return DType::name;                     \
  }
BNEXT_DTYPES(BNEXT_DTYPE_OF)
#undef BNEXT_DTYPE_OF

// What values of type S are computed in, and what weight, bias and statistics are stored in.
template <class S>
struct ComputeOf;
#define BNEXT_COMPUTE(name, type_, compute) \
  template <>                               \
  struct ComputeOf<type_> {                 \
    using type = compute;                   \
  };
BNEXT_DTYPES(BNEXT_COMPUTE)
#undef BNEXT_COMPUTE
template <class S>
using Compute = typename ComputeOf<S>::type;

// The dtype of weight, bias and statistics for data of this one: float32 for those of 16 bits.
DType parameter_dtype(DType dtype);

// An array argument has the wrong dtype. Wrong values and shapes raise std::invalid_argument.
class DTypeError : public std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// A device, or its driver, cannot do what it was asked for. That it has no memory left is a
// std::bad_alloc.
class DeviceError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where memory is: main memory, or that of a GPU.
enum class DeviceKind { cpu, cuda };
struct Device {
  DeviceKind kind = DeviceKind::cpu;
  int index = 0;

  bool operator==(const Device& other) const { return kind == other.kind && index == other.index; }
  bool operator!=(const Device& other) const { return !(*this == other); }
};

// Operations on arrays of a GPU run on this of its streams, a cudaStream_t, and return before they
// are done: whoever reads results from elsewhere waits for the stream, as usual with CUDA.
using Stream = void*;

using Shape = std::vector<std::int64_t>;

// A C-contiguous array that somebody else owns and keeps alive during the call.
// A default-constructed Array stands for an optional argument that is not given.
struct Array {
  void* data = nullptr;
  DType dtype = DType::float32;
  Shape shape;
  bool given = false;
  Device device = {};

  Array() = default;
  Array(void* data_, DType dtype_, Shape shape_)
      : data(data_), dtype(dtype_), shape(std::move(shape_)), given(true) {}
  template <class T>
  Array(T* data_, std::initializer_list<std::int64_t> shape_)
      : Array(data_, dtype_of<T>(), Shape(shape_)) {}
  // Inputs are never written, so a pointer to const may be given for them.
  template <class T>
  Array(const T* data_, std::initializer_list<std::int64_t> shape_)
      : Array(const_cast<T*>(data_), shape_) {}

  std::int64_t size() const;   // number of elements
  std::int64_t bytes() const;  // size() times the size of an element
};

}  // namespace bnext
