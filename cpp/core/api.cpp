// The public functions: check, bring into canonical form, dispatch.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "bnext/bnext.hpp"
#include "core/check.hpp"
#include "core/dispatch.hpp"
#include "core/math.hpp"
#include "core/philox.hpp"
#include "cpu/parallel.hpp"
#include "cuda/backend.hpp"

namespace bnext {
namespace {

Place place_of(const Array& data, Stream stream) {
  if (data.device.kind == DeviceKind::cpu) return {};
  return {data.device.index, stream};
}

bool in_main_memory(const Array& a) {
  return a.device.kind == DeviceKind::cpu;
}

// With 0 or NaN.
void fill(const Array& a, double value, Stream stream) {
  if (!a.given) return;
  if (!in_main_memory(a)) {
    // All bits set are a NaN.
    if (a.size() > 0)
      cuda::fill_bytes(place_of(a, stream), a.data, value == 0 ? 0 : 0xFF,
                       static_cast<std::size_t>(a.bytes()));
    return;
  }
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

void check_probability(const Check& check, const char* name, double p) {
  if (!(p >= 0 && p <= 1))
    check.fail(name, "expected a probability in [0, 1], got " + to_string(p));
}

// How `mask`, broadcast to `x`, is shared: the last axes are a run, those before them units, and so
// on. Axes of extent 1 belong to their neighbours.
MaskMap mask_map(const Check& check, const Shape& x, const Shape& mask) {
  MaskMap map{1, 1, 1};
  if (mask.empty()) return map;
  bool fits = mask.size() == x.size();
  int group = 0;  // run, units, repeats, samples
  for (std::size_t axis = x.size(); fits && axis-- > 0;) {
    const bool shared = mask[axis] == 1;
    fits = shared || mask[axis] == x[axis];
    if (x[axis] == 1) continue;
    if (shared == (group % 2 == 1)) ++group;
    if (group == 0) map.run *= x[axis];
    if (group == 1) map.units *= x[axis];
    if (group == 2) map.repeats *= x[axis];
    fits = fits && group <= 3;
  }
  if (!fits)
    check.fail("mask_shape", "expected the extents of x, " + to_string(x) +
                                 ", or 1 for those that share bits, in at most two groups of "
                                 "neighbours, got " +
                                 to_string(mask));
  return map;
}

MaskMap check_dropout(const Check& check, const char* in_name, const Array& in, double p,
                      const Array& out, const Shape& mask_shape) {
  check_probability(check, "p", p);
  check.same_kind(in_name, in, in);
  check.same_kind("out", out, in);
  check.no_overlap({{"out", out}}, {{in_name, in}}, {});
  MaskMap map = mask_map(check, in.shape, mask_shape);
  // Without repeats, units are numbered through all samples.
  if (map.repeats == 1 && map.run > 0) map.units = in.size() / map.run;
  return map;
}

const char* name_of(const DropoutForward& a) {
  return a.alpha ? "alpha_dropout_forward" : "dropout_forward";
}

MaskDraw mask_draw(double p, const DropoutDraw& draw) {
  return {static_cast<std::uint64_t>(std::llround(std::ldexp(p, 32))), p == 1 ? 0 : 1 / (1 - p),
          draw.seed, draw.offset, draw.device_seed};
}

// y = scale x + shift where an element is kept, `dropped` elsewhere.
struct DropoutValues {
  double scale, shift, dropped;
};

DropoutValues alpha_values(double p) {
  if (p == 1) return {0, 0, 0};                       // the limit of `dropped`
  constexpr double saturation = -1.7580993408473766;  // of SELU: -1.0507... times 1.6732...
  const double scale = 1 / std::sqrt((1 - p) * (1 + p * saturation * saturation));
  return {scale, -scale * p * saturation, scale * saturation * (1 - p)};
}

// Forward and backward are the same product with the same mask; alpha's forward adds constants.
void run_dropout(const Array& in, double p, const DropoutDraw& draw, const Array& out,
                 const MaskMap& map, bool alpha, bool backward, Stream stream) {
  if (in.size() == 0) return;
  const Place place = place_of(in, stream);
  if (p == 0) {
    const auto bytes = static_cast<std::size_t>(in.bytes());
    if (out.data == in.data) return;
    if (in_main_memory(in))
      std::memcpy(out.data, in.data, bytes);
    else
      cuda::copy_bytes(place, out.data, in.data, bytes);
    return;
  }
  MaskDraw mask = mask_draw(p, draw);
  DropoutValues values{mask.scale, 0, 0};
  if (alpha) values = alpha_values(p);
  if (backward) values.shift = values.dropped = 0;
  mask.scale = values.scale;
  backend_for(in.device).dropout[row(in.dtype)](
      {in.size(), in.data, mask, out.data, map, values.shift, values.dropped, place});
}

// A residual, the bits of a gated activation and dropout, for batch_norm_*.
void check_fusion(const Check& check, const Array& x, const Array& residual, Activation activation,
                  double negative_slope, double dropout, const std::uint8_t* passes) {
  check.activation(activation);
  check.slope(negative_slope);
  if (residual.given) check.same_kind("residual", residual, x);
  check_probability(check, "dropout", dropout);
  if (passes != nullptr && !is_gated(activation))
    check.fail("passes", "expected none: the gradient of this activation needs more than a bit");
}

}  // namespace

namespace {

// Whether loops of T can multiply by the slope and by its inverse: neither is 0 or infinite there.
template <class T>
bool has_inverse(double slope) {
  const T rounded = static_cast<T>(slope);
  return rounded > 0 && std::isfinite(rounded) && std::isfinite(1 / rounded);
}

double parameter(const Array& a, std::int64_t c) {
  return a.dtype == DType::float64 ? static_cast<const double*>(a.data)[c]
                                   : static_cast<double>(static_cast<const float*>(a.data)[c]);
}

void check_from_result(const Check& check, const BatchNormBackward& a) {
  if (!is_invertible(a.activation, a.negative_slope, a.x.dtype)) {
    if (a.activation == Activation::leaky_relu)
      check.fail("negative_slope", std::string("expected a positive one with an inverse in ") +
                                       to_string(parameter_dtype(a.x.dtype)) + ", got " +
                                       to_string(a.negative_slope) +
                                       ": x cannot be found again from the results of another");
    check.fail("activation",
               "expected none, or leaky_relu with a positive slope: x cannot be "
               "found again from the results of another");
  }
  if (a.residual.given)
    check.fail("residual", "expected none: x cannot be found again from results with a residual");
  if (a.passes != nullptr)
    check.fail("passes", "expected none: the results themselves tell where the gradient passes");
  if (a.dropout != 0)
    check.fail("dropout", "expected 0: x cannot be found again where it was dropped");
  const bool readable = a.weight.given && in_main_memory(a.weight);
  for (std::int64_t c = 0; readable && c < a.weight.size(); ++c)
    if (parameter(a.weight, c) == 0)
      check.fail("weight", "expected no 0, got one in channel " + std::to_string(c) +
                               ": x cannot be found again from the results, which are constant");
}

}  // namespace

bool is_invertible(Activation activation, double negative_slope, DType dtype) {
  if (activation == Activation::none) return true;
  if (activation != Activation::leaky_relu) return false;
  return parameter_dtype(dtype) == DType::float64 ? has_inverse<double>(negative_slope)
                                                  : has_inverse<float>(negative_slope);
}

bool is_gated(Activation activation) {
  switch (activation) {
#define BNEXT_CASE(name) \
  case Activation::name: \
    return epilogue::name::gated;
    BNEXT_EPILOGUES(BNEXT_CASE)
#undef BNEXT_CASE
  }
  return false;
}

std::int64_t passes_bytes(std::int64_t size) {
  return size / 8 + 8;  // whole words can be read from any byte
}

namespace {

DropoutDraw run_forward(const BatchNormForward& a, Generator* generator) {
  const Check check("batch_norm_forward", a.x);
  const Problem problem = check.problem(a.x, a.channel_axis);
  const DType parameters = parameter_dtype(a.x.dtype);
  check.eps(a.eps);
  check_fusion(check, a.x, a.residual, a.activation, a.negative_slope, a.dropout, a.passes);
  check.optional_per_channel("weight", a.weight, problem.c, parameters);
  check.optional_per_channel("bias", a.bias, problem.c, parameters);
  if (problem.per_channel() == 1 && problem.c > 0)
    check.fail("x", "1 value per channel (shape " + to_string(a.x.shape) +
                        ") in training mode; batch statistics need at least 2: use a larger "
                        "batch, or inference with running statistics");
  check.same_kind("out", a.y, a.x);
  check.per_channel("mean", a.mean, problem.c, DType::float64);
  check.per_channel("var", a.var, problem.c, DType::float64);
  check.per_channel("inv_std", a.inv_std, problem.c, DType::float64);
  check.no_overlap({{"out", a.y},
                    {"mean", a.mean},
                    {"var", a.var},
                    {"inv_std", a.inv_std},
                    {"passes", a.passes, passes_bytes(problem.size())}},
                   {{"x", a.x}, {"residual", a.residual}},
                   {{"weight", a.weight}, {"bias", a.bias}});

  if (a.passes != nullptr && in_main_memory(a.x))
    std::memset(a.passes, 0, static_cast<std::size_t>(passes_bytes(problem.size())));
  if (problem.size() == 0) {
    for (const Array& statistic : {a.mean, a.var, a.inv_std})
      fill(statistic, std::numeric_limits<double>::quiet_NaN(), a.stream);
    return a.draw;
  }
  DropoutDraw draw = a.draw;
  if (generator != nullptr && a.dropout > 0) draw = {generator->seed(), generator->next()};
  backend_for(a.x.device)
      .batch_norm_forward[row(a.x.dtype)]({problem,
                                           a.x.data,
                                           optional(a.weight),
                                           optional(a.bias),
                                           a.eps,
                                           {optional(a.residual), a.activation, a.negative_slope,
                                            mask_draw(a.dropout, draw), a.passes, nullptr, false},
                                           a.y.data,
                                           static_cast<double*>(a.mean.data),
                                           static_cast<double*>(a.var.data),
                                           static_cast<double*>(a.inv_std.data),
                                           place_of(a.x, a.stream)});
  return draw;
}

}  // namespace

void batch_norm_forward(const BatchNormForward& args) {
  run_forward(args, nullptr);
}

DropoutDraw batch_norm_forward(const BatchNormForward& args, Generator& generator) {
  return run_forward(args, &generator);
}

void batch_norm_backward(const BatchNormBackward& a) {
  const Check check("batch_norm_backward", a.x);
  const Problem problem = check.problem(a.x, a.channel_axis);
  const DType parameters = parameter_dtype(a.x.dtype);
  check_fusion(check, a.x, a.residual, a.activation, a.negative_slope, a.dropout, a.passes);
  check.same_kind("grad_y", a.grad_y, a.x);
  check.optional_per_channel("weight", a.weight, problem.c, parameters);
  check.optional_per_channel("bias", a.bias, problem.c, parameters);
  check.per_channel("mean", a.mean, problem.c, DType::float64);
  check.per_channel("inv_std", a.inv_std, problem.c, DType::float64);
  check.same_kind("out", a.grad_x, a.x);
  check.optional_per_channel("grad_weight", a.grad_weight, problem.c, parameters);
  check.optional_per_channel("grad_bias", a.grad_bias, problem.c, parameters);
  if (a.grad_residual.given) check.same_kind("grad_residual", a.grad_residual, a.x);
  if (a.from_result) check_from_result(check, a);
  check.no_overlap({{"out", a.grad_x},
                    {"grad_residual", a.grad_residual},
                    {"grad_weight", a.grad_weight},
                    {"grad_bias", a.grad_bias}},
                   {{"grad_y", a.grad_y}, {"x", a.x}},
                   {{"residual", a.residual},
                    {"passes", a.passes, passes_bytes(problem.size())},
                    {"weight", a.weight},
                    {"bias", a.bias},
                    {"mean", a.mean},
                    {"inv_std", a.inv_std}});

  if (problem.size() == 0) {
    fill(a.grad_weight, 0, a.stream);
    fill(a.grad_bias, 0, a.stream);
    return;
  }
  backend_for(a.x.device)
      .batch_norm_backward[row(a.x.dtype)](
          {problem,
           a.grad_y.data,
           a.x.data,
           optional(a.weight),
           optional(a.bias),
           static_cast<const double*>(a.mean.data),
           static_cast<const double*>(a.inv_std.data),
           {optional(a.residual), a.activation, a.negative_slope, mask_draw(a.dropout, a.draw),
            const_cast<std::uint8_t*>(a.passes), nullptr,
            a.from_result && a.activation != Activation::none},
           a.batch_statistics,
           a.from_result,
           a.grad_x.data,
           a.grad_residual.given ? a.grad_residual.data : nullptr,
           a.grad_weight.given ? a.grad_weight.data : nullptr,
           a.grad_bias.given ? a.grad_bias.data : nullptr,
           place_of(a.x, a.stream)});
}

void batch_norm_inference(const BatchNormInference& a) {
  const Check check("batch_norm_inference", a.x);
  const Problem problem = check.problem(a.x, a.channel_axis);
  const DType parameters = parameter_dtype(a.x.dtype);
  check.eps(a.eps);
  check_fusion(check, a.x, a.residual, a.activation, a.negative_slope, 0, nullptr);
  check.per_channel("mean", a.mean, problem.c, parameters);
  check.per_channel("var", a.var, problem.c, parameters);
  check.optional_per_channel("weight", a.weight, problem.c, parameters);
  check.optional_per_channel("bias", a.bias, problem.c, parameters);
  if (in_main_memory(a.var) &&
      (parameters == DType::float32 ? has_negative<float>(a.var) : has_negative<double>(a.var)))
    check.fail("var", "expected no negative variance");
  check.same_kind("out", a.y, a.x);
  check.no_overlap({{"out", a.y}}, {{"x", a.x}, {"residual", a.residual}},
                   {{"mean", a.mean}, {"var", a.var}, {"weight", a.weight}, {"bias", a.bias}});

  if (problem.size() == 0) return;
  backend_for(a.x.device)
      .batch_norm_inference[row(a.x.dtype)]({problem,
                                             a.x.data,
                                             a.mean.data,
                                             a.var.data,
                                             optional(a.weight),
                                             optional(a.bias),
                                             a.eps,
                                             {optional(a.residual), a.activation, a.negative_slope,
                                              mask_draw(0, {}), nullptr, nullptr, false},
                                             a.y.data,
                                             place_of(a.x, a.stream)});
}

void dropout_forward(const DropoutForward& a, const DropoutDraw& draw) {
  const Check check(name_of(a), a.x);
  const MaskMap map = check_dropout(check, "x", a.x, a.p, a.y, a.mask_shape);
  run_dropout(a.x, a.p, draw, a.y, map, a.alpha, false, a.stream);
}

DropoutDraw dropout_forward(const DropoutForward& a, Generator& generator) {
  const Check check(name_of(a), a.x);
  const MaskMap map = check_dropout(check, "x", a.x, a.p, a.y, a.mask_shape);
  const std::uint64_t offset = a.p == 0 ? generator.offset() : generator.next();
  const DropoutDraw draw{generator.seed(), offset};
  run_dropout(a.x, a.p, draw, a.y, map, a.alpha, false, a.stream);
  return draw;
}

void dropout_backward(const DropoutBackward& a) {
  const Check check("dropout_backward", a.grad_y);
  const MaskMap map = check_dropout(check, "grad_y", a.grad_y, a.p, a.grad_x, a.mask_shape);
  run_dropout(a.grad_y, a.p, a.draw, a.grad_x, map, a.alpha, true, a.stream);
}

void dropout_mask(double p, const DropoutDraw& draw, std::int64_t first, std::int64_t count,
                  std::uint8_t* kept) {
  const Check check("dropout_mask", {});
  check_probability(check, "p", p);
  check.elements(first, count, "kept", kept);
  if (count == 0) return;
  constexpr std::int64_t words_per_task = 256;
  // Nothing is rounded up beyond `end`, which may be the largest of all numbers.
  const std::int64_t end = first + count, first_word = first / mask_word_size;
  const std::int64_t words = (end - 1) / mask_word_size + 1 - first_word;
  const std::uint64_t threshold = mask_draw(p, draw).threshold;
  parallel_for((words + words_per_task - 1) / words_per_task, count, [&](std::int64_t task) {
    const std::int64_t begin = first_word + task * words_per_task;
    const std::int64_t stop = std::min(begin + words_per_task, first_word + words);
    for (std::int64_t number = begin; number < stop; ++number) {
      const std::uint32_t word =
          mask_word(draw.seed, draw.offset, threshold, static_cast<std::uint64_t>(number));
      const std::int64_t start = number * mask_word_size;
      const std::int64_t last = std::min<std::int64_t>(mask_word_size, end - start);
      for (std::int64_t bit = std::max<std::int64_t>(first - start, 0); bit < last; ++bit)
        kept[start - first + bit] = word >> bit & 1u;
    }
  });
}

std::array<std::uint32_t, 4> philox4x32_10(const std::array<std::uint32_t, 4>& counter,
                                           const std::array<std::uint32_t, 2>& key) {
  const PhiloxBlock b = philox(counter[0], counter[1], counter[2], counter[3], key[0], key[1]);
  return {b.word[0], b.word[1], b.word[2], b.word[3]};
}

}  // namespace bnext
