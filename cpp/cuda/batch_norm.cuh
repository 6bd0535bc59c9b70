// Batch normalization: which thread visits what, and how sums come together. The arithmetic is that
// of core/math.hpp.
#pragma once

#include "core/args.hpp"
#include "cuda/fusion.cuh"
#include "cuda/moments.cuh"

namespace bnext {
namespace cuda {

// Where blocks meet.
struct Meeting {
  // Reading twice
  Sums* partials;     // of each item, sums_per_item of them
  unsigned* tickets;  // of each group: 0, and again 0 afterwards
  // Reading once
  Letter* letters;  // of each group, one from each chunk; and then those that say its coefficients
  unsigned launch;  // its number, which no earlier letter bears
};

template <class T>
__device__ inline double value_or(const void* array, std::int64_t c, double otherwise) {
  return array != nullptr ? static_cast<double>(static_cast<const T*>(array)[c]) : otherwise;
}

// -- forward and inference: what is known of a channel, and what is done with it -----------------

template <class S>
struct Forward {
  using T = Compute<S>;
  using Coefficients = Affine<T>;
  using Center = T;  // a value of the channel, around which its sums are made
  static constexpr int tensors = 1, together = 4;  // that are read; slots at a time

  BatchNormForwardArgs a;
  const void* given_mean;  // inference
  const void* given_var;
  bool wide;

  __device__ const S* x() const { return static_cast<const S*>(a.x); }
  __device__ Center center(std::int64_t c) const {
    return widen(x()[c * (a.problem.channels_last ? 1 : a.problem.s)]);
  }

  // What the sums of a channel say, and where it is kept.
  struct Known {
    double mean, inv_std;
  };
  __device__ Known finish(std::int64_t c, const Sums& sums) const {
    const auto count = static_cast<double>(a.problem.per_channel());
    const Moments total =
        moments_from_shifted(count, static_cast<double>(center(c)), sums.first, sums.second);
    const double var = total.m2 / total.count;
    const Known known{total.mean, 1 / sqrt(var + a.eps)};
    a.mean[c] = known.mean;
    a.var[c] = var;
    a.inv_std[c] = known.inv_std;
    return known;
  }
  __device__ Known known(std::int64_t c) const {
    if (given_mean == nullptr) return {fresh(a.mean + c), fresh(a.inv_std + c)};
    return {value_or<T>(given_mean, c, 0), 1 / sqrt(value_or<T>(given_var, c, 0) + a.eps)};
  }
  __device__ Coefficients coefficients(std::int64_t c, const Known& known) const {
    return normalisation<T>(known.mean, known.inv_std, value_or<T>(a.weight, c, 1),
                            value_or<T>(a.bias, c, 0));
  }

  // What is read at a slot.
  struct Input {
    Stored<S> x;
  };
  template <class At>
  __device__ Input input(const At& slot) const {
    return {load(x(), slot, a.problem.size(), wide)};
  }
  template <class At>
  __device__ void bring(Stored<S>* at, int, const At& slot) const {
    fetch(at, x(), slot, a.problem.size(), wide);
  }
  __device__ static Input brought(const Stored<S>* at, int) { return {at[0]}; }

  template <bool plain>
  __device__ Tail<S, plain> tail() const {
    return {a.fusion, a.problem.size(), wide};
  }
  // The sums come before everything that follows the normalisation.
  template <bool plain, class At>
  __device__ Stored<S> residual_of_sums(const At&) const {
    return {};
  }
  // Adds what the values of a slot add to the sums.
  template <bool plain, class At, class CenterOf, class SumsOf>
  __device__ void sum(const At& slot, const Input& in, const Stored<S>&, CenterOf center,
                      SumsOf sums) const {
#pragma unroll
    for (int e = 0; e < width_of<S>; ++e) {
      const T c = center(e), x = slot.has(e) ? in.x[e] : c;
      // Numbers of 16 bits are apart by what float32 can tell.
      sums(e).add_moments(sizeof(S) == 2 ? static_cast<double>(x - c)
                                         : static_cast<double>(x) - static_cast<double>(c));
    }
  }
  template <bool plain, class At, class CoefficientsOf>
  __device__ void write(const At& slot, const Input& in, const Stored<S>& residual,
                        CoefficientsOf of) const {
    T z[width_of<S>];
#pragma unroll
    for (int e = 0; e < width_of<S>; ++e) z[e] = apply(of(e), in.x[e]);
    tail<plain>().values(z, residual, slot);
    store(static_cast<S*>(a.y), slot, z, wide);
  }
};

template <class T>
struct BackwardCoefficients {
  Affine<T> forward;
  GradAffine<T> backward;
};

template <class S>
struct Backward {
  using T = Compute<S>;
  using Coefficients = BackwardCoefficients<T>;
  struct Center {
    Affine<T> forward;
    double origin;  // what x is counted from in the sums: see Sums::add_products
  };
  static constexpr int tensors = 2, together = 2;

  BatchNormBackwardArgs a;
  Sums* totals;  // of each channel, {sum g, sum g n}, for another launch
  bool wide;

  __device__ Centered channel(std::int64_t c) const {
    return centered(a.from_result, a.mean[c], a.inv_std[c], value_or<T>(a.weight, c, 1),
                    value_or<T>(a.bias, c, 0));
  }
  __device__ Affine<T> forward(std::int64_t c) const {
    if (a.from_result) return {0, -1, 0};
    return normalisation<T>(a.mean[c], a.inv_std[c], value_or<T>(a.weight, c, 1),
                            value_or<T>(a.bias, c, 0));
  }
  __device__ double origin(std::int64_t c) const { return sizeof(T) == 4 ? 0 : channel(c).center; }
  __device__ Center center(std::int64_t c) const { return {forward(c), origin(c)}; }

  using Known = Sums;
  __device__ Known finish(std::int64_t c, const Sums& sums) const {
    const Centered by = channel(c);
    const double lost = by.center - origin(c);
    const double gx = lost == 0 ? sums.second : sums.second - lost * sums.first;
    const Known known{sums.first, gx * by.scale};
    if (totals != nullptr) totals[c] = known;
    if (a.grad_weight != nullptr) static_cast<T*>(a.grad_weight)[c] = static_cast<T>(known.second);
    if (a.grad_bias != nullptr) static_cast<T*>(a.grad_bias)[c] = static_cast<T>(known.first);
    return known;
  }
  __device__ Known known(std::int64_t c) const { return fresh(totals + c); }
  __device__ Coefficients coefficients(std::int64_t c, const Known& known) const {
    const Centered by = channel(c);
    const auto count = static_cast<double>(a.problem.per_channel());
    // Constant statistics pass no gradient on, not even one that is not finite.
    const double g = a.batch_statistics ? known.first / count : 0;
    const double gn = a.batch_statistics ? known.second / count : 0;
    return {forward(c), grad_normalisation<T>(by.center, by.scale, by.weight, g, gn)};
  }

  struct Input {
    Stored<S> g, x;
  };
  __device__ const S* g() const { return static_cast<const S*>(a.grad_y); }
  __device__ const S* x() const { return static_cast<const S*>(a.x); }
  template <class At>
  __device__ Input input(const At& slot) const {
    const std::int64_t size = a.problem.size();
    return {load(g(), slot, size, wide), load(x(), slot, size, wide)};
  }
  template <class At>
  __device__ void bring(Stored<S>* at, int places, const At& slot) const {
    const std::int64_t size = a.problem.size();
    fetch(at, g(), slot, size, wide);
    fetch(at + places, x(), slot, size, wide);
  }
  __device__ static Input brought(const Stored<S>* at, int places) { return {at[0], at[places]}; }

  template <bool plain>
  __device__ Tail<S, plain> tail() const {
    return {a.fusion, a.problem.size(), wide};
  }
  template <bool plain, class At>
  __device__ Stored<S> residual_of_sums(const At& slot) const {
    return tail<plain>().residual(slot);
  }
  // g before the activation, and x.
  template <bool plain, class At, class AffineOf>
  __device__ void gradients(T (&g)[width_of<S>], T (&x)[width_of<S>], const At& slot,
                            const Input& in, const Stored<S>& residual, AffineOf of) const {
    const Tail<S, plain> tail = this->template tail<plain>();
    tail.inputs(x, in.x);
#pragma unroll
    for (int e = 0; e < width_of<S>; ++e) g[e] = in.g[e];
    tail.gradients(g, x, residual, slot, of);
  }
  template <bool plain, class At, class CenterOf, class SumsOf>
  __device__ void sum(const At& slot, const Input& in, const Stored<S>& residual, CenterOf center,
                      SumsOf sums) const {
    T g[width_of<S>], x[width_of<S>];
    gradients<plain>(g, x, slot, in, residual, [&](int e) { return center(e).forward; });
#pragma unroll
    for (int e = 0; e < width_of<S>; ++e) {
      const bool has = slot.has(e);
      sums(e).add_products(has ? g[e] : T{}, has ? x[e] : T{}, center(e).origin);
    }
  }
  template <bool plain, class At, class CoefficientsOf>
  __device__ void write(const At& slot, const Input& in, const Stored<S>& residual,
                        CoefficientsOf of) const {
    T g[width_of<S>], x[width_of<S>];
    gradients<plain>(g, x, slot, in, residual, [&](int e) { return of(e).forward; });
    if constexpr (!plain)
      if (a.grad_residual != nullptr) store(static_cast<S*>(a.grad_residual), slot, g, wide);
#pragma unroll
    for (int e = 0; e < width_of<S>; ++e) x[e] = apply_if_it_depends(of(e).backward, g[e], x[e]);
    store(static_cast<S*>(a.grad_x), slot, x, wide);
  }
};

// -- items ----------------------------------------------------------------------------------------

// What is kept for each value of an access: in columns, they are of different ones.
template <class T, int count>
struct Each {
  T of[count];

  __device__ T& operator()(int e) { return of[count == 1 ? 0 : e]; }
  __device__ const T& operator()(int e) const { return of[count == 1 ? 0 : e]; }
};

template <Layout layout, class S>
constexpr int columns_of = layout == Layout::rows ? 1 : width_of<S>;
// `fast`: all slots are whole accesses; see Plan::whole.
template <bool fast>
using Index = std::conditional_t<fast, int, std::int64_t>;
template <Layout layout, bool fast>
using Slots =
    std::conditional_t<layout == Layout::rows, RowSlots<Index<fast>>, ColumnSlots<Index<fast>>>;

struct Item {
  unsigned group, chunk;
};
__device__ inline Item item_numbered(const Plan& plan, unsigned number) {
  const auto chunks = static_cast<unsigned>(plan.chunks);
  const unsigned group = number / chunks;
  return {group, number - group * chunks};
}

// Calls body(e, column) for the values of an access that have columns of their own in the group.
template <int count, class Walk, class Body>
__device__ inline void for_columns(const Walk& walk, Body body) {
  if constexpr (count == 1) {
    body(0, 0);
  } else {
#pragma unroll
    for (int e = 0; e < count; ++e)
      if (walk.has(e)) body(e, walk.column(e));
  }
}

template <int count, class Op, class Walk>
__device__ inline void find_centers(Each<typename Op::Center, count>& centers, const Op& op,
                                    const Plan& plan, std::int64_t group, const Walk& walk) {
  const std::int64_t first = first_channel(plan, group);
  for_columns<count>(walk, [&](int e, int column) {
    centers(e) = op.center(first + channel_of_column(plan, column));
  });
}

// Calls body(slot, number) for the slots of a thread.
template <class S, bool fast, class Walk, class Body>
__device__ inline void for_slots(Walk walk, Body body) {
  for (; walk.valid(); walk.next()) {
    if constexpr (fast)
      body(WholeSlot<width_of<S>>{walk.first_if_whole()}, walk.number());
    else if (const Slot slot = walk.get(); slot.any())
      body(slot, walk.number());
  }
}

// Calls load(u, slot) for some slots of a thread, and then body(u, slot), until all had their turn.
template <class S, bool fast, int together, class Walk, class Load, class Body>
__device__ inline void for_some_slots(Walk walk, Load load, Body body) {
  using At = std::conditional_t<fast, WholeSlot<width_of<S>>, Slot>;
  while (walk.valid()) {
    At slots[together];
    bool has[together];
#pragma unroll
    for (int u = 0; u < together; ++u) {
      has[u] = walk.valid();
      if (!has[u]) continue;
      if constexpr (fast)
        slots[u].first = walk.first_if_whole();
      else
        slots[u] = walk.get();
      has[u] = slots[u].any();
      if (has[u]) load(u, slots[u]);
      walk.next();
    }
#pragma unroll
    for (int u = 0; u < together; ++u)
      if (has[u]) body(u, slots[u]);
  }
}

// Sums of the threads of each warp, into rows of sums_per_item of `scratch`; then, for each column,
// total(column, sums of all warps), by a thread.
template <int count, class Walk, class Total>
__device__ inline void fold_item(Sums* scratch, const Plan& plan, const Walk& walk,
                                 const Each<Sums, count>& mine, Total total) {
  const auto columns = static_cast<int>(plan.sums_per_item());
  const int across = count == 1 ? 1 : plan.across;
  const auto warps = static_cast<int>(blockDim.x) / warp_threads;
  const auto warp = static_cast<int>(threadIdx.x) / warp_threads;
  Each<Sums, count> of_warp;
#pragma unroll
  for (int e = 0; e < count; ++e) of_warp(e) = warp_sum(mine(e), across);
  // Threads without rows of their own have columns, too.
  if (static_cast<int>(threadIdx.x) % warp_threads < across)
    for_columns<count>(walk,
                       [&](int e, int column) { scratch[warp * columns + column] = of_warp(e); });
  __syncthreads();
  for (auto i = static_cast<int>(threadIdx.x); i < columns; i += static_cast<int>(blockDim.x)) {
    Sums sums = scratch[i];
#pragma unroll 4
    for (int w = 1; w < warps; ++w) sums.add(scratch[w * columns + i]);
    total(i, sums);
  }
}

// The sums of all chunks of a group, into the first sums_per_item of `scratch`.
__device__ inline void gather(Sums* scratch, const Plan& plan, const Meeting& meeting,
                              std::int64_t group) {
  constexpr int together = 8;
  const auto columns = static_cast<int>(plan.sums_per_item());
  const auto chunks = static_cast<int>(plan.chunks);
  const int parts = static_cast<int>(blockDim.x) / columns;
  const auto thread = static_cast<int>(threadIdx.x), part = thread / columns;
  const Sums* from = meeting.partials + group * chunks * columns + thread % columns;
  Sums sums{0, 0};
  for (int chunk = part; part < parts && chunk < chunks; chunk += together * parts) {
    Sums next[together];
#pragma unroll
    for (int u = 0; u < together; ++u) {
      const int k = chunk + u * parts;
      next[u] = k < chunks ? fresh(from + static_cast<std::int64_t>(k) * columns) : Sums{0, 0};
    }
#pragma unroll
    for (int u = 0; u < together; ++u) sums.add(next[u]);
  }
  __syncthreads();
  if (part < parts) scratch[thread] = sums;
  fold(scratch, parts, columns);
}

// What follows from the sums of a group's columns, for each of its channels.
template <class Op>
__device__ inline void finish_group(typename Op::Coefficients* of_channels, const Op& op,
                                    const Plan& plan, std::int64_t group, const Sums* sums) {
  const std::int64_t first = first_channel(plan, group);
  const int channels = channels_of(plan, group);
  const auto per = static_cast<int>(plan.per), between = static_cast<int>(plan.channel_columns);
  const auto columns = static_cast<int>(plan.sums_per_item());
  for (auto i = static_cast<int>(threadIdx.x); i < channels; i += static_cast<int>(blockDim.x)) {
    Sums total{0, 0};
    for (int replica = 0; replica < columns; replica += between)
      for (int k = 0; k < per; ++k) total.add(sums[replica + i * per + k]);
    const typename Op::Known known = op.finish(first + i, total);
    if (of_channels != nullptr) of_channels[i] = op.coefficients(first + i, known);
  }
}
template <class Op>
__device__ inline void recall_group(typename Op::Coefficients* of_channels, const Op& op,
                                    const Plan& plan, std::int64_t group) {
  const std::int64_t first = first_channel(plan, group);
  const int channels = channels_of(plan, group);
  for (auto i = static_cast<int>(threadIdx.x); i < channels; i += static_cast<int>(blockDim.x))
    of_channels[i] = op.coefficients(first + i, op.known(first + i));
}

template <int count, class Coefficients, class Walk>
__device__ inline void find_coefficients(Each<Coefficients, count>& mine, const Plan& plan,
                                         const Walk& walk, const Coefficients* of_channels) {
  for_columns<count>(
      walk, [&](int e, int column) { mine(e) = of_channels[channel_of_column(plan, column)]; });
}

// -- two launches ---------------------------------------------------------------------------------

template <class S, class Op, Layout layout, bool plain, bool fast>
__global__ void __launch_bounds__(block_threads)
    sum_items(const __grid_constant__ Op op, const __grid_constant__ Plan plan,
              const Meeting meeting) {
  constexpr int count = columns_of<layout, S>, together = Op::together;
  auto* scratch = reinterpret_cast<Sums*>(shared_memory());
  const auto chunks = static_cast<unsigned>(plan.chunks);
  const auto [group, chunk] = item_numbered(plan, blockIdx.x);
  Slots<layout, fast> walk(plan, threadIdx.x, blockDim.x);
  walk.start(group, chunk);
  Each<typename Op::Center, count> centers;
  find_centers(centers, op, plan, group, walk);
  Each<Sums, count> sums = {};
  typename Op::Input in[together];
  Stored<S> residual[together];
  for_some_slots<S, fast, together>(
      walk,
      [&](int u, const auto& slot) {
        in[u] = op.input(slot);
        residual[u] = op.template residual_of_sums<plain>(slot);
      },
      [&](int u, const auto& slot) {
        op.template sum<plain>(
            slot, in[u], residual[u], [&](int e) -> const auto& { return centers(e); },
            [&](int e) -> Sums& { return sums(e); });
      });
  // The last of a group adds up what all have left.
  const auto columns = static_cast<int>(plan.sums_per_item());
  fold_item(scratch, plan, walk, sums, [&](int column, const Sums& total) {
    if (chunks == 1)
      scratch[column] = total;
    else
      meeting.partials[std::int64_t{blockIdx.x} * columns + column] = total;
  });
  if (chunks > 1) {
    unsigned* const ticket = meeting.tickets + group;
    const unsigned before =
        arrive(ticket, reinterpret_cast<unsigned*>(scratch + scratch_sums(plan) - 1));
    if (before != chunks - 1) return;
    if (threadIdx.x == 0) *ticket = 0;
    gather(scratch, plan, meeting, group);
  }
  __syncthreads();
  finish_group<Op>(nullptr, op, plan, group, scratch);
}

// Last blocks first: what the sums read last is still in the cache.
template <class S, class Op, Layout layout, bool plain, bool fast>
__global__ void __launch_bounds__(block_threads)
    write_items(const __grid_constant__ Op op, const __grid_constant__ Plan plan) {
  constexpr int count = columns_of<layout, S>, together = Op::together;
  using Coefficients = typename Op::Coefficients;
  auto* of_channels = reinterpret_cast<Coefficients*>(shared_memory());
  const auto [group, chunk] = item_numbered(plan, gridDim.x - 1 - blockIdx.x);
  recall_group(of_channels, op, plan, group);
  Slots<layout, fast> walk(plan, threadIdx.x, blockDim.x);
  walk.start(group, chunk);
  const Tail<S, plain> tail = op.template tail<plain>();
  __syncthreads();
  Each<Coefficients, count> coefficients;
  find_coefficients(coefficients, plan, walk, of_channels);
  typename Op::Input in[together];
  Stored<S> residual[together];
  for_some_slots<S, fast, together>(
      walk,
      [&](int u, const auto& slot) {
        in[u] = op.input(slot);
        residual[u] = tail.residual(slot);
      },
      [&](int u, const auto& slot) {
        op.template write<plain>(slot, in[u], residual[u],
                                 [&](int e) -> const Coefficients& { return coefficients(e); });
      });
}

// -- one launch -----------------------------------------------------------------------------------

// Items of a block follow each other in steps: while some are on their way into shared memory, one
// is summed, and one of `lag` steps ago is written. Where channels have several chunks, blocks send
// each other letters: the sums of an item to the one that has the last of the channel and finishes
// it, and its coefficients to all. In each step a block sums before it waits, finishes the channel
// of the item before, and then writes: what it waits for is made in an earlier step of another
// block, or in the same one without waiting, if all blocks run at the same time and `lag` is long
// enough; see keep_chunks.
template <class S, class Op, Layout layout, bool plain, bool fast>
// (What is known of columns does not fit into the registers that two blocks of them leave a
// thread.)
__global__ void __launch_bounds__(keeping_threads(layout, Op::tensors),
                                  layout == Layout::rows ? keeping_blocks(layout, Op::tensors) : 1)
    keep_items(const __grid_constant__ Op op, const __grid_constant__ Plan plan,
               const Meeting meeting) {
  constexpr int count = columns_of<layout, S>;
  using Coefficients = typename Op::Coefficients;
  constexpr int pages = letters_for<Coefficients>;
  static_assert(sizeof(Coefficients) <= (sizeof(typename Op::T) == 8 ? 64 : 32),
                "see most_coefficients");
  auto* kept = reinterpret_cast<Stored<S>*>(shared_memory());
  auto* scratch = reinterpret_cast<Sums*>(shared_memory() + plan.shared_bytes);
  Sums* const totals = scratch + scratch_sums(plan) - plan.sums_per_item();
  auto* const all_coefficients = reinterpret_cast<Coefficients*>(scratch + scratch_sums(plan));

  const auto places = static_cast<int>(plan.places);
  const auto columns = static_cast<int>(plan.sums_per_item());
  const auto chunks = static_cast<unsigned>(plan.chunks);
  const auto items = static_cast<unsigned>(plan.items());
  const auto thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int stages = plan.stages();
  const bool meets = layout == Layout::rows && chunks > 1;
  Letter* const of_coefficients = meeting.letters + items;

  // An item of this block, and where it is kept.
  struct Step {
    unsigned item, group, chunk;
    int stage;
  };
  const unsigned groups_further = gridDim.x / chunks;
  const unsigned chunks_further = gridDim.x - groups_further * chunks;
  const auto advance = [&](Step& step) {
    step.item += gridDim.x;
    step.group += groups_further;
    step.chunk += chunks_further;
    if (step.chunk >= chunks) {
      step.chunk -= chunks;
      ++step.group;
    }
    if (++step.stage == stages) step.stage = 0;
  };
  const auto place_of = [&](const Step& step) { return kept + step.stage * Op::tensors * places; };
  const Slots<layout, fast> any_walk(plan, thread, threads);
  const auto walk_of = [&](const Step& step) {
    Slots<layout, fast> walk = any_walk;
    walk.start(step.group, step.chunk);
    return walk;
  };

  const Item first_item = item_numbered(plan, blockIdx.x);
  const Step first{blockIdx.x, first_item.group, first_item.chunk, 0};
  Step fetching = first, summing = first, writing = first;
  const auto bring = [&] {
    begin_fetches();
    if (fetching.item < items) {
      Stored<S>* const to = place_of(fetching);
      for_slots<S, fast>(walk_of(fetching), [&](const auto& slot, int number) {
        op.bring(to + number, places, slot);
      });
    }
    commit_fetches();
    advance(fetching);
  };
  constexpr unsigned none = ~0u;
  unsigned centered = none, recalled = none;  // groups
  Each<typename Op::Center, count> centers;
  const auto center = [&](const Step& step) {
    if (step.group == centered || step.item >= items) return;
    centered = step.group;
    find_centers(centers, op, plan, step.group, walk_of(step));
  };
  Coefficients* of_channels = all_coefficients;  // and, in turns, those after them
  const Tail<S, plain> tail = op.template tail<plain>();

  for (int k = 0; k < plan.ahead; ++k) bring();
  center(first);
  for (int step = 0;; ++step) {
    bring();
    if (step > plan.lag) advance(writing);
    // The coefficients of a channel, which have probably come; they are read further below.
    Letter coming[pages];
    const Letter* const from_finisher = of_coefficients + std::int64_t{writing.group} * pages;
    const bool expects = meets && step >= plan.lag && thread == 0 && writing.item < items &&
                         writing.group != recalled;
    if (expects) {
#pragma unroll
      for (int k = 0; k < pages; ++k) coming[k] = look_at(from_finisher + k);
    }
    wait_for_fetches(plan.ahead);
    const Step before = summing;
    if (step > 0) advance(summing);
    if (summing.item < items) {
      const auto walk = walk_of(summing);
      Each<Sums, count> sums = {};
      const Stored<S>* const from = place_of(summing);
      for_slots<S, fast>(walk, [&](const auto& slot, int number) {
        op.template sum<plain>(
            slot, Op::brought(from + number, places), op.template residual_of_sums<plain>(slot),
            [&](int e) -> const auto& { return centers(e); },
            [&](int e) -> Sums& { return sums(e); });
      });
      Step next = summing;  // its centers will be there when it is summed
      advance(next);
      center(next);
      Sums* const in_turns = scratch + step % 2 * (threads / warp_threads * columns);
      fold_item(in_turns, plan, walk, sums, [&](int column, const Sums& total) {
        if (meets)
          post(meeting.letters + summing.item, total, meeting.launch);
        else
          totals[column] = total;
      });
    }
    if (meets && step > 0 && before.item < items && before.chunk == chunks - 1 &&
        thread < warp_threads) {
      const auto all = static_cast<int>(chunks);
      const Letter* const from = meeting.letters + (before.item - before.chunk) + thread;
      const int mine = (all - thread + warp_threads - 1) / warp_threads;
      const Sums total = warp_sum(receive_all(from, mine, warp_threads, meeting.launch), 1);
      if (thread == 0) {
        const std::int64_t c = before.group;
        post(of_coefficients + c * pages, op.coefficients(c, op.finish(c, total)), meeting.launch);
      }
    }
    if (step < plan.lag) continue;

    if (writing.item >= items) break;
    const auto walk = walk_of(writing);
    if (writing.group != recalled) {
      of_channels = of_channels == all_coefficients ? all_coefficients + plan.group_channels
                                                    : all_coefficients;
      if (meets) {
        if (expects) *of_channels = receive<Coefficients>(from_finisher, coming, meeting.launch);
      } else {
        if (columns > 1) __syncthreads();  // a thread that is alone has what it needs
        finish_group(of_channels, op, plan, writing.group, totals);
      }
      __syncthreads();
      recalled = writing.group;
    }
    Each<Coefficients, count> coefficients;
    find_coefficients(coefficients, plan, walk, of_channels);
    const Stored<S>* const from = place_of(writing);
    for_slots<S, fast>(walk, [&](const auto& slot, int number) {
      op.template write<plain>(slot, Op::brought(from + number, places), tail.residual(slot),
                               [&](int e) -> const Coefficients& { return coefficients(e); });
    });
  }
}

}  // namespace cuda
}  // namespace bnext
