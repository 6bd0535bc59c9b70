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
  using None = Plain<S, epilogue::none>;
  using Relu = Plain<S, epilogue::relu>;
  using Any = General<S, Mask::drawn>;
  using AnySums = General<S, Mask::drawn_and_noted>;
  using AnyAgain = General<S, Mask::noted>;
  static constexpr Kernels<S> kernels{
      moments<S>,
      {apply<S, None>, apply<S, Relu>, apply<S, Any>},
      {grad_sums<S, None>, grad_sums<S, Relu>, grad_sums<S, AnySums>},
      {apply_grad<S, None, None>, apply_grad<S, Relu, Relu>, apply_grad<S, AnyAgain, AnySums>},
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
