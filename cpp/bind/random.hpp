// Generators, seeds and offsets as arguments.
#pragma once

#include <memory>

#include "bind/arrays.hpp"
#include "bnext/random.hpp"

namespace bnext::bind {

// The generator `object`, or the default one for None; TypeError for anything else.
std::shared_ptr<Generator> generator_of(const char* operation, py::handle object);

// An unsigned 64-bit integer, which bool is not.
std::uint64_t word(const char* operation, const char* argument, py::handle object);

}  // namespace bnext::bind
