// How the CUDA backend cuts tensors: every value in exactly one place, within what devices can do.
// Without a device: plans are arithmetic.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/plan.hpp"

using bnext::Problem;
using namespace bnext::cuda;

namespace {

int failures = 0;
std::string of;

void check(bool ok, const char* what) {
  if (ok) return;
  ++failures;
  std::printf("FAILED %s: %s\n", of.c_str(), what);
}

// Shared memory of a block and blocks of a cluster, for compute capability 7.5, 8.0 and 9.0.
constexpr Limits devices[] = {{63 << 10, 1}, {162 << 10, 1}, {226 << 10, 8}};
constexpr std::int64_t most_workspace = std::int64_t{24} << 20;

std::int64_t channel_of(const Problem& p, std::int64_t i) {
  return p.channels_last ? i % p.c : i / p.s % p.c;
}

// Where the values of a slot may lie.
void check_slot(const Plan& plan, const Slot& slot) {
  check(slot.first % plan.vector == 0, "a slot is not aligned");
  check(slot.begin >= 0 && slot.end <= plan.vector, "a slot is wider than an access");
  check(slot.end <= slot.begin || slot.first + slot.end <= plan.problem.size(), "beyond the end");
}

// Visits all that the blocks of a plan visit; each value must be met once, in its channel.
void check_coverage(const Plan& plan) {
  const Problem& p = plan.problem;
  std::vector<unsigned char> seen(static_cast<std::size_t>(p.size()), 0);
  bool channels_right = true;
  const auto visit = [&](const Slot& slot, auto channel) {
    check_slot(plan, slot);
    for (int e = slot.begin; e < slot.end; ++e) {
      ++seen[static_cast<std::size_t>(slot.first + e)];
      channels_right &= channel_of(p, slot.first + e) == channel(e);
    }
  };
  if (plan.path == Path::rows || plan.path == Path::resident) {
    const std::int64_t blocks = plan.path == Path::resident ? plan.cluster : plan.chunks;
    const std::int64_t places =
        plan.shared_bytes > 0 ? plan.rows_per_chunk * plan.slots_per_run : INT64_MAX;
    for (std::int64_t c = 0; c < p.c; ++c) {
      std::int64_t values = 0;
      for (std::int64_t chunk = 0; chunk < blocks; ++chunk)
        for (int t = 0; t < plan.threads; ++t) {
          RowSlots walk(plan, c, chunk, t, plan.threads);
          if (t == 0) values += walk.values();
          for (; walk.valid(); walk.next()) {
            check(walk.number() < places, "no place in shared memory");
            visit(walk.get(), [&](int) { return c; });
          }
        }
      check(values == p.per_channel(), "values of a channel");
    }
  } else {
    for (std::int64_t chunk = 0; chunk < plan.chunks; ++chunk)
      for (std::int64_t tile = 0; tile < plan.tiles; ++tile)
        for (int t = 0; t < plan.threads; ++t)
          for (ColumnSlots walk(plan, tile, chunk, t, plan.threads); walk.valid(); walk.next()) {
            const std::int64_t column = walk.column();
            check(plan.own_tiles || plan.path == Path::columns,
                  "one launch needs the whole of each channel in a tile");
            visit(walk.get(), [&](int e) { return channel_of_column(plan, column + e); });
          }
  }
  check(channels_right, "a value of another channel");
  check(std::all_of(seen.begin(), seen.end(), [](unsigned char n) { return n == 1; }),
        "a value was met other than once");
}

void check_plan(const Problem& p, bool covered) {
  for (const Limits& limits : devices)
    for (const int item : {2, 4, 8})
      for (const int tensors : {1, 2}) {
        of = std::to_string(p.n) + "x" + std::to_string(p.c) + "x" + std::to_string(p.s) +
             (p.channels_last ? " last" : "") + ", item " + std::to_string(item) + ", tensors " +
             std::to_string(tensors) + ", cluster " + std::to_string(limits.cluster);
        const Plan plan = make_plan(p, item, tensors, limits);
        check(plan.vector * item == access_bytes, "width of an access");
        check(plan.shared_bytes <= limits.shared_bytes, "shared memory");
        check(plan.threads % 32 == 0 && plan.threads <= most_threads, "threads");
        check(plan.cluster >= 1 && plan.cluster <= limits.cluster, "cluster");
        check(plan.path != Path::resident || plan.chunks <= plan.cluster, "chunks of a cluster");
        check(
            plan.partials * 16 + plan.tickets * 4 <= std::max(most_workspace, 64 * plan.problem.c),
            "workspace");
        check(plan.chunks * std::max(plan.problem.c, plan.tiles) < (std::int64_t{1} << 31),
              "blocks");
        if (covered) check_coverage(plan);
      }
}

std::vector<Problem> shapes(const char* path) {
  std::ifstream file(path);
  std::vector<Problem> list;
  std::string line;
  std::getline(file, line);
  while (std::getline(file, line)) {
    line.erase(0, line.find(',') + 1);
    std::istringstream fields(line);
    std::int64_t n, c, h, w;
    char comma;
    fields >> n >> comma >> c >> comma >> h >> comma >> w;
    list.push_back({n, c, h * w, false});
    list.push_back({n, c, h * w, true});
  }
  return list;
}

}  // namespace

int main(int, char** argv) {
  const std::vector<Problem> listed = shapes(argv[1]);
  check(listed.size() > 40, "shapes were read");
  for (const Problem& p : listed) check_plan(p, p.size() <= 1 << 20);
  for (const std::int64_t n : {1, 2, 3, 7, 33})
    for (const std::int64_t c : {1, 2, 3, 5, 16, 129})
      for (const std::int64_t s : {1, 2, 3, 7, 8, 31, 49, 64, 1000})
        for (const bool last : {false, true}) check_plan({n, c, s, last}, true);
  for (const std::int64_t s : {16384, 16385, 200003}) check_plan({1, 2, s, false}, true);
  check_plan({200003, 1, 1, true}, true);
  // More values than 32 bits count.
  check_plan({std::int64_t{1} << 33, 3, 1, true}, false);
  check_plan({64, 3, std::int64_t{1} << 30, false}, false);
  check_plan({3, std::int64_t{1} << 26, 64, false}, false);

  // What is meant to happen, on the largest device: single reads where a channel fits.
  const Limits& hopper = devices[2];
  const auto path = [&](Problem p, int item, int tensors) {
    return make_plan(p, item, tensors, hopper).path;
  };
  of = "paths";
  check(path({32, 64, 112 * 112, false}, 4, 1) == Path::resident, "1.6 MB fit into a cluster");
  check(path({32, 64, 112 * 112, false}, 4, 2) == Path::rows, "twice as much does not");
  check(path({32, 2048, 49, false}, 4, 2) == Path::resident, "short rows");
  check(path({32, 3, 224 * 224, false}, 4, 1) == Path::rows, "few channels");
  check(path({32, 64, 3136, true}, 2, 1) == Path::columns, "channels-last");
  check(path({128, 512, 1, true}, 4, 1) == Path::columns_once, "small activations");
  if (failures == 0) std::printf("done\n");
  return failures == 0 ? 0 : 1;
}
