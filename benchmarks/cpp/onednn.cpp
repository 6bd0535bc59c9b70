// oneDNN's batch normalization, in the layouts that it has.
#include <dnnl.hpp>
#include <memory>
#include <unordered_map>

#include "bench.hpp"

namespace bench {
namespace {

using dnnl::memory;
using Tag = memory::format_tag;

const dnnl::engine& cpu() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

// oneDNN has no float64 of it.
memory::data_type data_type(bnext::DType dtype) {
  switch (dtype) {
    case bnext::DType::float32:
      return memory::data_type::f32;
    case bnext::DType::float16:
      return memory::data_type::f16;
    case bnext::DType::bfloat16:
      return memory::data_type::bf16;
    default:
      return memory::data_type::undef;
  }
}

// `from` in the layout of `md`, in memory of oneDNN's own.
memory converted(const memory::desc& md, const memory::desc& from_md, const Tensor& from) {
  dnnl::stream stream(cpu());
  memory source(from_md, cpu(), from.data()), target(md, cpu());
  dnnl::reorder(source, target).execute(stream, source, target);
  stream.wait();
  return target;
}

void add_layout(const char* name, Tag tag, bool own_memory, const Op& op, Arrays& arrays,
                std::vector<Contender>& contenders) {
  using Forward = dnnl::batch_normalization_forward;
  using Backward = dnnl::batch_normalization_backward;
  const Case& k = arrays.k;
  const memory::dims dims{k.n, k.c, k.h, k.w};
  const memory::desc md(dims, data_type(arrays.dtype), tag);
  const memory::desc plain(dims, data_type(arrays.dtype), Tag::nchw);
  const memory::desc row_md({k.c}, memory::data_type::f32, Tag::a);
  auto flags = dnnl::normalization_flags::use_scale | dnnl::normalization_flags::use_shift;
  if (op.relu) flags |= dnnl::normalization_flags::fuse_norm_relu;
  const auto wrap = [&](const Tensor& t) {
    return own_memory ? converted(md, plain, t) : memory(md, cpu(), t.data());
  };
  const auto row = [&](const Tensor& t) { return memory(row_md, cpu(), t.data()); };
  const memory out = own_memory ? memory(md, cpu()) : memory(md, cpu(), arrays.out.data());

  const auto kind =
      op.training() ? dnnl::prop_kind::forward_training : dnnl::prop_kind::forward_inference;
  const auto more = op.training() ? flags : flags | dnnl::normalization_flags::use_global_stats;
  const Forward::primitive_desc forward_pd({kind, md, 1e-5f, more}, cpu());
  std::unordered_map<int, memory> args{
      {DNNL_ARG_SRC, wrap(arrays.x)},       {DNNL_ARG_MEAN, row(arrays.mean)},
      {DNNL_ARG_VARIANCE, row(arrays.var)}, {DNNL_ARG_SCALE, row(arrays.weight)},
      {DNNL_ARG_SHIFT, row(arrays.bias)},   {DNNL_ARG_DST, out}};
  auto stream = std::make_shared<dnnl::stream>(cpu());
  dnnl::primitive primitive = Forward(forward_pd);
  if (op.relu && op.training()) {
    // The forward pass leaves there what ReLU let through, for the backward pass.
    args.insert({DNNL_ARG_WORKSPACE, memory(forward_pd.workspace_desc(), cpu())});
    primitive.execute(*stream, args);
    stream->wait();
  }
  if (op.kind == Kind::backward) {
    const Backward::primitive_desc backward_pd({dnnl::prop_kind::backward, md, md, 1e-5f, flags},
                                               cpu(), forward_pd);
    args.erase(DNNL_ARG_DST);
    args.insert({DNNL_ARG_DIFF_DST, wrap(arrays.other)});
    args.insert({DNNL_ARG_DIFF_SRC, out});
    args.insert({DNNL_ARG_DIFF_SCALE, row(arrays.grad_weight)});
    args.insert({DNNL_ARG_DIFF_SHIFT, row(arrays.grad_bias)});
    primitive = Backward(backward_pd);
  }
  contenders.push_back({std::string("onednn ") + name, op, [=] {
                          primitive.execute(*stream, args);
                          stream->wait();
                        }});
}

}  // namespace

void add_onednn(const Op& op, Arrays& arrays, std::vector<Contender>& contenders) {
  if (op.kind == Kind::dropout || op.residual || op.dropout) return;
  if (data_type(arrays.dtype) == memory::data_type::undef) return;
  try {
    if (arrays.channels_last) {
      add_layout("nhwc", Tag::nhwc, false, op, arrays, contenders);
    } else {
      add_layout("nchw", Tag::nchw, false, op, arrays, contenders);
      // Its blocks are as long as its vectors; for others it has nothing but slow loops.
      if (dnnl::get_effective_cpu_isa() >= dnnl::cpu_isa::avx512_core)
        add_layout("nChw16c", Tag::nChw16c, true, op, arrays, contenders);
      else
        add_layout("nChw8c", Tag::nChw8c, true, op, arrays, contenders);
    }
  } catch (const dnnl::error& error) {
    if (error.status != dnnl_unimplemented) throw;  // a dtype that it has only on other processors
  }
}

}  // namespace bench
