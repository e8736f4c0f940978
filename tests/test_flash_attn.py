"""The launcher of flash-attn: runs and their merge, over a stand-in for the package's two calls.

The stand-in computes what the package documents, in float32. On a GPU with the package installed,
`gpu/` runs the real one.
"""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_checks import Inputs, assert_accuracy, assert_same_bits, output_weight
from cases import ROUTED, RoutedCase
from torch import Tensor

from kvpo_kernels import explain

LAUNCHER = "kvpo_kernels.backends.flash.routed_attention"


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * scale


class StandIn(ModuleType):
    """`flash_attn.flash_attn_interface`; remembers the storage that it was given."""

    def __init__(self) -> None:
        super().__init__("flash_attn.flash_attn_interface")
        self.keys: list[Tensor] = []

    def _flash_attn_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, **options: Any
    ) -> tuple[Tensor, Tensor, None, None]:
        assert options["causal"] is False and options["dropout_p"] == 0.0
        assert softmax_scale > 0  # it takes the largest product before it scales
        self.keys.append(k)
        s = scores(q, k, softmax_scale)
        v = v.repeat_interleave(q.shape[2] // v.shape[2], 2).float()
        out = torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v)
        return out.to(q.dtype), s.logsumexp(-1), None, None

    def _flash_attn_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        *,
        softmax_scale: float,
        deterministic: bool,
        **options: Any,
    ) -> None:
        assert deterministic
        group = q.shape[2] // k.shape[2]
        wide = lambda t: t.repeat_interleave(group, 2).float()
        p = (scores(q, k, softmax_scale) - lse[..., None]).exp()
        dp = torch.einsum("bqhd,bkhd->bhqk", dout.float(), wide(v))
        delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)[..., None]
        ds = p * (dp - delta) * softmax_scale
        dq.copy_(torch.einsum("bhqk,bkhd->bqhd", ds, wide(k)))
        narrow = lambda t: t.unflatten(2, (-1, group)).sum(3)
        dk.copy_(narrow(torch.einsum("bhqk,bqhd->bkhd", ds, q.float())))
        dv.copy_(narrow(torch.einsum("bhqk,bqhd->bkhd", p, dout.float())))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    package = StandIn()
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", package)
    monkeypatch.delitem(sys.modules, LAUNCHER, raising=False)
    yield package
    sys.modules.pop(LAUNCHER, None)


def of_flash(inputs: Inputs, slots: Tensor, sign: int = 1) -> Inputs:
    launcher = importlib.import_module(LAUNCHER)  # anew: it takes the package's calls by name
    scale = sign * inputs[0].shape[-1] ** -0.5
    args = (*inputs[:3], slots, *inputs[3:], None, None)
    out, lse = launcher.forward(*args, scale)
    return out, lse, *launcher.backward(output_weight(out), *args, out, lse, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", ROUTED, ids=lambda c: c.name)
def test_as_accurate_as_torch(case: RoutedCase, dtype: torch.dtype, stand_in: StandIn) -> None:
    inputs = case.inputs(dtype)
    assert_accuracy(case, inputs, of_flash(inputs, case.table().slots))


def test_a_negative_scale_is_that_of_negative_queries(stand_in: StandIn) -> None:
    case = ROUTED[3]
    q, *keys = case.inputs(torch.float16)
    out, lse, grad_q, *grads = of_flash((q, *keys), case.table().slots, -1)
    other = of_flash((-q, *keys), case.table().slots)
    assert_same_bits((out, lse, -grad_q, *grads), other)


def test_a_run_is_read_as_it_lies(stand_in: StandIn) -> None:
    case = RoutedCase("", B=1, Q=3, H=1, D=16, F=9, T=2, R=6, L=4)
    inputs = case.inputs(torch.float16)
    pool = torch.randn(9, 2, 1, 16).half()
    slots = torch.tensor([[4, 5, 6, 1, 8, 7, -1]], dtype=torch.int32)
    of_flash((inputs[0], pool, pool, *inputs[3:]), slots)
    starts = [pool[f].data_ptr() for f in (4, 1, 8, 7)] + [inputs[3].data_ptr()]
    assert [k.data_ptr() for k in stand_in.keys] == starts
    assert [k.shape[1] for k in stand_in.keys] == [6, 2, 2, 2, 4]

    stand_in.keys.clear()  # a layer of a pool that holds several: frames are apart
    layers = torch.randn(9, 3, 2, 1, 16).half()[:, 1]
    of_flash((inputs[0], layers, layers, *inputs[3:]), slots)
    assert [k.shape[1] for k in stand_in.keys] == [2] * 6 + [4]
    assert stand_in.keys[1].data_ptr() == layers[5].data_ptr()


def test_reasons_not_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ampere = {"device": "cuda", "dtype": torch.bfloat16, "capability": (8, 0)}
    why = lambda **changes: explain("routed_attention", **(ampere | changes))["flash_attn"]
    monkeypatch.setattr("kvpo_kernels.registry.HAS_FLASH_ATTN", False)
    assert "pip install kvpo_kernels[flash]" in str(why())
    monkeypatch.setattr("kvpo_kernels.registry.HAS_FLASH_ATTN", True)
    assert why() is None
    assert "float32" in str(why(dtype=torch.float32))
    assert "(7, 5)" in str(why(capability=(7, 5)))
    assert "cpu" in str(why(device="cpu", capability=None))
    assert "got 20" in str(why(head_size=20))
