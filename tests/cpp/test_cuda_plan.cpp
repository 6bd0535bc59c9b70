// How the CUDA backend cuts tensors: every value in exactly one place, within what devices can do.
// Without a device: plans are arithmetic.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>
#include <utility>
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

// A T4, an A100 and an H100.
constexpr Limits devices[] = {{64 << 10, 40}, {163 << 10, 108}, {227 << 10, 132}};
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
  const std::int64_t places = plan.reads == Reads::once ? plan.places : INT64_MAX;
  for (std::int64_t group = 0; group < plan.groups; ++group) {
    const std::int64_t first = first_channel(plan, group);
    check(channels_of(plan, group) > 0 && first + channels_of(plan, group) <= p.c,
          "channels of a group");
    const auto walk_all = [&](auto walk) {
      for (; walk.valid(); walk.next()) {
        check(walk.number() < places, "no place in shared memory");
        Slot slot = walk.get();
        if (plan.whole) {
          check(slot.first == walk.first_if_whole(), "a whole slot is elsewhere");
          slot = {walk.first_if_whole(), 0, plan.vector};
        }
        visit(slot, [&](int e) {
          const int column = walk.column(e);
          check(column < plan.sums_per_item(), "a column of another tile");
          return first + channel_of_column(plan, column);
        });
      }
    };
    const auto walk_chunks = [&](auto walk) {
      for (unsigned chunk = 0; chunk < plan.chunks; ++chunk) {
        walk.start(group, chunk);
        walk_all(walk);
      }
    };
    for (int t = 0; t < plan.threads; ++t)
      if (plan.layout == Layout::rows)
        walk_chunks(RowSlots<std::int64_t>(plan, t, plan.threads));
      else
        walk_chunks(ColumnSlots<std::int64_t>(plan, t, plan.threads));
  }
  check(channels_right, "a value of another channel");
  check(std::all_of(seen.begin(), seen.end(), [](unsigned char n) { return n == 1; }),
        "a value was met other than once");
}

void check_plan(const Problem& p, bool covered) {
  for (const Limits& limits : devices)
    for (const int item : {2, 4, 8})
      for (const auto& [tensors, summed] : {std::pair(1, true), {2, true}, {1, false}}) {
        of = std::to_string(p.n) + "x" + std::to_string(p.c) + "x" + std::to_string(p.s) +
             (p.channels_last ? " last" : "") + ", item " + std::to_string(item) + ", tensors " +
             std::to_string(tensors) + (summed ? ", summed" : "") + ", multiprocessors " +
             std::to_string(limits.multiprocessors);
        const Plan plan = make_plan(p, item, tensors, summed, limits);
        check(plan.vector * item == access_bytes, "width of an access");
        check(plan.threads % 32 == 0 && plan.threads <= block_threads, "threads");
        check(plan.across <= most_across && plan.threads / 32 % plan.phases == 0, "warps");
        check(plan.sums_per_item() <= most_across * plan.vector, "sums of an item");
        const std::int64_t beside = bytes_beside(plan);
        const std::int64_t reserved = 1024, together = plan.blocks_per_multiprocessor;
        check(plan.reads == Reads::once || plan.shared_bytes == 0, "nothing is kept");
        check(plan.reads == Reads::twice ||
                  (together > 0 && (plan.shared_bytes + beside + reserved) * together <=
                                       limits.shared_bytes + reserved),
              "shared memory");
        // All that run at the same time wait for none that does not; see keep_items.
        check(plan.reads == Reads::twice || plan.chunks == 1 ||
                  plan.chunks <= (plan.lag - 1) * together * limits.multiprocessors,
              "chunks that wait for each other");
        check(plan.ahead <= 1, "fetches that can be waited for");
        check(plan.partials * 16 + plan.tickets * 4 + plan.letters * 32 <= most_workspace,
              "workspace");
        check(plan.items() < (std::int64_t{1} << 31), "blocks");
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

  // What is meant to happen, on the largest device: single reads where blocks can keep a group.
  const Limits& hopper = devices[2];
  const auto once = [&](Problem p, int item, int tensors) {
    return make_plan(p, item, tensors, true, hopper).reads == Reads::once;
  };
  const auto chunks = [&](Problem p, int item, int tensors) {
    return make_plan(p, item, tensors, true, hopper).chunks;
  };
  of = "paths";
  check(once({32, 64, 224 * 224, false}, 4, 1), "channels of 6 MB");
  check(once({32, 64, 224 * 224, false}, 4, 2), "two tensors of them");
  check(!once({32, 64, 224 * 224, true}, 4, 1), "tiles of 206 MB");
  check(chunks({32, 2048, 49, false}, 4, 2) == 1, "small channels are whole");
  check(chunks({128, 512, 1, true}, 4, 1) == 1, "small activations");
  check(chunks({1, 64, 224 * 224, false}, 4, 1) > 1, "few channels of a large device");
  if (failures == 0) std::printf("done\n");
  return failures == 0 ? 0 : 1;
}
