// Times every operation on every shape of benchmarks/shapes.csv, side by side with the streaming
// limit and with oneDNN where that is installed. Results are checked before anything is timed,
// contenders take turns, and medians are reported.
#include "bench.hpp"

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <bnext/bnext.hpp>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <random>
#include <sstream>
#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bench {
namespace {

struct Options {
  int threads = bnext::num_threads();
  double seconds = 0.5;  // for each case and operation
  bool cold = false;
  bool channels_last = false;
  bool relu = false;
  std::string only;
  std::string json;
};

const std::map<std::string, Op> ops{{"forward", Op::forward},
                                    {"backward", Op::backward},
                                    {"inference", Op::inference},
                                    {"dropout", Op::dropout}};

// 64-byte aligned, on huge pages where the system has them.
class Buffer {
 public:
  explicit Buffer(std::int64_t size) : bytes_(static_cast<std::size_t>(size) * sizeof(float)) {
    constexpr std::size_t huge = 2 << 20;
    bytes_ = (bytes_ + huge - 1) / huge * huge;
    data_ = std::aligned_alloc(huge, bytes_);
    if (data_ == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
    std::memset(data_, 0, bytes_);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  float* data() { return static_cast<float*>(data_); }

  // Out of every cache.
  void flush() const {
#if defined(__x86_64__)
    const char* begin = static_cast<const char*>(data_);
    for (std::size_t i = 0; i < bytes_; i += 64) _mm_clflush(begin + i);
    _mm_mfence();
#endif
  }

 private:
  std::size_t bytes_;
  void* data_;
};

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

// bnext on the arrays of a case.
class Bnext {
 public:
  Bnext(const Case& k, Arrays& arrays, bool channels_last, bool relu) {
    const bnext::Shape shape =
        channels_last ? bnext::Shape{k.n, k.h, k.w, k.c} : bnext::Shape{k.n, k.c, k.h, k.w};
    const auto data = [&](const float* values) {
      return bnext::Array(const_cast<float*>(values), bnext::DType::float32, shape);
    };
    const auto row = [&](std::vector<float>& values) { return bnext::Array(values.data(), {k.c}); };
    mean_.resize(static_cast<std::size_t>(k.c));
    var_ = inv_std_ = mean_;

    forward_.x = data(arrays.x);
    forward_.weight = row(arrays.weight);
    forward_.bias = row(arrays.bias);
    forward_.channel_axis = channels_last ? -1 : 1;
    forward_.y = data(arrays.out);
    forward_.mean = {mean_.data(), {k.c}};
    forward_.var = {var_.data(), {k.c}};
    forward_.inv_std = {inv_std_.data(), {k.c}};

    backward_.grad_y = data(arrays.grad_y);
    backward_.x = forward_.x;
    backward_.weight = forward_.weight;
    backward_.mean = forward_.mean;
    backward_.inv_std = forward_.inv_std;
    backward_.channel_axis = forward_.channel_axis;
    backward_.grad_x = forward_.y;
    backward_.grad_weight = row(arrays.grad_weight);
    backward_.grad_bias = row(arrays.grad_bias);

    inference_.x = forward_.x;
    inference_.mean = row(arrays.mean);
    inference_.var = row(arrays.var);
    inference_.weight = forward_.weight;
    inference_.bias = forward_.bias;
    inference_.channel_axis = forward_.channel_axis;
    inference_.y = forward_.y;

    const auto activation = relu ? bnext::Activation::relu : bnext::Activation::none;
    forward_.activation = inference_.activation = backward_.activation = activation;
    backward_.bias = forward_.bias;

    dropout_.x = forward_.x;
    dropout_.y = forward_.y;
  }

  void run(Op op) {
    if (op == Op::forward) bnext::batch_norm_forward(forward_);
    if (op == Op::backward) bnext::batch_norm_backward(backward_);
    if (op == Op::inference) bnext::batch_norm_inference(inference_);
    if (op == Op::dropout) bnext::dropout_forward(dropout_, generator_);
  }

 private:
  std::vector<double> mean_, var_, inv_std_;
  bnext::BatchNormForward forward_;
  bnext::BatchNormBackward backward_;
  bnext::BatchNormInference inference_;
  bnext::DropoutForward dropout_;
  bnext::Generator generator_{1};
};

// The result of `op` in arrays.out against plain loops in double, on a few channels.
void check_result(Op op, const Case& k, const Arrays& a, bool channels_last, bool relu) {
  if (op == Op::dropout) {
    const auto dropped = std::count(a.out, a.out + k.size(), 0.0f);
    const double expected = 0.5 * static_cast<double>(k.size());
    if (std::abs(static_cast<double>(dropped) - expected) > 6 * std::sqrt(expected))
      throw std::runtime_error(k.name + ": dropout: wrong share of zeros");
    return;
  }
  const std::int64_t plane = k.h * k.w;
  for (std::int64_t c = 0; c < k.c; c += std::max<std::int64_t>(1, k.c / 3)) {
    const auto channel = static_cast<std::size_t>(c);
    const auto each = [&](auto body) {
      for (std::int64_t i = 0; i < k.n; ++i)
        for (std::int64_t j = 0; j < plane; ++j)
          body(channels_last ? (i * plane + j) * k.c + c : (i * k.c + c) * plane + j);
    };
    const double m = static_cast<double>(k.n * plane);
    double mean = 0, var = 0, g = 0, gn = 0;
    each([&](std::int64_t i) { mean += a.x[i] / m; });
    each([&](std::int64_t i) { var += (a.x[i] - mean) * (a.x[i] - mean) / m; });
    if (op == Op::inference) mean = a.mean[channel], var = a.var[channel];
    const double r = 1 / std::sqrt(var + 1e-5), w = a.weight[channel];
    const auto z = [&](std::int64_t i) { return (a.x[i] - mean) * r * w + a.bias[channel]; };
    const auto grad = [&](std::int64_t i) { return relu && z(i) <= 0 ? 0.0 : a.grad_y[i]; };
    each([&](std::int64_t i) {
      g += grad(i);
      gn += grad(i) * (a.x[i] - mean) * r;
    });
    each([&](std::int64_t i) {
      const double n = (a.x[i] - mean) * r;
      const double expected = op == Op::backward ? w * r * (grad(i) - g / m - n * gn / m)
                              : relu             ? std::max(0.0, z(i))
                                                 : z(i);
      // Rounding may put a value on the other side of the corner of ReLU.
      if (op == Op::backward && relu && std::abs(z(i)) < 1e-5) return;
      if (!(std::abs(a.out[i] - expected) <= 2e-5 * (1 + std::abs(expected))))
        throw std::runtime_error(k.name + ": wrong result in channel " + std::to_string(c));
    });
  }
}

double seconds_of(const std::function<void()>& run, int times) {
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < times; ++i) run();
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
  return elapsed.count() / times;
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<long>(values.size() / 2),
                   values.end());
  return values[values.size() / 2];
}

struct Row {
  Case k;
  std::string op, layout, state, contender;
  double seconds;
  std::int64_t bytes;
};

void run_case(const Case& k, const Options& options, std::vector<Row>& rows) {
  Buffer x(k.size()), grad_y(k.size()), out(k.size());
  std::mt19937 engine(1);
  std::normal_distribution<float> normal(0.5f, 2);
  // A block of random numbers, repeated: making hundreds of megabytes would take longer than all.
  std::vector<float> noise(1 << 20);
  for (float& value : noise) value = normal(engine);
  for (std::int64_t i = 0; i < k.size(); ++i) {
    x.data()[i] = noise[static_cast<std::size_t>(i * 7 % 1048573)];
    grad_y.data()[i] = noise[static_cast<std::size_t>(i * 5 % 1048571)];
  }
  const auto c = static_cast<std::size_t>(k.c);
  Arrays arrays{x.data(),
                grad_y.data(),
                out.data(),
                std::vector<float>(noise.begin(), noise.begin() + k.c),
                std::vector<float>(noise.begin() + k.c, noise.begin() + 2 * k.c),
                std::vector<float>(c, 0.5f),
                std::vector<float>(c, 4.0f),
                std::vector<float>(c),
                std::vector<float>(c)};
  Bnext ours(k, arrays, options.channels_last, options.relu);

  for (const auto& [op_name, op] : ops) {
    if (op != Op::inference && op != Op::dropout && k.n * k.h * k.w < 2) continue;
    const int reads = op == Op::backward ? 2 : 1;
    ours.run(Op::forward);  // backward needs its statistics
    ours.run(op);
    check_result(op, k, arrays, options.channels_last, options.relu);

    std::vector<Contender> contenders;
    const Op which = op;
    contenders.push_back({"bnext", [&ours, which] { ours.run(which); }});
    const bool training = op == Op::forward || op == Op::backward;
    add_streams(reads, training, k.size(), arrays, options.threads, contenders);
#ifdef BNEXT_ONEDNN
    add_onednn(op, k, arrays, options.channels_last, options.relu, contenders);
#endif

    // Short runs are repeated, so that the clock and the wake-up of threads do not count.
    const double once = seconds_of(contenders[0].run, 1);
    const int times = options.cold ? 1 : std::max(1, static_cast<int>(100e-6 / once));
    std::vector<std::vector<double>> samples(contenders.size());
    const auto begin = std::chrono::steady_clock::now();
    std::chrono::duration<double> elapsed{};
    while (samples[0].size() < 7 ||
           (elapsed.count() < options.seconds && samples[0].size() < 101)) {
      for (std::size_t i = 0; i < contenders.size(); ++i) {
        if (options.cold) {
          x.flush();
          grad_y.flush();
          out.flush();
        } else {
          for (int k = 0; k < 3; ++k) contenders[i].run();  // in the state that it leaves itself
        }
        samples[i].push_back(seconds_of(contenders[i].run, times));
      }
      elapsed = std::chrono::steady_clock::now() - begin;
    }
    const std::int64_t bytes = (reads + 1) * k.size() * static_cast<std::int64_t>(sizeof(float));
    for (std::size_t i = 0; i < contenders.size(); ++i)
      rows.push_back({k, op_name, options.channels_last ? "nhwc" : "nchw",
                      options.cold ? "cold" : "warm", contenders[i].name, median(samples[i]),
                      bytes});
  }
}

// One line for each operation of the last case: time, bandwidth, share of the limit, peers.
void print_rows(const std::vector<Row>& rows, std::size_t first) {
  for (std::size_t i = first; i < rows.size();) {
    std::size_t end = i;
    double limit = 1e30, passes = 1e30, ours = 0;
    std::string peers;
    while (end < rows.size() && rows[end].op == rows[i].op && rows[end].k.name == rows[i].k.name)
      ++end;
    for (std::size_t j = i; j < end; ++j)
      if (rows[j].contender == "bnext") ours = rows[j].seconds;
    for (std::size_t j = i; j < end; ++j) {
      if (rows[j].contender.rfind("limit", 0) == 0) {
        limit = std::min(limit, rows[j].seconds);
      } else if (rows[j].contender.rfind("two passes", 0) == 0) {
        passes = std::min(passes, rows[j].seconds);
      } else if (rows[j].contender != "bnext") {
        char text[64];
        std::snprintf(text, sizeof text, "  %s %.2f", rows[j].contender.c_str(),
                      rows[j].seconds / ours);
        peers += text;
      }
    }
    char of_passes[32] = "";
    if (passes < 1e30)
      std::snprintf(of_passes, sizeof of_passes, "  of two passes %.2f", passes / ours);
    std::printf("%-22s %-15s %-10s %9.3f ms %7.1f GB/s  of limit %.2f%s%s\n",
                rows[i].k.name.c_str(), rows[i].k.shape().c_str(), rows[i].op.c_str(), ours * 1e3,
                static_cast<double>(rows[i].bytes) / ours * 1e-9, limit / ours, of_passes,
                peers.c_str());
    i = end;
  }
  std::fflush(stdout);
}

// Bytes that the largest caches of as many cores hold; each core may have one of its own.
std::int64_t cache_bytes() {
  std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
  std::int64_t kilobytes = 0;
  return file >> kilobytes ? 2 * (kilobytes << 10) : std::int64_t{64} << 20;
}

void write_json(const std::vector<Row>& rows, const Options& options) {
  std::ofstream file(options.json);
  file << "{\"threads\": " << options.threads << ", \"activation\": \""
       << (options.relu ? "relu" : "none") << "\", \"layout\": \""
       << (options.channels_last ? "nhwc" : "nchw") << "\", \"cache_bytes\": " << cache_bytes()
       << ", \"backend\": \"" << bnext::backend() << "\", \"version\": \"" << bnext::version()
       << "\", \"rows\": [\n";
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Row& r = rows[i];
    file << "{\"case\": \"" << r.k.name << "\", \"shape\": [" << r.k.n << ", " << r.k.c << ", "
         << r.k.h << ", " << r.k.w << "], \"op\": \"" << r.op << "\", \"layout\": \"" << r.layout
         << "\", \"state\": \"" << r.state << "\", \"contender\": \"" << r.contender
         << "\", \"seconds\": " << r.seconds << ", \"bytes\": " << r.bytes << "}"
         << (i + 1 < rows.size() ? ",\n" : "\n");
  }
  file << "]}\n";
  if (!file) throw std::runtime_error("cannot write " + options.json);
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string key = argv[i];
    const auto value = [&] {
      if (++i == argc) throw std::runtime_error(key + " needs a value");
      return std::string(argv[i]);
    };
    if (key == "--threads")
      options.threads = std::stoi(value());
    else if (key == "--seconds")
      options.seconds = std::stod(value());
    else if (key == "--only")
      options.only = value();
    else if (key == "--json")
      options.json = value();
    else if (key == "--cold")
      options.cold = true;
    else if (key == "--channels-last")
      options.channels_last = true;
    else if (key == "--relu")
      options.relu = true;
    else
      throw std::runtime_error(
          "unknown option " + key +
          "; known: --threads N, --seconds S, --only NAME, --json FILE, --cold, --channels-last, "
          "--relu");
  }
  return options;
}

int run(int argc, char** argv) {
  const Options options = parse(argc, argv);
  bnext::set_num_threads(options.threads);
  omp_set_num_threads(options.threads);  // of oneDNN
  std::printf("backend %s, %d threads, %s%s; peers: their time / ours\n", bnext::backend().c_str(),
              options.threads, options.relu ? "with ReLU, " : "",
              options.cold ? "caches flushed before each call" : "warm");
  std::vector<Row> rows;
  for (const Case& k : read_cases(options.only)) {
    const std::size_t first = rows.size();
    run_case(k, options, rows);
    print_rows(rows, first);
  }
  if (!options.json.empty()) write_json(rows, options);
  return 0;
}

}  // namespace
}  // namespace bench

int main(int argc, char** argv) {
  try {
    return bench::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bnext_bench: %s\n", error.what());
    return 1;
  }
}
