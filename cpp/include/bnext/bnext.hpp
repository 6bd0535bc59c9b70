// bnext: fast, exact Batch Normalization and Dropout on the CPU.
#pragma once

#include <bnext/batch_norm.hpp>
#include <bnext/dropout.hpp>
#include <bnext/random.hpp>
#include <bnext/runtime.hpp>
#include <bnext/types.hpp>
