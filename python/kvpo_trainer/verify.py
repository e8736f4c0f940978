"""Does KVPO learn? The signed test and the shuffled-advantage control.

Per training seed three arms start from the shipped weights: towards +reward, towards -reward, and
towards +reward with advantages shuffled within each prompt. All are evaluated on the same held-out
prompts and noise, and so are the weights they start from. The *signed gap* is the mean reward of
the first arm minus that of the second: drift that has nothing to do with the reward cancels. How
far the control has come from the start is drift, and what groups of equal advantages say.
"""

import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from kvpo_trainer.config import RunConfig, of_weights, routing_text, to_mapping
from kvpo_trainer.data import split_prompts
from kvpo_trainer.evaluation import Evaluation, evaluate, standard_error
from kvpo_trainer.files import write_whole
from kvpo_trainer.update import Trainer
from kvpo_trainer.weights import load_weights

ARMS = ("plus", "minus", "shuffled")
START = "start"  # no training at all; once, under the first seed
REQUIRED_ERRORS = 4.0  # standard errors over the training seeds


@dataclass(frozen=True)
class Gap:
    """A difference between two arms, per training seed."""

    per_seed: list[float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.per_seed)

    @property
    def error(self) -> float:
        """Standard error over the seeds; NaN for one seed."""
        return standard_error(self.per_seed)

    @property
    def errors(self) -> float:
        """The mean in standard errors."""
        return self.mean / self.error if self.error > 0 else math.nan


class VerifyError(RuntimeError):
    """The arms cannot be run or compared."""


def run_arm(config: RunConfig, arm: str, seed: int, out: Path, noises: int = 2) -> None:
    """Train one arm, `START` not at all, and write its per-prompt scores to `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # two arms run side by side
    weights = load_weights()
    config = of_weights(config, weights.config)
    _check(config)
    weights.generator.history = config.history
    train, held_out = split_prompts()
    prompts = held_out[: config.train.evaluation_prompts] * noises
    kvpo = replace(
        config.kvpo,
        reward_sign=-1 if arm == "minus" else 1,
        shuffle_advantages=arm == "shuffled",
    )
    started = time.perf_counter()
    trainer = Trainer(weights.generator, weights.reward_model, train, kvpo, seed)
    iterations = 0 if arm == START else config.train.iterations
    history = [trainer.step().metrics for _ in range(iterations)]
    trained = time.perf_counter() - started

    def scores(evaluation: Evaluation) -> dict[str, list[float]]:
        return {k: [round(x, 6) for x in v.tolist()] for k, v in evaluation.scores.items()}

    result = evaluate(
        weights.generator,
        weights.reward_model,
        weights.judge,
        config.kvpo.rewards,
        prompts,
        config.train.evaluation_seed,
    )
    record = {
        "arm": arm,
        "seed": seed,
        "config": to_mapping(config),
        "weights": weights.checksum,
        "scores": scores(result),
        "train_seconds": round(trained, 1),
        "evaluation_seconds": round(time.perf_counter() - started - trained, 1),
        "history": [{k: round(v, 7) for k, v in row.items()} for row in history],
    }
    write_whole(out, json.dumps(record))


def run_all(
    command: Callable[[str, int, Path], Sequence[str]],
    seeds: Sequence[int],
    folder: Path,
    config: RunConfig,
    weights: str,
    processes: int = 2,
) -> dict[tuple[str, int], dict[str, Any]]:
    """Run every arm that has no result in `folder` yet, so many at a time.

    Args:
        command: makes the command line of an arm.
        config: what the arms run with.
        weights: checksum of what they start from.

    Raises:
        VerifyError: an arm failed, its output is in the folder; or a result that is there already
            is unreadable or of another configuration or other weights.
    """
    _check(config)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(START, seeds[0]), *((arm, seed) for seed in seeds for arm in ARMS)]
    waiting = [job for job in jobs if not _result(folder, *job).exists()]
    for job in jobs:
        path = _result(folder, *job)
        if not path.exists():
            continue
        there = _read(path)
        for what, same in (
            ("another configuration", there["config"] == _as_json(config)),
            ("other weights", there["weights"] == weights),
        ):
            if not same:
                raise VerifyError(f"{path} is of {what}: remove it, or use another --out")
    if len(waiting) < len(jobs):
        print(f"{len(jobs) - len(waiting)} arms have a result in {folder} already", flush=True)
    running: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                arm, seed = waiting.pop(0)
                with _log(folder / f"{arm}-{seed}.log") as file:
                    running[arm, seed] = subprocess.Popen(
                        list(command(arm, seed, _result(folder, arm, seed))),
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=environment,
                    )
            time.sleep(0.5)
            for job, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                name = f"{job[0]}-{job[1]}"
                if process.returncode or not _result(folder, *job).exists():
                    raise VerifyError(f"arm {name} failed, see {folder / name}.log")
                print(f"{name} done, {len(waiting) + len(running)} to go", flush=True)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return {job: _read(_result(folder, *job)) for job in jobs}


def summarise(
    results: dict[tuple[str, int], dict[str, Any]], seeds: Sequence[int], config: RunConfig
) -> dict[str, Any]:
    """The gaps of every measure, and whether the signed test holds."""
    measures = list(results["plus", seeds[0]]["scores"])

    def mean_of(arm: str, seed: int, measure: str) -> float:
        record = results[arm, seeds[0] if arm == START else seed]
        return statistics.fmean(record["scores"][measure])

    def gap(first: str, second: str, measure: str) -> Gap:
        return Gap([mean_of(first, s, measure) - mean_of(second, s, measure) for s in seeds])

    def row(g: Gap) -> dict[str, Any]:
        return {"per_seed": g.per_seed, "mean": g.mean, "error": g.error, "errors": g.errors}

    gaps = {
        name: {m: row(gap(*arms, m)) for m in measures}
        for name, arms in {
            "signed": ("plus", "minus"),
            "plus_minus_shuffled": ("plus", "shuffled"),
            "plus_minus_start": ("plus", START),
            "shuffled_minus_start": ("shuffled", START),
        }.items()
    }
    return {
        "test": "signed: reward of +reward training minus reward of -reward training",
        "required_errors": REQUIRED_ERRORS,
        "passed": gaps["signed"]["reward"]["errors"] > REQUIRED_ERRORS,
        **gaps,
        "seeds": list(seeds),
        "iterations": config.train.iterations,
        "config": to_mapping(config),
        "weights": results["plus", seeds[0]]["weights"],
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "arms": {
            f"{arm}-{seed}": {k: v for k, v in result.items() if k not in ("config", "weights")}
            for (arm, seed), result in results.items()
        },
    }


def table(summary: dict[str, Any]) -> str:
    """The gaps as text."""
    columns = {
        "+reward - (-reward)": "signed",
        "real - shuffled": "plus_minus_shuffled",
        "real - start": "plus_minus_start",
        "shuffled - start": "shuffled_minus_start",
    }
    routing = summary["config"]["kvpo"]["routing"]
    lines = [
        f"routing of {routing['num_branches']} branches: {routing_text(routing)}",
        f"{'':14}" + "".join(f"{title:>26}" for title in columns),
    ]
    for measure in summary["signed"]:
        gaps = [summary[name][measure] for name in columns.values()]
        cells = [f"{g['mean']:+.4f} ± {g['error']:.4f} ({g['errors']:.1f})" for g in gaps]
        lines.append(f"{measure:14}" + "".join(f"{cell:>26}" for cell in cells))
    lines.append("mean ± standard error over the training seeds (in standard errors)")
    word = "holds" if summary["passed"] else "does NOT hold"
    lines.append(f"signed test (> {REQUIRED_ERRORS:g} standard errors): {word}")
    return "\n".join(lines)


def arm_command(arguments: Sequence[str]) -> Callable[[str, int, Path], Sequence[str]]:
    """Command lines that run an arm in a process of its own, with these options."""

    def command(arm: str, seed: int, out: Path) -> Sequence[str]:
        own = ["verify-arm", "--arm", arm, "--seed", str(seed), "--out", str(out)]
        return [sys.executable, "-m", "kvpo_trainer", *own, *arguments]

    return command


def _check(config: RunConfig) -> None:
    if config.train.minutes:
        raise VerifyError("train.minutes must be 0: arms are compared after as many iterations")


def _as_json(config: RunConfig) -> Any:
    return json.loads(json.dumps(to_mapping(config)))


def _log(path: Path) -> BinaryIO:
    """What an arm says goes there; nowhere, if there is no space for it."""
    try:
        return path.open("wb")
    except OSError:
        return open(os.devnull, "wb")


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise VerifyError(f"{path} is no result of an arm: {error}") from error
    if not isinstance(record, dict) or not {"config", "weights", "scores"} <= set(record):
        raise VerifyError(f"{path} is no result of an arm")
    return record


def _result(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"{arm}-{seed}.json"
