// The table of the CUDA backend: from checked arguments to launches.
#include <atomic>
#include <type_traits>

#include "cuda/backend.hpp"
#include "cuda/batch_norm.cuh"
#include "cuda/dropout.cuh"
#include "cuda/memory.hpp"
#include "cuda/staging.hpp"

namespace bnext {
namespace cuda {
namespace {

constexpr std::int64_t enough_blocks = 2048;

// Kernels whose blocks may take more shared memory than is theirs by default.
template <auto kernel>
void allow_shared(std::size_t bytes, int device) {
  constexpr std::size_t by_default = 48 << 10;
  static std::atomic<std::uint64_t> allowed{0};  // a bit for each device
  const std::uint64_t bit = device < 64 ? std::uint64_t{1} << device : 0;
  if (bytes <= by_default || (allowed.load() & bit) != 0) return;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(limits_of(device).shared_bytes)),
        "asking for shared memory");
  allowed |= bit;
}

template <auto kernel, class... Args>
void start(const Place& place, std::int64_t blocks, int threads, std::size_t shared, bool together,
           const Args&... args) {
  allow_shared<kernel>(shared, place.device);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(place.stream);
  config.attrs = &attribute;
  config.numAttrs = together ? 1 : 0;  // all blocks at the same time
  check(cudaLaunchKernelEx(&config, kernel, args...), "launching a kernel");
}

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (reinterpret_cast<std::uintptr_t>(p) % access_bytes != 0) return false;
  return true;
}

bool is_plain(const Fusion& f, const void* grad_residual = nullptr) {
  return f.residual == nullptr && f.dropout.threshold == 0 && f.passes == nullptr && !f.inverted &&
         grad_residual == nullptr &&
         (f.activation == Activation::none || f.activation == Activation::relu);
}

template <class S, class Op, Layout layout, bool plain, bool fast>
void write_only(const Place& place, const Plan& plan, const Op& op) {
  const auto shared =
      static_cast<std::size_t>(plan.group_channels) * sizeof(typename Op::Coefficients);
  start<write_items<S, Op, layout, plain, fast>>(place, plan.items(), plan.threads, shared, false,
                                                 op, plan);
}

// Sums, and then what follows from them.
template <class S, class Op, Layout layout, bool plain, bool fast>
void sum_and_write(const Place& place, const Plan& plan, const Op& op, const Meeting& meeting) {
  if (plan.reads == Reads::once) {
    const std::int64_t most =
        std::int64_t{plan.blocks_per_multiprocessor} * limits_of(place.device).multiprocessors;
    // Groups of columns are small: one kernel does for every fusion.
    start<keep_items<S, Op, layout, plain && layout == Layout::rows, fast>>(
        place, std::min(plan.items(), most), plan.threads,
        static_cast<std::size_t>(plan.shared_bytes + bytes_beside(plan)), plan.chunks > 1, op, plan,
        meeting);
    return;
  }
  const std::size_t scratch = static_cast<std::size_t>(scratch_sums(plan)) * sizeof(Sums);
  // The sums of forward come before everything that follows the normalisation.
  constexpr bool plain_sums = plain || std::is_same<Op, Forward<S>>::value;
  start<sum_items<S, Op, layout, plain_sums, fast>>(place, plan.items(), plan.threads, scratch,
                                                    false, op, plan, meeting);
  write_only<S, Op, layout, plain, fast>(place, plan, op);
}

// Calls body(layout, plain, fast). Of float64, which nobody is in a hurry with, there is one kind.
template <class S, class Body>
void with_kind(const Plan& plan, bool plain, bool wide, Body body) {
  const auto with = [&](auto layout) {
    constexpr std::false_type no;
    if constexpr (sizeof(S) == 8) {
      body(layout, no, no);
    } else {
      constexpr std::true_type yes;
      const bool fast = plan.whole && wide;
      if (plain)
        fast ? body(layout, yes, yes) : body(layout, yes, no);
      else
        fast ? body(layout, no, yes) : body(layout, no, no);
    }
  };
  if (plan.layout == Layout::rows)
    with(std::integral_constant<Layout, Layout::rows>());
  else
    with(std::integral_constant<Layout, Layout::columns>());
}

std::int64_t words_of_mask(std::int64_t size) {
  return (size + mask_word_size - 1) / mask_word_size;
}

// Workspace of an operation, with the bits of its dropout where it has one.
struct Scratch {
  Workspace workspace;
  Meeting meeting;
  Sums* totals;
  std::uint32_t* kept;

  Scratch(const Place& place, const Plan& plan, std::int64_t channels, std::int64_t masked)
      : workspace(place,
                  Workspace::bytes<Sums>(plan.partials) + Workspace::bytes<Sums>(channels) +
                      Workspace::bytes<std::uint32_t>(words_of_mask(masked)),
                  static_cast<std::size_t>(plan.tickets) * sizeof(unsigned),
                  static_cast<std::size_t>(plan.letters) * sizeof(Letter)) {
    meeting.tickets = workspace.zeroed<unsigned>();
    meeting.partials = workspace.take<Sums>(plan.partials);
    meeting.letters = workspace.letters<Letter>();
    meeting.launch = workspace.launch();
    totals = channels > 0 ? workspace.take<Sums>(channels) : nullptr;
    kept = workspace.take<std::uint32_t>(words_of_mask(masked));
  }
};

void draw(const Place& place, const MaskDraw& mask, std::int64_t size, std::uint32_t* words) {
  const std::int64_t count = words_of_mask(size);
  start<draw_mask>(place, std::min(enough_blocks, blocks_for(count, block_threads)), block_threads,
                   0, false, mask, count, words);
}

// The bits of dropout, for kernels to find.
void note_mask(const Place& place, Fusion& fusion, std::int64_t size, std::uint32_t* words) {
  if (fusion.dropout.threshold == 0) return;
  draw(place, fusion.dropout, size, words);
  fusion.kept = reinterpret_cast<std::uint8_t*>(words);
}

template <class S>
void on_device(const BatchNormForwardArgs& args) {
  const DeviceGuard guard(args.place.device);
  const Plan plan = make_plan(args.problem, sizeof(S), 1, true, limits_of(args.place.device));
  Forward<S> op{args, nullptr, nullptr, aligned({args.x, args.y, args.fusion.residual})};
  op.a.problem = plan.problem;
  const std::int64_t size = plan.problem.size();
  const Scratch scratch(args.place, plan, 0, args.fusion.dropout.threshold > 0 ? size : 0);
  note_mask(args.place, op.a.fusion, size, scratch.kept);
  if (args.fusion.passes != nullptr)
    check(cudaMemsetAsync(args.fusion.passes, 0, static_cast<std::size_t>(passes_bytes(size)),
                          static_cast<cudaStream_t>(args.place.stream)),
          "clearing memory");
  with_kind<S>(plan, is_plain(args.fusion), op.wide, [&](auto layout, auto plain, auto fast) {
    sum_and_write<S, Forward<S>, layout(), plain(), fast()>(args.place, plan, op, scratch.meeting);
  });
}

template <class S>
void on_device(const BatchNormBackwardArgs& args) {
  const DeviceGuard guard(args.place.device);
  const Plan plan = make_plan(args.problem, sizeof(S), 2, true, limits_of(args.place.device));
  const std::int64_t size = plan.problem.size();
  const Scratch scratch(args.place, plan, plan.reads == Reads::once ? 0 : plan.problem.c,
                        args.fusion.dropout.threshold > 0 ? size : 0);
  Backward<S> op{
      args, scratch.totals,
      aligned({args.grad_y, args.x, args.grad_x, args.fusion.residual, args.grad_residual})};
  op.a.problem = plan.problem;
  note_mask(args.place, op.a.fusion, size, scratch.kept);
  const bool plain_fusion = is_plain(args.fusion, args.grad_residual);
  with_kind<S>(plan, plain_fusion, op.wide, [&](auto layout, auto plain, auto fast) {
    sum_and_write<S, Backward<S>, layout(), plain(), fast()>(args.place, plan, op, scratch.meeting);
  });
}

template <class S>
void on_device(const BatchNormInferenceArgs& args) {
  const DeviceGuard guard(args.place.device);
  const Plan plan = make_plan(args.problem, sizeof(S), 1, false, limits_of(args.place.device));
  const Forward<S> op{{plan.problem, args.x, args.weight, args.bias, args.eps, args.fusion, args.y,
                       nullptr, nullptr, nullptr, args.place},
                      args.mean,
                      args.var,
                      aligned({args.x, args.y, args.fusion.residual})};
  with_kind<S>(plan, is_plain(args.fusion), op.wide, [&](auto layout, auto plain, auto fast) {
    write_only<S, Forward<S>, layout(), plain(), fast()>(args.place, plan, op);
  });
}

template <class S>
void on_device(const DropoutArgs& args) {
  const DeviceGuard guard(args.place.device);
  const bool wide = aligned({args.x, args.y});
  constexpr std::int64_t per_block = block_threads * mask_word_size;
  const std::int64_t blocks = std::min(4 * enough_blocks, blocks_for(args.size, per_block));
  if (!args.map.shares()) {
    start<dropout<S>>(args.place, blocks, block_threads, 0, false, args,
                      static_cast<const std::uint32_t*>(nullptr), wide);
    return;
  }
  const std::int64_t bits = args.size / (args.map.repeats * args.map.run);
  const Scratch scratch(args.place, {}, 0, bits);
  draw(args.place, args.draw, bits, scratch.kept);
  start<dropout<S>>(args.place, blocks, block_threads, 0, false, args,
                    static_cast<const std::uint32_t*>(scratch.kept), wide);
}

template <class S, class Args>
void run(const Args& args) {
  if (args.place.device >= 0)
    on_device<S>(args);
  else
    staged<S>(args, [](const Args& there) { on_device<S>(there); });
}

}  // namespace
}  // namespace cuda

#define BNEXT_LAUNCHER(name, type, compute) cuda::run<type>,
#define BNEXT_ROW(op, args) {BNEXT_DTYPES(BNEXT_LAUNCHER)},
const Backend backend_cuda{"cuda", DeviceKind::cuda, BNEXT_OPS(BNEXT_ROW)};

}  // namespace bnext
