// The kernels of one instruction set. CMake compiles this file once per bnext_isa row, with
// BNEXT_ISA_ID set; everything but their table is internal, and nothing runs before dispatch has
// asked whether the processor can. Nothing may be thrown here: there are no tables for it.
#include "cpu/batch_norm.hpp"
#include "cpu/dropout.hpp"

#ifndef BNEXT_ISA_ID
#error "compile through bnext_isa() of CMakeLists.txt"
#endif

namespace bnext {
namespace {

template <class S>
struct Table {
  template <Mask mask>
  using Any = General<S, mask>;
  // Loops of their own where they are worth their space, otherwise those of whatever fusion says.
  static constexpr bool worth_it = sizeof(S) <= 4;
  using None = Plain<S, epilogue::none>;
  template <Mask mask>
  using Clip = typename Choice<worth_it, Plain<S, clip>, Any<mask>>::type;
  // A limit that is none costs backward a comparison in both passes.
  template <Mask mask>
  using ReluBack =
      typename Choice<sizeof(S) == 4 && !compact, Plain<S, epilogue::relu>, Clip<mask>>::type;
  template <Mask mask, bool residual>
  using ReluAnd =
      typename Choice<worth_it, General<S, mask, Known<positive_part, residual, !residual>>,
                      Any<mask>>::type;
  template <Mask mask>
  using Dropout = ReluAnd<mask, false>;
  template <Mask mask>
  using Residual = ReluAnd<mask, true>;
  static constexpr Mask drawn = Mask::drawn, noted = Mask::drawn_and_noted, again = Mask::noted;
  template <class Tail>
  static constexpr typename Kernels<S>::Apply forward{apply<S, Tail>, sums_next<S, Tail>};
  template <class Tail, class SumTail>
  static constexpr typename Kernels<S>::ApplyGrad backward{apply_grad<S, Tail, SumTail>,
                                                           grad_sums_next<S, Tail>};
  static constexpr Kernels<S> kernels{
      moments<S>,
      {forward<None>, forward<Clip<drawn>>, forward<Clip<drawn>>, forward<Dropout<drawn>>,
       forward<Residual<drawn>>, forward<Any<drawn>>},
      {grad_sums<S, None>, grad_sums<S, ReluBack<noted>>, grad_sums<S, Clip<noted>>,
       grad_sums<S, Dropout<noted>>, grad_sums<S, Residual<noted>>, grad_sums<S, Any<noted>>},
      {backward<None, None>, backward<ReluBack<again>, ReluBack<noted>>,
       backward<Clip<again>, Clip<noted>>, backward<Dropout<again>, Dropout<noted>>,
       backward<Residual<again>, Residual<noted>>, backward<Any<again>, Any<noted>>},
      dropout<S>};
};

}  // namespace

#define BNEXT_CONCAT(a, b) a##b
#define BNEXT_KERNELS_OF(id) BNEXT_CONCAT(kernels_, id)
#define BNEXT_OF_DTYPE(name, type, compute) Table<type>::kernels,

extern const IsaKernels BNEXT_KERNELS_OF(BNEXT_ISA_ID);
const IsaKernels BNEXT_KERNELS_OF(BNEXT_ISA_ID){BNEXT_DTYPES(BNEXT_OF_DTYPE)};

}  // namespace bnext
