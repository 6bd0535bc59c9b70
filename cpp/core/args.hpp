// What a launcher gets: checked arguments in the form that kernels use. Shared by all backends.
#pragma once

#include <cstdint>

namespace bnext {

enum class Activation;

// Data as channels-first (n, c, s), or channels-last (n, s, c): kernels never see H and W.
struct Problem {
  std::int64_t n, c, s;
  bool channels_last;

  std::int64_t per_channel() const { return n * s; }
  std::int64_t size() const { return n * s * c; }
};

// Pointers to void are float or double, as the launcher's dtype says. Optional ones may be null.
struct BatchNormForwardArgs {
  Problem problem;
  const void* x;
  const void* weight;
  const void* bias;
  double eps;
  Activation activation;
  double negative_slope;
  void* y;
  double* mean;
  double* var;
  double* inv_std;
};

struct BatchNormBackwardArgs {
  Problem problem;
  const void* grad_y;
  const void* x;
  const void* weight;
  const void* bias;
  const double* mean;
  const double* inv_std;
  Activation activation;
  double negative_slope;
  bool batch_statistics;
  void* grad_x;
  void* grad_weight;
  void* grad_bias;
};

struct BatchNormInferenceArgs {
  Problem problem;
  const void* x;
  const void* mean;
  const void* var;
  const void* weight;
  const void* bias;
  double eps;
  Activation activation;
  double negative_slope;
  void* y;
};

struct DropoutArgs {
  std::int64_t size;
  const void* x;
  std::uint64_t threshold;  // dropped where the 32 random bits are below it; up to 2^32
  double scale;
  std::uint64_t seed;
  std::uint64_t offset;
  void* y;
};

}  // namespace bnext
