// What the parts of the benchmark share.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace bench {

struct Case {
  std::string name;
  std::int64_t n, c, h, w;

  std::int64_t size() const { return n * c * h * w; }
  std::string shape() const {
    return std::to_string(n) + "x" + std::to_string(c) + "x" + std::to_string(h) + "x" +
           std::to_string(w);
  }
};

// The arrays of one case, float32: x and grad_y are read, out is written.
struct Arrays {
  const float* x;
  const float* grad_y;
  float* out;
  std::vector<float> weight, bias, mean, var, grad_weight, grad_bias;
};

enum class Op { forward, backward, inference, dropout };

// Somebody's implementation of an operation. Those whose name starts with "limit" only move the
// bytes; the fastest of them is the streaming limit. Those with "two passes" also make the sums
// that training needs.
struct Contender {
  std::string name;
  std::function<void()> run;
};

// streams.cpp: every way to read `reads` arrays and write one, for `training` with sums first.
void add_streams(int reads, bool training, std::int64_t size, const Arrays& arrays, int threads,
                 std::vector<Contender>& contenders);

// onednn.cpp: batch normalization, with ReLU where `relu`, in each layout. Blocked layouts get
// arrays of their own, filled with the same values.
void add_onednn(Op op, const Case& k, Arrays& arrays, bool channels_last, bool relu,
                std::vector<Contender>& contenders);

}  // namespace bench
