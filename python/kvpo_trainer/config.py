"""A run's configuration: frozen dataclasses, read strictly from YAML.

Unknown keys, wrong types and values out of range are errors that name the full path of the key. The
file is data only: a safe loader, no interpolation, no object construction.
"""

import dataclasses
import difflib
import math
import operator
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from kvpo_trainer.data import DIGIT_PIXELS, DataConfig, split_prompts
from kvpo_trainer.generator import GeneratorConfig, History
from kvpo_trainer.pretrain import PretrainConfig
from kvpo_trainer.sampling import SIGMAS
from kvpo_trainer.update import KvpoConfig

T = TypeVar("T")


class ConfigurationError(ValueError):
    """The configuration cannot be meant; the message names the key."""


@dataclass(frozen=True)
class TrainConfig:
    """Length and surroundings of a training run."""

    iterations: int = 40
    minutes: float = 0.0
    """Stop after this much training time, if more than 0; a run that is resumed has it anew."""
    evaluation_prompts: int = 40
    """Held-out prompts, before and after."""
    evaluation_seed: int = 12345
    save_every: int = 10
    keep_checkpoints: int = 2


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on."""

    seed: int = 0
    threads: int = 0
    """Of torch; 0 leaves its choice."""
    history: History = "float32"
    """What past keys and values are rounded to: 8 bits take a quarter of the memory."""
    train: TrainConfig = field(default_factory=TrainConfig)
    kvpo: KvpoConfig = field(default_factory=KvpoConfig)
    data: DataConfig = field(default_factory=DataConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)

    def __post_init__(self) -> None:
        """Refuse values that would fail, or mean nothing, deep inside a run."""
        for path, (low, high) in _RANGES.items():
            value = operator.attrgetter(path)(self)
            if not low <= value <= high:
                allowed = f"at least {low:g}" if high == _ANY else f"in [{low:g}, {high:g}]"
                raise ConfigurationError(f"{path} must be {allowed}, got {value}")
        if self.kvpo.reward_sign == 0:
            raise ConfigurationError("kvpo.reward_sign must be 1 or -1, got 0")
        for path, of in (
            ("data.frames", "data.block_frames"),
            ("data.canvas", "data.patch"),
            ("generator.dim", "generator.heads"),
        ):
            value, unit = operator.attrgetter(path, of)(self)
            if value % unit:
                raise ConfigurationError(f"{path} must be a multiple of {of} = {unit}, got {value}")
        if (self.generator.dim // self.generator.heads) % 2:
            raise ConfigurationError(
                "generator.dim / generator.heads must be even, got"
                f" {self.generator.dim} / {self.generator.heads}"
            )
        if self.kvpo.local_weight + self.kvpo.global_weight == 0:
            raise ConfigurationError("kvpo.local_weight and kvpo.global_weight must not both be 0")
        for path, least in (("data.segment_blocks", 1), ("data.turn_blocks", 0)):
            first, last = operator.attrgetter(path)(self)
            if not least <= first <= last:
                raise ConfigurationError(
                    f"{path} must be two ascending numbers from {least} on, got {[first, last]}"
                )


_ANY = math.inf
_POSITIVE = 1e-12  # of numbers that something is divided by
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),  # the seeds of the steps, a million times it, fit 64 bits
    "threads": (0, 1024),
    "train.iterations": (0, _ANY),
    "train.minutes": (0, _ANY),
    "train.evaluation_prompts": (2, len(split_prompts()[1])),  # one has no standard error
    "train.evaluation_seed": (0, 2**32 - 1),
    "train.save_every": (1, _ANY),
    "train.keep_checkpoints": (1, _ANY),
    "kvpo.prompts_per_step": (1, _ANY),
    "kvpo.learning_rate": (0, _ANY),
    "kvpo.warmup_steps": (0, _ANY),
    "kvpo.weight_decay": (0, _ANY),
    "kvpo.max_grad_norm": (_POSITIVE, _ANY),
    "kvpo.ema": (0, 1),
    "kvpo.rollouts_per_sync": (1, _ANY),
    "kvpo.gradient_steps": (1, len(SIGMAS)),
    "kvpo.sigma_floor": (_POSITIVE, _ANY),
    "kvpo.local_weight": (0, _ANY),
    "kvpo.global_weight": (0, _ANY),
    "kvpo.advantage_clamp": (_POSITIVE, _ANY),
    "kvpo.reward_sign": (-1, 1),
    "kvpo.routing.num_branches": (2, _ANY),  # one branch has no gradient
    "data.frames": (1, 1024),  # of the generator's rotary table
    "data.block_frames": (1, _ANY),
    "data.canvas": (DIGIT_PIXELS, 1024),
    "data.patch": (1, _ANY),
    "data.exemplars": (1, 100),  # of at least 174 writers per digit
    "data.speed_match": (0, 1),
    "generator.dim": (1, _ANY),
    "generator.layers": (1, _ANY),
    "generator.heads": (1, _ANY),
    "generator.ffn_factor": (1, _ANY),
    "generator.rope_theta": (_POSITIVE, _ANY),
    "pretrain.steps": (0, _ANY),
    "pretrain.batch": (1, _ANY),
    "pretrain.learning_rate": (0, _ANY),
    "pretrain.warmup_steps": (1, _ANY),
    "pretrain.decay_from": (0, 1),
    "pretrain.self_context_from": (0, 1),
    "pretrain.self_context": (0, 1),
    "pretrain.context_noise": (0, _ANY),
    "pretrain.routed_share": (0, 1),
    "pretrain.ema": (0, 1),
}


def of_weights(config: RunConfig, made: RunConfig) -> RunConfig:
    """The configuration with the sections that weights were made with.

    Raises:
        ConfigurationError: the configuration asks for others: they need `pretrain`.
    """
    default = RunConfig()
    for section in ("data", "generator", "pretrain"):
        asked, own = getattr(config, section), getattr(made, section)
        for key, value in dataclasses.asdict(asked).items():
            if value not in (getattr(own, key), getattr(getattr(default, section), key)):
                raise ConfigurationError(
                    f"{section}.{key} = {value} is not what the weights were made with,"
                    f" {getattr(own, key)}: it takes `pretrain`"
                )
    return dataclasses.replace(
        config, data=made.data, generator=made.generator, pretrain=made.pretrain
    )


def differences(a: Mapping[str, Any], b: Mapping[str, Any], path: str = "") -> list[str]:
    """Where two mappings of `to_mapping` differ: `key: value of a, value of b`."""
    found = []
    for key in dict.fromkeys((*a, *b)):
        one, other = a.get(key), b.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += differences(one, other, f"{path}{key}.")
        elif one != other:
            found.append(f"{path}{key}: {one}, {other}")
    return found


def load_config(
    path: Path | None, overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> RunConfig:
    """The configuration of a YAML file, with `a.b=value` overrides on top.

    Args:
        base: what holds where neither says anything, a mapping of `to_mapping`; else the defaults.

    Raises:
        ConfigurationError: naming file or key, value and what is allowed.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"cannot read {path}: {error}") from error
        values = _parse(text, str(path))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigurationError(f"override {override!r} is not of the form key.path=value")
        *parents, leaf = key.split(".")
        at = values
        for parent in parents:
            below = at.setdefault(parent, {})
            if not isinstance(below, dict):
                raise ConfigurationError(f"{key}: {parent} is a value, not a section")
            at = below
        at[leaf] = _parse(value, override, mapping=False)
    return from_mapping(RunConfig, values if base is None else _over(base, values))


def from_mapping(kind: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """A dataclass from plain values, every key and type checked."""
    hints = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigurationError(
                f"unknown key {where}{hint}; allowed: {', '.join(sorted(hints))}"
            )
        arguments[key] = _convert(hints[key], value, where)
    try:
        return kind(**arguments)
    except ConfigurationError:
        raise
    except ValueError as error:
        raise ConfigurationError(f"{path or 'configuration'}: {error}") from error


def to_mapping(config: Any) -> dict[str, Any]:
    """Plain values that `from_mapping` reads back."""
    values: dict[str, Any] = dataclasses.asdict(config)
    return typing.cast(dict[str, Any], _plain(values))


def dump_yaml(config: Any) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False)


def routing_text(routing: Mapping[str, Any]) -> str:
    """A routing of `to_mapping` in one line."""
    return ", ".join(f"{k} {v}" for k, v in routing.items() if k != "num_branches")


_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)


def whole_number(text: str) -> int:
    """An integer as YAML 1.2 writes it: decimal, `0o17` or `0xff`; leading zeros mean nothing.

    Raises:
        ValueError: it is written otherwise, as `1_000` or `1:00`.
    """
    if not _INT.match(text):
        raise ValueError(f"{text!r} is not an integer; {_AS_YAML}")
    bases = {"0o": 8, "0x": 16}
    return int(text, bases.get(text[:2], 10))


_AS_YAML = "numbers are those of YAML 1.2, such as 12, 0o14, 0xc, 1.5, 1e-4"


class _Loader(yaml.SafeLoader):
    """Safe YAML with the core schema of YAML 1.2 (its section 10.3.2), and a key once only.

    PyYAML's own is that of 1.1, where 010 is 8, 1:00 is 60, 1_0 is 10, 1e-4 is text, and yes and
    off are booleans. No aliases: a few lines of them stand for a value of any size.
    """

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 - none of PyYAML's own

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"alias *{self.peek_event().anchor} is not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"{', '.join(sorted(twice))} given twice{node.start_mark}")
        return super().construct_mapping(node, deep)

    def _whole(self, node: yaml.ScalarNode) -> int:
        return whole_number(self.construct_scalar(node))

    def _floating(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node)
        if not _FLOAT.match(text):
            raise ValueError(f"{text!r} is not a number; {_AS_YAML}")
        return float(re.sub(r"\.(?=[iInN])", "", text))

    def _truth(self, node: yaml.ScalarNode) -> bool:
        text = self.construct_scalar(node)
        if not _BOOL.match(text):
            raise ValueError(f"{text!r} is not true or false")
        return text.lower() == "true"


# An explicit tag, as in `!!int 010`, goes the same way as a plain value.
for _name, _pattern, _first, _construct in (
    ("null", _NULL, ["~", "n", "N", ""], _Loader.construct_yaml_null),
    ("bool", _BOOL, list("tTfF"), _Loader._truth),
    ("int", _INT, list("-+0123456789"), _Loader._whole),
    ("float", _FLOAT, list("-+.0123456789"), _Loader._floating),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _construct)


# PyYAML lets through what its constructors raise, as for `!!int x`, `!!bool x` and `!!timestamp x`.
_YAML_ERRORS = (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError)


def _over(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values over those of `base`, section by section."""
    merged = dict(base)
    for key, value in values.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _over(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _parse(text: str, source: str, mapping: bool = True) -> Any:
    try:
        value = yaml.load(text, Loader=_Loader)
    except _YAML_ERRORS as error:
        raise ConfigurationError(f"{source}: not plain YAML: {error}") from error
    if mapping:
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise ConfigurationError(f"{source}: must hold keys and values")
    return value


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise ConfigurationError(f"{where} is a section, got {value!r}")
        return from_mapping(kind, value, where)
    if origin is typing.Literal:
        allowed = typing.get_args(kind)
        if value not in allowed:
            raise ConfigurationError(f"{where} must be one of {allowed}, got {value!r}")
        return value
    if origin in (tuple, types.GenericAlias):
        items = typing.get_args(kind)
        if not isinstance(value, list) or len(value) != len(items):
            raise ConfigurationError(f"{where} must be a list of {len(items)}, got {value!r}")
        pairs = zip(items, value, strict=True)
        return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(pairs))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        hint = ""
        if kind in (int, float) and isinstance(value, str) and re.match(r"[-+.]*[0-9]", value):
            hint = f"; {_AS_YAML}"
        elif kind is bool and isinstance(value, str):
            hint = "; of the words only true and false are booleans"
        raise ConfigurationError(
            f"{where} must be {kind.__name__}, got {value!r} ({type(value).__name__}){hint}"
        )
    if kind is float and not math.isfinite(value):
        raise ConfigurationError(f"{where} must be a finite number, got {value}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value
