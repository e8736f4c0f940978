"""Compile the Triton kernels for GPUs that are not there, through their own launchers.

Run: `python tests/ahead_of_time.py [TARGET ...]` prints one JSON record per kernel: registers,
spills, shared memory, matrix instructions. A process of its own, because under TRITON_INTERPRET=1
nothing can be compiled.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kvpo_kernels.backends.gluon import routed_attention as gluon
from kvpo_kernels.backends.triton import configs, norm_rope, store_frames, tve_grpo
from kvpo_kernels.backends.triton import routed_attention as portable

# name: (target, kind of GPU in the table of launch configurations)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "sm_80"),
    "sm_89": (GPUTarget("cuda", 89, 32), "sm_86"),
    "sm_90": (GPUTarget("cuda", 90, 32), "sm_90"),
    "sm_100": (GPUTarget("cuda", 100, 32), "sm_100"),
    "sm_120": (GPUTarget("cuda", 120, 32), "sm_86"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "amd"),
}
# op, backend, head size, tokens of a frame
PORTABLE = [("routed_attention", "triton", D, 1560) for D in (64, 128, 256)]
PORTABLE += [("routed_attention float8_e4m3fn", "triton", 128, 1560)]  # int8 needs no more
PORTABLE += [("tve_grpo", "triton", 0, 0), ("norm_rope", "triton", 128, 1560)]
PORTABLE += [("store_frames", "triton", 128, 1560)]
HOPPER = [("routed_attention", "gluon", D, T) for D in (64, 128) for T in (1560, 1350, 128)]
HOPPER += [("routed_attention int8", "triton", 128, 1560)]


def call(op: str, backend: str, head_size: int, frame_tokens: int, kind: str) -> None:
    """Call the launchers as for one block of a 1.3B model; nothing is read or written."""
    if op == "tve_grpo":
        pred, target = torch.empty(2, 8, 4, 299_520, dtype=torch.bfloat16)
        weights, scores = torch.empty(4, dtype=torch.float64), torch.empty(8)
        options = (0.1, 0.2, 10.0, 20.0, 0.0, 1.0, 1.0, False, True)
        tve_grpo.forward(pred, target, weights, weights, scores, scores, None, *options)
        return
    B, Q, H, F, R, dtype = 8, 4680, 12, 33, 9, torch.bfloat16
    if op == "norm_rope":
        x, pool = (torch.empty(*n, H, head_size, dtype=dtype) for n in ((B, Q), (F, 1560)))
        angles = torch.empty(2, Q, head_size // 2)
        weights = torch.empty(2, H * head_size, dtype=dtype)
        slots = torch.empty(B, 3, dtype=torch.int64)
        norm_rope.write(x, x, x, *weights, *angles, pool, pool, slots, 1e-6)
        norm_rope.backward(x, x, x, x, *weights, *angles, 1e-6)
        return
    if op == "store_frames":
        frames, slots = torch.empty(24, 1560, H, head_size, dtype=dtype), torch.empty(24).long()
        for page in (torch.int8, torch.float8_e4m3fn):
            store_frames.store(frames, frames.to(page), torch.empty(24, H), slots)
        return
    q, *live = (torch.empty(B, Q, H, head_size, dtype=dtype) for _ in range(3))
    _, _, page = op.partition(" ")
    page_dtype, scales = (getattr(torch, page), torch.ones(F, H)) if page else (dtype, None)
    pools = [torch.empty(F, frame_tokens, H, head_size, dtype=page_dtype) for _ in range(2)]
    slots = torch.empty(B, R, dtype=torch.int32)
    launches = configs.launches(kind, head_size, dtype.itemsize, bool(page))
    launcher = {"triton": portable, "gluon": gluon}[backend]
    # Ada and later convert float8 themselves.
    as_float8 = kind in ("sm_90", "sm_100")
    pages = (lambda pool: pool) if as_float8 else portable._pages
    with (
        mock.patch.object(portable, "_launches", return_value=launches),
        mock.patch.object(portable, "_pages", pages),
    ):
        inputs = (q, *pools, slots, *live, scales, scales)
        out, lse = launcher.forward(*inputs, 0.1)
        launcher.backward(out, *inputs, out, lse, 0.1)


def compiled(
    target: str, op: str, backend: str, head_size: int, frame_tokens: int
) -> list[dict[str, Any]]:
    """Compile the kernels of a call for one target; what came out, in the order of launches."""
    gpu, kind = TARGETS[target]
    records = []

    class Driver:
        """As much of a driver as the specialization of a call asks for."""

        get_current_device = staticmethod(lambda: target)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: gpu)

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        problem = {
            "op": op,
            "backend": backend,
            "head_size": head_size,
            "frame_tokens": frame_tokens,
        }
        name = self.__name__.strip("_")
        records.append({"target": target, "kernel": name, **problem, **facts(kernel)})

    run = JITFunction.run
    with (
        mock.patch.object(triton.runtime.driver, "_active", Driver(), create=True),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        call(op, backend, head_size, frame_tokens, kind)
    return records


def facts(kernel: Any) -> dict[str, Any]:
    """Resources of a compiled kernel and how often it has the instructions that matter."""
    found = {"shared_bytes": kernel.metadata.shared, "num_warps": kernel.metadata.num_warps}
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]
        return found | {
            "registers": number("vgpr_count"),
            "spilled_bytes": 4 * number("vgpr_spill_count"),
            "matrix": len(re.findall(r"\bv_mfma", text)),
            "tma_loads": 0,
        }
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        call = lambda *words: (
            subprocess.run([*words, file.name], capture_output=True, text=True, check=True).stdout
        )
        usage = call(tools / "cuobjdump", "--dump-resource-usage")
        code = call(tools / "nvdisasm", "-c")
    registers, stack, local = re.search(  # type: ignore[union-attr]
        r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage
    ).groups()
    count = lambda pattern: len(re.findall(pattern, code))
    return found | {
        "registers": int(registers),
        "stack_bytes": int(stack) + int(local),
        "spilled_bytes": 4 * (count(r"\bLDL") + count(r"\bSTL")),
        "matrix": count(r"\b(?:HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA)\b"),
        "wgmma": count(r"\bHGMMA"),
        "tma_loads": count(r"\bUTMALDG"),
        "fused_adds": count(r"\bFFMA"),
    }


def main() -> None:
    """Compile for the targets named, all if none is."""
    for target in sys.argv[1:] or TARGETS:
        for problem in PORTABLE + (HOPPER if target == "sm_90" else []):
            for record in compiled(target, *problem):
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
