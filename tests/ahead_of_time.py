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
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kvpo_kernels.backends.triton import configs
from kvpo_kernels.backends.triton import routed_attention as attention

# name: (target, kind of GPU in the table of launch configurations)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "sm_80"),
    "sm_89": (GPUTarget("cuda", 89, 32), "sm_86"),
    "sm_90": (GPUTarget("cuda", 90, 32), "sm_90"),
    "sm_100": (GPUTarget("cuda", 100, 32), "sm_100"),
    "sm_120": (GPUTarget("cuda", 120, 32), "sm_86"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "amd"),
}
HEAD_SIZES = (64, 128, 256)


def attention_kernels(head_size: int, dtype: torch.dtype, kind: str) -> Iterator[str]:
    """Call the launchers as for one block of a 1.3B model; yield the name of what is launched."""
    B, Q, H, F, T = 8, 4680, 12, 33, 1560
    q, live_k, live_v = (torch.empty(B, Q, H, head_size, dtype=dtype) for _ in range(3))
    pools = [torch.empty(F, T, H, head_size, dtype=dtype) for _ in range(2)]
    slots = torch.zeros(B, 9, dtype=torch.int32)
    launches = configs.launches(kind, head_size, dtype.itemsize)
    with mock.patch.object(attention, "_launches", return_value=launches):
        yield "forward"
        out, lse = attention.forward(q, *pools, slots, live_k, live_v, 0.1)
        yield "backward"
        attention.backward(out, q, *pools, slots, live_k, live_v, out, lse, 0.1)


def compiled(target: str, head_size: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Compile the kernels for one target; what came out, in the order of their launches."""
    gpu, kind = TARGETS[target]
    records = []

    class Driver:
        """As much of a driver as the specialization of a call asks for."""

        get_current_device = staticmethod(lambda: target)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: gpu)

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        name = self.__name__.strip("_")
        records.append({"target": target, "kernel": name, "head_size": head_size, **facts(kernel)})

    run = JITFunction.run
    with (
        mock.patch.object(triton.runtime.driver, "_active", Driver(), create=True),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        for _ in attention_kernels(head_size, dtype, kind):
            pass
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
    }


def main() -> None:
    """Compile for the targets named, all if none is."""
    for target in sys.argv[1:] or TARGETS:
        for head_size in HEAD_SIZES:
            for record in compiled(target, head_size, torch.bfloat16):
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
