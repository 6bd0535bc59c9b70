// The backend of one instruction set. CMake compiles this file once per bnext_isa row, with
// BNEXT_ISA_ID and BNEXT_ISA_NAME set; everything but the table is internal, and nothing runs
// before dispatch has asked whether the processor can.
#include "core/dispatch.hpp"
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
  using None = Plain<S, epilogue::none>;
  template <Mask mask>
  using Clip = typename Choice<sizeof(S) == 4 || (sizeof(S) == 2 && !compact), Plain<S, clip>,
                               Any<mask>>::type;
  // The order of sums of half types follows from whether gradients are as stored, everywhere alike.
  using ClipSums =
      typename Choice<sizeof(S) <= 4, Plain<S, clip>, Any<Mask::drawn_and_noted>>::type;
  template <Mask mask, bool residual>
  using ReluAnd = typename Choice<sizeof(S) == 4 && !compact,
                                  General<S, mask, Known<epilogue::relu, residual, !residual>>,
                                  Any<mask>>::type;
  template <Mask mask>
  using Dropout = ReluAnd<mask, false>;
  template <Mask mask>
  using Residual = ReluAnd<mask, true>;
  static constexpr Mask drawn = Mask::drawn, noted = Mask::drawn_and_noted, again = Mask::noted;
  static constexpr Kernels<S> kernels{
      moments<S>,
      {sums_next<S, None>, sums_next<S, Clip<drawn>>, sums_next<S, Dropout<drawn>>,
       sums_next<S, Residual<drawn>>, sums_next<S, Any<drawn>>},
      {grad_sums_next<S, None>, grad_sums_next<S, Clip<again>>, grad_sums_next<S, Dropout<again>>,
       grad_sums_next<S, Residual<again>>, grad_sums_next<S, Any<again>>},
      {apply<S, None>, apply<S, Clip<drawn>>, apply<S, Dropout<drawn>>, apply<S, Residual<drawn>>,
       apply<S, Any<drawn>>},
      {grad_sums<S, None>, grad_sums<S, ClipSums>, grad_sums<S, Dropout<noted>>,
       grad_sums<S, Residual<noted>>, grad_sums<S, Any<noted>>},
      {apply_grad<S, None, None>, apply_grad<S, Clip<again>, ClipSums>,
       apply_grad<S, Dropout<again>, Dropout<noted>>,
       apply_grad<S, Residual<again>, Residual<noted>>, apply_grad<S, Any<again>, Any<noted>>},
      dropout<S>};
};

template <class S, class Args>
void run(const Args& args) {
  launch(args, Table<S>::kernels);
}

}  // namespace

#define BNEXT_CONCAT(a, b) a##b
#define BNEXT_BACKEND_OF(id) BNEXT_CONCAT(backend_, id)
#define BNEXT_LAUNCHER_FOR_DTYPE(name, type, compute) run<type>,
#define BNEXT_ROW(op, args) {BNEXT_DTYPES(BNEXT_LAUNCHER_FOR_DTYPE)},

extern const Backend BNEXT_BACKEND_OF(BNEXT_ISA_ID);
const Backend BNEXT_BACKEND_OF(BNEXT_ISA_ID){BNEXT_ISA_NAME, DeviceKind::cpu, BNEXT_OPS(BNEXT_ROW)};

}  // namespace bnext
