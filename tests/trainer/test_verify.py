"""The controls' statistics on known numbers, and arms that fail or are stale."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kvpo_trainer import verify
from kvpo_trainer.config import RunConfig, load_config, to_mapping
from kvpo_trainer.verify import ARMS, START, Gap, VerifyError
from kvpo_trainer.weights import load_weights


def results(values: dict[str, list[float]]) -> dict[tuple[str, int], dict]:
    return {
        (arm, seed): {"weights": "w", "scores": {"reward": [v - 0.1, v + 0.1], "vq": [v, v]}}
        for arm, per_seed in values.items()
        for seed, v in enumerate(per_seed)
    } | {(START, 0): {"weights": "w", "scores": {"reward": [0.4, 0.6], "vq": [0.5, 0.5]}}}


def test_gap() -> None:
    gap = Gap([0.1, 0.2, 0.3])
    assert gap.mean == pytest.approx(0.2)
    assert gap.error == pytest.approx(0.1 / math.sqrt(3))
    assert gap.errors == pytest.approx(2 * math.sqrt(3))
    assert math.isnan(Gap([0.1]).error) and math.isnan(Gap([0.1]).errors)


@pytest.mark.parametrize(
    ("plus", "passed"),
    [
        ([1.30, 1.31, 1.29], True),  # gap .3, error .006
        ([1.0, 1.01, 0.99], False),  # no gap
        ([1.0, 1.3, 1.6], False),  # a gap of 1.7 errors
        ([0.7, 0.71, 0.69], False),  # the wrong way round
    ],
)
def test_the_signed_test(plus: list[float], passed: bool) -> None:
    summary = verify.summarise(
        results({"plus": plus, "minus": [1.0, 1.0, 1.0], "shuffled": [1.1, 1.1, 1.1]}),
        [0, 1, 2],
        RunConfig(),
    )
    assert summary["passed"] is passed
    assert summary["signed"]["reward"]["per_seed"] == pytest.approx([p - 1.0 for p in plus])
    control = summary["plus_minus_shuffled"]["reward"]
    assert control["per_seed"] == pytest.approx([p - 1.1 for p in plus])
    names = ("plus_minus_start", "shuffled_minus_start")
    away = [summary[name]["reward"]["per_seed"] for name in names]
    assert away[0] == pytest.approx([p - 0.5 for p in plus]) and away[1] == pytest.approx([0.6] * 3)
    text = verify.table(summary)
    assert "routing of 8 branches: window_frames 12" in text and "shuffled - start" in text
    assert ("holds" in text and "NOT" not in text) is passed
    json.dumps(summary)


def test_an_arm(tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms of a seed begin with the same rollout; what is done with its rewards differs."""
    monkeypatch.setattr(verify, "load_weights", lambda: load_weights(tiny_weights))
    settings = ["kvpo.prompts_per_step=1", "train.iterations=2", "train.evaluation_prompts=2"]
    config = load_config(None, settings)
    records = {}
    for arm in (*ARMS, START):
        verify.run_arm(config, arm, 5, tmp_path / f"{arm}.json", noises=1)
        records[arm] = json.loads((tmp_path / f"{arm}.json").read_text())
    start = records.pop(START)
    assert start["history"] == [] and start["scores"] != records["plus"]["scores"]
    for arm, record in records.items():
        assert (record["arm"], record["seed"]) == (arm, 5)
        assert len(record["history"]) == 2 and len(record["scores"]["reward"]) == 2
        for key in ("reward_branches", "reward_anchor", "start_frame"):
            assert record["history"][0][key] == records["plus"]["history"][0][key]
    scores = [json.dumps(record["scores"]) for record in records.values()]
    assert len(set(scores)) == 3
    again = tmp_path / "again.json"
    verify.run_arm(config, "minus", 5, again, noises=1)
    assert json.loads(again.read_text())["scores"] == records["minus"]["scores"]
    assert not list(tmp_path.glob("*.tmp*"))


WRITE = """
import json, sys
arm, seed, out, config = sys.argv[1:]
open(out, "w").write(json.dumps({"arm": arm, "config": json.loads(config), "weights": "w",
    "scores": {}}))
"""


def writer(config: RunConfig):
    text = json.dumps(to_mapping(config))
    return lambda arm, seed, out: [sys.executable, "-c", WRITE, arm, str(seed), str(out), text]


def test_arms_run_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig()
    got = verify.run_all(writer(config), [1, 2], tmp_path, config, "w")
    assert set(got) == {(START, 1), *((arm, seed) for arm in ARMS for seed in (1, 2))}
    assert got["minus", 2]["arm"] == "minus"
    fail = lambda arm, seed, out: [sys.executable, "-c", "raise SystemExit(3)"]
    assert verify.run_all(fail, [1, 2], tmp_path, config, "w") == got  # all there: nothing is run
    assert f"7 arms have a result in {tmp_path} already" in capsys.readouterr().out


def test_arms_stop_after_iterations_not_minutes(tmp_path: Path) -> None:
    timed = load_config(None, ["train.minutes=1"])
    with pytest.raises(VerifyError, match=r"train\.minutes must be 0"):
        verify.run_all(writer(timed), [1], tmp_path, timed, "w")
    with pytest.raises(VerifyError, match=r"train\.minutes must be 0"):
        verify.run_arm(timed, "plus", 1, tmp_path / "arm.json")
    assert not list(tmp_path.iterdir())


def test_results_of_another_configuration_are_refused(tmp_path: Path) -> None:
    config = RunConfig()
    verify.run_all(writer(config), [1], tmp_path, config, "w")
    other = load_config(None, ["kvpo.learning_rate=1e-5"])
    with pytest.raises(VerifyError, match=r"start-1.json is of other weights"):
        verify.run_all(writer(config), [1], tmp_path, config, "v")
    with pytest.raises(VerifyError, match=r"start-1.json is of another configuration"):
        verify.run_all(writer(other), [1], tmp_path, other, "w")


def test_a_failed_arm_is_an_error(tmp_path: Path) -> None:
    code = "import sys; print('why it failed'); sys.exit(sys.argv[1] == 'minus')"
    command = lambda arm, seed, out: (
        [sys.executable, "-c", code, arm] if arm == "minus" else writer(RunConfig())(arm, seed, out)
    )
    with pytest.raises(VerifyError, match=r"arm minus-1 failed, see .*minus-1.log"):
        verify.run_all(command, [1], tmp_path, RunConfig(), "w")
    assert "why it failed" in (tmp_path / "minus-1.log").read_text()


def test_a_terminated_run_ends_its_arms(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from kvpo_trainer import cli, verify
sleep = "import os, time; open('{tmp_path}/' + str(os.getpid()), 'w').close(); time.sleep(60)"
verify.arm_command = lambda words: lambda *job: [sys.executable, "-c", sleep]
sys.exit(cli.main(["verify", "--out", "{tmp_path}/run"]))
"""
    run = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while len(arms := [p for p in tmp_path.iterdir() if p.name.isdigit()]) < 2:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    run.terminate()
    assert run.wait(timeout=30) == 128 + signal.SIGTERM
    for arm in arms:
        with pytest.raises(ProcessLookupError):
            os.kill(int(arm.name), 0)
