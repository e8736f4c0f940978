"""What a CUDA graph would do, on any device: a tape of operations, and their repetition.

As in a capture, the host runs once: its numbers and branches are fixed then, memory that existed
before is read where it lies, and what the host would have to read, or send, is refused.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

REFUSED = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "item", "pin_memory")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.tape: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in REFUSED:
            raise AssertionError(f"{name} in a capture")
        result = func(*args, **(kwargs or {}))
        self.tape.append((func, args, kwargs or {}, result))
        return result


def capture(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What repeats the function's operations, and the tensor in which the result then is."""
    with _Recorder() as recorder:
        result = function()

    def replay() -> None:
        made: dict[int, Any] = {}  # the tape keeps its tensors alive: ids are theirs alone
        for func, args, kwargs, recorded in recorder.tape:
            now = lambda x: made.get(id(x), x) if isinstance(x, Tensor) else x
            again = func(*tree_map(now, args), **tree_map(now, kwargs))
            for old, new in zip(tree_leaves(recorded), tree_leaves(again), strict=True):
                made[id(old)] = new
        result.copy_(made[id(result)])

    return replay, result
