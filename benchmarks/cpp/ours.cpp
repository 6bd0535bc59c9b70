// bnext on the arrays of a case, and whether its results are right.
#include <algorithm>
#include <bnext/bnext.hpp>
#include <cmath>
#include <memory>
#include <stdexcept>

#include "bench.hpp"

namespace bench {
namespace {

// An operation with all its arguments. Its arrays keep what they have until it runs.
class Bnext {
 public:
  Bnext(const Op& op, Arrays& a) : op_(op) {
    const Case& k = a.k;
    const bnext::Shape shape =
        a.channels_last ? bnext::Shape{k.n, k.h, k.w, k.c} : bnext::Shape{k.n, k.c, k.h, k.w};
    const auto data = [&](Tensor& t) { return bnext::Array(t.data(), a.dtype, shape); };
    const auto row = [&](Tensor& t) { return bnext::Array(t.data(), t.dtype(), {k.c}); };
    const auto activation = op.relu ? bnext::Activation::relu : bnext::Activation::none;
    const int axis = a.channels_last ? -1 : 1;
    for (auto* statistic : {&mean_, &var_, &inv_std_})
      statistic->resize(static_cast<std::size_t>(k.c));

    forward_.x = data(a.x);
    forward_.weight = row(a.weight);
    forward_.bias = row(a.bias);
    forward_.channel_axis = axis;
    forward_.activation = activation;
    forward_.dropout = op.dropout;
    forward_.draw = draw_;
    forward_.y = data(a.out);
    forward_.mean = {mean_.data(), {k.c}};
    forward_.var = {var_.data(), {k.c}};
    forward_.inv_std = {inv_std_.data(), {k.c}};

    backward_.grad_y = data(a.other);
    backward_.x = forward_.x;
    backward_.weight = forward_.weight;
    backward_.bias = forward_.bias;
    backward_.mean = forward_.mean;
    backward_.inv_std = forward_.inv_std;
    backward_.channel_axis = axis;
    backward_.activation = activation;
    backward_.dropout = op.dropout;
    backward_.draw = draw_;
    backward_.grad_x = forward_.y;
    backward_.grad_weight = row(a.grad_weight);
    backward_.grad_bias = row(a.grad_bias);

    inference_.x = forward_.x;
    inference_.mean = row(a.mean);
    inference_.var = row(a.var);
    inference_.weight = forward_.weight;
    inference_.bias = forward_.bias;
    inference_.channel_axis = axis;
    inference_.activation = activation;
    inference_.y = forward_.y;

    dropout_.x = forward_.x;
    dropout_.p = op.dropout;
    dropout_.y = forward_.y;

    if (op.residual) {
      if (op.relu) passes_.resize(static_cast<std::size_t>(bnext::passes_bytes(k.size())));
      forward_.residual = inference_.residual = data(a.other);
      backward_.passes = forward_.passes = passes_.empty() ? nullptr : passes_.data();
      backward_.grad_residual = data(a.more);
    }
    if (op.kind == Kind::backward) bnext::batch_norm_forward(forward_);  // its statistics and bits
  }

  void run() {
    if (op_.kind == Kind::forward) bnext::batch_norm_forward(forward_);
    if (op_.kind == Kind::backward) bnext::batch_norm_backward(backward_);
    if (op_.kind == Kind::inference) bnext::batch_norm_inference(inference_);
    if (op_.kind == Kind::dropout) draw_ = bnext::dropout_forward(dropout_, generator_);
  }

  // Which elements dropout has kept in the last run.
  std::vector<std::uint8_t> kept(std::int64_t size) const {
    std::vector<std::uint8_t> mask(static_cast<std::size_t>(size));
    bnext::dropout_mask(op_.dropout, draw_, 0, size, mask.data());
    return mask;
  }

 private:
  const Op op_;
  std::vector<double> mean_, var_, inv_std_;
  std::vector<std::uint8_t> passes_;
  bnext::DropoutDraw draw_{1, 0};
  bnext::Generator generator_{1};
  bnext::BatchNormForward forward_;
  bnext::BatchNormBackward backward_;
  bnext::BatchNormInference inference_;
  bnext::DropoutForward dropout_;
};

// The result of `op` in a.out and a.more against plain loops in double, on a few channels.
void check_result(const Op& op, const Arrays& a, const std::vector<std::uint8_t>& kept) {
  const Case& k = a.k;
  const auto fail = [&](const std::string& what) {
    throw std::runtime_error(k.name + ": " + op.name() + ": " + what);
  };
  const auto size = static_cast<double>(k.size());
  if (op.dropout > 0) {
    const auto share = static_cast<double>(std::count(kept.begin(), kept.end(), 1)) / size;
    if (std::abs(share - (1 - op.dropout)) > 4 * std::sqrt(0.25 / size))
      fail("wrong share of zeros");
  }
  const double tolerance = rounding(a.dtype) + (a.dtype == bnext::DType::float64 ? 1e-10 : 2e-5);
  const auto compare = [&](double got, double expected, std::int64_t c) {
    if (!(std::abs(got - expected) <= tolerance * (1 + std::abs(expected))))
      fail("wrong result in channel " + std::to_string(c));
  };
  const std::int64_t plane = k.h * k.w;
  const auto m = static_cast<std::size_t>(k.n * plane);
  const auto count = static_cast<double>(m);
  for (std::int64_t c = 0; c < k.c; c += std::max<std::int64_t>(1, k.c / 3)) {
    std::vector<std::int64_t> at;  // the elements of the channel
    for (std::int64_t i = 0; i < k.n; ++i)
      for (std::int64_t j = 0; j < plane; ++j)
        at.push_back(a.channels_last ? (i * plane + j) * k.c + c : (i * k.c + c) * plane + j);

    std::vector<double> n(m), z(m), factor(m), grad(m);  // n normalised, factor of dropout
    double mean = 0, var = 0, mean_g = 0, mean_gn = 0;
    for (std::size_t i = 0; i < m; ++i) mean += (n[i] = a.x[at[i]]) / count;
    for (const double x : n) var += (x - mean) * (x - mean) / count;
    if (op.kind == Kind::inference) mean = a.mean[c], var = a.var[c];
    const double r = 1 / std::sqrt(var + 1e-5), weight = a.weight[c];
    for (std::size_t i = 0; i < m; ++i) {
      const double x = n[i], other = a.other[at[i]];
      n[i] = (x - mean) * r;
      z[i] = op.kind == Kind::dropout ? x : n[i] * weight + a.bias[c] + (op.residual ? other : 0);
      factor[i] = kept[static_cast<std::size_t>(at[i])];
      if (op.dropout > 0) factor[i] /= 1 - op.dropout;
      grad[i] = op.relu && z[i] <= 0 ? 0 : factor[i] * other;
      mean_g += grad[i] / count;
      mean_gn += grad[i] * n[i] / count;
    }
    for (std::size_t i = 0; i < m; ++i) {
      if (op.kind != Kind::backward) {
        compare(a.out[at[i]], factor[i] * (op.relu ? std::max(0.0, z[i]) : z[i]), c);
      } else if (!op.relu || std::abs(z[i]) > 1e-5) {  // else rounding may decide what passes
        compare(a.out[at[i]], weight * r * (grad[i] - mean_g - n[i] * mean_gn), c);
        if (op.residual) compare(a.more[at[i]], grad[i], c);
      }
    }
  }
}

}  // namespace

void add_bnext(const std::string& name, const Op& op, Arrays& arrays,
               std::vector<Contender>& contenders) {
  const auto ours = std::make_shared<Bnext>(op, arrays);
  ours->run();
  check_result(op, arrays, ours->kept(arrays.k.size()));
  contenders.push_back({name, op, [ours] { ours->run(); }});
}

}  // namespace bench
