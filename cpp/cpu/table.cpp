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

template <class T>
struct Table {
  using none = epilogue::none;
  using relu = epilogue::relu;
  using leaky_relu = epilogue::leaky_relu;
  static constexpr Kernels<T> kernels{
      moments<T>,
      {apply<T, none>, apply<T, relu>, apply<T, leaky_relu>, apply<T, staged>},
      {grad_sums<T, none>, grad_sums<T, relu>, grad_sums<T, leaky_relu>, grad_sums<T, staged>},
      {apply_grad<T, none>, apply_grad<T, relu>, apply_grad<T, leaky_relu>, apply_grad<T, staged>},
      dropout<T>};
};

template <class T, class Args>
void run(const Args& args) {
  launch(args, Table<T>::kernels);
}

}  // namespace

#define BNEXT_CONCAT(a, b) a##b
#define BNEXT_BACKEND_OF(id) BNEXT_CONCAT(backend_, id)
#define BNEXT_LAUNCHER_FOR_DTYPE(name, type) run<type>,
#define BNEXT_ROW(op, args) {BNEXT_DTYPES(BNEXT_LAUNCHER_FOR_DTYPE)},

extern const Backend BNEXT_BACKEND_OF(BNEXT_ISA_ID);
const Backend BNEXT_BACKEND_OF(BNEXT_ISA_ID){BNEXT_ISA_NAME, BNEXT_OPS(BNEXT_ROW)};

}  // namespace bnext
