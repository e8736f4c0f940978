"""The Triton kernels compile for every GPU they are for, without spilling registers."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from ahead_of_time import HOPPER, PORTABLE

from kvpo_kernels import registry

SCRIPT = Path(__file__).parent / "ahead_of_time.py"
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# Of an SM; what the driver keeps for itself is not in these.
SHARED_BYTES = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
KERNELS = {
    "routed_attention": ["forward_kernel", "grad_q_kernel", "grad_live_kernel"],
    "tve_grpo": ["energies_kernel", "gradient_kernel"],
    "norm_rope": ["forward_kernel"] * 2 + ["backward_kernel"] * 2,
    "store_frames": ["store_kernel"] * 2,
}
# Two accumulators, two score tiles and their rounded copies fill 240 registers but for a few words,
# which go to L1 outside the matrix products' way.
ACCEPTED_SPILLS = {("gluon", "grad_q_kernel"): 64, ("gluon", "grad_live_kernel"): 128}
# The launch configurations were measured with triton 3.6, which spills nothing there; 3.7, which
# torch 2.13 asks for, runs out of registers in these. No more than now, until it is measured.
SPILLS_OF_TRITON_3_7 = {
    ("sm_90", "grad_q_kernel", 64): 8,
    ("sm_90", "grad_live_kernel", 128): 8,
    ("sm_100", "forward_kernel", 128): 364,
    ("sm_120", "grad_q_kernel", 64): 32,
    ("sm_120", "grad_live_kernel", 64): 92,
    ("sm_120", "grad_live_kernel", 128): 24,
}
# Matrix instructions of a consumer before, in and after its loop, for heads of 16 n. Each is 16
# deep: n for scores, 8 where 128 keys are summed over, 4 where 64 queries are.
PRODUCTS = {
    "forward_kernel": lambda n: 2 * n + 2 * 8,  # scores twice, values twice
    "grad_q_kernel": lambda n: (
        2 * (n + n) + 2 * 8
    ),  # scores and their gradients twice, grad_q twice
    "grad_live_kernel": lambda n: n + n + 4 + 4,
}


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, target], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in done.stdout.splitlines()]
    compiled = [(r["op"], r["backend"], r["head_size"], r["frame_tokens"]) for r in records]
    problems = PORTABLE + (HOPPER if target == "sm_90" else [])
    for problem in problems:
        names = [r["kernel"] for r, p in zip(records, compiled, strict=True) if p == problem]
        assert names == KERNELS[problem[0].partition(" ")[0]], problem
    assert set(compiled) == set(problems)
    for r in records:
        accepted = ACCEPTED_SPILLS.get((r["backend"], r["kernel"]), 0)
        if r["backend"] == "triton" and registry.TRITON_VERSION.startswith("3.7."):
            accepted = SPILLS_OF_TRITON_3_7.get((target, r["kernel"], r["head_size"]), 0)
        assert r["spilled_bytes"] <= accepted, r
        assert r["shared_bytes"] <= SHARED_BYTES[target] * 1024, r
        assert r["registers"] <= (512 if target == "gfx942" else 255), r
        if r["op"] == "store_frames" and "fused_adds" in r:
            # Those of one division; none of a value with what rounds it, or codes would differ.
            assert r["fused_adds"] < 32, r
        if not r["op"].startswith("routed_attention"):
            continue
        assert r["matrix"] > 0, r
        if target in ("sm_90", "sm_100"):
            assert r["tma_loads"] > 0, r
        if target == "sm_90" and r["head_size"] <= 128:
            assert r["wgmma"] == r["matrix"], r
        if r["backend"] == "gluon":  # 2 consumers of 4 warps, and the producer's
            assert r["num_warps"] == 12 and r["registers"] == 168, r
            assert r["wgmma"] == 2 * PRODUCTS[r["kernel"]](r["head_size"] // 16), r


@pytest.mark.skipif(not registry.HAS_CUDA_KERNELS, reason=registry.WHY_NO_CUDA_KERNELS)
def test_cuda_kernels_do_not_spill() -> None:
    spec = importlib.util.find_spec("kvpo_kernels._cuda")
    assert spec is not None and spec.origin is not None
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run(
        [cuobjdump, "--dump-resource-usage", spec.origin],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for target in ("sm_80", "sm_90"):
        code = "".join(
            part for part in usage.split("Fatbin elf code") if f"arch = {target}" in part
        )
        kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", code)
        for name in ("fused_kernel", "energy_kernel", "gradient_kernel"):
            # float32 and bfloat16, aligned or not
            assert sum(name in kernel for kernel, *_ in kernels) == 4, (target, name, usage)
        for kernel, registers, stack, local in kernels:
            assert int(registers) <= 64 and int(stack) == int(local) == 0, (target, kernel)
