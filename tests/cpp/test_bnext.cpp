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
    if (!small) {
      test_dropout_masks();
      test_concurrent_callers();
    }
    std::printf("%s: done\n", backend.name.c_str());
  }
  if (failures) std::printf("%d checks failed\n", failures);
  return failures ? 1 : 0;
}
