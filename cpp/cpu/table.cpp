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
#define BNEXT_ENTRY(name) apply<T, epilogue::name>,
#define BNEXT_SUMS_ENTRY(name) grad_sums<T, epilogue::name>,
#define BNEXT_GRAD_ENTRY(name) apply_grad<T, epilogue::name>,
  static constexpr Kernels<T> kernels{moments<T>,
                                      {BNEXT_EPILOGUES(BNEXT_ENTRY)},
                                      {BNEXT_EPILOGUES(BNEXT_SUMS_ENTRY)},
                                      {BNEXT_EPILOGUES(BNEXT_GRAD_ENTRY)},
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
