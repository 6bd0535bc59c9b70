// What a launcher gets: checked arguments in the form that kernels use. Shared by all backends.
#pragma once

#include <cstdint>

#include "core/host_device.hpp"

namespace bnext {

enum class Activation;

// Data as channels-first (n, c, s), or channels-last (n, s, c): kernels never see H and W.
struct Problem {
  std::int64_t n, c, s;
  bool channels_last;

  BNEXT_HD std::int64_t per_channel() const { return n * s; }
  BNEXT_HD std::int64_t size() const { return n * s * c; }
};

// Where dropout draws an element's 32 random bits, and what it makes of them.
struct MaskDraw {
  std::uint64_t threshold;  // dropped where the bits are below it; up to 2^32; 0: no dropout
  double scale;             // of what is kept
  std::uint64_t seed;
  std::uint64_t offset;
  const std::uint64_t* seed_at;  // device backends: if not null, the seed is there
};

// Where an operation runs. Backends of the processor need neither.
struct Place {
  int device = -1;         // of the arrays; -1: they lie in main memory
  void* stream = nullptr;  // a cudaStream_t
};

// What follows the normalisation in the same pass: + residual, activation, dropout.
struct Fusion {
  const void* residual;  // like x, optional
  Activation activation;
  double negative_slope;
  MaskDraw dropout;
  // Optional: bit i tells whether the gradient passes the activation at element i. Written by
  // forward, read by backward in place of what it would have to compute z from.
  std::uint8_t* passes;
  // Backward of dropout: room for the bits of what is kept. The sums draw them, so that the second
  // pass need not draw again.
  std::uint8_t* kept;
  // Backward of LeakyReLU: in place of x there is the result, in which x still is.
  bool inverted;
};

// Pointers to void are of the launcher's dtype, those of parameters and statistics of what it is
// computed in. Optional ones may be null.
struct BatchNormForwardArgs {
  Problem problem;
  const void* x;
  const void* weight;
  const void* bias;
  double eps;
  Fusion fusion;
  void* y;
  double* mean;
  double* var;
  double* inv_std;
  Place place;
};

struct BatchNormBackwardArgs {
  Problem problem;
  const void* grad_y;
  const void* x;
  const void* weight;
  const void* bias;
  const double* mean;
  const double* inv_std;
  Fusion fusion;
  bool batch_statistics;
  bool from_result;  // x is the result of forward
  void* grad_x;
  void* grad_residual;
  void* grad_weight;
  void* grad_bias;
  Place place;
};

struct BatchNormInferenceArgs {
  Problem problem;
  const void* x;
  const void* mean;
  const void* var;
  const void* weight;
  const void* bias;
  double eps;
  Fusion fusion;
  void* y;
  Place place;
};

// Which elements share a mask's bit. Seen as (samples, repeats, units, run), the element at
// (i, r, u, j) has that of number i * units + u.
struct MaskMap {
  std::int64_t repeats, units, run;

  BNEXT_HD bool shares() const { return repeats > 1 || run > 1; }
};

// y = scale x + shift where an element is kept, `dropped` elsewhere.
struct DropoutArgs {
  std::int64_t size;
  const void* x;
  MaskDraw draw;
  void* y;
  MaskMap map;
  double shift;  // 0 for all but alpha dropout, as is `dropped`
  double dropped;
  Place place;
};

}  // namespace bnext
