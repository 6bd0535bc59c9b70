#include "core/check.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <sstream>

#include "bnext/batch_norm.hpp"
#include "bnext/lists.hpp"

namespace bnext {

std::string to_string(const Shape& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

std::string to_string(double value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

std::string to_string(const Device& device) {
  return device.kind == DeviceKind::cpu ? "main memory" : "cuda:" + std::to_string(device.index);
}

const char* to_string(DType dtype) {
  switch (dtype) {
#define BNEXT_CASE(name, type, compute) \
  case DType::name:                     \
    return #name;
    BNEXT_DTYPES(BNEXT_CASE)
#undef BNEXT_CASE
  }
  return "?";
}

std::int64_t dtype_size(DType dtype) {
  switch (dtype) {
#define BNEXT_CASE(name, type, compute) \
  case DType::name:                     \
    return sizeof(type);
    BNEXT_DTYPES(BNEXT_CASE)
#undef BNEXT_CASE
  }
  return 0;
}

DType parameter_dtype(DType dtype) {
  switch (dtype) {
#define BNEXT_CASE(name, type, compute) \
  case DType::name:                     \
    return dtype_of<compute>();
    BNEXT_DTYPES(BNEXT_CASE)
#undef BNEXT_CASE
  }
  return dtype;
}

std::int64_t Array::size() const {
  std::int64_t product = 1;
  for (const std::int64_t extent : shape) product *= extent;
  return product;
}

std::int64_t Array::bytes() const {
  return size() * dtype_size(dtype);
}

void Check::fail(const char* argument, const std::string& message) const {
  throw std::invalid_argument(std::string(operation_) + ": " + argument + ": " + message);
}

void Check::usable(const char* argument, const Array& a) const {
  if (!a.given) fail(argument, "expected an array, got none");
  const std::int64_t element = dtype_size(a.dtype);
#define BNEXT_NAME(name, type, compute) #name ", "
  if (element == 0)
    throw DTypeError(std::string(operation_) + ": " + argument +
                     ": expected a dtype of " BNEXT_DTYPES(BNEXT_NAME) "got DType(" +
                     std::to_string(static_cast<int>(a.dtype)) + ")");
#undef BNEXT_NAME
  // Of an empty array too, the other extents must have a product: some of them are multiplied.
  std::int64_t bytes = element;
  bool empty = false;
  for (const std::int64_t extent : a.shape) {
    if (extent < 0) fail(argument, "expected no negative extent, got shape " + to_string(a.shape));
    if (extent == 0)
      empty = true;
    else if (__builtin_mul_overflow(bytes, extent, &bytes))
      fail(argument, "expected fewer than 2**63 bytes, got shape " + to_string(a.shape));
  }
  if (empty) return;
  if (a.data == nullptr) fail(argument, "expected data, got a null pointer");
  // Elements have a power of two of bytes, and a mask takes less time than a division.
  if ((reinterpret_cast<std::uintptr_t>(a.data) & static_cast<std::uintptr_t>(element - 1)) != 0)
    fail(argument, "expected data aligned to its elements, got a misaligned pointer");
  if (a.device != device_)
    fail(argument, "expected an array in " + to_string(device_) + " as the data, got one in " +
                       to_string(a.device));
}

Problem Check::problem(const Array& x, int channel_axis) const {
  usable("x", x);
  const auto rank = static_cast<int>(x.shape.size());
  if (rank < 2)
    fail("x",
         "expected 2 or more dimensions, (N, C, *) or (N, *, C), got shape " + to_string(x.shape));
  // The last axis may also be called by its positive number where that is 1.
  if (channel_axis != 1 && channel_axis != -1)
    fail("channel_axis", "expected 1 or -1, got " + std::to_string(channel_axis));
  const bool last = channel_axis == -1;
  Problem problem{x.shape[0], last ? x.shape.back() : x.shape[1], 1, last};
  for (int axis = last ? 1 : 2; axis < (last ? rank - 1 : rank); ++axis)
    problem.s *= x.shape[static_cast<std::size_t>(axis)];
  // (N, C) has the same memory either way, and rows of channels are its natural form.
  if (problem.s == 1) problem.channels_last = true;
  return problem;
}

void Check::same_kind(const char* argument, const Array& a, const Array& x) const {
  usable(argument, a);
  if (a.dtype != x.dtype)
    throw DTypeError(std::string(operation_) + ": " + argument + ": expected dtype " +
                     to_string(x.dtype) + " like the data, got " + to_string(a.dtype));
  if (a.shape != x.shape)
    fail(argument, "expected shape " + to_string(x.shape) + ", got " + to_string(a.shape));
}

void Check::per_channel(const char* argument, const Array& a, std::int64_t c, DType dtype) const {
  usable(argument, a);
  if (a.dtype != dtype)
    throw DTypeError(std::string(operation_) + ": " + argument + ": expected dtype " +
                     to_string(dtype) + ", got " + to_string(a.dtype));
  // Shape{c} would allocate.
  if (a.shape.size() != 1 || a.shape[0] != c)
    fail(argument, "expected shape " + to_string(Shape{c}) + ", got " + to_string(a.shape));
}

void Check::optional_per_channel(const char* argument, const Array& a, std::int64_t c,
                                 DType dtype) const {
  if (a.given) per_channel(argument, a, c, dtype);
}

void Check::eps(double eps) const {
  if (!(eps >= 0) || std::isinf(eps))
    fail("eps", "expected a finite number that is not negative, got " + to_string(eps));
}

void Check::slope(double negative_slope) const {
  if (!std::isfinite(negative_slope))
    fail("negative_slope", "expected a finite number, got " + to_string(negative_slope));
}

void Check::activation(Activation activation) const {
  switch (activation) {
#define BNEXT_CASE(name) case Activation::name:
    BNEXT_EPILOGUES(BNEXT_CASE)
#undef BNEXT_CASE
    return;
  }
#define BNEXT_NAME(name) #name ", "
  fail("activation", "expected one of " BNEXT_EPILOGUES(BNEXT_NAME) "got Activation(" +
                         std::to_string(static_cast<int>(activation)) + ")");
#undef BNEXT_NAME
}

void Check::elements(std::int64_t first, std::int64_t count, const char* to_name,
                     const void* to) const {
  if (first < 0) fail("first", "expected a number >= 0, got " + std::to_string(first));
  if (count < 0) fail("count", "expected a number >= 0, got " + std::to_string(count));
  if (count > std::numeric_limits<std::int64_t>::max() - first)
    fail("count", "expected first + count < 2**63, got " + std::to_string(first) + " + " +
                      std::to_string(count));
  if (count > 0 && to == nullptr) fail(to_name, "expected data, got a null pointer");
}

Region::Region(const char* name_, const void* data, std::int64_t bytes) : name(name_) {
  if (data == nullptr || bytes == 0) return;
  begin = reinterpret_cast<std::uintptr_t>(data);
  end = begin + static_cast<std::uintptr_t>(bytes);
}

void Check::no_overlap(Regions outputs, Regions in_place, Regions inputs) const {
  for (const Region& out : outputs) {
    const bool is_first = &out == outputs.begin();
    for (const Region* other = &out + 1; other != outputs.end(); ++other) apart(out, *other, false);
    for (const Region& in : in_place) apart(out, in, is_first);
    for (const Region& in : inputs) apart(out, in, false);
  }
}

void Check::apart(const Region& out, const Region& other, bool may_be_same) const {
  if (out.end <= other.begin || other.end <= out.begin) return;
  if (may_be_same && out.begin == other.begin && out.end == other.end) return;
  fail(out.name, std::string("overlaps ") + other.name +
                     (may_be_same ? " in part; it may be that very array, or memory of its own"
                                  : "; it must have memory of its own"));
}

}  // namespace bnext
