#include "cpu/launch.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <memory>

#include "bnext/batch_norm.hpp"
#include "bnext/runtime.hpp"
#include "cpu/parallel.hpp"

namespace bnext {
namespace {

// Scratch memory of the calling thread, kept for its next call.
class Workspace {
 public:
  explicit Workspace(std::size_t bytes) {
    static thread_local std::unique_ptr<unsigned char[]> buffer;
    static thread_local std::size_t capacity = 0;
    if (bytes > capacity) {
      buffer.reset();
      capacity = 0;
      buffer.reset(new unsigned char[bytes]);
      capacity = bytes;
    }
    next_ = buffer.get();
  }

  template <class T>
  T* take(std::int64_t count) {
    T* block = reinterpret_cast<T*>(next_);
    next_ += bytes<T>(count);
    return block;
  }

  template <class T>
  static std::size_t bytes(std::int64_t count) {
    const std::size_t size = static_cast<std::size_t>(count) * sizeof(T);
    constexpr std::size_t alignment = alignof(std::max_align_t);  // as new gives it
    return (size + alignment - 1) / alignment * alignment;
  }

 private:
  unsigned char* next_;
};

template <class T>
double value_or(const void* array, std::int64_t c, double otherwise) {
  return array != nullptr ? static_cast<double>(static_cast<const T*>(array)[c]) : otherwise;
}

// What sums of gradients count the values of a channel from, n = (x - center) scale. Products of
// float32 are exact in float64 and need nothing; float64 has the center itself. Those of half types
// are made in float32, exactly as long as x - origin has few digits: a multiple of some deviations
// takes away what is large in x, and nothing of its digits.
template <class S>
double origin_of(double center, double scale) {
  if (!sums_have_origin<S>) return 0;
  if (sizeof(S) == 8) return center;
  const double step = std::exp2(std::logb(1 / scale) + 3);  // also of 0 and infinity
  if (!std::isfinite(step)) return 0;
  return static_cast<float>(step > 0 ? std::nearbyint(center / step) * step : center);
}

// `residual`: there is one, of which loops of their own ask what they need; `more`: something that
// only the general ones do.
Path path_of(const Fusion& f, bool residual, bool more) {
  const bool dropping = f.dropout.threshold > 0;
  const bool alone = !residual && !dropping && !more;
  if (alone && f.activation == Activation::none) return Path::none;
  if (alone && f.activation == Activation::relu) return Path::relu;
  if (alone && f.activation == Activation::relu6) return Path::relu6;
  if (f.activation != Activation::relu || (residual && dropping) || (more && !residual))
    return Path::general;
  return residual ? Path::residual_and_relu : Path::relu_and_dropout;
}
int forward_path(const Fusion& f) {
  return static_cast<int>(path_of(f, f.residual != nullptr, f.passes != nullptr));
}
// Backward of a residual and ReLU goes by the bits of what passed, if there are any.
int backward_path(const Fusion& f, bool grad_residual) {
  return static_cast<int>(path_of(f, f.passes != nullptr, f.residual != nullptr || grad_residual));
}

// What an operation on a tensor takes, in values: a channel as long as so many, for its roots and
// divisions.
std::int64_t work_of(const Problem& problem) {
  constexpr std::int64_t values_of_a_channel = 64;
  return problem.size() + values_of_a_channel * problem.c;
}

// Pieces of channels, each enough for what the call of a phase takes not to matter.
constexpr std::int64_t channels_of_a_piece = 64;
std::int64_t pieces_of(std::int64_t channels) {
  return (channels + channels_of_a_piece - 1) / channels_of_a_piece;
}
template <class Body>
auto for_piece_of(std::int64_t first, std::int64_t last, Body& body) {
  return [first, last, &body](std::int64_t piece) {
    const std::int64_t begin = first + piece * channels_of_a_piece;
    for (std::int64_t c = begin; c < std::min(begin + channels_of_a_piece, last); ++c) body(c);
  };
}

// Whether all threads take one group after another: what a group reads twice is then in the last
// cache once, not as often as there are threads, or groups. The parts of a group must be enough to
// share out. Measured, docs/performance.md.
bool one_by_one(const Grid& grid) {
  constexpr std::int64_t parts_of_a_thread = 8;
  const std::int64_t threads = num_threads();
  return grid.chunks >= parts_of_a_thread * threads &&
         grid.group_inputs * threads > cache_bytes() / 8;
}

// prepare(channel), then reduce(group, chunk) for every tile, then finish(channel), then
// apply(group, chunk, next): with `next` it also reduces the mirrored chunk of the next group.
// The order of the sums is in the grid; this only chooses who does what when.
template <class Prepare, class Reduce, class Finish, class Apply>
void reduce_then_apply(Grid& grid, Prepare prepare, Reduce reduce, Finish finish, Apply apply) {
  const std::int64_t work = work_of(grid.problem);
  const auto each_channel = [&](std::int64_t group, auto& body) {
    for (std::int64_t c = grid.first_channel(group); c < grid.last_channel(group); ++c) body(c);
  };
  const bool together = one_by_one(grid);
  // Enough groups to share out: each is taken through all three steps while it is in cache. The
  // second pass goes backwards, since what the first read last is still there.
  const bool shared_out = !together && (grid.chunks == 1 || grid.groups >= 4 * num_threads());
  grid.sum_next = grid.sum_next && shared_out;
  grid.summed_before = shared_out;
  grid.fetch_rows = grid.fetch_rows && !shared_out;
  if (shared_out) {
    parallel_shares(grid.groups, work, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t group = begin; group < end; ++group) {
        const bool next = grid.sum_next && group + 1 < end;
        if (group == begin || !grid.sum_next) {
          each_channel(group, prepare);
          for (std::int64_t chunk = 0; chunk < grid.chunks; ++chunk) reduce(group, chunk);
        }
        each_channel(group, finish);
        if (next) each_channel(group + 1, prepare);
        for (std::int64_t chunk = grid.chunks; chunk-- > 0;) apply(group, chunk, next);
      }
    });
    return;
  }
  const auto take = [&](std::int64_t first, std::int64_t groups) {
    const std::int64_t tiles = groups * grid.chunks;
    auto reduce_tile = [&](std::int64_t tile) { reduce(first + tile % groups, tile / groups); };
    auto apply_tile = [&](std::int64_t tile) {
      apply(first + tile % groups, tile / groups, false);
    };
    const std::int64_t begin = grid.first_channel(first);
    const std::int64_t end = grid.last_channel(first + groups - 1), pieces = pieces_of(end - begin);
    auto prepare_piece = for_piece_of(begin, end, prepare);
    auto finish_piece = for_piece_of(begin, end, finish);
    const Phase phases[] = {phase(pieces, prepare_piece), phase(tiles, reduce_tile),
                            phase(pieces, finish_piece), phase(tiles, apply_tile, true)};
    parallel_phases(work, phases, 4);
  };
  const std::int64_t at_once = together ? 1 : grid.groups;
  for (std::int64_t group = 0; group < grid.groups; group += at_once) take(group, at_once);
}

}  // namespace

template <class S>
void launch(const BatchNormForwardArgs& a, const Kernels<S>& kernels) {
  using T = Compute<S>;
  Grid grid = make_grid(a.problem, a.fusion.residual != nullptr ? 3 : 2, sizeof(S));
  const std::int64_t channels = a.problem.c;
  Workspace workspace(Workspace::bytes<Moments>(channels * grid.chunks) +
                      Workspace::bytes<Affine<T>>(channels));
  auto* partials = workspace.take<Moments>(channels * grid.chunks);
  auto* forward = workspace.take<Affine<T>>(channels);
  const auto* x = static_cast<const S*>(a.x);
  auto* y = static_cast<S*>(a.y);
  const int path = forward_path(a.fusion);
  const auto apply = kernels.apply[path];
  grid.sum_next = grid.sum_next && apply.sums_next;

  reduce_then_apply(
      grid, [](std::int64_t) {},
      [&](std::int64_t group, std::int64_t chunk) {
        kernels.moments(grid, group, chunk, x, partials);
      },
      [&](std::int64_t c) {
        const Moments total = merged(partials + c, grid.chunks, channels);
        const double var = total.m2 / total.count;
        const double inv_std = 1 / std::sqrt(var + a.eps);
        a.mean[c] = total.mean;
        a.var[c] = var;
        a.inv_std[c] = inv_std;
        forward[c] = normalisation<T>(total.mean, inv_std, value_or<T>(a.weight, c, 1),
                                      value_or<T>(a.bias, c, 0));
      },
      [&](std::int64_t group, std::int64_t chunk, bool next) {
        apply.run(grid, group, chunk, x, forward, a.fusion, y, next ? partials : nullptr);
      });
}

template <class S>
void launch(const BatchNormBackwardArgs& a, const Kernels<S>& kernels) {
  using T = Compute<S>;
  Grid grid = make_grid(a.problem, a.grad_residual != nullptr ? 4 : 3, sizeof(S));
  const std::int64_t channels = a.problem.c;
  Fusion fusion = a.fusion;
  const bool dropping = fusion.dropout.threshold > 0;
  const std::int64_t kept_bytes = dropping ? grid.runs() * grid.noted_bytes() : 0;
  Workspace workspace(
      Workspace::bytes<GradSums>(channels * grid.chunks) + Workspace::bytes<Affine<T>>(channels) +
      Workspace::bytes<GradAffine<T>>(channels) + 4 * Workspace::bytes<double>(channels) +
      Workspace::bytes<bool>(channels) + Workspace::bytes<std::uint8_t>(kept_bytes));
  auto* partials = workspace.take<GradSums>(channels * grid.chunks);
  auto* forward = workspace.take<Affine<T>>(channels);
  auto* backward = workspace.take<GradAffine<T>>(channels);
  auto* center = workspace.take<double>(channels);
  auto* origin = workspace.take<double>(channels);
  auto* scale = workspace.take<double>(channels);
  auto* weight = workspace.take<double>(channels);
  auto* finite = workspace.take<bool>(channels);
  fusion.kept = workspace.take<std::uint8_t>(kept_bytes);
  const auto* grad_y = static_cast<const S*>(a.grad_y);
  const auto* x = static_cast<const S*>(a.x);
  auto* grad_x = static_cast<S*>(a.grad_x);
  auto* grad_residual = static_cast<S*>(a.grad_residual);
  const int path = backward_path(fusion, grad_residual != nullptr);
  const auto grad_sums = kernels.grad_sums[path];
  const auto apply_grad = kernels.apply_grad[path];
  const auto apply_any_grad = kernels.apply_grad[static_cast<int>(Path::general)];
  grid.sum_next = grid.sum_next && apply_grad.sums_next;
  const auto count = static_cast<double>(a.problem.per_channel());

  reduce_then_apply(
      grid,
      [&](std::int64_t c) {
        const double w = value_or<T>(a.weight, c, 1), b = value_or<T>(a.bias, c, 0);
        const Centered by = centered(a.from_result, a.mean[c], a.inv_std[c], w, b);
        center[c] = by.center;
        origin[c] = origin_of<S>(by.center, by.scale);
        scale[c] = by.scale;
        weight[c] = by.weight;
        forward[c] =
            a.from_result ? Affine<T>{0, -1, 0} : normalisation<T>(a.mean[c], a.inv_std[c], w, b);
      },
      [&](std::int64_t group, std::int64_t chunk) {
        grad_sums(grid, group, chunk, grad_y, x, origin, forward, fusion, partials);
      },
      [&](std::int64_t c) {
        GradSums total{0, 0};
        for (std::int64_t chunk = 0; chunk < grid.chunks; ++chunk) {
          total.g += partials[chunk * channels + c].g;
          total.gx += partials[chunk * channels + c].gx;
        }
        const double sum_gn = (total.gx - (center[c] - origin[c]) * total.g) * scale[c];
        if (a.grad_weight != nullptr) static_cast<T*>(a.grad_weight)[c] = static_cast<T>(sum_gn);
        if (a.grad_bias != nullptr) static_cast<T*>(a.grad_bias)[c] = static_cast<T>(total.g);
        finite[c] = std::isfinite(sum_gn);
        // Constant statistics pass no gradient on, not even one that is not finite.
        const double mean_g = a.batch_statistics ? total.g / count : 0;
        const double mean_gn = a.batch_statistics ? sum_gn / count : 0;
        backward[c] = grad_normalisation<T>(center[c], scale[c], weight[c], mean_g, mean_gn);
      },
      [&](std::int64_t group, std::int64_t chunk, bool next) {
        // Nor do they take the gradient of x from x, which may be infinite: the general loops know.
        const bool* const first = finite + grid.first_channel(group);
        const bool* const last = finite + grid.last_channel(group);
        if (a.batch_statistics || std::find(first, last, false) == last) {
          apply_grad.run(grid, group, chunk, grad_y, x, origin, forward, backward, fusion, grad_x,
                         grad_residual, next ? partials : nullptr);
          return;
        }
        apply_any_grad.run(grid, group, chunk, grad_y, x, origin, forward, backward, fusion, grad_x,
                           grad_residual, nullptr);
        if (next)
          grad_sums(grid, group + 1, grid.chunks - 1 - chunk, grad_y, x, origin, forward, fusion,
                    partials);
      });
}

template <class S>
void launch(const BatchNormInferenceArgs& a, const Kernels<S>& kernels) {
  using T = Compute<S>;
  Grid grid = make_grid(a.problem, 2, sizeof(S));
  const std::int64_t channels = a.problem.c;
  Workspace workspace(Workspace::bytes<Affine<T>>(channels));
  auto* forward = workspace.take<Affine<T>>(channels);
  auto prepare = [&](std::int64_t c) {
    forward[c] = normalisation<T>(static_cast<const T*>(a.mean)[c],
                                  1 / std::sqrt(value_or<T>(a.var, c, 0) + a.eps),
                                  value_or<T>(a.weight, c, 1), value_or<T>(a.bias, c, 0));
  };
  const auto apply = kernels.apply[forward_path(a.fusion)];
  // One pass, in the order of memory: no sums to make, so the tiles can be what suits the threads.
  grid.sum_next = false;
  constexpr std::int64_t enough_tiles = 4;
  const std::int64_t enough_chunks = (enough_tiles + grid.groups - 1) / grid.groups;
  if (!grid.columns)
    grid.cut(1);
  else if (grid.chunks < enough_chunks)
    grid.cut((grid.rows + enough_chunks - 1) / enough_chunks);
  auto apply_tile = [&](std::int64_t tile) {
    apply.run(grid, tile % grid.groups, tile / grid.groups, static_cast<const S*>(a.x), forward,
              a.fusion, static_cast<S*>(a.y), nullptr);
  };
  auto prepare_piece = for_piece_of(0, channels, prepare);
  const Phase phases[] = {phase(pieces_of(channels), prepare_piece),
                          phase(grid.groups * grid.chunks, apply_tile)};
  parallel_phases(work_of(a.problem), phases, 2);
}

template <class S>
void launch(const DropoutArgs& a, const Kernels<S>& kernels) {
  const bool streaming = worth_streaming(2 * a.size * static_cast<std::int64_t>(sizeof(S)));
  const std::int64_t tasks = (a.size + dropout_run - 1) / dropout_run;
  parallel_for(tasks, a.size, [&](std::int64_t task) {
    const std::int64_t first = task * dropout_run;
    kernels.dropout(a, first, std::min(first + dropout_run, a.size), streaming);
  });
}

#define BNEXT_INSTANTIATE(name, S, compute)                               \
  template void launch(const BatchNormForwardArgs&, const Kernels<S>&);   \
  template void launch(const BatchNormBackwardArgs&, const Kernels<S>&);  \
  template void launch(const BatchNormInferenceArgs&, const Kernels<S>&); \
  template void launch(const DropoutArgs&, const Kernels<S>&);
BNEXT_DTYPES(BNEXT_INSTANTIATE)
#undef BNEXT_INSTANTIATE

}  // namespace bnext
