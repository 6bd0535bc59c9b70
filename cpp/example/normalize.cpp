// Normalizes a batch of 4 samples with 2 channels.
#include <bnext/bnext.hpp>
#include <cstdio>

int main() {
  const float x[] = {1, 10, 2, 20, 3, 30, 4, 40};
  float y[8];
  double mean[2], var[2], inv_std[2];
  bnext::BatchNormForward args;
  args.x = {x, {4, 2}};
  args.y = {y, {4, 2}};
  args.mean = {mean, {2}};
  args.var = {var, {2}};
  args.inv_std = {inv_std, {2}};
  bnext::batch_norm_forward(args);
  std::printf("%s: mean %g and %g, y %.2f to %.2f\n", bnext::backend().c_str(), mean[0], mean[1],
              static_cast<double>(y[0]), static_cast<double>(y[6]));
}
