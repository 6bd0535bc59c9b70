#!/bin/sh
# All linters; needs pip install ".[lint]".
set -eu
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
mypy
find cpp tests/cpp benchmarks/cpp \( -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh' -o -path '*emulated_cuda*.h' \) -print0 | xargs -0 clang-format --dry-run --Werror
