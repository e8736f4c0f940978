"""The configuration: strict, and errors that name the key."""

from pathlib import Path

import pytest
from kvpo_trainer.cli import CONFIGS
from kvpo_trainer.config import (
    ConfigurationError,
    RunConfig,
    dump_yaml,
    from_mapping,
    load_config,
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
        ("seed: yes", r"seed must be int, got True \(bool\)"),
        ("seed: 1.5", r"seed must be int, got 1.5 \(float\)"),
        ("kvpo: {learning_rate: fast}", r"kvpo.learning_rate must be float, got 'fast' \(str\)"),
        ("kvpo: 3", r"kvpo is a section, got 3"),
        ("data: {turn_blocks: [1]}", r"data.turn_blocks must be a list of 2, got \[1\]"),
        ("data: {turn_blocks: [1, a]}", r"data.turn_blocks\[1\] must be int, got 'a'"),
        ("kvpo: {routing: {selection: best}}", r"kvpo.routing.*selection.*best"),
        ("kvpo: {objective: {clip_range_low: 2.0}}", r"kvpo.objective: clip_range_low must be in"),
        ("train: {evaluation_prompts: 1}", r"train: evaluation_prompts must be at least 2, got 1"),
        ("train: {minutes: -1}", r"train: minutes must be at least 0"),
        ("train: {minutes: .nan}", r"train.minutes is not a number"),
        ("seed: 1\nseed: 2", r"not plain YAML: seed given twice.*line 1"),
        ("- 1\n- 2", r"must hold keys and values"),
        ("just words", r"must hold keys and values"),
        ("a: [", r"not plain YAML"),
        ("!!python/object/apply:os.system ['true']", r"not plain YAML"),
        ("seed: !!python/name:os.system", r"not plain YAML"),
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
    ("override", "match"),
    [
        ("seed", "not of the form key.path=value"),
        ("=1", "not of the form"),
        ("seed.a=1", "seed"),
        ("kvpo.nothing=1", "unknown key kvpo.nothing"),
        ("train.iterations=[", "not plain YAML"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        loaded(tmp_path, "seed: 1", override)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert loaded(tmp_path, "# nothing\n") == RunConfig()
