#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: build, run all tests of the CUDA backend, compute-sanitizer and
# the benchmark, in some eight minutes (or SECONDS_IN_ALL) and without a network.
#   [SECONDS_IN_ALL=470] benchmarks/gpu_check.sh OUT
# Needs nvcc, CMake, a C++ compiler, and a Python with pybind11, numpy, ml_dtypes, pytest,
# hypothesis and torch; pytest-xdist makes the tests faster. OUT gets a log of each step, gpu.json, gpu.png and summary.txt. A step that
# fails does not stop the others; the exit status says whether all went well.
set -uo pipefail
[ $# -eq 1 ] || { sed -n 's/^#   //p' "$0"; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
build=${BUILD:-build/gpu}
failed=0
: > "$out/summary.txt"

# step NAME SECONDS COMMAND...: its output goes to OUT/NAME.log.
step() {
  local name=$1 limit=$2 begin=$SECONDS result=ok
  shift 2
  timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1 || { result="FAILED ($?)"; failed=1; }
  echo "$name: $result in $((SECONDS - begin)) s" | tee -a "$out/summary.txt"
  tail -n "${tail:-3}" "$out/$name.log"
}

[ -x "$(command -v nvcc)" ] || export PATH="$PATH:/usr/local/cuda/bin"
architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '. ')
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader > "$out/device.txt"

configure() {
  cmake -S . -B "$build" -DCMAKE_BUILD_TYPE=Release -DBNEXT_CUDA=ON -DBNEXT_PYTHON=ON \
    -DBNEXT_TESTS=ON -DCMAKE_CUDA_ARCHITECTURES="$architecture" \
    -DPython_EXECUTABLE="$(command -v "$python")" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
    cmake --build "$build" --parallel
}
export -f configure
export build python architecture
step build 240 bash -c configure
cp "$build"/_core*.so python/bnext/ || exit 1
export PYTHONPATH=$PWD/python PYTHONUNBUFFERED=1

step config 60 "$python" -c "import bnext; bnext.show_config()"
step c++ 60 "$build/tests/cpp/bnext_test" cuda
# The tests of every backend, for this one; test_cuda.py also has arrays of the device.
parallel=$("$python" -c "import xdist" 2> /dev/null && echo "-n 8")
# shellcheck disable=SC2086
step tests 200 "$python" -m pytest -m gpu -q -p no:cacheprovider -p no:benchmark $parallel tests
for tool in memcheck racecheck; do
  if command -v compute-sanitizer > /dev/null; then
    step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$build/tests/cpp/bnext_test" cuda --small
  else
    echo "$tool: no compute-sanitizer here" | tee -a "$out/summary.txt"
  fi
done
left=$((${SECONDS_IN_ALL:-470} - SECONDS))
left=$((left > 60 ? left : 60))
tail=12 step benchmark "$left" "$python" benchmarks/gpu_ops.py \
  --write "$out/gpu.json" --plot "$out/gpu.png" --seconds $((left - 25))
echo "all: $SECONDS s" | tee -a "$out/summary.txt"
exit $failed
