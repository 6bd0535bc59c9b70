// Times every operation on every shape of benchmarks/shapes.csv, side by side with the streaming
// limit and with oneDNN where that is installed. Results are checked before anything is timed,
// contenders take turns, and medians are reported.
#include "bench.hpp"

#include <omp.h>

#include <algorithm>
#include <bnext/bnext.hpp>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <optional>
#include <stdexcept>

namespace bench {
namespace {

struct Options {
  int threads = bnext::num_threads();
  double seconds = 0.5;  // for each case and operation
  bool cold = false;
  bool channels_last = false;
  bool fused = false;
  bnext::DType dtype = bnext::DType::float32;
  std::optional<Kind> kind;
  std::string only;
  std::string json;
};

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

// What is measured side by side: the operation alone, then what `fused` adds to it. Dropout of 0.5
// takes one draw of random bits, most other probabilities two, and some of their words a third.
std::vector<Op> ops_of(Kind kind, bool fused) {
  if (kind == Kind::dropout) return {{kind, false, false, 0.5}, {kind, false, false, 0.1}};
  std::vector<Op> ops{{kind}};
  if (fused) {
    ops.push_back({kind, false, true});
    if (kind != Kind::inference)
      for (const double p : {0.5, 0.1}) ops.push_back({kind, false, true, p});
    ops.push_back({kind, true, true});
  }
  return ops;
}

// Every contender of some operations, in the order in which they take turns.
std::vector<Contender> contenders_of(const std::vector<Op>& ops, const Options& options,
                                     Arrays& arrays, Arrays* float32) {
  std::vector<Contender> all;
  for (const Op& op : ops) {
    add_bnext("bnext", op, arrays, all);
    if (float32 != nullptr) add_bnext("bnext float32", op, *float32, all);
    // What is fused moves no more, but for the residual.
    if (op.residual || &op == &ops[0]) add_streams(op, arrays, options.threads, all);
#ifdef BNEXT_ONEDNN
    add_onednn(op, arrays, all);
#endif
  }
  return all;
}

// Median seconds of one run of each.
std::vector<double> take_turns(const std::vector<Contender>& contenders, const Options& options,
                               double seconds, const std::function<void()>& flush) {
  // Short runs are repeated, so that the clock and the wake-up of threads do not count.
  const double once = seconds_of(contenders[0].run, 1);
  const int times = options.cold ? 1 : std::max(1, static_cast<int>(100e-6 / once));
  const int warm_up = once > 5e-3 ? 1 : 3;
  std::vector<std::vector<double>> samples(contenders.size());
  const auto begin = std::chrono::steady_clock::now();
  std::chrono::duration<double> elapsed{};
  while (samples[0].size() < 7 || (elapsed.count() < seconds && samples[0].size() < 101)) {
    for (std::size_t i = 0; i < contenders.size(); ++i) {
      if (options.cold)
        flush();
      else
        for (int k = 0; k < warm_up; ++k)
          contenders[i].run();  // in the state that it leaves itself
      samples[i].push_back(seconds_of(contenders[i].run, times));
    }
    elapsed = std::chrono::steady_clock::now() - begin;
  }
  std::vector<double> medians;
  for (const auto& values : samples) medians.push_back(median(values));
  return medians;
}

struct Row {
  Case k;
  Op op;
  std::string contender;
  double seconds;
  std::int64_t bytes;  // that the operation has to move
};

void run_case(const Case& k, const Options& options, std::vector<Row>& rows) {
  Arrays arrays(k, options.dtype, options.channels_last);
  std::optional<Arrays> float32;
  if (options.dtype != bnext::DType::float32)
    float32.emplace(k, bnext::DType::float32, options.channels_last);
  const auto flush = [&] {
    for (const Arrays* a : {&arrays, float32 ? &*float32 : nullptr})
      if (a != nullptr)
        for (const Tensor* t : {&a->x, &a->other, &a->out, &a->more}) t->flush();
  };
  for (const Kind kind : {Kind::backward, Kind::dropout, Kind::forward, Kind::inference}) {
    const std::vector<Op> ops = ops_of(kind, options.fused);
    if (options.kind.value_or(kind) != kind) continue;
    if (ops[0].training() && k.n * k.h * k.w < 2) continue;
    const auto contenders = contenders_of(ops, options, arrays, float32 ? &*float32 : nullptr);
    const double seconds = options.seconds * static_cast<double>(ops.size());
    const auto medians = take_turns(contenders, options, seconds, flush);
    for (std::size_t i = 0; i < contenders.size(); ++i) {
      const Op& op = contenders[i].op;
      rows.push_back(
          {k, op, contenders[i].name, medians[i], (op.reads() + op.writes()) * arrays.x.bytes()});
    }
  }
}

// One line for each operation of a case: time, bandwidth, share of the limit, time in units of that
// of the operation alone, peers.
void print_rows(const std::vector<Row>& rows, std::size_t first) {
  const auto begin = rows.begin() + static_cast<long>(first);
  // The fastest of those whose name starts so, that move as much for an operation of this kind.
  const auto ratio_to_best = [&](const char* start, const Row& ours) {
    double best = 0;
    for (auto row = begin; row != rows.end(); ++row)
      if (row->op.kind == ours.op.kind && row->bytes == ours.bytes &&
          row->contender.rfind(start, 0) == 0)
        best = best == 0 ? row->seconds : std::min(best, row->seconds);
    return best / ours.seconds;
  };
  const auto text = [](const char* format, double value) {
    char buffer[64];
    std::snprintf(buffer, sizeof buffer, format, value);
    return value == 0 ? "" : std::string(buffer);
  };
  double alone = 0;
  for (auto ours = begin; ours != rows.end(); ++ours) {
    if (ours->contender != "bnext") continue;
    const bool fused = ours->op.relu || ours->op.residual;
    if (!fused) alone = ours->seconds;
    std::string more = text("  of two passes %.2f", ratio_to_best("two passes", *ours));
    if (fused) more += text("  / alone %.2f", ours->seconds / alone);
    for (auto peer = begin; peer != rows.end(); ++peer)
      if (peer->op.name() == ours->op.name() &&
          (peer->contender.rfind("onednn", 0) == 0 || peer->contender == "bnext float32"))
        more += "  " + peer->contender + text(" %.2f", peer->seconds / ours->seconds);
    std::printf("%-22s %-15s %-22s %9.3f ms %7.1f GB/s  of limit %.2f%s\n", ours->k.name.c_str(),
                ours->k.shape().c_str(), ours->op.name().c_str(), ours->seconds * 1e3,
                static_cast<double>(ours->bytes) / ours->seconds * 1e-9,
                ratio_to_best("limit", *ours), more.c_str());
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
  file << "{\"threads\": " << options.threads << ", \"dtype\": \"" << name_of(options.dtype)
       << "\", \"layout\": \"" << (options.channels_last ? "nhwc" : "nchw") << "\", \"state\": \""
       << (options.cold ? "cold" : "warm") << "\", \"cache_bytes\": " << cache_bytes()
       << ", \"backend\": \"" << bnext::backend() << "\", \"version\": \"" << bnext::version()
       << "\", \"rows\": [\n";
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Row& r = rows[i];
    file << "{\"case\": \"" << r.k.name << "\", \"shape\": [" << r.k.n << ", " << r.k.c << ", "
         << r.k.h << ", " << r.k.w << "], \"op\": \"" << r.op.name() << "\", \"contender\": \""
         << r.contender << "\", \"seconds\": " << r.seconds << ", \"bytes\": " << r.bytes << "}"
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
    else if (key == "--fused")
      options.fused = true;
    else if (key == "--dtype")
      options.dtype = dtype_of(value());
    else if (key == "--op")
      options.kind = kind_of(value());
    else
      throw std::runtime_error(
          "unknown option " + key +
          "; known: --threads N, --seconds S, --only NAME, --op NAME, --dtype NAME, --fused, "
          "--channels-last, --cold, --json FILE");
  }
  return options;
}

int run(int argc, char** argv) {
  const Options options = parse(argc, argv);
  bnext::set_num_threads(options.threads);
  omp_set_num_threads(options.threads);  // of oneDNN
  std::printf("backend %s, %s, %d threads, %s; peers: their time / ours\n",
              bnext::backend().c_str(), name_of(options.dtype).c_str(), options.threads,
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
