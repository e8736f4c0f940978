"""Every exception the library raises on purpose."""

from collections.abc import Mapping


class KvpoError(Exception):
    """Base class, so that callers can catch exactly what is ours."""


class ShapeError(KvpoError, ValueError):
    """An argument's rank or shape does not fit the others."""


class NonFiniteError(ShapeError):
    """A value is NaN or infinite, or a result would be: out of the range of its dtype."""


class RangeError(ShapeError):
    """A value, an index or a count lies outside its range, or is named twice."""


class GroupError(ShapeError):
    """The ranks of a process group do not fit together."""


class ArgumentError(KvpoError, TypeError):
    """An argument is missing, or excludes another that is given."""


class DtypeError(KvpoError, TypeError):
    """An argument's dtype or device does not fit the others."""


class ConfigError(KvpoError, ValueError):
    """A hyperparameter has a value that cannot be meant."""


class PoolError(KvpoError, RuntimeError):
    """The frame pool cannot do what was asked: no free slot, or a released timeline."""


class FrameError(PoolError, ValueError):
    """A frame that is not there: evicted, offloaded, not yet written; or a slot that has come to
    be another frame's."""


class GradientError(KvpoError, RuntimeError):
    """A gradient was asked of what has none, or a backward found what it needs changed."""


class ConstantError(GradientError, ShapeError):
    """An argument requires grad, but is a constant: detach it."""


class BackendUnavailable(KvpoError, NotImplementedError):
    """No allowed backend can run this call; `reasons` says why for each one."""

    def __init__(self, op: str, reasons: Mapping[str, str]) -> None:
        self.op, self.reasons = op, dict(reasons)
        lines = "".join(f"\n  {name}: {why}" for name, why in self.reasons.items())
        super().__init__(f"{op}: no backend can run this call{lines}")
