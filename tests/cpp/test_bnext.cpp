// The C++ API on every backend that this machine has, against plain loops in double.
#include <algorithm>
#include <bnext/bnext.hpp>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

int failures = 0;

void check(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s: %s\n", bnext::backend().c_str(), what.c_str());
}

template <class Exception>
void check_throws(const std::string& message, const std::function<void()>& call) {
  try {
    call();
  } catch (const Exception& error) {
    check(std::string(error.what()).find(message) != std::string::npos,
          "expected '" + message + "', got '" + error.what() + "'");
    return;
  }
  check(false, "nothing thrown; expected '" + message + "'");
}

struct Case {
  std::int64_t n, c, s;
  bool last;

  bnext::Shape shape() const { return last ? bnext::Shape{n, s, c} : bnext::Shape{n, c, s}; }
  std::int64_t size() const { return n * c * s; }
  std::int64_t index(std::int64_t i, std::int64_t channel, std::int64_t j) const {
    return last ? (i * s + j) * c + channel : (i * c + channel) * s + j;
  }
  std::string name() const {
    return std::to_string(n) + "x" + std::to_string(c) + "x" + std::to_string(s) +
           (last ? " channels-last" : "");
  }
};

template <class T>
std::vector<T> random_values(std::int64_t size, unsigned seed) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal(1, 2);
  std::vector<T> values(static_cast<std::size_t>(size));
  for (T& value : values) value = static_cast<T>(normal(engine));
  return values;
}

template <class T>
struct Result {
  std::vector<T> y, grad_x, grad_weight, grad_bias, inference;
  std::vector<double> mean, var, inv_std;
};

template <class T>
Result<T> run(const Case& k, const std::vector<T>& x, const std::vector<T>& g,
              const std::vector<T>& weight, const std::vector<T>& bias) {
  const auto size = static_cast<std::size_t>(k.size()), c = static_cast<std::size_t>(k.c);
  const bnext::DType dtype = bnext::dtype_of<T>();
  Result<T> r{std::vector<T>(size),   std::vector<T>(size),  std::vector<T>(c),
              std::vector<T>(c),      std::vector<T>(size),  std::vector<double>(c),
              std::vector<double>(c), std::vector<double>(c)};
  const auto data = [&](const std::vector<T>& values) {
    return bnext::Array(const_cast<T*>(values.data()), dtype, k.shape());
  };

  bnext::BatchNormForward forward;
  forward.x = data(x);
  forward.weight = {weight.data(), {k.c}};
  forward.bias = {bias.data(), {k.c}};
  forward.channel_axis = k.last ? -1 : 1;
  forward.activation = bnext::Activation::relu;
  forward.y = data(r.y);
  forward.mean = {r.mean.data(), {k.c}};
  forward.var = {r.var.data(), {k.c}};
  forward.inv_std = {r.inv_std.data(), {k.c}};
  bnext::batch_norm_forward(forward);

  bnext::BatchNormBackward backward;
  backward.grad_y = data(g);
  backward.x = forward.x;
  backward.weight = forward.weight;
  backward.bias = forward.bias;
  backward.mean = forward.mean;
  backward.inv_std = forward.inv_std;
  backward.channel_axis = forward.channel_axis;
  backward.activation = forward.activation;
  backward.grad_x = data(r.grad_x);
  backward.grad_weight = {r.grad_weight.data(), {k.c}};
  backward.grad_bias = {r.grad_bias.data(), {k.c}};
  bnext::batch_norm_backward(backward);

  std::vector<T> mean(r.mean.begin(), r.mean.end()), var(r.var.begin(), r.var.end());
  bnext::BatchNormInference inference;
  inference.x = forward.x;
  inference.mean = {mean.data(), {k.c}};
  inference.var = {var.data(), {k.c}};
  inference.weight = forward.weight;
  inference.bias = forward.bias;
  inference.channel_axis = forward.channel_axis;
  inference.activation = forward.activation;
  inference.y = data(r.inference);
  bnext::batch_norm_inference(inference);
  return r;
}

template <class T>
void test_batch_norm(const Case& k) {
  const auto x = random_values<T>(k.size(), 1), g = random_values<T>(k.size(), 2);
  const auto weight = random_values<T>(k.c, 3), bias = random_values<T>(k.c, 4);
  bnext::set_num_threads(1);
  const Result<T> r = run(k, x, g, weight, bias);
  const double tolerance = sizeof(T) == 4 ? 5e-6 : 1e-12;
  const auto close = [&](double actual, double expected, double unit, const char* what) {
    check(std::abs(actual - expected) <= tolerance * (unit + std::abs(expected)),
          k.name() + ": " + what + ": expected " + std::to_string(expected) + ", got " +
              std::to_string(actual));
  };

  const double m = static_cast<double>(k.n * k.s);
  for (std::int64_t c = 0; c < k.c; ++c) {
    const auto channel = static_cast<std::size_t>(c);
    double mean = 0, var = 0, sum_g = 0, sum_gn = 0;
    const auto each = [&](auto body) {
      for (std::int64_t i = 0; i < k.n; ++i)
        for (std::int64_t j = 0; j < k.s; ++j) body(static_cast<std::size_t>(k.index(i, c, j)));
    };
    each([&](std::size_t i) { mean += x[i] / m; });
    each([&](std::size_t i) { var += (x[i] - mean) * (x[i] - mean) / m; });
    const double inv_std = 1 / std::sqrt(var + 1e-5), w = weight[channel], b = bias[channel];
    const auto n = [&](std::size_t i) { return (x[i] - mean) * inv_std; };
    const auto dz = [&](std::size_t i) { return n(i) * w + b > 0 ? static_cast<double>(g[i]) : 0; };
    each([&](std::size_t i) {
      sum_g += dz(i);
      sum_gn += dz(i) * n(i);
    });
    close(r.mean[channel], mean, 1, "mean");
    close(r.var[channel], var, 1, "var");
    close(r.grad_bias[channel], sum_g, std::sqrt(m), "grad_bias");
    close(r.grad_weight[channel], sum_gn, std::sqrt(m), "grad_weight");
    const double unit = 1 + 10 * std::abs(w * inv_std);
    each([&](std::size_t i) {
      close(r.y[i], std::max(n(i) * w + b, 0.0), 1, "y");
      close(r.inference[i], std::max(n(i) * w + b, 0.0), 1, "inference");
      close(r.grad_x[i], w * inv_std * (dz(i) - sum_g / m - n(i) * sum_gn / m), unit, "grad_x");
    });
  }

  for (const int threads : {2, 3, 8}) {
    bnext::set_num_threads(threads);
    const Result<T> again = run(k, x, g, weight, bias);
    check(again.y == r.y && again.mean == r.mean && again.var == r.var &&
              again.grad_x == r.grad_x && again.grad_weight == r.grad_weight &&
              again.grad_bias == r.grad_bias && again.inference == r.inference,
          k.name() + ": other bits on " + std::to_string(threads) + " threads");
  }
}

// A residual, ReLU and dropout in the same pass, against the operations one after another. Arrays
// are exactly as large as they must be, for the sanitizers.
void test_fused(const Case& k) {
  const auto size = static_cast<std::size_t>(k.size()), c = static_cast<std::size_t>(k.c);
  const auto x = random_values<float>(k.size(), 1), g = random_values<float>(k.size(), 2),
             residual = random_values<float>(k.size(), 3);
  std::vector<float> y(size), z(size), grad_x(size), grad_z(size), expected(size),
      grad_residual(size);
  std::vector<double> mean(c), var(c), inv_std(c);
  std::vector<std::uint8_t> passes(static_cast<std::size_t>(bnext::passes_bytes(k.size())));
  const auto data = [&](const std::vector<float>& values) {
    return bnext::Array(const_cast<float*>(values.data()), bnext::DType::float32, k.shape());
  };
  const auto largest_error = [](const std::vector<float>& a, const std::vector<float>& b) {
    float error = 0;
    for (std::size_t i = 0; i < a.size(); ++i) error = std::max(error, std::abs(a[i] - b[i]));
    return error;
  };

  bnext::BatchNormForward forward;
  forward.x = data(x);
  forward.channel_axis = k.last ? -1 : 1;
  forward.y = data(z);
  forward.mean = {mean.data(), {k.c}};
  forward.var = {var.data(), {k.c}};
  forward.inv_std = {inv_std.data(), {k.c}};
  bnext::batch_norm_forward(forward);
  bnext::Generator generator(7);
  forward.y = data(y);
  forward.residual = data(residual);
  forward.activation = bnext::Activation::relu;
  forward.dropout = 0.4;
  forward.passes = passes.data();
  const bnext::DropoutDraw draw = bnext::batch_norm_forward(forward, generator);
  for (std::size_t i = 0; i < size; ++i) expected[i] = std::max(0.0f, z[i] + residual[i]);
  bnext::Generator same(7);
  bnext::dropout_forward({data(expected), 0.4, data(expected)}, same);
  check(largest_error(y, expected) < 1e-5f, k.name() + ": fused forward");
  check(generator.offset() == 1, k.name() + ": fused forward: expected one draw");

  bnext::BatchNormBackward backward;
  backward.x = data(x);
  backward.channel_axis = forward.channel_axis;
  backward.mean = forward.mean;
  backward.inv_std = forward.inv_std;
  bnext::dropout_backward({data(g), 0.4, draw, data(grad_z)});
  for (std::size_t i = 0; i < size; ++i)
    if (z[i] + residual[i] <= 0) grad_z[i] = 0;
  backward.grad_y = data(grad_z);
  backward.grad_x = data(expected);
  bnext::batch_norm_backward(backward);
  backward.grad_y = data(g);
  backward.grad_x = data(grad_x);
  backward.grad_residual = data(grad_residual);
  backward.activation = forward.activation;
  backward.dropout = forward.dropout;
  backward.draw = draw;
  backward.passes = passes.data();
  bnext::batch_norm_backward(backward);
  check(largest_error(grad_x, expected) < 1e-4f, k.name() + ": fused backward");
  check(grad_residual == grad_z, k.name() + ": gradient of the residual");
}

void test_dropout() {
  const std::vector<float> x(10007, 1.0f);
  std::vector<float> first(x.size()), again(x.size());
  const std::int64_t size = static_cast<std::int64_t>(x.size());
  bnext::Generator generator(42);
  const bnext::DropoutDraw draw =
      bnext::dropout_forward({{x.data(), {size}}, 0.25, {first.data(), {size}}}, generator);
  bnext::dropout_backward({{x.data(), {size}}, 0.25, draw, {again.data(), {size}}});
  check(first == again, "dropout: backward has another mask");
  const auto dropped = std::count(first.begin(), first.end(), 0.0f);
  check(std::abs(static_cast<double>(dropped) - 2501.75) < 5 * std::sqrt(10007 * 0.25 * 0.75),
        "dropout: " + std::to_string(dropped) + " of 10007 dropped");
  check(generator.offset() == 1, "dropout: expected one draw");
  bnext::dropout_forward({{x.data(), {size}}, 0, {again.data(), {size}}}, generator);
  check(again == x && generator.offset() == 1, "dropout: p = 0 is the identity, without a draw");
}

// Masks that are broadcast, alpha dropout, and what there is to look at.
void test_dropout_masks() {
  constexpr std::int64_t n = 7, c = 30, size = 301;
  const std::vector<float> x = random_values<float>(n * c * size, 6);
  std::vector<float> y(x.size()), grad(x.size());
  for (const bool alpha : {false, true}) {
    bnext::Generator generator(9, 3);
    bnext::DropoutForward forward;
    forward.x = {x.data(), {n, c, size}};
    forward.p = 0.3;
    forward.y = {y.data(), {n, c, size}};
    forward.mask_shape = {n, c, 1};
    forward.alpha = alpha;
    const bnext::DropoutDraw draw = bnext::dropout_forward(forward, generator);
    bnext::DropoutBackward backward;
    backward.grad_y = forward.x;
    backward.p = forward.p;
    backward.draw = draw;
    backward.grad_x = {grad.data(), {n, c, size}};
    backward.mask_shape = forward.mask_shape;
    backward.alpha = alpha;
    bnext::dropout_backward(backward);
    std::uint8_t kept[n * c];
    bnext::dropout_mask(forward.p, draw, 0, n * c, kept);
    const double s = alpha ? -1.7580993408473766 : 0, q = 1 - forward.p;
    const double scale = alpha ? 1 / std::sqrt(q * (1 + forward.p * s * s)) : 1 / q;
    double worst = 0;
    for (std::int64_t i = 0; i < n * c * size; ++i) {
      const auto k = static_cast<std::size_t>(i);
      const bool keep = kept[i / size] != 0;
      const double value = keep ? scale * (x[k] - forward.p * s) : scale * s * q;
      worst = std::max(worst, std::abs(y[k] - value));
      worst = std::max(worst, std::abs(grad[k] - (keep ? scale * x[k] : 0)));
    }
    check(worst < 1e-5, "dropout: mask of channels, alpha " + std::to_string(alpha));
  }
  std::vector<float> noise(1000), part(100);
  bnext::gaussian_dropout_noise(0.5, {9, 3}, 0, 1000, noise.data());
  bnext::gaussian_dropout_noise(0.5, {9, 3}, 555, 100, part.data());
  check(std::equal(part.begin(), part.end(), noise.begin() + 555), "noise: a part of it differs");
  double sum = 0;
  for (const float value : noise) sum += value;
  check(std::abs(sum / 1000 - 1) < 0.2, "noise: its mean is not 1");
}

void test_errors() {
  float x[6] = {1, 2, 3, 4, 5, 6}, y[6] = {};
  double statistics[3][3] = {};
  bnext::BatchNormForward good;
  good.x = {x, {2, 3}};
  good.y = {y, {2, 3}};
  good.mean = {statistics[0], {3}};
  good.var = {statistics[1], {3}};
  good.inv_std = {statistics[2], {3}};
  const auto with = [&](auto change) {
    return [=] {
      bnext::BatchNormForward bad = good;
      change(bad);
      bnext::batch_norm_forward(bad);
    };
  };
  using Args = bnext::BatchNormForward;
  using Invalid = std::invalid_argument;
  const auto expect = [&](const char* message, auto change) {
    check_throws<Invalid>(message, with(change));
  };
  expect("batch_norm_forward: x: expected an array, got none", [](Args& a) { a.x = {}; });
  expect("x: expected data, got a null pointer",
         [](Args& a) { a.x = {static_cast<float*>(nullptr), {2, 3}}; });
  expect("x: expected no negative extent", [&](Args& a) { a.x = {x, {-2, 3}}; });
  expect("x: expected 2 or more dimensions", [&](Args& a) { a.x = {x, {6}}; });
  expect("x: 1 value per channel (shape (1, 6))", [&](Args& a) { a.x = {x, {1, 6}}; });
  expect("channel_axis: expected 1 or -1, got 2", [](Args& a) { a.channel_axis = 2; });
  expect("eps: expected a finite number", [](Args& a) { a.eps = -1; });
  expect("weight: expected shape (3,), got (2,)", [&](Args& a) { a.weight = {y, {2}}; });
  expect("out: expected shape (2, 3), got (3, 2)", [&](Args& a) { a.y = {y, {3, 2}}; });
  expect("out: overlaps x in part", [&](Args& a) { a.y = {x - 1, {2, 3}}; });
  expect("mean: expected shape (3,), got (2,)", [&](Args& a) { a.mean = {statistics[0], {2}}; });
  expect("x: expected data aligned to its elements", [&](Args& a) {
    a.x = {reinterpret_cast<float*>(reinterpret_cast<char*>(x) + 1), {2, 3}};
  });
  check_throws<bnext::DTypeError>("weight: expected dtype float32, got float64",
                                  with([&](Args& a) { a.weight = {statistics[0], {3}}; }));
  // Shapes whose number of elements or of bytes wraps around, to 0 or to a few.
  constexpr std::int64_t one = 1;
  for (const bnext::Shape& shape : {bnext::Shape{one << 32, one << 32},
                                    {6148914691236517206, 3},
                                    {one << 62, 3},
                                    {one << 40, one << 22},
                                    {one << 62, 4, 0},
                                    {0, 3, one << 62, 4}})
    expect("x: expected fewer than 2**63 bytes, got shape (",
           [&](Args& a) { a.x = {x, bnext::DType::float32, shape}; });
  expect("residual: expected fewer than 2**63 bytes",
         [&](Args& a) { a.residual = {x, bnext::DType::float32, {one << 62, 3}}; });
  const auto dtype = static_cast<bnext::DType>(99);
  check_throws<bnext::DTypeError>(
      "batch_norm_forward: x: expected a dtype of float32, float64, float16, bfloat16, got "
      "DType(99)",
      with([&](Args& a) { a.x.dtype = dtype; }));
  check_throws<bnext::DTypeError>("weight: expected a dtype of",
                                  with([&](Args& a) { a.weight = {x, dtype, {3}}; }));
  for (const int number : {-1, 7, 99})
    expect("activation: expected one of none, relu, leaky_relu, ",
           [&](Args& a) { a.activation = static_cast<bnext::Activation>(number); });
  check_throws<Invalid>("n: expected 1 or more", [] { bnext::set_num_threads(0); });
  check_throws<Invalid>("no backend 'avx9'", [] { bnext::set_backend("avx9"); });
  check(std::all_of(y, y + 6, [](float value) { return value == 0; }), "a bad call wrote to y");

  float out[6];
  bnext::Generator generator(0);
  check_throws<Invalid>("dropout_forward: mask_shape: expected the extents of x, (6,)", [&] {
    bnext::Generator generator(1);
    bnext::dropout_forward({{x, {6}}, 0.5, {out, {6}}, {3}}, generator);
  });
  check_throws<Invalid>("dropout_forward: p: expected a probability in [0, 1], got nan", [&] {
    bnext::dropout_forward({{x, {6}}, std::numeric_limits<double>::quiet_NaN(), {out, {6}}},
                           generator);
  });
  check(generator.offset() == 0, "a bad call drew a number");
  check_throws<bnext::DTypeError>("dropout_forward: x: expected a dtype of", [&] {
    bnext::dropout_forward({{x, dtype, {6}}, 0.5, {out, dtype, {6}}}, generator);
  });
}

// An array of a call, and those that it may be the very array of.
struct Operand {
  bnext::Array* array;
  std::vector<const bnext::Array*> may_be = {};
};

// Every output in the place of every other array, and one element further: an error, before
// anything is written, unless it may be that very array. The outputs come first.
void check_overlaps(const std::string& name, std::vector<double>& memory,
                    const std::vector<Operand>& operands, std::size_t outputs,
                    const std::function<void()>& call) {
  const std::vector<double> before = memory;
  call();
  memory = before;
  for (std::size_t o = 0; o < outputs; ++o)
    for (const Operand& other : operands) {
      bnext::Array& out = *operands[o].array;
      if (other.array == &out) continue;
      const auto& may_be = operands[o].may_be;
      const bool allowed = std::find(may_be.begin(), may_be.end(), other.array) != may_be.end();
      void* const own = out.data;
      for (const int shift : {0, 1}) {
        out.data = static_cast<double*>(other.array->data) + shift;
        bool threw = false;
        try {
          call();
        } catch (const std::invalid_argument& error) {
          threw = std::string(error.what()).find("overlaps") != std::string::npos;
        }
        const bool expected = !allowed || shift > 0;
        const std::string which = name + ": output " + std::to_string(o) + " over operand " +
                                  std::to_string(&other - operands.data()) + " + " +
                                  std::to_string(shift);
        check(threw == expected, which + (expected ? ": no error" : ": an error"));
        check(!threw || memory == before, which + ": something was written");
        memory = before;
      }
      out.data = own;
    }
}

// float64, so that data and parameters can be each other's memory.
void test_overlaps() {
  std::vector<double> memory = random_values<double>(400, 5);
  double* next = memory.data();
  const auto data = [&] { return bnext::Array(std::exchange(next, next + 20), {4, 3}); };
  const auto channels = [&] { return bnext::Array(std::exchange(next, next + 20), {3}); };
  using Invalid = std::invalid_argument;

  bnext::BatchNormForward f;
  f.x = data(), f.residual = data(), f.y = data();
  f.weight = channels(), f.bias = channels();
  f.mean = channels(), f.var = channels(), f.inv_std = channels();
  check_overlaps("batch_norm_forward", memory,
                 {{&f.y, {&f.x, &f.residual}},
                  {&f.mean},
                  {&f.var},
                  {&f.inv_std},
                  {&f.x},
                  {&f.residual},
                  {&f.weight},
                  {&f.bias}},
                 4, [&] { bnext::batch_norm_forward(f); });
  f.activation = bnext::Activation::relu;
  const std::vector<double> before = memory;
  for (const bnext::Array* other : {&f.x, &f.residual, &f.weight, &f.bias, &f.y, &f.mean}) {
    f.passes = static_cast<std::uint8_t*>(other->data) + 3;
    check_throws<Invalid>("overlaps", [&] { bnext::batch_norm_forward(f); });
  }
  check(memory == before, "bits over other arrays were written");
  f.passes = static_cast<std::uint8_t*>(f.x.data);
  check_throws<Invalid>("batch_norm_forward: passes: overlaps x; it must have memory of its own",
                        [&] { bnext::batch_norm_forward(f); });

  bnext::BatchNormBackward b;
  b.grad_y = data(), b.x = f.x, b.residual = f.residual, b.weight = f.weight, b.bias = f.bias;
  b.mean = f.mean, b.inv_std = f.inv_std, b.activation = f.activation;
  b.grad_x = data(), b.grad_residual = data();
  b.grad_weight = channels(), b.grad_bias = channels();
  check_overlaps("batch_norm_backward", memory,
                 {{&b.grad_x, {&b.grad_y, &b.x}},
                  {&b.grad_residual},
                  {&b.grad_weight},
                  {&b.grad_bias},
                  {&b.grad_y},
                  {&b.x},
                  {&b.residual},
                  {&b.weight},
                  {&b.bias},
                  {&b.mean},
                  {&b.inv_std}},
                 4, [&] { bnext::batch_norm_backward(b); });
  b.passes = static_cast<const std::uint8_t*>(b.grad_weight.data);
  check_throws<Invalid>("batch_norm_backward: grad_weight: overlaps passes",
                        [&] { bnext::batch_norm_backward(b); });

  bnext::BatchNormInference i;
  i.x = f.x, i.residual = f.residual, i.weight = f.weight, i.bias = f.bias, i.y = f.y;
  i.mean = f.mean, i.var = f.var;
  for (std::size_t c = 0; c < 3; ++c) static_cast<double*>(i.var.data)[c] = 1;
  check_overlaps("batch_norm_inference", memory,
                 {{&i.y, {&i.x, &i.residual}},
                  {&i.x},
                  {&i.residual},
                  {&i.weight},
                  {&i.bias},
                  {&i.mean},
                  {&i.var}},
                 1, [&] { bnext::batch_norm_inference(i); });

  bnext::DropoutForward d;
  d.x = f.x, d.y = f.y;
  check_overlaps("dropout_forward", memory, {{&d.y, {&d.x}}, {&d.x}}, 1,
                 [&] { bnext::dropout_forward(d, {1, 2}); });
}

// What backward finds x again from the results of.
void test_from_result() {
  using bnext::Activation;
  using bnext::DType;
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16, DType::float64}) {
    const bool wide = dtype == DType::float64;
    const auto invertible = [&](double slope) {
      return bnext::is_invertible(Activation::leaky_relu, slope, dtype);
    };
    check(invertible(0.01) && invertible(1e-38) && invertible(1e38), "slopes that have an inverse");
    check(!invertible(0) && !invertible(-0.01) && !invertible(1e-320) && !invertible(NAN) &&
              !invertible(INFINITY),
          "slopes that have no inverse");
    // 0, without an inverse, and infinite in float32.
    for (const double slope : {1e-60, 1e-39, 1e60})
      check(invertible(slope) == wide, "slopes that have an inverse in float64");
    check(bnext::is_invertible(Activation::none, 0, dtype) &&
              !bnext::is_invertible(Activation::relu, 1, dtype),
          "activations that have an inverse");
  }

  float y[6] = {1, 2, 3, 4, 5, 6}, g[6] = {1, 0, 0, 1, 1, 0}, grad_x[6] = {};
  double mean[3] = {}, inv_std[3] = {1, 1, 1};
  std::uint8_t bits[16] = {};
  bnext::BatchNormBackward good;
  good.grad_y = {g, {2, 3}};
  good.x = {y, {2, 3}};
  good.mean = {mean, {3}};
  good.inv_std = {inv_std, {3}};
  good.grad_x = {grad_x, {2, 3}};
  good.from_result = true;
  good.activation = Activation::leaky_relu;
  const auto expect = [&](const char* message, auto change) {
    check_throws<std::invalid_argument>(message, [=] {
      bnext::BatchNormBackward bad = good;
      change(bad);
      bnext::batch_norm_backward(bad);
    });
  };
  using Args = bnext::BatchNormBackward;
  expect("negative_slope: expected a positive one with an inverse in float32, got 1e-60",
         [](Args& a) { a.negative_slope = 1e-60; });
  expect("activation: expected none, or leaky_relu with a positive slope",
         [](Args& a) { a.activation = Activation::relu; });
  expect("activation: expected one of none, relu",
         [](Args& a) { a.activation = static_cast<Activation>(99); });
  expect("residual: expected none", [&](Args& a) { a.residual = a.x; });
  expect("batch_norm_backward: passes: expected none", [&](Args& a) { a.passes = bits; });
  check(std::all_of(grad_x, grad_x + 6, [](float value) { return value == 0; }),
        "a bad call wrote to grad_x");
  bnext::batch_norm_backward(good);
}

// Parts of a mask and of noise: which elements, and where to.
void test_elements() {
  using Invalid = std::invalid_argument;
  constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
  std::uint8_t kept[100];
  float noise[100];
  const auto expect = [&](const std::string& message, std::int64_t first, std::int64_t count) {
    check_throws<Invalid>("dropout_mask: " + message,
                          [&] { bnext::dropout_mask(0.5, {1, 0}, first, count, kept); });
    check_throws<Invalid>("gaussian_dropout_noise: " + message,
                          [&] { bnext::gaussian_dropout_noise(0.5, {1, 0}, first, count, noise); });
  };
  expect("first: expected a number >= 0, got -1", -1, 100);
  expect("count: expected a number >= 0, got -100", 0, -100);
  expect("count: expected first + count < 2**63, got 9223372036854775800 + 100", most - 7, 100);
  check_throws<Invalid>("dropout_mask: kept: expected data, got a null pointer",
                        [] { bnext::dropout_mask(0.5, {1, 0}, 0, 100, nullptr); });
  check_throws<Invalid>("gaussian_dropout_noise: noise: expected data, got a null pointer",
                        [] { bnext::gaussian_dropout_noise(0.5, {1, 0}, 0, 100, nullptr); });
  bnext::dropout_mask(0.5, {1, 0}, 5, 0, nullptr);
  bnext::gaussian_dropout_noise(0.5, {1, 0}, 5, 0, nullptr);
  // The last elements that there are, as part of more of them.
  std::uint8_t last[10];
  float last_noise[10];
  bnext::dropout_mask(0.5, {1, 0}, most - 100, 100, kept);
  bnext::dropout_mask(0.5, {1, 0}, most - 10, 10, last);
  check(std::equal(last, last + 10, kept + 90), "the last elements of the longest mask");
  bnext::gaussian_dropout_noise(0.5, {1, 0}, most - 100, 100, noise);
  bnext::gaussian_dropout_noise(0.5, {1, 0}, most - 10, 10, last_noise);
  check(std::equal(last_noise, last_noise + 10, noise + 90),
        "the last elements of the longest noise");
}

void test_philox() {
  const std::array<std::uint32_t, 4> zero{}, answer{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  check(bnext::philox4x32_10(zero, {0, 0}) == answer, "Philox: known answer");
}

// Callers on several threads, each with arrays of its own.
void test_concurrent_callers() {
  const Case k{8, 5, 4000, false};
  const auto x = random_values<float>(k.size(), 1), g = random_values<float>(k.size(), 2);
  const auto weight = random_values<float>(k.c, 3), bias = random_values<float>(k.c, 4);
  const Result<float> expected = run(k, x, g, weight, bias);
  std::vector<int> same(4, 0);
  std::vector<std::thread> threads;
  for (int& count : same)
    threads.emplace_back([&] {
      for (int i = 0; i < 10; ++i) count += run(k, x, g, weight, bias).grad_x == expected.grad_x;
    });
  for (std::thread& thread : threads) thread.join();
  check(same == std::vector<int>(4, 10), "concurrent callers disturb each other");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--expect-unknown-backend") == 0) {
    check_throws<std::invalid_argument>("no backend 'avx9' on this machine; available: ",
                                        [] { bnext::backend(); });
    bnext::set_backend(bnext::backends().front().name);
    return failures ? 1 : 0;
  }
  if (argc == 2 && std::strcmp(argv[1], "--expect-wrong-cache-size") == 0) {
    float value = 1;
    for (const bnext::BackendInfo& backend : bnext::backends()) {
      // GPUs do not ask how large the caches are.
      if (!backend.available || backend.name == "cuda") continue;
      bnext::set_backend(backend.name);
      check_throws<std::invalid_argument>("BNEXT_CACHE_BYTES: expected bytes, got '32M'", [&] {
        bnext::dropout_forward({{&value, {1}}, 0.5, {&value, {1}}}, {1, 2});
      });
    }
    return failures ? 1 : 0;
  }
  // bnext_test [BACKEND [--small]]: of one backend alone, and without what takes many launches, as
  // tools that watch every access need it.
  const std::string only = argc > 1 ? argv[1] : "";
  const bool small = argc > 2 && std::strcmp(argv[2], "--small") == 0;
  const Case cases[] = {{2, 1, 1, false},     {7, 3, 5, false},   {3, 2, 63, false},
                        {3, 2, 64, false},    {5, 3, 1000, true}, {40, 700, 1, true},
                        {2, 2, 20011, false}, {9, 1100, 2, true}, {4, 130, 49, false}};
  test_philox();
  for (const bnext::BackendInfo& backend : bnext::backends()) {
    if (!only.empty() && backend.name != only) continue;
    if (!backend.available) {
      std::printf("%s: not on this machine\n", backend.name.c_str());
      continue;
    }
    bnext::set_backend(backend.name);
    for (const Case& k : cases) {
      test_batch_norm<float>(k);
      test_batch_norm<double>(k);
      test_fused(k);
    }
    test_dropout();
    test_errors();
    test_overlaps();
    test_from_result();
    test_elements();
    if (!small) {
      test_dropout_masks();
      test_concurrent_callers();
    }
    std::printf("%s: done\n", backend.name.c_str());
  }
  if (failures) std::printf("%d checks failed\n", failures);
  return failures ? 1 : 0;
}
