#!/usr/bin/env bash
# Everything a GPU is needed for, in one command and under nine minutes: build, correctness, speed.
#
#   benchmarks/device_suite.sh            prints one table last
#   OUT=folder benchmarks/device_suite.sh writes its JSON and logs there, not to benchmarks/results
#   DEVICE=cpu benchmarks/device_suite.sh proves the suite itself where no GPU is: small, no bars
#
# A part that fails or runs out of its time is reported in the table, and the rest still runs.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
DEVICE=${DEVICE:-cuda}
mkdir -p "$OUT"
commit=$(git rev-parse --short=10 HEAD 2>/dev/null || echo unknown)
name=$("$PYTHON" -c "import torch; print(torch.cuda.get_device_name().split()[-1].lower())" 2>/dev/null || echo cpu)
[ "$DEVICE" = cpu ] && name=cpu
result=$OUT/$name-$commit.json
failed=()

part() { # name, seconds, command...
  local label=$1 limit=$2 begin=$SECONDS
  shift 2
  timeout --kill-after=5 "$limit" "$@" >"$OUT/suite-$label.log" 2>&1
  local status=$?
  [ $status = 0 ] || failed+=("$label: exit status $status after $((SECONDS - begin)) s, see suite-$label.log")
}

build() {
  "$PYTHON" -c "import kvpo_kernels._native, kvpo_kernels._cuda" 2>/dev/null && return
  cmake -S . -B build/suite -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DPython_EXECUTABLE="$(command -v "$PYTHON")" -DKVPO_PYTHON_OUTPUT="$PWD/kvpo_kernels" \
    -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" \
    -DKVPO_BUILD_CUDA="$(command -v nvcc >/dev/null && echo ON || echo OFF)" &&
    cmake --build build/suite
}
export -f build
export PYTHON PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

part build 60 bash -c build
if [ "$DEVICE" = cpu ]; then
  part bench 120 "$PYTHON" -m kvpo_kernels bench --device cpu --quick --out "$result"
  part layer 60 "$PYTHON" benchmarks/layer.py --device cpu --rounds 3
else
  # Most of the tests' time is compilation: in parallel where pytest can.
  workers=$("$PYTHON" -c "import xdist; print('-n 8')" 2>/dev/null)
  # shellcheck disable=SC2086
  part tests 150 "$PYTHON" -m pytest tests/gpu -p no:cacheprovider $workers
  part bench 250 "$PYTHON" -m kvpo_kernels bench --backend gluon --backend triton --backend cuda \
    --out "$result" --plot "$OUT/$name-$commit.png"
  part layer 30 "$PYTHON" benchmarks/layer.py --size wan-1.3b --out "$OUT/$name-layer-$commit.json"
  part iteration 70 "$PYTHON" benchmarks/iteration.py --size wan-1.3b --layers 2 --rounds 2 \
    --out "$OUT/$name-iteration-$commit.json" --plot "$OUT/$name-iteration-$commit.png"
fi

echo "== tests"
tail -n 25 "$OUT/suite-tests.log" 2>/dev/null
echo "== benchmarks"
cat "$OUT/suite-bench.log"
cat "$OUT/suite-layer.log" "$OUT/suite-iteration.log" 2>/dev/null
echo "== suite: ${#failed[@]} parts failed, $SECONDS s; $result"
for f in "${failed[@]}"; do echo "FAILED $f"; done
[ ${#failed[@]} = 0 ]
