// What the parts of the benchmark share.
#pragma once

#include <bnext/types.hpp>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "tensor.hpp"

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

// Those of shapes.csv whose name contains `only`.
std::vector<Case> read_cases(const std::string& only);

// The arrays of one case, filled with random numbers.
struct Arrays {
  Arrays(const Case& k_, bnext::DType dtype_, bool channels_last_);

  const Case k;
  const bnext::DType dtype;
  const bool channels_last;
  Tensor x, other;   // read; the other is grad_y in backward and the residual elsewhere
  Tensor out, more;  // written; more is the gradient of the residual
  Tensor weight, bias, mean, var, grad_weight, grad_bias;
};

enum class Kind { forward, backward, inference, dropout };

// An operation of one kind and what is fused with it.
struct Op {
  Kind kind;
  bool residual = false, relu = false;
  double dropout = 0;  // probability

  std::string name() const;  // with the probability where that is not 0.5
  bool training() const { return kind == Kind::forward || kind == Kind::backward; }
  // Arrays of the size of x that have to be read and written. With a residual, one bit an element
  // passes from forward to backward, which is not counted.
  int reads() const { return kind == Kind::backward ? 2 : 1 + residual; }
  int writes() const { return kind == Kind::backward ? 1 + residual : 1; }
};

// What has that name; raises with the names that there are.
Kind kind_of(const std::string& name);
bnext::DType dtype_of(const std::string& name);
std::string name_of(bnext::DType dtype);

// Somebody's implementation of an operation. Those whose name starts with "limit" only move the
// bytes; the fastest of them is the streaming limit. Those with "two passes" also make the sums
// that training needs.
struct Contender {
  std::string name;
  Op op;
  std::function<void()> run;
};

// ours.cpp: bnext, once its result has been compared with plain loops in double.
void add_bnext(const std::string& name, const Op& op, Arrays& arrays,
               std::vector<Contender>& contenders);

// streams.cpp: every way to read and write as many arrays, in training with sums first.
void add_streams(const Op& op, Arrays& arrays, int threads, std::vector<Contender>& contenders);

// onednn.cpp: batch normalization, alone and with ReLU, in each layout. Blocked layouts get arrays
// of their own, filled with the same values.
void add_onednn(const Op& op, Arrays& arrays, std::vector<Contender>& contenders);

}  // namespace bench
