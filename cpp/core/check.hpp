// The only validator: every public function checks its arguments here, before dispatch.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "bnext/types.hpp"
#include "core/args.hpp"

namespace bnext {

std::string to_string(const Shape& shape);
const char* to_string(DType dtype);
std::string to_string(double value);
std::string to_string(const Device& device);
std::int64_t dtype_size(DType dtype);

// Memory that a call reads or writes: none if an optional argument is not given, or empty.
struct Region {
  const char* name;
  std::uintptr_t begin = 0, end = 0;

  Region(const char* name_, const void* data, std::int64_t bytes);
  Region(const char* name_, const Array& a)
      : Region(name_, a.given ? a.data : nullptr, a.given ? a.bytes() : 0) {}
};
using Regions = std::initializer_list<Region>;

// Checks for one operation, whose name starts every message.
class Check {
 public:
  // All arrays must lie where `data` does.
  Check(const char* operation, const Array& data) : operation_(operation), device_(data.device) {}

  // Throws std::invalid_argument "operation: argument: message".
  [[noreturn]] void fail(const char* argument, const std::string& message) const;

  // x has a shape with a channel: returns its canonical form.
  Problem problem(const Array& x, int channel_axis) const;

  void same_kind(const char* argument, const Array& a, const Array& x) const;
  void per_channel(const char* argument, const Array& a, std::int64_t c, DType dtype) const;
  void optional_per_channel(const char* argument, const Array& a, std::int64_t c,
                            DType dtype) const;
  void eps(double eps) const;
  void slope(double negative_slope) const;
  void activation(Activation activation) const;
  // Elements first to first + count are to be written to `to`.
  void elements(std::int64_t first, std::int64_t count, const char* to_name, const void* to) const;

  // No output may overlap another array of the call, but the first one may be the very array of one
  // of `in_place`, which are read, as `inputs` are.
  void no_overlap(Regions outputs, Regions in_place, Regions inputs) const;

 private:
  void usable(const char* argument, const Array& a) const;
  void apart(const Region& out, const Region& other, bool may_be_same) const;

  const char* operation_;
  Device device_;
};

}  // namespace bnext
