"""The Hopper kernels' arithmetic, tiles and barriers, in the emulator; on a GPU see `gpu/`."""

import threading
from collections.abc import Iterator

import gluon_emulator
import pytest
import torch
from attention_checks import Inputs, assert_accuracy, assert_same_bits, output_weight
from cases import RoutedCase

from kvpo_kernels import explain, registry

if not registry.TRITON_VERSION.startswith(("3.6.", "3.7.")):
    pytest.skip(
        f"the kernels are for triton 3.6 and 3.7, not {registry.TRITON_VERSION}",
        allow_module_level=True,
    )
from kvpo_kernels.backends.gluon import routed_attention as gluon

# 128 keys to a tile: T is whole tiles, a tail of whole or of broken boxes, or both.
CASES = (
    RoutedCase("whole", B=2, Q=70, H=1, D=64, F=5, T=128, R=3, L=9),
    RoutedCase("tails", B=2, Q=9, H=2, D=128, F=9, T=24, R=7, L=0),
    RoutedCase("both", B=4, Q=130, H=2, D=64, F=6, T=152, R=3, L=150, kv_heads=1, ragged=True),
    RoutedCase("broken-boxes", B=2, Q=17, H=3, D=64, F=6, T=263, R=4, L=129, kv_heads=1),
    RoutedCase("one-token", B=3, Q=5, H=1, D=64, F=40, T=1, R=33, L=1, ragged=True),
    RoutedCase("live-only", B=2, Q=65, H=2, D=64, F=1, T=3, R=0, L=130),
    RoutedCase("no-keys", B=4, Q=3, H=1, D=64, F=5, T=130, R=3, ragged=True),
)


@pytest.fixture
def emulator() -> Iterator[None]:
    with gluon_emulator.emulated(gluon):
        yield


def of_gluon(case: RoutedCase, inputs: Inputs, sign: int = 1) -> Inputs:
    slots, scale = case.table().slots, sign * case.D**-0.5
    args = (*inputs[:3], slots, *inputs[3:], None, None)
    out, lse = gluon.forward(*args, scale)
    return out, lse, *gluon.backward(output_weight(out), *args, out, lse, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_as_accurate_as_torch(case: RoutedCase, dtype: torch.dtype, emulator: None) -> None:
    inputs = case.inputs(dtype)
    assert_accuracy(case, inputs, of_gluon(case, inputs))


def test_a_negative_scale_is_that_of_negative_queries(emulator: None) -> None:
    case = CASES[2]
    q, *keys = case.inputs(torch.bfloat16)
    out, lse, grad_q, *grads = of_gluon(case, (q, *keys), -1)
    other = of_gluon(case, (-q, *keys))
    assert_same_bits((out, lse, -grad_q, *grads), other)


def test_the_emulator_sees_a_buffer_that_is_never_freed(
    emulator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gluon_emulator.MBARRIER, "arrive", lambda barrier, count: None)
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 0.2)
    case = CASES[2]
    with pytest.raises(AssertionError, match="deadlock"):
        of_gluon(case, case.inputs(torch.bfloat16))


def test_the_emulator_sees_a_buffer_freed_too_early(
    emulator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait, produce, hasty = gluon_emulator.MBARRIER.wait, gluon._produce, threading.local()

    def produce_hastily(*arguments: object) -> None:
        hasty.me = True
        produce(*arguments)

    def wait_unless_hasty(barrier: object, parity: int) -> None:
        if not hasattr(hasty, "me"):
            wait(barrier, parity)

    monkeypatch.setattr(gluon, "_produce", produce_hastily)
    monkeypatch.setattr(gluon_emulator.MBARRIER, "wait", wait_unless_hasty)
    monkeypatch.setattr(gluon_emulator, "PATIENCE", 0.2)
    case = CASES[2]
    inputs = case.inputs(torch.bfloat16)
    with pytest.raises(AssertionError):
        assert_accuracy(case, inputs, of_gluon(case, inputs))


def test_reasons_not_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "TRITON_VERSION", "3.6.0")
    hopper = {"device": "cuda", "dtype": torch.bfloat16, "capability": (9, 0)}
    why = lambda **changes: explain("routed_attention", **(hopper | changes))["gluon"]
    assert why() is None
    assert "(10, 0)" in str(why(capability=(10, 0)))
    assert "float32" in str(why(dtype=torch.float32))
    assert "got 96" in str(why(head_size=96))
    assert "16 bytes" in str(why(aligned=False))
    monkeypatch.setattr(registry, "TRITON_VERSION", "3.7.1")
    assert "for triton 3.6" in str(why())  # what no GPU has run yet
