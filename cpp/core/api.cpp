// The public functions: check, bring into canonical form, dispatch.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "bnext/bnext.hpp"
#include "core/check.hpp"
#include "core/dispatch.hpp"
#include "core/philox.hpp"

namespace bnext {
namespace {

void fill(const Array& a, double value) {
  if (!a.given) return;
  for (std::int64_t i = 0; i < a.size(); ++i) {
    if (a.dtype == DType::float32)
      static_cast<float*>(a.data)[i] = static_cast<float>(value);
    else
      static_cast<double*>(a.data)[i] = value;
  }
}

template <class T>
bool has_negative(const Array& a) {
  const T* begin = static_cast<const T*>(a.data);
  return std::any_of(begin, begin + a.size(), [](T value) { return value < 0; });
}

const void* optional(const Array& a) {
  return a.given ? a.data : nullptr;
}

std::size_t row(DType dtype) {
  return static_cast<std::size_t>(dtype);
}

void check_dropout(const Check& check, const char* in_name, const Array& in, double p,
                   const Array& out) {
  if (!(p >= 0 && p <= 1)) check.fail("p", "expected a probability in [0, 1], got " + to_string(p));
  check.same_kind(in_name, in, in);
  check.same_kind("out", out, in);
  check.no_overlap("out", out, in_name, in, true);
}

// Forward and backward are the same product with the same mask.
void run_dropout(const Array& in, double p, const DropoutDraw& draw, const Array& out) {
  if (in.size() == 0) return;
  if (p == 0) {
    if (out.data != in.data) std::memcpy(out.data, in.data, static_cast<std::size_t>(in.bytes()));
    return;
  }
  const auto threshold = static_cast<std::uint64_t>(std::llround(std::ldexp(p, 32)));
  const double scale = p == 1 ? 0 : 1 / (1 - p);
  current_backend().dropout[row(in.dtype)](
      {in.size(), in.data, threshold, scale, draw.seed, draw.offset, out.data});
}

}  // namespace

void batch_norm_forward(const BatchNormForward& a) {
  const Check check("batch_norm_forward");
  const Problem problem = check.problem(a.x, a.channel_axis);
  check.eps(a.eps);
  check.slope(a.negative_slope);
  check.optional_per_channel("weight", a.weight, problem.c, a.x.dtype);
  check.optional_per_channel("bias", a.bias, problem.c, a.x.dtype);
  if (problem.per_channel() == 1 && problem.c > 0)
    check.fail("x", "1 value per channel (shape " + to_string(a.x.shape) +
                        ") in training mode; batch statistics need at least 2: use a larger "
                        "batch, or inference with running statistics");
  check.same_kind("out", a.y, a.x);
  check.per_channel("mean", a.mean, problem.c, DType::float64);
  check.per_channel("var", a.var, problem.c, DType::float64);
  check.per_channel("inv_std", a.inv_std, problem.c, DType::float64);
  check.no_overlap("out", a.y, "x", a.x, true);
  check.no_overlap("out", a.y, "weight", a.weight, false);
  check.no_overlap("out", a.y, "bias", a.bias, false);

  if (problem.size() == 0) {
    for (const Array& statistic : {a.mean, a.var, a.inv_std})
      fill(statistic, std::numeric_limits<double>::quiet_NaN());
    return;
  }
  current_backend().batch_norm_forward[row(a.x.dtype)](
      {problem, a.x.data, optional(a.weight), optional(a.bias), a.eps, a.activation,
       a.negative_slope, a.y.data, static_cast<double*>(a.mean.data),
       static_cast<double*>(a.var.data), static_cast<double*>(a.inv_std.data)});
}

void batch_norm_backward(const BatchNormBackward& a) {
  const Check check("batch_norm_backward");
  const Problem problem = check.problem(a.x, a.channel_axis);
  check.slope(a.negative_slope);
  check.same_kind("grad_y", a.grad_y, a.x);
  check.optional_per_channel("weight", a.weight, problem.c, a.x.dtype);
  check.optional_per_channel("bias", a.bias, problem.c, a.x.dtype);
  check.per_channel("mean", a.mean, problem.c, DType::float64);
  check.per_channel("inv_std", a.inv_std, problem.c, DType::float64);
  check.same_kind("out", a.grad_x, a.x);
  check.optional_per_channel("grad_weight", a.grad_weight, problem.c, a.x.dtype);
  check.optional_per_channel("grad_bias", a.grad_bias, problem.c, a.x.dtype);
  check.no_overlap("out", a.grad_x, "grad_y", a.grad_y, true);
  check.no_overlap("out", a.grad_x, "x", a.x, true);
  check.no_overlap("out", a.grad_x, "weight", a.weight, false);
  check.no_overlap("out", a.grad_x, "bias", a.bias, false);

  if (problem.size() == 0) {
    fill(a.grad_weight, 0);
    fill(a.grad_bias, 0);
    return;
  }
  current_backend().batch_norm_backward[row(a.x.dtype)](
      {problem, a.grad_y.data, a.x.data, optional(a.weight), optional(a.bias),
       static_cast<const double*>(a.mean.data), static_cast<const double*>(a.inv_std.data),
       a.activation, a.negative_slope, a.batch_statistics, a.grad_x.data,
       a.grad_weight.given ? a.grad_weight.data : nullptr,
       a.grad_bias.given ? a.grad_bias.data : nullptr});
}

void batch_norm_inference(const BatchNormInference& a) {
  const Check check("batch_norm_inference");
  const Problem problem = check.problem(a.x, a.channel_axis);
  check.eps(a.eps);
  check.slope(a.negative_slope);
  check.per_channel("mean", a.mean, problem.c, a.x.dtype);
  check.per_channel("var", a.var, problem.c, a.x.dtype);
  check.optional_per_channel("weight", a.weight, problem.c, a.x.dtype);
  check.optional_per_channel("bias", a.bias, problem.c, a.x.dtype);
  if (a.x.dtype == DType::float32 ? has_negative<float>(a.var) : has_negative<double>(a.var))
    check.fail("var", "expected no negative variance");
  check.same_kind("out", a.y, a.x);
  check.no_overlap("out", a.y, "x", a.x, true);
  check.no_overlap("out", a.y, "mean", a.mean, false);
  check.no_overlap("out", a.y, "var", a.var, false);
  check.no_overlap("out", a.y, "weight", a.weight, false);
  check.no_overlap("out", a.y, "bias", a.bias, false);

  if (problem.size() == 0) return;
  current_backend().batch_norm_inference[row(a.x.dtype)](
      {problem, a.x.data, a.mean.data, a.var.data, optional(a.weight), optional(a.bias), a.eps,
       a.activation, a.negative_slope, a.y.data});
}

DropoutDraw dropout_forward(const DropoutForward& a, Generator& generator) {
  check_dropout(Check("dropout_forward"), "x", a.x, a.p, a.y);
  const std::uint64_t offset = a.p == 0 ? generator.offset() : generator.next();
  const DropoutDraw draw{generator.seed(), offset};
  run_dropout(a.x, a.p, draw, a.y);
  return draw;
}

void dropout_backward(const DropoutBackward& a) {
  check_dropout(Check("dropout_backward"), "grad_y", a.grad_y, a.p, a.grad_x);
  run_dropout(a.grad_y, a.p, a.draw, a.grad_x);
}

std::array<std::uint32_t, 4> philox4x32_10(const std::array<std::uint32_t, 4>& counter,
                                           const std::array<std::uint32_t, 2>& key) {
  const PhiloxBlock b = philox(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  return {b.word[0], b.word[1], b.word[2], b.word[3]};
}

}  // namespace bnext
