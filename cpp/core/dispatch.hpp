// A backend is a table of launchers, one per operation and dtype.
#pragma once

#include <cstddef>

#include "bnext/types.hpp"
#include "core/args.hpp"

namespace bnext {

#define BNEXT_COUNT(...) +1
constexpr std::size_t dtype_count = 0 BNEXT_DTYPES(BNEXT_COUNT);
#undef BNEXT_COUNT

struct Backend {
  const char* name;
  DeviceKind device;
#define BNEXT_FIELD(op, args) void (*op[dtype_count])(const args&);
  BNEXT_OPS(BNEXT_FIELD)
#undef BNEXT_FIELD
};

// The table for arrays of `device`; those in main memory are for the one in use.
const Backend& backend_for(const Device& device);

}  // namespace bnext
