// What is measured: the shapes, the operations, and the arrays that they work on.
#include <fstream>
#include <random>
#include <sstream>
#include <stdexcept>

#include "bench.hpp"

namespace bench {
namespace {

constexpr const char* dtype_names[] = {
#define BENCH_NAME(name, type, compute) #name,
    BNEXT_DTYPES(BENCH_NAME)
#undef BENCH_NAME
};
constexpr const char* kind_names[] = {"forward", "backward", "inference", "dropout"};

// The place of `name` in a list of names, which is the value of its enumerator.
template <class Enum, std::size_t size>
Enum named(const char* const (&names)[size], const std::string& name) {
  std::string known;
  for (std::size_t i = 0; i < size; ++i) {
    if (name == names[i]) return static_cast<Enum>(i);
    known += std::string(" ") + names[i];
  }
  throw std::runtime_error("expected one of" + known + ", got " + name);
}

}  // namespace

Kind kind_of(const std::string& name) {
  return named<Kind>(kind_names, name);
}

bnext::DType dtype_of(const std::string& name) {
  return named<bnext::DType>(dtype_names, name);
}

std::string name_of(bnext::DType dtype) {
  return dtype_names[static_cast<int>(dtype)];
}

std::string Op::name() const {
  std::string text = kind_names[static_cast<int>(kind)];
  const std::string p = dropout == 0.5 ? "" : " " + std::to_string(dropout).substr(0, 3);
  if (kind == Kind::dropout) return text + p;
  if (residual) text += " residual";
  if (relu) text += " relu";
  if (dropout > 0) text += " dropout" + p;
  return text;
}

std::vector<Case> read_cases(const std::string& only) {
  std::ifstream file(BNEXT_SHAPES);
  if (!file) throw std::runtime_error("cannot read " BNEXT_SHAPES);
  std::vector<Case> cases;
  std::string line;
  std::getline(file, line);
  while (std::getline(file, line)) {
    std::istringstream fields(line);
    Case k;
    char comma;
    std::getline(fields, k.name, ',');
    fields >> k.n >> comma >> k.c >> comma >> k.h >> comma >> k.w;
    if (k.name.find(only) != std::string::npos) cases.push_back(k);
  }
  return cases;
}

Arrays::Arrays(const Case& k_, bnext::DType dtype_, bool channels_last_)
    : k(k_),
      dtype(dtype_),
      channels_last(channels_last_),
      x(dtype, k.size()),
      other(dtype, k.size()),
      out(dtype, k.size()),
      more(dtype, k.size()),
      weight(bnext::parameter_dtype(dtype), k.c),
      bias(weight.dtype(), k.c),
      mean(weight.dtype(), k.c),
      var(weight.dtype(), k.c),
      grad_weight(weight.dtype(), k.c),
      grad_bias(weight.dtype(), k.c) {
  std::mt19937 engine(1);
  std::normal_distribution<double> normal(0.5, 2);
  // A block of random numbers, repeated: making hundreds of megabytes would take longer than all.
  Tensor noise(dtype, 1048573);
  for (std::int64_t i = 0; i < noise.size(); ++i) noise.set(i, normal(engine));
  x.repeat(noise, 7);
  other.repeat(noise, 5);
  for (std::int64_t i = 0; i < k.c; ++i) {
    weight.set(i, noise[i]);
    bias.set(i, noise[i + k.c]);
  }
  mean.fill(0.5);
  var.fill(4);
}

}  // namespace bench
