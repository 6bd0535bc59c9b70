// Batch normalization: which thread visits what, and how sums come together. The arithmetic is that
// of core/math.hpp.
#pragma once

#include "core/args.hpp"
#include "cuda/fusion.cuh"
#include "cuda/moments.cuh"

namespace bnext {
namespace cuda {

// Where sums of blocks meet.
struct Meeting {
  Sums* partials;     // chunk by chunk, each of all channels or columns
  unsigned* tickets;  // 0, and again 0 afterwards
  Sums* totals;       // backward: of each channel, {sum g, sum g n}
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
  static constexpr int accesses = 1, together = 4;  // arrays that are read, slots at a time

  BatchNormForwardArgs a;
  const void* given_mean;  // inference
  const void* given_var;
  bool wide;

  __device__ const S* x() const { return static_cast<const S*>(a.x); }
  __device__ double count() const { return static_cast<double>(a.problem.per_channel()); }
  // A value of the channel, around which its sums are made.
  __device__ double origin(std::int64_t c) const {
    const std::int64_t between = a.problem.channels_last ? 1 : a.problem.s;
    return static_cast<double>(widen(x()[c * between]));
  }

  // From the sums of all its values.
  __device__ void finish(std::int64_t c, double origin, const Sums& sums, Sums*) const {
    const Moments total = moments_from_shifted(count(), origin, sums.first, sums.second);
    const double var = total.m2 / total.count;
    a.mean[c] = total.mean;
    a.var[c] = var;
    a.inv_std[c] = 1 / sqrt(var + a.eps);
  }
  __device__ Coefficients coefficients(std::int64_t c, const Sums*) const {
    const double weight = value_or<T>(a.weight, c, 1), bias = value_or<T>(a.bias, c, 0);
    if (given_mean == nullptr) return normalisation<T>(a.mean[c], a.inv_std[c], weight, bias);
    const double var = value_or<T>(given_var, c, 0);
    return normalisation<T>(value_or<T>(given_mean, c, 0), 1 / sqrt(var + a.eps), weight, bias);
  }

  // What is read at a slot.
  struct Input {
    Stored<S> x;
  };
  __device__ Input input(const Slot& slot) const {
    return {load(x(), slot, a.problem.size(), wide)};
  }

  template <bool plain>
  __device__ Tail<S, plain> tail() const {
    return {a.fusion, a.problem.size(), wide};
  }
  template <bool plain, class CoefficientsOf>
  __device__ void write(const Slot& slot, const Input& in, const Stored<S>& residual,
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
  static constexpr int accesses = 2, together = 2;

  BatchNormBackwardArgs a;
  bool wide;

  __device__ Centered channel(std::int64_t c) const {
    return centered(a.from_result, a.mean[c], a.inv_std[c], value_or<T>(a.weight, c, 1),
                    value_or<T>(a.bias, c, 0));
  }
  __device__ Affine<T> forward(std::int64_t c) const {
    if (a.from_result) return {0, 1, 0};
    return normalisation<T>(a.mean[c], a.inv_std[c], value_or<T>(a.weight, c, 1),
                            value_or<T>(a.bias, c, 0));
  }
  // What x is counted from in the sums: see Sums::add_products.
  __device__ double origin(std::int64_t c) const { return sizeof(T) == 4 ? 0 : channel(c).center; }

  __device__ void finish(std::int64_t c, double origin, const Sums& sums, Sums* totals) const {
    const Centered by = channel(c);
    const double lost = by.center - origin;
    const double gx = lost == 0 ? sums.second : sums.second - lost * sums.first;
    const double gn = gx * by.scale;
    totals[c] = {sums.first, gn};
    if (a.grad_weight != nullptr) static_cast<T*>(a.grad_weight)[c] = static_cast<T>(gn);
    if (a.grad_bias != nullptr) static_cast<T*>(a.grad_bias)[c] = static_cast<T>(sums.first);
  }
  __device__ Coefficients coefficients(std::int64_t c, const Sums* totals) const {
    const Centered by = channel(c);
    const auto count = static_cast<double>(a.problem.per_channel());
    // Constant statistics pass no gradient on, not even one that is not finite.
    const double g = a.batch_statistics ? totals[c].first / count : 0;
    const double gn = a.batch_statistics ? totals[c].second / count : 0;
    return {forward(c), grad_normalisation<T>(by.center, by.scale, by.weight, g, gn)};
  }

  struct Input {
    Stored<S> g, x;
  };
  __device__ Input input(const Slot& slot) const {
    const std::int64_t size = a.problem.size();
    return {load(static_cast<const S*>(a.grad_y), slot, size, wide),
            load(static_cast<const S*>(a.x), slot, size, wide)};
  }

  template <bool plain>
  __device__ Tail<S, plain> tail() const {
    return {a.fusion, a.problem.size(), wide};
  }
  // g before the activation, and x.
  template <bool plain, class AffineOf>
  __device__ void gradients(T (&g)[width_of<S>], T (&x)[width_of<S>], const Slot& slot,
                            const Input& in, const Stored<S>& residual, AffineOf of) const {
    const Tail<S, plain> tail = this->template tail<plain>();
    tail.inputs(x, in.x);
#pragma unroll
    for (int e = 0; e < width_of<S>; ++e) g[e] = in.g[e];
    tail.gradients(g, x, residual, slot, of);
  }
  template <bool plain, class CoefficientsOf>
  __device__ void write(const Slot& slot, const Input& in, const Stored<S>& residual,
                        CoefficientsOf of) const {
    T g[width_of<S>], x[width_of<S>];
    gradients<plain>(g, x, slot, in, residual, [&](int e) { return of(e).forward; });
    if constexpr (!plain)
      if (a.grad_residual != nullptr) store(static_cast<S*>(a.grad_residual), slot, g, wide);
#pragma unroll
    for (int e = 0; e < width_of<S>; ++e) x[e] = apply(of(e).backward, g[e], x[e]);
    store(static_cast<S*>(a.grad_x), slot, x, wide);
  }
};

// -- sums of one channel, some slots at a time ----------------------------------------------------

template <class S, bool plain>
class ChannelSums {
 public:
  using T = Compute<S>;
  static constexpr int width = width_of<S>;

  __device__ ChannelSums(const Forward<S>& op, std::int64_t c) : origin_(op.origin(c)) {}
  __device__ ChannelSums(const Backward<S>& op, std::int64_t c)
      : origin_(op.origin(c)), forward_(op.forward(c)) {}

  template <int count>
  __device__ void add(const Forward<S>&, const Slot (&slots)[count],
                      const typename Forward<S>::Input (&in)[count]) {
#pragma unroll
    for (int u = 0; u < count; ++u)
#pragma unroll
      for (int e = 0; e < width; ++e)
        if (slots[u].has(e)) sums_.add_moments(in[u].x[e], origin_);
  }
  template <int count>
  __device__ void add(const Backward<S>& op, const Slot (&slots)[count],
                      const typename Backward<S>::Input (&in)[count]) {
    const Tail<S, plain> tail = op.template tail<plain>();
    Stored<S> residual[count];
#pragma unroll
    for (int u = 0; u < count; ++u)
      if (slots[u].end > slots[u].begin) residual[u] = tail.residual(slots[u]);
#pragma unroll
    for (int u = 0; u < count; ++u) {
      if (slots[u].end == slots[u].begin) continue;
      T g[width], x[width];
      op.template gradients<plain>(g, x, slots[u], in[u], residual[u],
                                   [&](int) { return forward_; });
#pragma unroll
      for (int e = 0; e < width; ++e)
        if (slots[u].has(e)) sums_.add_products(g[e], x[e], origin_);
    }
  }
  __device__ const Sums& sums() const { return sums_; }
  __device__ double origin() const { return origin_; }

 private:
  double origin_;
  Affine<T> forward_ = {};
  Sums sums_ = {0, 0};
};

// -- rows -----------------------------------------------------------------------------------------

// Calls body(slots, numbers) for the slots of this thread, `together` at a time.
template <int together, class Body>
__device__ inline void for_each_slots(RowSlots walk, Body body) {
  while (walk.valid()) {
    Slot slots[together];
    std::int64_t numbers[together];
#pragma unroll
    for (int u = 0; u < together; ++u) {
      slots[u] = walk.valid() ? walk.get() : Slot{0, 0, 0};
      numbers[u] = walk.number();
      if (walk.valid()) walk.next();
    }
    body(slots, numbers);
  }
}

// Sums of (channel, chunk); the last block of a channel adds up its chunks.
template <class S, class Op, bool plain>
__global__ void __launch_bounds__(block_threads) sum_rows(Op op, Plan plan, Meeting meeting) {
  auto* scratch = reinterpret_cast<Sums*>(shared_memory());
  const std::int64_t channel = blockIdx.x / plan.chunks, chunk = blockIdx.x % plan.chunks;
  ChannelSums<S, plain> sums(op, channel);
  for_each_slots<Op::together>(
      RowSlots(plan, channel, chunk, threadIdx.x, blockDim.x),
      [&](const Slot(&slots)[Op::together], const std::int64_t (&)[Op::together]) {
        typename Op::Input in[Op::together];
#pragma unroll
        for (int u = 0; u < Op::together; ++u)
          if (slots[u].end > slots[u].begin) in[u] = op.input(slots[u]);
        sums.add(op, slots, in);
      });
  Sums total = block_sum(sums.sums(), scratch);
  Sums* const of_channel = meeting.partials + channel * plan.chunks;
  if (plan.chunks > 1) {
    if (threadIdx.x == 0) of_channel[chunk] = total;
    if (!last_to_arrive(meeting.tickets + channel, static_cast<unsigned>(plan.chunks),
                        reinterpret_cast<unsigned*>(scratch)))
      return;
    Sums mine{0, 0};
    for (std::int64_t k = threadIdx.x; k < plan.chunks; k += blockDim.x) mine.add(of_channel[k]);
    total = block_sum(mine, scratch);
  }
  if (threadIdx.x == 0) op.finish(channel, sums.origin(), total, meeting.totals);
}

// Last blocks first: what the sums read last is still in the cache.
template <class S, class Op, bool plain>
__global__ void __launch_bounds__(block_threads) write_rows(Op op, Plan plan, Meeting meeting) {
  auto* of_channel = reinterpret_cast<typename Op::Coefficients*>(shared_memory());
  const std::int64_t block = static_cast<std::int64_t>(gridDim.x) - 1 - blockIdx.x;
  const std::int64_t channel = block / plan.chunks, chunk = block % plan.chunks;
  if (threadIdx.x == 0) *of_channel = op.coefficients(channel, meeting.totals);
  __syncthreads();
  const typename Op::Coefficients coefficients = *of_channel;
  const Tail<S, plain> tail = op.template tail<plain>();
  for_each_slots<Op::together>(
      RowSlots(plan, channel, chunk, threadIdx.x, blockDim.x),
      [&](const Slot(&slots)[Op::together], const std::int64_t (&)[Op::together]) {
        typename Op::Input in[Op::together];
        Stored<S> residual[Op::together];
#pragma unroll
        for (int u = 0; u < Op::together; ++u)
          if (slots[u].end > slots[u].begin) {
            in[u] = op.input(slots[u]);
            residual[u] = tail.residual(slots[u]);
          }
#pragma unroll
        for (int u = 0; u < Op::together; ++u)
          if (slots[u].end > slots[u].begin)
            op.template write<plain>(slots[u], in[u], residual[u],
                                     [&](int) { return coefficients; });
      });
}

// A cluster takes a channel through all steps, with what it read in shared memory.
template <class S, class Op, bool plain>
__global__ void __launch_bounds__(most_threads) resident(Op op, Plan plan, Meeting meeting) {
  using Input = typename Op::Input;
  using Coefficients = typename Op::Coefficients;
  constexpr int warps = most_threads / warp_threads;
  auto* kept = reinterpret_cast<Input*>(shared_memory());
  auto* scratch = reinterpret_cast<Sums*>(shared_memory() + plan.shared_bytes);
  Sums* const of_block = scratch + warps;
  auto* of_channel = reinterpret_cast<Coefficients*>(of_block + 1);

  const std::int64_t channel = blockIdx.x / plan.cluster, chunk = blockIdx.x % plan.cluster;
  const RowSlots walk(plan, channel, chunk, threadIdx.x, blockDim.x);
  ChannelSums<S, plain> sums(op, channel);
  for_each_slots<Op::together>(
      walk, [&](const Slot(&slots)[Op::together], const std::int64_t (&numbers)[Op::together]) {
        Input in[Op::together];
#pragma unroll
        for (int u = 0; u < Op::together; ++u)
          if (slots[u].end > slots[u].begin) in[u] = op.input(slots[u]);
#pragma unroll
        for (int u = 0; u < Op::together; ++u)
          if (slots[u].end > slots[u].begin) kept[numbers[u]] = in[u];
        sums.add(op, slots, in);
      });
  Sums total = block_sum(sums.sums(), scratch);
  if (plan.cluster > 1) {
    if (threadIdx.x == 0) *of_block = total;
    cluster_barrier();
    total = {0, 0};
    for (int rank = 0; rank < plan.cluster; ++rank) total.add(*of_peer(of_block, rank));
    cluster_barrier();  // before a block may end
  }
  if (threadIdx.x == 0) {
    // All blocks of a cluster write the same, and each reads what it has written itself.
    // (The first of the channel's values may be overwritten by now.)
    op.finish(channel, sums.origin(), total, meeting.totals);
    *of_channel = op.coefficients(channel, meeting.totals);
  }
  __syncthreads();
  const Coefficients coefficients = *of_channel;
  const Tail<S, plain> tail = op.template tail<plain>();
  for_each_slots<1>(walk, [&](const Slot(&slots)[1], const std::int64_t (&numbers)[1]) {
    if (slots[0].end == slots[0].begin) return;
    op.template write<plain>(slots[0], kept[numbers[0]], tail.residual(slots[0]),
                             [&](int) { return coefficients; });
  });
}

// -- columns --------------------------------------------------------------------------------------

// Sums of a column of accesses, one for each value of it.
template <class S, bool plain>
class ColumnSums {
 public:
  using T = Compute<S>;
  static constexpr int width = width_of<S>;
  static constexpr int forward_rows = 8, backward_rows = 4;

  template <class Op>
  __device__ ColumnSums(const Op& op, const Plan& plan, std::int64_t column) {
#pragma unroll
    for (int e = 0; e < width; ++e) {
      sums_[e] = {0, 0};
      if (column + e < plan.width) set(op, e, channel_of_column(plan, column + e));
    }
  }
  __device__ void add_all(const Forward<S>& op, ColumnSlots walk) {
    while (walk.valid()) {
      Slot slots[forward_rows];
      Stored<S> in[forward_rows];
      each(walk, slots, [&](int r) { in[r] = op.input(slots[r]).x; });
#pragma unroll
      for (int r = 0; r < forward_rows; ++r)
#pragma unroll
        for (int e = 0; e < width; ++e)
          if (slots[r].has(e)) sums_[e].add_moments(in[r][e], origin_[e]);
    }
  }
  __device__ void add_all(const Backward<S>& op, ColumnSlots walk) {
    const Tail<S, plain> tail = op.template tail<plain>();
    while (walk.valid()) {
      Slot slots[backward_rows];
      typename Backward<S>::Input in[backward_rows];
      Stored<S> residual[backward_rows];
      each(walk, slots, [&](int r) {
        in[r] = op.input(slots[r]);
        residual[r] = tail.residual(slots[r]);
      });
#pragma unroll
      for (int r = 0; r < backward_rows; ++r) {
        if (slots[r].end == 0) continue;
        T g[width], x[width];
        op.template gradients<plain>(g, x, slots[r], in[r], residual[r],
                                     [&](int e) { return forward_[e]; });
#pragma unroll
        for (int e = 0; e < width; ++e)
          if (slots[r].has(e)) sums_[e].add_products(g[e], x[e], origin_[e]);
      }
    }
  }
  __device__ const Sums& operator[](int e) const { return sums_[e]; }

 private:
  template <int rows, class Load>
  static __device__ void each(ColumnSlots& walk, Slot (&slots)[rows], Load load) {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      slots[r] = walk.valid() ? walk.get() : Slot{0, 0, 0};
      if (slots[r].end > 0) load(r);
      if (walk.valid()) walk.next();
    }
  }
  __device__ void set(const Forward<S>& op, int e, std::int64_t c) { origin_[e] = op.origin(c); }
  __device__ void set(const Backward<S>& op, int e, std::int64_t c) {
    origin_[e] = op.origin(c);
    forward_[e] = op.forward(c);
  }

  Sums sums_[width];
  double origin_[width] = {};
  Affine<T> forward_[width] = {};
};

// Sums of a tile, over the threads that are below each other: in place of those of the first.
template <class S, bool plain>
__device__ inline void fold_columns(const Plan& plan, const ColumnSums<S, plain>& sums,
                                    Sums* scratch) {
  constexpr int width = width_of<S>;
  const auto thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const auto across = static_cast<int>(plan.tile_vectors);
  const int down = threads / across, row = thread / across;
#pragma unroll
  for (int e = 0; e < width; ++e) scratch[e * threads + thread] = sums[e];
  int half = 1;
  while (half < down) half *= 2;
  for (half /= 2; half > 0; half /= 2) {
    __syncthreads();
    if (row < half && row + half < down)
#pragma unroll
      for (int e = 0; e < width; ++e)
        scratch[e * threads + thread].add(scratch[e * threads + thread + half * across]);
  }
  __syncthreads();
}

// Adds up the columns and chunks of the channels [first, last), a warp for each. get(chunk, column)
// has the sums.
template <class Op, class Get>
__device__ inline void finish_columns(const Op& op, const Plan& plan, std::int64_t chunks,
                                      std::int64_t first, std::int64_t last, Sums* totals,
                                      Get get) {
  const std::int64_t columns = plan.width / plan.channel_columns * plan.per;
  const std::int64_t warps = blockDim.x / warp_threads;
  for (std::int64_t c = first + threadIdx.x / warp_threads; c < last; c += warps) {
    Sums mine{0, 0};
    for (std::int64_t i = threadIdx.x % warp_threads; i < chunks * columns; i += warp_threads) {
      const std::int64_t of = i % columns;
      mine.add(
          get(i / columns, of / plan.per * plan.channel_columns + c * plan.per + of % plan.per));
    }
    const Sums total = warp_sum(mine);
    if (threadIdx.x % warp_threads == 0) op.finish(c, op.origin(c), total, totals);
  }
}

// `sums` and `writes`: which of the two steps; both in one launch with Path::columns_once.
template <class S, class Op, bool plain>
__global__ void __launch_bounds__(block_threads)
    columns(Op op, Plan plan, Meeting meeting, bool sums, bool writes) {
  using Coefficients = typename Op::Coefficients;
  constexpr int width = width_of<S>;
  auto* scratch = reinterpret_cast<Sums*>(shared_memory());
  std::int64_t block = blockIdx.x;
  if (!sums) block = static_cast<std::int64_t>(gridDim.x) - 1 - block;  // as in write_rows
  const std::int64_t tile = block % plan.tiles, chunk = block / plan.tiles;
  const ColumnSlots walk(plan, tile, chunk, threadIdx.x, blockDim.x);
  const std::int64_t column = walk.column();
  const std::int64_t tile_columns = plan.tile_vectors * width, first_column = tile * tile_columns;
  const auto threads = static_cast<std::int64_t>(blockDim.x);

  if (sums) {
    {
      ColumnSums<S, plain> mine(op, plan, column);
      mine.add_all(op, walk);
      fold_columns<S, plain>(plan, mine, scratch);
    }
    const auto in_tile = [&](std::int64_t of) -> Sums& {
      return scratch[of % width * threads + of / width];
    };
    // Channels of this tile, or all where they lie in several.
    const std::int64_t first = plan.own_tiles && plan.tiles > 1 ? first_column : 0;
    std::int64_t last = plan.own_tiles && plan.tiles > 1 ? first + tile_columns : plan.problem.c;
    if (last > plan.problem.c) last = plan.problem.c;
    if (plan.path == Path::columns_once) {
      finish_columns(op, plan, 1, first, last, meeting.totals,
                     [&](std::int64_t, std::int64_t of) { return in_tile(of - first_column); });
    } else {
      for (std::int64_t of = threadIdx.x; of < tile_columns && first_column + of < plan.width;
           of += threads)
        meeting.partials[chunk * plan.width + first_column + of] = in_tile(of);
      const std::int64_t others = plan.own_tiles ? plan.chunks : plan.chunks * plan.tiles;
      __syncthreads();
      if (last_to_arrive(meeting.tickets + (plan.own_tiles ? tile : 0),
                         static_cast<unsigned>(others), reinterpret_cast<unsigned*>(scratch)))
        finish_columns(
            op, plan, plan.chunks, first, last, meeting.totals,
            [&](std::int64_t k, std::int64_t of) { return meeting.partials[k * plan.width + of]; });
    }
    __syncthreads();
  }
  if (!writes) return;

  auto* of_columns = reinterpret_cast<Coefficients*>(shared_memory());
  for (std::int64_t of = threadIdx.x; of < tile_columns && first_column + of < plan.width;
       of += threads)
    of_columns[of] = op.coefficients(channel_of_column(plan, first_column + of), meeting.totals);
  __syncthreads();
  Coefficients coefficients[width] = {};
#pragma unroll
  for (int e = 0; e < width; ++e)
    if (walk.valid() && column + e < plan.width)
      coefficients[e] = of_columns[column - first_column + e];
  const Tail<S, plain> tail = op.template tail<plain>();
  ColumnSlots again = walk;
  while (again.valid()) {
    Slot slots[Op::together];
    typename Op::Input in[Op::together];
    Stored<S> residual[Op::together];
#pragma unroll
    for (int u = 0; u < Op::together; ++u) {
      slots[u] = again.valid() ? again.get() : Slot{0, 0, 0};
      if (slots[u].end > 0) {
        in[u] = op.input(slots[u]);
        residual[u] = tail.residual(slots[u]);
      }
      if (again.valid()) again.next();
    }
#pragma unroll
    for (int u = 0; u < Op::together; ++u)
      if (slots[u].end > 0)
        op.template write<plain>(slots[u], in[u], residual[u],
                                 [&](int e) { return coefficients[e]; });
  }
}

}  // namespace cuda
}  // namespace bnext
