"""Whoever watches the dispatcher sees the operators; where nobody does, calls are the kernels."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from kvpo_kernels import registry, trajectory_velocity_energy

OP = torch.ops.kvpo.velocity_energy_forward.default
Found = list[Any]


class DispatchMode(TorchDispatchMode):
    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(func)
        return func(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(func)
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        SEEN.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


SEEN: Found = []


@contextmanager
def profiler(found: Found) -> Iterator[None]:
    with profile() as seen:
        yield
    found.extend(OP for e in seen.events() if e.name == "kvpo::velocity_energy_forward")


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.ones(3)


@pytest.mark.parametrize("watch", [DispatchMode, FunctionMode, profiler])
def test_watchers_see_the_operator(watch: Callable[[Found], AbstractContextManager[Any]]) -> None:
    found: Found = []
    arguments = inputs()
    with watch(found):
        energies = trajectory_velocity_energy(*arguments)
    assert OP in found
    assert torch.equal(energies, trajectory_velocity_energy(*arguments))


@pytest.mark.filterwarnings("ignore")
def test_subclasses_fakes_and_traces_see_the_operator() -> None:
    SEEN.clear()
    pred, target, weights = inputs()
    trajectory_velocity_energy(pred.as_subclass(Subclass), target, weights)
    assert OP in SEEN
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (pred, target, weights)]
    assert trajectory_velocity_energy(*fakes).shape == (2,)  # a kernel would read memory
    traced = torch.jit.trace(trajectory_velocity_energy, (pred, target, weights), check_trace=False)
    assert "velocity_energy_forward" in str(traced.graph)


def test_without_watchers_a_call_is_the_kernel() -> None:
    torch.library.define("kvpo_test::twice", "(Tensor x, float y, str z) -> Tensor")
    calls: Found = []

    def kernel(*args: Any) -> Tensor:
        calls.append(args)
        return args[0] * 2

    call = registry.register("kvpo_test::twice", kernel, lambda x, y, z: x.new_empty(x.shape))
    x, scale = torch.randn(3), 0.1
    for watch in (nullcontext([]), DispatchMode([])):
        with watch as mode:
            assert torch.equal(call(x, scale, "cpu"), 2 * x)
        # The dispatcher unpacks numbers and makes them anew.
        assert (calls[-1][1] is scale) == (not isinstance(mode, DispatchMode))
    assert call(x.to("meta"), scale, "cpu").is_meta and len(calls) == 2
