"""What goes wrong around `routed_attention`: refused with a name, or contained."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpo_kernels import BackendUnavailable, RouteTable, _native, explain, routed_attention

RUNNING = [name for name, why in explain("routed_attention").items() if why is None]
each_backend = pytest.mark.parametrize("backend", RUNNING)
NAN, INF = float("nan"), float("inf")


def arguments(B: int = 2, L: int = 3, **changes: Any) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng)
    names = dict(
        q=draw(B, 5, 4, 16),
        k_pool=draw(3, 7, 2, 16),
        v_pool=draw(3, 7, 2, 16),
        table=RouteTable([[b % 3] for b in range(B)], 3),
        k_live=draw(B, L, 2, 16),
        v_live=draw(B, L, 2, 16),
    )
    return {**names, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 5, 16)}, ValueError, r"q must be \[B, Q, H, D\], got \[2, 5, 16\]"),
        ({"k_pool": torch.zeros(3, 7, 2, 32)}, ValueError, r"k_pool must be \[F, T, Hkv, 16\]"),
        ({"q": torch.zeros(2, 5, 3, 16)}, ValueError, "3 heads of q must be a multiple of the 2"),
        ({"v_pool": torch.zeros(3, 6, 2, 16)}, ValueError, "v_pool must be .* like k_pool"),
        ({"k_live": torch.zeros(1, 3, 2, 16)}, ValueError, r"k_live must be \[2, L, 2, 16\]"),
        ({"v_live": torch.zeros(2, 4, 2, 16)}, ValueError, "v_live must be .* like k_live"),
        ({"v_live": None}, ValueError, "both or neither"),
        ({"k_pool": torch.zeros(3, 7, 2, 16).half()}, TypeError, "k_pool must be torch.float32"),
        ({"v_live": torch.zeros(2, 3, 2, 16).double()}, TypeError, "v_live must be torch.float32"),
        ({"q": torch.zeros(2, 5, 4, 16, dtype=torch.int32)}, TypeError, "q must be float32"),
        ({"v_pool": torch.zeros(3, 7, 2, 16, device="meta")}, TypeError, "v_pool must be on cpu"),
        ({"table": RouteTable([[0], [4]], 5)}, ValueError, "made for a pool of 5 slots.* has 3"),
        ({"table": RouteTable([[0]], 3)}, ValueError, "table has 1 rows, but q has 2"),
        ({"table": torch.zeros(2, 1)}, TypeError, "table must be a RouteTable, got Tensor"),
        ({"scale": NAN}, ValueError, "scale must be finite, got nan"),
        ({"scale": INF}, ValueError, "scale must be finite, got inf"),
        (
            {"k_pool": torch.zeros(3, 7, 2, 16, requires_grad=True)},
            ValueError,
            "k_pool requires grad",
        ),
        (
            {"v_pool": torch.zeros(3, 7, 16, 2).transpose(2, 3)},
            ValueError,
            "v_pool: last axis must be contiguous",
        ),
        (
            {"k_pool": torch.zeros(3, 7, 2, 16, dtype=torch.uint8)},
            NotImplementedError,
            "LongLive-2 NVFP4",
        ),
        (
            {"backend": "flash"},
            NotImplementedError,
            "the table has cpu, triton, gluon, flash_attn,",
        ),
    ],
)
def test_refused_with_a_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        routed_attention(**arguments(**changes))


def test_table_on_another_device_names_both() -> None:
    table = RouteTable([[0], [1]], 3, device="meta")
    with pytest.raises(TypeError, match="table is on meta, but q is on cpu"):
        routed_attention(**arguments(table=table))


def test_named_backend_never_falls_back() -> None:
    a = arguments()
    wide = {n: a[n].double() for n in ("q", "k_pool", "v_pool", "k_live", "v_live")}
    with pytest.raises(BackendUnavailable, match="cpu: takes float32, bfloat16 and float16"):
        routed_attention(**{**a, **wide}, backend="cpu")
    odd = {n: a[n][..., :10] for n in wide}
    with pytest.raises(BackendUnavailable, match="multiples of 16 up to 256, got 10"):
        routed_attention(**{**a, **odd}, backend="cpu")
    assert routed_attention(**{**a, **odd}).shape == (2, 5, 4, 10)  # the reference takes it


@each_backend
def test_live_tokens_inside_the_pool(backend: str) -> None:
    a = arguments(B=1)
    inside = a["k_pool"][1:2, 2:5]
    a |= {"k_live": inside, "backend": backend}
    assert routed_attention(**a).isfinite().all()  # harmless without a backward pass
    a["q"].requires_grad_()
    with pytest.raises(ValueError, match="k_live lies in the memory of k_pool"):
        routed_attention(**a)
    arena = torch.randn(4, 7, 2, 16)  # beside the pool in one allocation is fine
    a |= {"k_pool": arena[:3], "k_live": arena[3:, :3]}
    routed_attention(**a).sum().backward()


@each_backend
def test_second_derivative_is_an_error(backend: str) -> None:
    a = arguments(backend=backend)
    q = a["q"].requires_grad_()
    (grad,) = torch.autograd.grad(routed_attention(**a).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@each_backend
def test_table_updated_before_the_backward_pass(backend: str) -> None:
    a = arguments(backend=backend)
    a["q"].requires_grad_()
    out = routed_attention(**a)
    a["table"].update([[2], [2]])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("where", ["k_pool", "v_pool"])
def test_bad_values_stay_in_their_rows(
    where: str, bad: float, dtype: torch.dtype, isa: str
) -> None:
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng).to(dtype)
    q, k_live, v_live = (draw(3, 50, 2, 32).requires_grad_() for _ in range(3))
    pools = {"k_pool": draw(4, 7, 2, 32), "v_pool": draw(4, 7, 2, 32)}
    run = lambda table: routed_attention(
        q, **pools, table=table, k_live=k_live, v_live=v_live, return_lse=True, backend="cpu"
    )
    table = RouteTable([[0], [1], [2, 0]], 4)
    clean_out, clean_lse = run(table)
    clean_grads = torch.autograd.grad(clean_out.sum(), (q, k_live, v_live))
    pools[where][1, 3] = bad  # routed by row 1 only
    pools[where][3] = bad  # by none
    out, lse = run(table)
    grads = torch.autograd.grad(out.sum(), (q, k_live, v_live))
    for b in (0, 2):
        assert torch.equal(out[b], clean_out[b]) and torch.equal(lse[b], clean_lse[b])
        assert all(torch.equal(g[b], c[b]) for g, c in zip(grads, clean_grads, strict=True))
    assert not out[1].isfinite().any()
    if bad != bad:
        assert out[1].isnan().all() and grads[0][1].isnan().all()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(size: float, isa: str) -> None:
    # Every second key has logit `size`, the others 0: all the weight is on one half of them.
    q = torch.full((1, 40, 1, 16), 1.0)
    k = torch.zeros(1, 20, 1, 16)
    k[:, ::2, :, 0] = size
    v = torch.arange(20.0).view(1, 20, 1, 1).expand(1, 20, 1, 16).contiguous()
    table = RouteTable([[0]], 1)
    out, lse = routed_attention(q, k, v, table, scale=1.0, return_lse=True, backend="cpu")
    # A few roundings: the weights share a factor near 1 that the rounding of the shift leaves.
    torch.testing.assert_close(
        out, out.new_full(out.shape, 9.0 if size > 0 else 10.0), rtol=5e-7, atol=0
    )
    expected = max(size, 0.0) + math.log(10)  # to one rounding of float32
    torch.testing.assert_close(lse, lse.new_full(lse.shape, expected), rtol=1.2e-7, atol=0)
    negative, _ = routed_attention(q, -k, v, table, scale=-1.0, return_lse=True, backend="cpu")
    assert torch.equal(out, negative)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scale_zero_is_the_mean(dtype: torch.dtype, isa: str) -> None:
    q, k = torch.randn(1, 3, 1, 32).to(dtype), torch.randn(1, 8, 1, 32).to(dtype)
    v = torch.arange(8.0).view(1, 8, 1, 1).expand(1, 8, 1, 32).contiguous().to(dtype)
    out, lse = routed_attention(
        q, k, v, RouteTable([[0]], 1), scale=0.0, return_lse=True, backend="cpu"
    )
    assert (out == 3.5).all()
    torch.testing.assert_close(lse, lse.new_full(lse.shape, math.log(8)), rtol=1.2e-7, atol=0)


def test_float16_overflowing_products(isa: str) -> None:
    q = torch.full((1, 2, 1, 32), 65504.0).half()
    out, lse = routed_attention(
        q, q[None, 0, :, :], q[None, 0], RouteTable([[0]], 1), scale=1e-9, return_lse=True
    )
    assert (out == 65504).all() and lse.isfinite().all()


def test_keys_of_minus_infinity_have_no_weight(isa: str) -> None:
    q = torch.ones(1, 4, 1, 16)
    k = torch.zeros(2, 3, 1, 16)
    k[0] = -INF
    v = torch.stack([torch.full((3, 1, 16), 5.0), torch.full((3, 1, 16), 2.0)])
    run = lambda rows: routed_attention(
        q, k, v, RouteTable(rows, 2), return_lse=True, backend="cpu"
    )
    assert (run([[0, 1]])[0] == 2).all()
    out, lse = run([[0]])
    assert not out.any() and (lse == -INF).all()


def test_slots_written_behind_our_back_stay_in_bounds(isa: str) -> None:
    a = arguments(B=1, L=0)
    expected = routed_attention(**a)
    table = RouteTable([[0, 1, 2]], 3)
    table.slots[0, 1], table.slots[0, 2] = 2**31 - 1, -(2**31)
    assert torch.equal(routed_attention(**{**a, "table": table}, backend="cpu"), expected)


def test_autocast_does_not_mix_dtypes_silently() -> None:
    a = arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert routed_attention(**a).dtype == torch.float32
        mixed = {**a, "q": torch.nn.functional.linear(a["q"], torch.eye(16))}
        with pytest.raises(TypeError, match=r"k_pool must be torch\.bfloat16 like q"):
            routed_attention(**mixed)


def test_function_transforms_are_an_explicit_error() -> None:
    a = arguments()
    call = lambda x: routed_attention(**{**a, "q": x})
    batch = torch.stack([a["q"], a["q"]])
    for transformed in (
        lambda: torch.vmap(call)(batch),
        lambda: torch.vmap(call)(batch.requires_grad_()),
        lambda: torch.func.grad(lambda x: call(x).sum())(a["q"]),
        lambda: torch.func.jvp(call, (a["q"],), (a["q"],)),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
            transformed()


def test_binding_refuses_what_would_leave_memory() -> None:
    from kvpo_kernels.backends.native.dlpack import view

    a = arguments()
    out, lse = torch.empty(2, 5, 4, 16), torch.empty(2, 4, 5)
    good: dict[str, Tensor] = {
        n: a[n] for n in ("q", "k_pool", "v_pool", "k_live", "v_live")
    } | dict(slots=a["table"].slots, out=out, lse=lse)

    pages, scales = a["k_pool"].to(torch.int8), torch.ones(3, 2)

    def call(**changes: Tensor) -> None:
        views = dict.fromkeys(("k_scales", "v_scales"))
        views |= {n: view(t) for n, t in {**good, **changes}.items()}
        _native.routed_attention_forward(**views, scale=1.0, threads=1)

    quantized = {"k_pool": pages, "v_pool": pages, "k_scales": scales, "v_scales": scales}
    call()
    call(**quantized)
    for changes in (
        {"k_pool": pages},
        {"k_pool": pages, "v_pool": pages, "k_scales": scales},
        {**quantized, "v_scales": scales[:2]},
        {**quantized, "k_scales": scales.double()},
        {**quantized, "v_pool": a["v_pool"]},
        {"out": out[:1]},
        {"lse": lse.double()},
        {"slots": a["table"].slots.long()},
        {"v_pool": a["v_pool"][:2]},
        {"k_pool": a["k_pool"].transpose(2, 3).contiguous().transpose(2, 3)},
        {"q": a["q"].bfloat16()},
    ):
        with pytest.raises(_native.Error):
            call(**changes)


# 20: more rows and heads than a grid has in y
def test_more_than_65535_rows() -> None:
    rows = 66_000
    g = torch.Generator().manual_seed(0)
    q = torch.randn(rows, 1, 1, 16, generator=g)
    k, v = torch.randn(2, 2, 3, 1, 16, generator=g)
    out = routed_attention(q, k, v, RouteTable([[b % 2] for b in range(rows)], 2), backend="cpu")
    for b in (0, 1, 65_535, 65_536, rows - 1):
        one = routed_attention(q[b : b + 1], k, v, RouteTable([[b % 2]], 2), backend="cpu")
        assert torch.equal(out[b : b + 1], one)
