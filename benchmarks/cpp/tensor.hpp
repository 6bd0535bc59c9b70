// Memory of any dtype, for every contender.
#pragma once

#include <bnext/types.hpp>
#include <cstdint>

namespace bench {

// `size` zeros, aligned to 64 bytes, on huge pages where the system has them.
class Tensor {
 public:
  Tensor(bnext::DType dtype, std::int64_t size);
  Tensor(const Tensor&) = delete;
  ~Tensor();

  bnext::DType dtype() const { return dtype_; }
  std::int64_t size() const { return size_; }
  std::int64_t bytes() const;
  void* data() const { return data_; }

  double operator[](std::int64_t i) const;
  void set(std::int64_t i, double value);  // to the nearest that the dtype has
  // Its elements are those of `source`, `step` after one another, round and round.
  void repeat(const Tensor& source, std::int64_t step);
  void fill(double value);

  void flush() const;  // out of every cache

 private:
  bnext::DType dtype_;
  std::int64_t size_;
  void* data_;
};

// The largest relative error of rounding to it.
double rounding(bnext::DType dtype);

}  // namespace bench
