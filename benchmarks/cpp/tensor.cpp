#include "tensor.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bench {
namespace {

using bnext::DType;

// How many bits of a number of 16 bits are mantissa; the rest but the sign is exponent.
struct Half {
  int mantissa;

  int bias() const { return (1 << (14 - mantissa)) - 1; }

  double value(std::uint16_t bits) const {
    const int exponent = (bits & 0x7fff) >> mantissa;
    int digits = bits & ((1 << mantissa) - 1);
    if (exponent > 0) digits += 1 << mantissa;
    const double size = std::ldexp(digits, std::max(exponent, 1) - bias() - mantissa);
    return bits & 0x8000 ? -size : size;
  }

  // Of a number in its range.
  std::uint16_t bits(double value) const {
    const int sign = std::signbit(value) ? 0x8000 : 0;
    const int exponent = value == 0 ? 1 - bias() : std::max(std::ilogb(value), 1 - bias());
    const double digits = std::nearbyint(std::ldexp(std::abs(value), mantissa - exponent));
    const int size = ((exponent + bias() - 1) << mantissa) + static_cast<int>(digits);
    return static_cast<std::uint16_t>(sign | size);
  }
};

constexpr Half float16{10}, bfloat16{7};

std::int64_t bytes_of(DType dtype) {
  return bnext::Array(nullptr, dtype, {1}).bytes();
}

}  // namespace

double rounding(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return std::ldexp(1, -24);
    case DType::float64:
      return std::ldexp(1, -53);
    case DType::float16:
      return std::ldexp(1, -float16.mantissa - 1);
    case DType::bfloat16:
      return std::ldexp(1, -bfloat16.mantissa - 1);
  }
  return 0;
}

Tensor::Tensor(DType dtype, std::int64_t size) : dtype_(dtype), size_(size) {
  constexpr std::size_t huge = 2 << 20;
  const std::size_t rounded = (static_cast<std::size_t>(bytes()) + huge - 1) / huge * huge;
  data_ = std::aligned_alloc(huge, rounded);
  if (data_ == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  madvise(data_, rounded, MADV_HUGEPAGE);
#endif
  std::memset(data_, 0, rounded);
}

Tensor::~Tensor() {
  std::free(data_);
}

std::int64_t Tensor::bytes() const {
  return size_ * bytes_of(dtype_);
}

double Tensor::operator[](std::int64_t i) const {
  switch (dtype_) {
    case DType::float32:
      return static_cast<const float*>(data_)[i];
    case DType::float64:
      return static_cast<const double*>(data_)[i];
    case DType::float16:
      return float16.value(static_cast<const std::uint16_t*>(data_)[i]);
    case DType::bfloat16:
      return bfloat16.value(static_cast<const std::uint16_t*>(data_)[i]);
  }
  return 0;
}

void Tensor::set(std::int64_t i, double value) {
  switch (dtype_) {
    case DType::float32:
      static_cast<float*>(data_)[i] = static_cast<float>(value);
      break;
    case DType::float64:
      static_cast<double*>(data_)[i] = value;
      break;
    case DType::float16:
      static_cast<std::uint16_t*>(data_)[i] = float16.bits(value);
      break;
    case DType::bfloat16:
      static_cast<std::uint16_t*>(data_)[i] = bfloat16.bits(value);
      break;
  }
}

void Tensor::repeat(const Tensor& source, std::int64_t step) {
  const auto copy = [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(source.data_);
    T* to = static_cast<T*>(data_);
    for (std::int64_t i = 0, at = 0; i < size_; ++i) {
      to[i] = from[at];
      at += step;
      if (at >= source.size_) at -= source.size_;
    }
  };
  if (bytes_of(dtype_) == 2) copy(std::uint16_t{});
  if (bytes_of(dtype_) == 4) copy(std::uint32_t{});
  if (bytes_of(dtype_) == 8) copy(std::uint64_t{});
}

void Tensor::fill(double value) {
  for (std::int64_t i = 0; i < size_; ++i) set(i, value);
}

void Tensor::flush() const {
#if defined(__x86_64__)
  const char* begin = static_cast<const char*>(data_);
  for (std::int64_t i = 0; i < bytes(); i += 64) _mm_clflush(begin + i);
  _mm_mfence();
#endif
}

}  // namespace bench
