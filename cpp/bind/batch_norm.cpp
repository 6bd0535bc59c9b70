#include "bnext/batch_norm.hpp"

#include <cmath>

#include "bind/arrays.hpp"
#include "bind/device.hpp"
#include "bind/random.hpp"
#include "bnext/lists.hpp"
#include "core/check.hpp"

namespace bnext::bind {
namespace {

const char* activation_name(Activation activation) {
  switch (activation) {
#define BNEXT_CASE(name) \
  case Activation::name: \
    return #name;
    BNEXT_EPILOGUES(BNEXT_CASE)
#undef BNEXT_CASE
  }
  return "?";
}

}  // namespace

Activation activation_of(const char* operation, py::handle object) {
  if (object.is_none()) return Activation::none;
  std::string names = "None";
  const std::string given = py::str(object).cast<std::string>();
#define BNEXT_MATCH(name)                        \
  if (Activation::name != Activation::none) {    \
    if (given == #name) return Activation::name; \
    names += std::string(", '") + #name + "'";   \
  }
  BNEXT_EPILOGUES(BNEXT_MATCH)
#undef BNEXT_MATCH
  const std::string message = std::string(operation) + ": activation: expected one of " + names +
                              ", got " + py::repr(object).cast<std::string>();
  if (!py::isinstance<py::str>(object)) throw py::type_error(message);
  throw py::value_error(message);
}

namespace {

py::object or_none(const OptionalArray& array) {
  return array ? py::object(*array) : py::object(py::none());
}

OptionalArray copy(const OptionalArray& array) {
  if (!array) return std::nullopt;
  return py::array(array->attr("copy")());
}

// What backward needs. x is borrowed, not copied. The statistics are float64, since float32 cannot
// hold the mean of data with a large offset; Python sees them in the dtype of x.
struct BatchNormSaved {
  py::array x;
  OptionalArray weight, bias;
  py::array mean, var, inv_std;
  int channel_axis;
  Activation activation;
  double negative_slope;
  bool batch_statistics;
  bool x_overwritten;  // by the result, from which it may be found again
  // Of a residual: whether there was one, and what the gradient of the activation needs of it, its
  // bits or itself.
  bool has_residual = false;
  OptionalArray residual = {}, passes = {};
  bool residual_overwritten = false;
  double dropout = 0;
  DropoutDraw draw = {};

  std::int64_t nbytes() const {
    std::int64_t bytes = 0;
    for (const OptionalArray& array :
         {OptionalArray(x), weight, bias, OptionalArray(mean), OptionalArray(var),
          OptionalArray(inv_std), residual, passes})
      if (array) bytes += array->nbytes();
    return bytes;
  }

  std::int64_t count() const {
    const std::int64_t channels = mean.size();
    return channels ? x.size() / channels : 0;
  }
  py::object in_dtype_of_x(const py::array& statistic) const {
    return statistic.attr("astype")(parameter_dtype(x));
  }
};

// 1 / sqrt(var + eps), as forward calculates it.
py::array inverse_deviation(const py::array_t<double>& var, double eps) {
  py::array_t<double> inv_std(var.size());
  for (py::ssize_t c = 0; c < inv_std.size(); ++c)
    inv_std.mutable_at(c) = 1 / std::sqrt(var.at(c) + eps);
  return std::move(inv_std);
}

struct BatchNormGrads {
  py::array x;
  py::object weight, bias, residual;
};

// The arguments that all three operations share.
struct Options {
  int channel_axis;
  Activation activation;
  double negative_slope;

  Options(const char* operation, py::handle axis, py::handle name, py::handle slope)
      : channel_axis(integer(operation, "channel_axis", axis)),
        activation(activation_of(operation, name)),
        negative_slope(number(operation, "negative_slope", slope)) {}
};

// Number of channels, before anything has been checked: for the outputs that are made here.
std::int64_t channels_of(const py::array& x, int channel_axis) {
  return x.ndim() < 2 ? 0 : x.shape(channel_axis == -1 ? x.ndim() - 1 : 1);
}

OptionalArray optional_input(const char* operation, const char* argument, py::handle object) {
  if (object.is_none()) return std::nullopt;
  return input(operation, argument, object);
}

py::object forward(py::handle x, py::handle weight, py::handle bias, py::handle eps,
                   py::handle channel_axis, py::handle residual, py::handle activation,
                   py::handle negative_slope, py::handle dropout, py::handle generator,
                   py::handle out) {
  constexpr const char* operation = "batch_norm_forward";
  if (is_on_device(x))
    return device_operation(operation)(x, weight, bias, eps, channel_axis, residual, activation,
                                       negative_slope, dropout, generator, out);
  const Options options(operation, channel_axis, activation, negative_slope);
  const py::array from = input(operation, "x", x);
  const OptionalArray w = per_channel(operation, "weight", weight, parameter_dtype(from));
  const OptionalArray b = per_channel(operation, "bias", bias, parameter_dtype(from));
  const OptionalArray r = optional_input(operation, "residual", residual);
  const double epsilon = number(operation, "eps", eps);
  const double p = number(operation, "dropout", dropout);
  const py::array y = output(operation, out, from);

  const Shape channels{channels_of(from, options.channel_axis)};
  const py::dtype float64 = py::dtype::of<double>();
  BatchNormSaved saved{from,
                       copy(w),
                       copy(b),
                       new_array(float64, channels),
                       new_array(float64, channels),
                       new_array(float64, channels),
                       options.channel_axis,
                       options.activation,
                       options.negative_slope,
                       true,
                       y.data() == from.data()};
  if (r) {
    saved.has_residual = true;
    if (is_gated(options.activation))
      saved.passes = new_array(py::dtype::of<std::uint8_t>(), {passes_bytes(from.size())});
    else if (options.activation != Activation::none)
      saved.residual = r;
    saved.residual_overwritten = saved.residual && y.data() == r->data();
  }
  BatchNormForward args;
  args.x = view(from);
  args.weight = view(w);
  args.bias = view(b);
  args.eps = epsilon;
  args.channel_axis = options.channel_axis;
  args.residual = view(r);
  args.activation = options.activation;
  args.negative_slope = options.negative_slope;
  args.dropout = saved.dropout = p;
  if (saved.passes) args.passes = static_cast<std::uint8_t*>(saved.passes->mutable_data());
  args.y = view(y);
  args.mean = view(saved.mean);
  args.var = view(saved.var);
  args.inv_std = view(saved.inv_std);
  const auto source = generator_of(operation, generator);
  {
    const py::gil_scoped_release release;
    saved.draw = batch_norm_forward(args, *source);
  }
  return py::make_tuple(y, std::move(saved));
}

py::object backward(py::handle grad_y, py::handle saved, py::handle out) {
  constexpr const char* operation = "batch_norm_backward";
  if (is_of_device(saved)) return device_operation(operation)(grad_y, saved, out);
  if (!py::isinstance<BatchNormSaved>(saved))
    throw py::type_error(std::string(operation) +
                         ": saved: expected what batch_norm_forward returned, got " +
                         type_name(saved));
  const auto& s = saved.cast<const BatchNormSaved&>();
  if (s.x_overwritten && (s.has_residual || s.dropout != 0 ||
                          !is_invertible(s.activation, s.negative_slope, view(s.x).dtype)))
    throw py::value_error(std::string(operation) +
                          ": saved: x was overwritten, since forward ran with out=x; backward "
                          "needs x, and can find it again only without a residual and dropout, and "
                          "with no activation or leaky_relu with a positive slope");
  if (s.residual_overwritten)
    throw py::value_error(std::string(operation) +
                          ": saved: the residual was overwritten, since forward ran with "
                          "out=residual; the gradient of this activation needs it");
  const py::array g = input(operation, "grad_y", grad_y);
  const py::array grad_x = output(operation, out, s.x);
  OptionalArray grad_weight, grad_bias;
  if (s.weight) grad_weight = new_array(parameter_dtype(s.x), {s.mean.size()});
  if (s.bias) grad_bias = new_array(parameter_dtype(s.x), {s.mean.size()});
  // What only passes through needs no array of its own.
  const bool through = s.activation == Activation::none && s.dropout == 0;
  OptionalArray grad_residual;
  if (s.has_residual) grad_residual = through ? g : new_array(s.x.dtype(), shape_of(s.x));
  if (s.has_residual && through && grad_x.data() == g.data())
    throw py::value_error(std::string(operation) +
                          ": out: expected other memory than that of grad_y, which is the gradient "
                          "of the residual");

  BatchNormBackward args;
  args.grad_y = view(g);
  args.x = view(s.x);
  args.weight = view(s.weight);
  args.bias = view(s.bias);
  args.mean = view(s.mean);
  args.inv_std = view(s.inv_std);
  args.channel_axis = s.channel_axis;
  args.residual = view(s.residual);
  args.activation = s.activation;
  args.negative_slope = s.negative_slope;
  args.dropout = s.dropout;
  args.draw = s.draw;
  if (s.passes) args.passes = static_cast<const std::uint8_t*>(s.passes->data());
  args.batch_statistics = s.batch_statistics;
  args.from_result = s.x_overwritten;
  if (!through) args.grad_residual = view(grad_residual);
  args.grad_x = view(grad_x);
  args.grad_weight = view(grad_weight);
  args.grad_bias = view(grad_bias);
  {
    const py::gil_scoped_release release;
    batch_norm_backward(args);
  }
  return py::cast(
      BatchNormGrads{grad_x, or_none(grad_weight), or_none(grad_bias), or_none(grad_residual)});
}

// Inference, and what backward would need through it: the statistics are constants there.
py::tuple inference_saved(const char* operation, py::handle x, py::handle mean, py::handle var,
                          py::handle weight, py::handle bias, py::handle eps,
                          py::handle channel_axis, py::handle residual, py::handle activation,
                          py::handle negative_slope, py::handle out, bool keep) {
  const Options options(operation, channel_axis, activation, negative_slope);
  const py::array from = input(operation, "x", x);
  const auto channel = [&](const char* argument, py::handle object) {
    return per_channel(operation, argument, object, parameter_dtype(from));
  };
  const OptionalArray m = channel("mean", mean), v = channel("var", var);
  const OptionalArray w = channel("weight", weight), b = channel("bias", bias);
  const OptionalArray r = optional_input(operation, "residual", residual);
  BatchNormInference args;
  args.x = view(from);
  args.residual = view(r);
  args.mean = view(m);
  args.var = view(v);
  args.weight = view(w);
  args.bias = view(b);
  args.eps = number(operation, "eps", eps);
  args.channel_axis = options.channel_axis;
  args.activation = options.activation;
  args.negative_slope = options.negative_slope;
  const py::array y = output(operation, out, from);
  args.y = view(y);
  {
    const py::gil_scoped_release release;
    batch_norm_inference(args);
  }
  if (!keep) return py::make_tuple(y);

  const py::array_t<double> mean64(*m), var64(*v);
  BatchNormSaved saved{from,
                       copy(w),
                       copy(b),
                       mean64.attr("copy")(),
                       var64.attr("copy")(),
                       inverse_deviation(var64, args.eps),
                       options.channel_axis,
                       options.activation,
                       options.negative_slope,
                       false,
                       y.data() == from.data()};
  saved.has_residual = r.has_value();
  if (r && options.activation != Activation::none) {
    saved.residual = r;
    saved.residual_overwritten = y.data() == r->data();
  }
  return py::make_tuple(y, std::move(saved));
}

py::object inference(py::handle x, py::handle mean, py::handle var, py::handle weight,
                     py::handle bias, py::handle eps, py::handle channel_axis, py::handle residual,
                     py::handle activation, py::handle negative_slope, py::handle out) {
  constexpr const char* operation = "batch_norm_inference";
  if (is_on_device(x))
    return device_operation(operation)(x, mean, var, weight, bias, eps, channel_axis, residual,
                                       activation, negative_slope, out);
  return inference_saved(operation, x, mean, var, weight, bias, eps, channel_axis, residual,
                         activation, negative_slope, out, false)[0];
}

py::tuple inference_forward(py::handle x, py::handle mean, py::handle var, py::handle weight,
                            py::handle bias, py::handle eps, py::handle channel_axis,
                            py::handle residual, py::handle activation, py::handle negative_slope,
                            py::handle out) {
  return inference_saved("batch_norm_inference", x, mean, var, weight, bias, eps, channel_axis,
                         residual, activation, negative_slope, out, true);
}

// What forward kept, from its parts.
BatchNormSaved saved_of(py::handle x, py::handle mean, py::handle var, py::handle passes,
                        py::handle weight, py::handle bias, py::handle eps, py::handle channel_axis,
                        bool has_residual, py::handle residual, py::handle activation,
                        py::handle negative_slope, py::handle dropout, py::handle generator,
                        bool batch_statistics) {
  constexpr const char* operation = "BatchNormSaved";
  const Options options(operation, channel_axis, activation, negative_slope);
  const py::array from = input(operation, "x", x);
  const py::array_t<double> m(input(operation, "mean", mean)), v(input(operation, "var", var));
  BatchNormSaved saved{from,
                       per_channel(operation, "weight", weight, parameter_dtype(from)),
                       per_channel(operation, "bias", bias, parameter_dtype(from)),
                       m,
                       v,
                       inverse_deviation(v, number(operation, "eps", eps)),
                       options.channel_axis,
                       options.activation,
                       options.negative_slope,
                       batch_statistics,
                       false};
  saved.has_residual = has_residual;
  saved.residual = optional_input(operation, "residual", residual);
  if (!passes.is_none()) {
    saved.passes = passes.cast<py::array_t<std::uint8_t, py::array::c_style>>();
    if (saved.passes->size() != passes_bytes(from.size()))
      throw py::value_error("BatchNormSaved: passes: expected one bit for each element of x");
  }
  saved.dropout = number(operation, "dropout", dropout);
  const auto source = generator_of(operation, generator);
  saved.draw = {source->seed(), source->offset()};
  return saved;
}

}  // namespace
}  // namespace bnext::bind

void bind_batch_norm(pybind11::module_& m) {
  namespace py = pybind11;
  using namespace py::literals;
  using namespace bnext::bind;

  py::class_<BatchNormSaved>(m, "BatchNormSaved", R"(What `batch_norm_backward` needs.

Attributes
----------
mean, var, inv_std : ndarray (C,), dtype of weight
    Of this batch; `var` is the biased variance, `inv_std` is 1 / sqrt(var + eps). Backward
    itself uses them in float64.
moments : (ndarray (C,), ndarray (C,)), float64
    Mean and biased variance as they were accumulated: float32 cannot hold the mean of data that
    lie far from zero.
count : int
    Number of values per channel.
nbytes : int
    Of all arrays that are kept for backward: x itself, values per channel, and for a residual one
    bit an element, or the residual itself where the activation's gradient needs more. A dropout
    mask takes none: it is drawn again.

Notes
-----
`x` is borrowed: do not change it before backward.)")
      // For callers that can keep nothing but arrays. `moments` and `passes` are what forward adds
      // to its arguments; a residual is needed where it gave no `passes` and has an activation.
      .def(py::init(&saved_of), "x"_a, "mean"_a, "var"_a, "passes"_a, "weight"_a, "bias"_a,
           py::kw_only(), "eps"_a, "channel_axis"_a, "has_residual"_a, "residual"_a, "activation"_a,
           "negative_slope"_a, "dropout"_a, "generator"_a, "batch_statistics"_a)
      .def_property_readonly("passes", [](const BatchNormSaved& s) { return or_none(s.passes); })
      .def_property_readonly("mean",
                             [](const BatchNormSaved& s) { return s.in_dtype_of_x(s.mean); })
      .def_property_readonly("var", [](const BatchNormSaved& s) { return s.in_dtype_of_x(s.var); })
      .def_property_readonly("inv_std",
                             [](const BatchNormSaved& s) { return s.in_dtype_of_x(s.inv_std); })
      .def_property_readonly("moments",
                             [](const BatchNormSaved& s) {
                               return py::make_tuple(s.mean.attr("copy")(), s.var.attr("copy")());
                             })
      .def_property_readonly("count", &BatchNormSaved::count)
      .def_property_readonly("nbytes", &BatchNormSaved::nbytes)
      .def("__repr__", [](const BatchNormSaved& s) {
        return "BatchNormSaved(channels=" + std::to_string(s.mean.size()) +
               ", count=" + std::to_string(s.count()) +
               ", dtype=" + py::str(s.x.dtype()).cast<std::string>() +
               ", activation=" + activation_name(s.activation) + ")";
      });

  py::class_<BatchNormGrads>(m, "BatchNormGrads", R"(Gradients of batch normalization.

Attributes
----------
x : ndarray, like x
weight, bias : ndarray (C,) or None
residual : ndarray, like x, or None
    None where forward had no such argument. The gradient of the residual is `grad_y` itself where
    neither an activation nor dropout followed.)")
      .def_readonly("x", &BatchNormGrads::x)
      .def_readonly("weight", &BatchNormGrads::weight)
      .def_readonly("bias", &BatchNormGrads::bias)
      .def_readonly("residual", &BatchNormGrads::residual);

  py::list activations;
#define BNEXT_APPEND(name) activations.append(#name);
  BNEXT_EPILOGUES(BNEXT_APPEND)
#undef BNEXT_APPEND
  activations[0] = py::none();
  m.attr("activations") = py::tuple(activations);

  py::dict dtypes;
#define BNEXT_INSERT(name, type, compute) \
  dtypes[#name] = bnext::to_string(bnext::parameter_dtype(bnext::DType::name));
  BNEXT_DTYPES(BNEXT_INSERT)
#undef BNEXT_INSERT
  m.attr("dtypes") = dtypes;

  const py::object none = py::none();

  m.def("batch_norm_forward", forward, "x"_a, "weight"_a = none, "bias"_a = none, py::kw_only(),
        "eps"_a = 1e-5, "channel_axis"_a = 1, "residual"_a = none, "activation"_a = none,
        "negative_slope"_a = 0.01, "dropout"_a = 0.0, "generator"_a = none, "out"_a = none,
        R"(Normalize each channel by the mean and variance of this batch.

y = dropout(activation((x - mean) / sqrt(var + eps) * weight + bias + residual)), with the biased
variance, in one pass over memory.

Parameters
----------
x : array_like, (N, C, *) or, with channel_axis -1, (N, *, C)
    float32, float64, float16, or bfloat16 (of the package ml_dtypes).
weight, bias : array_like (C,), optional
    1 and 0 if not given. dtype of x; float32 where that has 16 bits.
eps : float, default 1e-5
    Finite, not negative.
channel_axis : 1 or -1, default 1
residual : array_like, like x, optional
    Added to the normalized values.
activation : str, optional
    One of `bnext.functional.activations`, such as "relu".
negative_slope : float, default 0.01
    Of leaky_relu.
dropout : float, default 0
    Probability of a zero, as for `dropout_forward`, with the same mask.
generator : Generator, optional
    Where dropout draws from; `bnext.random.default_generator` if not given.
out : ndarray, optional
    Where to write, of x's shape and dtype. May be `x` itself: half the memory for backward, which
    then finds x again from y (Rota Bulo et al., arXiv:1712.02616). That needs no activation or
    leaky_relu with a positive slope, no residual, no dropout, and no weight of 0; the gradients
    are as exact as y, whose error counts |bias / weight| times.

Returns
-------
y : ndarray, like x
saved : BatchNormSaved
    For `batch_norm_backward`; also ``mean``, ``var``, ``inv_std``, ``count``.

Raises
------
ValueError
    For shapes and values, and if a channel has one value only. Nothing has been written then.
TypeError
    For other dtypes and kinds of arguments.

Notes
-----
Statistics accumulate in float64. Results are the same to the bit for any number of threads.

References
----------
Ioffe & Szegedy, "Batch normalization", arXiv:1502.03167.

Examples
--------
>>> import numpy as np, bnext
>>> x = np.random.default_rng(0).normal(5, 3, (8, 4, 6, 6)).astype(np.float32)
>>> y, saved = bnext.functional.batch_norm_forward(x)
>>> bool(abs(y.mean()) < 1e-6 and abs(y.std() - 1) < 1e-5), saved.count
(True, 288))");

  m.def("batch_norm_backward", backward, "grad_y"_a, "saved"_a, py::kw_only(), "out"_a = none,
        R"(Gradients of `batch_norm_forward`, through the activation and the statistics.

With g the gradient before the activation, n the normalized x, r = 1 / sqrt(var + eps) and <.> the
mean over a channel: bias' = sum g, weight' = sum g n, x' = weight r (g - <g> - n <g n>).

Parameters
----------
grad_y : array_like, like x
saved : BatchNormSaved
    From forward; x must not have changed since.
out : ndarray, optional
    Where to write the gradient of x; may be `grad_y` or `x` itself.

Returns
-------
grads : BatchNormGrads
    ``x``, ``weight``, ``bias``; the last two None where forward had none.

Raises
------
ValueError, TypeError
    As `batch_norm_forward`; also if forward wrote over x and x cannot be found again.)");

  m.def("batch_norm_inference", inference, "x"_a, "mean"_a, "var"_a, "weight"_a = none,
        "bias"_a = none, py::kw_only(), "eps"_a = 1e-5, "channel_axis"_a = 1, "residual"_a = none,
        "activation"_a = none, "negative_slope"_a = 0.01, "out"_a = none,
        R"(Normalize each channel by given statistics.

y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)

Parameters
----------
x : array_like, (N, C, *) or, with channel_axis -1, (N, *, C)
    float32, float64, float16, or bfloat16 (of the package ml_dtypes).
mean, var : array_like (C,), dtype of weight
    `var` is not negative. Where var and eps are both 0 the result is that of IEEE arithmetic.
weight, bias, eps, channel_axis, residual, activation, negative_slope, out
    As `batch_norm_forward`.

Returns
-------
y : ndarray, like x

Raises
------
ValueError, TypeError
    As `batch_norm_forward`; one value per channel is fine here.

Examples
--------
>>> import numpy as np, bnext
>>> x = np.ones((2, 3), np.float32)
>>> bnext.functional.batch_norm_inference(x, [1, 0, 0], [1, 1, 4], eps=0)
array([[0. , 1. , 0.5],
       [0. , 1. , 0.5]], dtype=float32))");

  m.def("batch_norm_inference_forward", inference_forward, "x"_a, "mean"_a, "var"_a,
        "weight"_a = none, "bias"_a = none, py::kw_only(), "eps"_a = 1e-5, "channel_axis"_a = 1,
        "residual"_a = none, "activation"_a = none, "negative_slope"_a = 0.01, "out"_a = none,
        "batch_norm_inference, with what backward needs: (y, saved). The statistics are "
        "constants, so no gradient goes through them.");
}
