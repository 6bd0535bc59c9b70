// Generators as arguments.
#pragma once

#include <memory>

#include "bind/arrays.hpp"
#include "bnext/random.hpp"

namespace bnext::bind {

// The generator `object`, or the default one for None; TypeError for anything else.
std::shared_ptr<Generator> generator_of(const char* operation, py::handle object);

}  // namespace bnext::bind
