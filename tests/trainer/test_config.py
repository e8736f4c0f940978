"""The configuration: strict, and errors that name the key."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from kvpo_trainer.cli import CONFIGS
from kvpo_trainer.config import (
    _RANGES,
    ConfigurationError,
    RunConfig,
    differences,
    dump_yaml,
    from_mapping,
    load_config,
    of_weights,
    to_mapping,
)


def loaded(tmp_path: Path, text: str | bytes, *overrides: str) -> RunConfig:
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, overrides)


def test_round_trip(tmp_path: Path) -> None:
    config = load_config(None, ["kvpo.learning_rate=3e-4", "kvpo.routing.num_branches=5"])
    assert config.kvpo.learning_rate == 3e-4 and config.kvpo.routing.num_branches == 5
    assert loaded(tmp_path, dump_yaml(config)) == config
    assert from_mapping(RunConfig, to_mapping(config)) == config
    assert load_config(None) == RunConfig()


def test_shipped_configurations_load() -> None:
    paths = list(CONFIGS.glob("*.yaml"))
    assert {p.stem for p in paths} >= {"demo"}
    for path in paths:
        assert isinstance(load_config(path), RunConfig)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    config = loaded(tmp_path, "seed: 3\ntrain: {iterations: 7}", "train.iterations=9")
    assert (config.seed, config.train.iterations) == (3, 9)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("sead: 1", r"unknown key sead \(did you mean seed\?\); allowed: .*seed"),
        (
            "kvpo: {learning_rat: 1.0}",
            r"unknown key kvpo.learning_rat \(did you mean learning_rate",
        ),
        ("kvpo: {objective: {kl: 1.0}}", r"unknown key kvpo.objective.kl"),
        ("seed: true", r"seed must be int, got True \(bool\)"),
        ("seed: yes", r"seed must be int, got 'yes' \(str\)$"),
        ("seed: 1.5", r"seed must be int, got 1.5 \(float\)"),
        ("kvpo: {learning_rate: fast}", r"kvpo.learning_rate must be float, got 'fast' \(str\)"),
        ("kvpo: 3", r"kvpo is a section, got 3"),
        ("data: {turn_blocks: [1]}", r"data.turn_blocks must be a list of 2, got \[1\]"),
        ("data: {turn_blocks: [1, a]}", r"data.turn_blocks\[1\] must be int, got 'a'"),
        ("kvpo: {routing: {selection: best}}", r"kvpo.routing.*selection.*best"),
        ("kvpo: {objective: {clip_range_low: 2.0}}", r"kvpo.objective: clip_range_low must be in"),
        ("train: {evaluation_prompts: 1}", r"train.evaluation_prompts must be in \[2, 40\], got 1"),
        ("train: {minutes: -1}", r"train.minutes must be at least 0"),
        ("train: {minutes: .nan}", r"train.minutes must be a finite number"),
        ("seed: 1\nseed: 2", r"not plain YAML: seed given twice.*line 1"),
        ("- 1\n- 2", r"must hold keys and values"),
        ("just words", r"must hold keys and values"),
        ("a: [", r"not plain YAML"),
        ("!!python/object/apply:os.system ['true']", r"not plain YAML"),
        ("seed: !!python/name:os.system", r"not plain YAML"),
        ("seed: !!python/object/new:os.system [x]", r"not plain YAML"),
        ("_target_: os.system", r"unknown key _target_"),
        ("seed: ${oc.env:HOME}", r"seed must be int, got '\$\{oc.env:HOME\}' \(str\)"),
        # What PyYAML's constructors raise is not all of its own kind.
        ("seed: 2020-13-45", r"seed must be int, got '2020-13-45' \(str\); numbers are those of"),
        ("seed: 2020-12-24", r"seed must be int, got '2020-12-24' \(str\); numbers are those of"),
        ("seed: !!timestamp soon", r"c.yaml: not plain YAML"),
        ("seed: !!bool maybe", r"c.yaml: not plain YAML"),
        ("seed: !!int abc", r"c.yaml: not plain YAML"),
        (f"seed: {'1' * 5000}", r"c.yaml: not plain YAML"),
        ("[" * 5000, r"c.yaml: not plain YAML"),
        ("seed: \0", r"c.yaml: not plain YAML"),
        ("? [1]\n: 2", r"c.yaml: not plain YAML"),
        ("1: 2", r"unknown key 1;"),
        ("train:", r"train is a section, got None"),
        (f"kvpo: {{learning_rate: 1{'0' * 400}}}", r"kvpo.learning_rate must be a finite number"),
        ("kvpo: {rewards: {vq: -.inf}}", r"kvpo.rewards.vq must be a finite number, got -inf"),
        ("kvpo: {rewards: {ta: true}}", r"kvpo.rewards.ta must be float, got True \(bool\)"),
        ("kvpo: {shuffle_advantages: 1}", r"kvpo.shuffle_advantages must be bool, got 1 \(int\)"),
        ("kvpo: {reward_sign: 0}", r"kvpo.reward_sign must be 1 or -1, got 0"),
        ("generator: {dim: 96, heads: 32}", r"generator.dim / generator.heads must be even"),
        ("kvpo: {local_weight: 0}", r"kvpo.local_weight and kvpo.global_weight must not both be 0"),
        ("data: {frames: 58}", r"data.frames must be a multiple of data.block_frames = 3, got 58"),
        ("data: {canvas: 18}", r"data.canvas must be a multiple of data.patch = 4, got 18"),
        ("generator: {dim: 97}", r"generator.dim must be a multiple of generator.heads = 3"),
        ("data: {turn_blocks: [9, 3]}", r"data.turn_blocks must be two ascending .*\[9, 3\]"),
        ("data: {segment_blocks: [0, 2]}", r"data.segment_blocks must be two ascending .* from 1"),
    ],
)
def test_refused_with_the_key(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        loaded(tmp_path, text)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read .*missing.yaml"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigurationError, match=r"cannot read"):
        loaded(tmp_path, b"seed: \xff\xfe")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "010", 10),  # leading zeros mean nothing
        ("seed", "08", 8),
        ("seed", "+7", 7),
        ("seed", "-0", 0),
        ("seed", "0o10", 8),
        ("seed", "0x1F", 31),
        ("seed", "!!int 010", 10),
        ("kvpo.learning_rate", "1e-4", 1e-4),
        ("kvpo.learning_rate", "1E+2", 100.0),
        ("kvpo.learning_rate", ".5", 0.5),
        ("kvpo.learning_rate", "2.", 2.0),
        ("kvpo.learning_rate", "3", 3.0),
        ("kvpo.learning_rate", "!!float 010", 10.0),
        ("kvpo.shuffle_advantages", "true", True),
        ("kvpo.shuffle_advantages", "FALSE", False),
    ],
)
def test_values_are_those_of_yaml_1_2(tmp_path: Path, key: str, text: str, value: Any) -> None:
    config = load_config(None, [f"{key}={text}"])
    assert leaves(config)[key] == value and type(leaves(config)[key]) is type(value)
    assert loaded(tmp_path, nested(key, text)) == config


def nested(key: str, text: str) -> str:
    lines = [f"{'  ' * i}{part}:" for i, part in enumerate(key.split("."))]
    return "\n".join(lines) + f" {text}\n"


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *(("seed", text) for text in ("1:00", "1_000", "0b11", "-0x1", "0o9", "1:2:3", "\uff11")),
        *(("seed", f"!!int {text}") for text in ("1:00", "1_000", "0b11", "''", "'1 '")),
        ("train.iterations", "190:20:30"),
        ("train.minutes", "1:30"),
        ("train.minutes", "!!float 1:30"),
        ("train.minutes", "!!float 1_0.5"),
        ("kvpo.learning_rate", "190:20:30.15"),
        ("kvpo.learning_rate", "1_0.5"),
        ("kvpo.learning_rate", "+.inf"),
        ("kvpo.learning_rate", ".NaN"),
        *(("kvpo.shuffle_advantages", word) for word in ("yes", "No", "on", "OFF", "y", "tRue")),
        ("kvpo.shuffle_advantages", "!!bool yes"),
        ("data.turn_blocks", "[1:00, 2:00]"),
    ],
)
def test_what_yaml_1_1_made_of_it_is_refused(tmp_path: Path, key: str, text: str) -> None:
    words = (
        r"numbers are|only true and false|finite number|not true or false|must be int, got '\uff11'"
    )
    with pytest.raises(ConfigurationError, match=words):
        load_config(None, [f"{key}={text}"])
    with pytest.raises(ConfigurationError, match=words):
        loaded(tmp_path, nested(key, text))


def test_no_key_merges_another_in(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="unknown key <<"):
        loaded(tmp_path, "<<: {seed: 3}")


def test_a_base_holds_where_nothing_is_said(tmp_path: Path) -> None:
    base = to_mapping(load_config(None, ["seed=5", "kvpo.ema=0.5", "kvpo.rewards.ta=3"]))
    path = tmp_path / "c.yaml"
    path.write_text("kvpo: {rewards: {vq: 2}}", encoding="utf-8")
    config = load_config(path, ["kvpo.ema=0.25"], base)
    wanted = ["seed=5", "kvpo.ema=0.25", "kvpo.rewards.ta=3", "kvpo.rewards.vq=2"]
    assert config == load_config(None, wanted)
    assert base["kvpo"]["ema"] == 0.5
    with pytest.raises(ConfigurationError, match="kvpo is a section, got 3"):
        load_config(None, ["kvpo=3"], base)


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("seed", "not of the form key.path=value"),
        ("=1", "not of the form"),
        ("seed.a=1", "seed"),
        ("kvpo.nothing=1", "unknown key kvpo.nothing"),
        ("kvpo.=1", "unknown key kvpo.;"),
        (".seed=1", "unknown key ;"),
        ("seed=", "seed must be int, got None"),
        ("train=3", "train is a section, got 3"),
        ("train.iterations=*x", "not plain YAML"),
        ("train.iterations=[", "not plain YAML"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        loaded(tmp_path, "seed: 1", override)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert loaded(tmp_path, "# nothing\n") == RunConfig()


def test_a_few_lines_do_not_become_a_value_of_any_size(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    lines += ["kvpo: *a11"]
    with pytest.raises(ConfigurationError, match=r"alias \*a0 is not supported"):
        loaded(tmp_path, "\n".join(lines))


def leaves(config: Any, path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, where = getattr(config, field.name), f"{path}{field.name}"
        found |= leaves(value, f"{where}.") if dataclasses.is_dataclass(value) else {where: value}
    return found


@pytest.mark.parametrize("path", _RANGES)
def test_ranges(path: str) -> None:
    low, high = _RANGES[path]
    whole = isinstance(leaves(RunConfig())[path], int)
    outside = [low - 1] + ([high + 1] if high != float("inf") else [])
    more = ["kvpo.global_weight=1"] if path == "kvpo.local_weight" else []  # not both may be 0
    for value in outside:
        with pytest.raises(ConfigurationError, match=rf"^{path} must be .*, got "):
            load_config(None, [f"{path}={int(value) if whole else value}"])
    if path not in ("data.frames", "data.canvas", "data.patch", "generator.dim"):  # multiples
        inside = int(low) if whole else low
        if path != "kvpo.reward_sign":
            assert leaves(load_config(None, [f"{path}={inside}", *more]))[path] == inside


def test_every_number_has_a_range() -> None:
    """A new key is not forgotten; those left out check themselves, or may be any number."""
    own = ("kvpo.routing.", "kvpo.objective.", "kvpo.rewards.")
    numbers = {
        path
        for path, value in leaves(RunConfig()).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    unchecked = {path for path in numbers - set(_RANGES) if not path.startswith(own)}
    assert not unchecked and set(_RANGES) <= numbers


def test_weights_decide_what_they_were_made_with() -> None:
    made = load_config(None, ["generator.layers=2", "data.canvas=8"])
    config = of_weights(load_config(None, ["kvpo.ema=0.5", "data.canvas=8"]), made)
    assert config.generator == made.generator and config.data == made.data
    assert config.kvpo.ema == 0.5
    match = r"generator.layers = 9 is not what the weights were made with, 2: it takes `pretrain`"
    with pytest.raises(ConfigurationError, match=match):
        of_weights(load_config(None, ["generator.layers=9"]), made)


def test_differences_name_the_key_and_both_values() -> None:
    a, b = (to_mapping(load_config(None, [f"kvpo.ema={x}", f"seed={x * 2}"])) for x in (0, 1))
    assert differences(a, a) == []
    assert differences(a, b) == ["seed: 0, 2", "kvpo.ema: 0.0, 1.0"]
