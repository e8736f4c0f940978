#!/usr/bin/env bash
# Everything a GPU is needed for, in one command and under ten minutes: build, correctness, speed.
#
#   benchmarks/device_suite.sh            prints one table last
#   OUT=folder benchmarks/device_suite.sh writes its JSON and log there, not to benchmarks/results
#   DEVICE=cpu benchmarks/device_suite.sh proves the suite itself where no GPU is: small, no bars
#   KVPO_COMMIT=... names the commit where the source comes without its repository
#
# A part that fails, hangs or runs out of its time is reported in the table, and the rest still runs:
# each op and backend has a process of its own, and what it has measured is written as it goes.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
DEVICE=${DEVICE:-cuda}
mkdir -p "$OUT"
export KVPO_COMMIT=${KVPO_COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
commit=${KVPO_COMMIT:0:10}
# "NVIDIA H100 80GB HBM3" -> h100
name=$("$PYTHON" -c "import torch; print(torch.cuda.get_device_name().split()[1].lower())" 2>/dev/null || echo cpu)
[ "$DEVICE" = cpu ] && name=cpu
result=$OUT/$name-$commit.json
rm -f "$result"
logs=$(mktemp -d)
failed=()

part() { # name, seconds, command...
  local label=$1 limit=$2 begin=$SECONDS
  shift 2
  timeout --kill-after=5 "$limit" "$@" >"$logs/$label" 2>&1
  local status=$?
  { echo "== $label: exit status $status, $((SECONDS - begin)) s"; cat "$logs/$label"; } >>"$OUT/suite.log"
  [ $status = 0 ] || failed+=("$label: exit status $status after $((SECONDS - begin)) s")
}

bench() { # op, backend, seconds
  part "bench-$1-$2" "$3" "$PYTHON" -m kvpo_kernels bench --op "$1" --backend "$2" --add --out "$result"
}

build() {
  "$PYTHON" -c "import kvpo_kernels._native, kvpo_kernels._cuda" 2>/dev/null && return
  local nvcc
  nvcc=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
  cmake -S . -B build/suite -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DPython_EXECUTABLE="$(command -v "$PYTHON")" -DKVPO_PYTHON_OUTPUT="$PWD/kvpo_kernels" \
    -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" \
    -DKVPO_BUILD_CUDA="$([ -n "$nvcc" ] && echo ON || echo OFF)" ${nvcc:+-DCMAKE_CUDA_COMPILER="$nvcc"} &&
    cmake --build build/suite
}
export -f build
export PYTHON PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

: >"$OUT/suite.log"
part build 60 bash -c build
if [ "$DEVICE" = cpu ]; then
  part bench 120 "$PYTHON" -m kvpo_kernels bench --device cpu --quick --small --add --out "$result"
  part layer 60 "$PYTHON" benchmarks/layer.py --device cpu --rounds 3
else
  # Most of the tests' time is compilation: in parallel where pytest can. A test that hangs ends.
  options=$("$PYTHON" -c "import xdist; print('-n 8')" 2>/dev/null)
  options+=$("$PYTHON" -c "import pytest_timeout; print(' --timeout 60')" 2>/dev/null)
  # shellcheck disable=SC2086
  part tests 120 "$PYTHON" -m pytest tests/gpu -p no:cacheprovider $options
  # First what is the default, last what has never run.
  bench routed_attention triton 90
  bench tve_grpo triton 35
  bench norm_rope triton 35
  bench store_frames triton 20
  bench tve_grpo cuda 25
  part layer 25 "$PYTHON" benchmarks/layer.py --size wan-1.3b --out "$OUT/$name-layer-$commit.json"
  part iteration 75 "$PYTHON" benchmarks/iteration.py --size wan-1.3b --layers 1 --rounds 2 \
    --out "$OUT/$name-iteration-$commit.json"
  bench routed_attention gluon 70
fi

echo "== tests"
tail -n 25 "$logs/tests" 2>/dev/null
echo "== benchmarks"
cat "$logs"/bench* "$logs"/layer "$logs"/iteration 2>/dev/null
echo "== suite: ${#failed[@]} parts failed, $SECONDS s; $result"
for f in "${failed[@]}"; do echo "FAILED $f"; done
rm -r "$logs"
[ ${#failed[@]} = 0 ]
