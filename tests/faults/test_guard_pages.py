"""Kernels read and write nothing beyond an allocation: the page after it ends the process.

Fault case 14. Sanitizers do not see what a compiler adds when it vectorises; this does.
"""

import subprocess
import sys

GUARDED = """
import ctypes, mmap, sys
import torch
from kvpo_kernels import RopeTable, RouteTable, _native
from kvpo_kernels import (qk_norm_rope, qk_norm_rope_write, quantize_frames, routed_attention,
    tve_grpo_loss)
from kvpo_kernels.ops.store_frames import store_frames

libc = ctypes.CDLL(None, use_errno=True)

def at_the_end(t):
    "A copy whose last byte is the last that may be touched."
    page = mmap.PAGESIZE
    size = -(-t.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + size), page, 0) == 0
    kept.append(memory)
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=t.nbytes, offset=size - t.nbytes)
    return copy.copy_(t.contiguous().view(-1).view(torch.uint8)).view(t.dtype).view(t.shape)

def same(call, inputs):
    a, b = call(*inputs), call(*[at_the_end(t) for t in inputs])
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

def attention(q, k, v, k_live, v_live, grad, *scales):
    leaves = [t.requires_grad_() for t in (q, k_live, v_live)]
    scales = dict(zip(("k_scales", "v_scales"), scales))
    out = routed_attention(q, k, v, table, k_live, v_live, backend="cpu", **scales)
    return [out, *torch.autograd.grad(out, leaves, grad)]

def objective(pred, target, weights, old, advantages):
    pred.requires_grad_()
    r = tve_grpo_loss(pred, target, weights, old, advantages, backend="cpu")
    return [r.numbers, r.pred_grad]

def norm_rope(q, k, v, q_weight, k_weight, pools, grad):
    leaves = [t.requires_grad_() for t in (q, k, q_weight, k_weight)]
    outs = qk_norm_rope(*leaves, rope, 3, grid=grid, backend="cpu")
    grads = torch.autograd.grad(outs, leaves, [grad, grad])
    with torch.no_grad():
        written = qk_norm_rope_write(q, k, v, q_weight, k_weight, rope, 3, grid=grid,
            k_pool=pools[0], v_pool=pools[1], slots=slots, backend="cpu")
    return [*outs, *grads, written, pools]

def stored(frames, pool, scales):
    store_frames(pool, scales, torch.tensor([2, 0]), frames, "cpu")
    return [pool.view(torch.uint8), scales]

kept = []
g = torch.Generator().manual_seed(0)
for isa in ("portable", "avx2", "avx512", "avx512_bf16"):
    _native.set_isa_limit(isa)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
        for T, L, Q in ((13, 3, 5), (1560 // 8, 7, 33), (1, 1, 1)):
            table = RouteTable([[2], [0, 2]], 3)
            pools, live = ([draw(n, t, 1, 48) for _ in "kv"] for n, t in ((3, T), (2, L)))
            q, grad = (draw(2, Q, 2, 48) for _ in "qg")
            same(attention, [q, *pools, *live, grad])
            for page in (torch.int8, torch.float8_e4m3fn):
                pages, scales = zip(*(quantize_frames(pool, page) for pool in pools))
                same(attention, [q, *pages, *live, grad, *scales])
        for T, H, D in ((1, 1, 1), (5, 3, 37), (13, 2, 48)):
            for page in (torch.int8, torch.float8_e4m3fn):
                pool = torch.zeros(3, T, H, D).to(page)
                same(stored, [draw(2, T, H, D), pool, torch.ones(3, H)])
        if dtype is torch.float16:
            continue
        for N in (1, 37, 4097):
            scores = [torch.randn(3, generator=g) for _ in "oa"]
            same(objective, [draw(3, 2, N), draw(3, 2, N), torch.rand(2, generator=g), *scores])
        for grid, H, D in (((1, 3, 5), 3, 16), ((2, 1, 1), 1, 48)):
            rope, T = RopeTable(D), grid[1] * grid[2]
            slots = torch.tensor([[3, 0][: grid[0]], [1, 2][: grid[0]]])
            x = [draw(2, grid[0] * T, H, D) for _ in "qkv"]
            same(norm_rope, [*x, draw(H * D), draw(H * D), torch.zeros(2, 4, T, H, D, dtype=dtype),
                             torch.ones_like(x[0])])
print("inside")
"""


def test_nothing_beyond_an_allocation_is_touched() -> None:
    """In a process of its own: a load past the end ends it."""
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True)
    assert done.stdout == "inside\n", done.stderr[-2000:]
