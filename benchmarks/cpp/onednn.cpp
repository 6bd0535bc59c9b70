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

// `from` in the layout of `md`, in memory of oneDNN's own.
memory converted(const memory::desc& md, const memory::desc& from_md, const float* from) {
  dnnl::stream stream(cpu());
  memory source(from_md, cpu(), const_cast<float*>(from)), target(md, cpu());
  dnnl::reorder(source, target).execute(stream, source, target);
  stream.wait();
  return target;
}

void add_layout(const char* name, Tag tag, bool own_memory, Op op, const Case& k, Arrays& arrays,
                bool relu, std::vector<Contender>& contenders) {
  using Forward = dnnl::batch_normalization_forward;
  using Backward = dnnl::batch_normalization_backward;
  const memory::dims dims{k.n, k.c, k.h, k.w};
  const memory::desc md(dims, memory::data_type::f32, tag);
  const memory::desc plain(dims, memory::data_type::f32, Tag::nchw);
  const memory::desc row({k.c}, memory::data_type::f32, Tag::a);
  auto flags = dnnl::normalization_flags::use_scale | dnnl::normalization_flags::use_shift;
  if (relu) flags |= dnnl::normalization_flags::fuse_norm_relu;
  const auto wrap = [&](const float* data) {
    return own_memory ? converted(md, plain, data) : memory(md, cpu(), const_cast<float*>(data));
  };
  const memory x = wrap(arrays.x), grad_y = wrap(arrays.grad_y);
  const memory out = own_memory ? memory(md, cpu()) : memory(md, cpu(), arrays.out);
  const memory mean(row, cpu(), arrays.mean.data()), var(row, cpu(), arrays.var.data());
  const memory scale(row, cpu(), arrays.weight.data()), shift(row, cpu(), arrays.bias.data());

  const auto kind =
      op == Op::inference ? dnnl::prop_kind::forward_inference : dnnl::prop_kind::forward_training;
  const auto more =
      op == Op::inference ? flags | dnnl::normalization_flags::use_global_stats : flags;
  const Forward::primitive_desc forward_pd({kind, md, 1e-5f, more}, cpu());
  std::unordered_map<int, memory> args{{DNNL_ARG_SRC, x},        {DNNL_ARG_MEAN, mean},
                                       {DNNL_ARG_VARIANCE, var}, {DNNL_ARG_SCALE, scale},
                                       {DNNL_ARG_SHIFT, shift},  {DNNL_ARG_DST, out}};
  auto stream = std::make_shared<dnnl::stream>(cpu());
  dnnl::primitive primitive = Forward(forward_pd);
  if (relu && op != Op::inference) {
    // The forward pass leaves there what ReLU let through, for the backward pass.
    args.insert({DNNL_ARG_WORKSPACE, memory(forward_pd.workspace_desc(), cpu())});
    primitive.execute(*stream, args);
    stream->wait();
  }
  if (op == Op::backward) {
    const Backward::primitive_desc backward_pd({dnnl::prop_kind::backward, md, md, 1e-5f, flags},
                                               cpu(), forward_pd);
    args.erase(DNNL_ARG_DST);
    args.insert({DNNL_ARG_DIFF_DST, grad_y});
    args.insert({DNNL_ARG_DIFF_SRC, out});
    args.insert({DNNL_ARG_DIFF_SCALE, memory(row, cpu(), arrays.grad_weight.data())});
    args.insert({DNNL_ARG_DIFF_SHIFT, memory(row, cpu(), arrays.grad_bias.data())});
    primitive = Backward(backward_pd);
  }
  contenders.push_back({std::string("onednn ") + name, [=] {
                          primitive.execute(*stream, args);
                          stream->wait();
                        }});
}

}  // namespace

void add_onednn(Op op, const Case& k, Arrays& arrays, bool channels_last, bool relu,
                std::vector<Contender>& contenders) {
  if (op == Op::dropout) return;
  if (channels_last) {
    add_layout("nhwc", Tag::nhwc, false, op, k, arrays, relu, contenders);
    return;
  }
  add_layout("nchw", Tag::nchw, false, op, k, arrays, relu, contenders);
  add_layout("nChw16c", Tag::nChw16c, true, op, k, arrays, relu, contenders);
}

}  // namespace bench
