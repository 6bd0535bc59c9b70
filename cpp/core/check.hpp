// The only validator: every public function checks its arguments here, before dispatch.
#pragma once

#include <string>

#include "bnext/types.hpp"
#include "core/args.hpp"

namespace bnext {

std::string to_string(const Shape& shape);
const char* to_string(DType dtype);
std::string to_string(double value);
std::string to_string(const Device& device);
std::int64_t dtype_size(DType dtype);

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
  // An output may be an array that is read, if it is one of `same`; any other overlap is an error.
  void no_overlap(const char* out_name, const Array& out, const char* in_name, const Array& in,
                  bool may_be_same) const;

 private:
  void usable(const char* argument, const Array& a) const;

  const char* operation_;
  Device device_;
};

}  // namespace bnext
