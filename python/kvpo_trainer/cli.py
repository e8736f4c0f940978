"""`kvpo-train`: pretrain, train, evaluate, sample, diversity, verify."""

import argparse
import json
import logging
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from kvpo_trainer import diversity, report, session, verify
from kvpo_trainer.checkpoint import CheckpointError, latest_checkpoint
from kvpo_trainer.config import (
    ConfigurationError,
    RunConfig,
    dump_yaml,
    from_mapping,
    load_config,
    of_weights,
)
from kvpo_trainer.data import Prompt, split_prompts
from kvpo_trainer.evaluation import Evaluation, evaluate
from kvpo_trainer.generator import Generator
from kvpo_trainer.pretrain import pretrain
from kvpo_trainer.rewards import HEADS, train_reward_models
from kvpo_trainer.rollout import check_routing
from kvpo_trainer.update import StepResult, Trainer
from kvpo_trainer.weights import SHIPPED, Weights, fill, load_weights, save_weights

CONFIGS = Path(__file__).parent / "configs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    options = _parser().parse_args(arguments)
    try:
        config = _config(options)
        if config.threads:
            torch.set_num_threads(config.threads)
        code: int = options.run(options, config)
        return code
    except session.Interrupted as stop:
        print(f"{stop}; --resume goes on", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("kvpo-train: interrupted", file=sys.stderr)
        return 130
    except (
        ConfigurationError,
        CheckpointError,
        session.RunError,
        verify.VerifyError,
        ValueError,
        OSError,
    ) as error:
        print(f"kvpo-train: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvpo-train", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument(
            "--config",
            help=f"a YAML file, or one of the shipped: {', '.join(_shipped_configs())}",
        )
        sub.add_argument(
            "--set", action="append", default=[], metavar="key.path=value", help="override a key"
        )
        return sub

    def policy_of(sub: argparse.ArgumentParser, done: str) -> None:
        sub.add_argument(
            "--weights", type=Path, default=SHIPPED, help="folder of `pretrain`; the shipped one"
        )
        sub.add_argument(
            "--checkpoint", type=Path, help=f"run folder whose newest policy is {done}"
        )
        sub.add_argument(
            "--average", action="store_true", help="of the run, the average of its weights"
        )

    sub = command("pretrain", _pretrain, "train generator, reward models and judge from a seed")
    sub.add_argument("--out", type=Path, required=True, help="folder of the weights")
    sub = command("train", _train, "align the generator by KVPO, and report")
    sub.add_argument("--out", type=Path, required=True, help="run folder")
    sub.add_argument(
        "--weights", type=Path, default=SHIPPED, help="folder of `pretrain`; the shipped one"
    )
    sub.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    sub.add_argument(
        "--strict-resume",
        action="store_true",
        help="--resume, but a damaged newest one is an error",
    )
    sub.add_argument("--figure", type=Path, help="also write the README's figure there")
    sub = command("evaluate", _evaluate, "score weights or a run on held-out prompts")
    policy_of(sub, "scored")
    sub = command("sample", _sample, "write a GIF for each prompt")
    sub.add_argument("prompts", nargs="+", help='such as "a 3 moves left slowly, then turns up"')
    sub.add_argument("--out", type=Path, required=True, help="folder of the GIFs")
    policy_of(sub, "sampled")
    sub = command("diversity", _diversity, "how different the branches are, beside other noise")
    policy_of(sub, "rolled out")
    sub.add_argument("--rollouts", type=int, default=20, help="how many; 20")
    sub.add_argument("--record", type=Path, help="also write the numbers there")
    sub = command(
        "verify",
        _verify,
        "does it learn: signed test and shuffled-advantage control, from the shipped weights; about"
        " 25 minutes on two cores",
    )
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("runs/verify"),
        help="folder of the arms' results, which are not run again; runs/verify",
    )
    sub.add_argument("--seeds", type=int, default=3, help="training seeds, at least 2; 3")
    sub.add_argument("--processes", type=int, default=2, help="arms at a time; 2")
    sub.add_argument("--record", type=Path, help="also write the summary there")
    sub = command("verify-arm", _verify_arm, "one arm of `verify`, which runs it")
    sub.add_argument("--arm", choices=(*verify.ARMS, verify.START), required=True)
    sub.add_argument("--seed", type=int, required=True)
    sub.add_argument("--out", type=Path, required=True)
    return parser


def _shipped_configs() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def _config(options: argparse.Namespace) -> RunConfig:
    path = None
    if options.config is not None:
        shipped = CONFIGS / f"{options.config}.yaml"
        path = shipped if options.config in _shipped_configs() else Path(options.config)
    return load_config(path, options.set)


def _pretrain(options: argparse.Namespace, config: RunConfig) -> int:
    options.out.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before it all
    print("reward models and judge")
    reward_model, judge = train_reward_models(config.data, config.seed)
    bar = tqdm(total=config.pretrain.steps, desc="generator", unit="step")

    def show(step: int, metrics: dict[str, float], average: Generator) -> None:
        bar.set_postfix(loss=f"{metrics['loss']:.3f}")
        bar.update()

    generator = pretrain(config.generator, config.data, config.pretrain, config.seed, show)
    bar.close()
    save_weights(options.out, generator, reward_model, judge, config)
    print(f"weights in {options.out}")
    return 0


def _train(options: argparse.Namespace, config: RunConfig) -> int:
    started = time.perf_counter()
    weights = load_weights(options.weights)
    weights.generator.history = config.history
    config = of_weights(config, weights.config)
    if options.figure is not None:
        _check_figure(options.figure)
    train, held_out = split_prompts()
    prompts = held_out[: config.train.evaluation_prompts]
    out: Path = options.out
    with session.run_folder(out):
        trainer = Trainer(weights.generator, weights.reward_model, train, config.kvpo, config.seed)
        resumed = False
        if options.resume or options.strict_resume:
            resumed = session.resume(trainer, out, config, options.strict_resume)
            if not resumed:
                print("nothing to resume: starting anew")
            elif trainer.step_index >= config.train.iterations and (out / "report.html").exists():
                print(f"nothing left to do: all {trainer.step_index} rollouts are done, see {out}")
                return 0
        elif any((out / "checkpoints").glob("step-*")):
            raise session.RunError(f"{out} holds a run: pass --resume, or another --out")
        if not resumed:
            (out / "metrics.jsonl").unlink(missing_ok=True)  # of a run that never saved
        if options.figure is not None:
            options.figure.parent.mkdir(parents=True, exist_ok=True)
        before = _evaluation(trainer.initial, weights, config, prompts, "before")
        limit = config.train.minutes
        last: list[StepResult] = []
        with tqdm(
            total=None if limit else config.train.iterations,
            initial=trainer.step_index,
            desc=f"KVPO, {limit:g} minutes" if limit else "KVPO",
            unit="rollout",
        ) as bar:

            def show(result: StepResult) -> None:
                m = result.metrics
                bar.set_postfix(
                    {head: f"{m[f'{head}_branches']:.3f}" for head in HEADS}
                    | {"reward": f"{m['reward_branches']:.3f}"}
                )
                bar.update()
                last[:] = [result]

            session.train_loop(trainer, out, config, show)
        after = _evaluation(trainer.policy, weights, config, prompts, "after")
        _write_report(options, config, trainer, before, after, prompts, last, started, weights)
    return 0


def _check_figure(path: Path) -> None:
    if path.suffix not in (".png", ".svg", ".pdf") or path.is_dir():
        raise ConfigurationError(f"--figure must name a .png, .svg or .pdf file, got {path}")


def _write_report(
    options: argparse.Namespace,
    config: RunConfig,
    trainer: Trainer,
    before: Evaluation,
    after: Evaluation,
    prompts: Sequence[Prompt],
    last: Sequence[StepResult],
    started: float,
    weights: Weights,
) -> None:
    out: Path = options.out
    rows = report.comparison(before, after)
    print(f"\nheld-out prompts, {trainer.step_index} rollouts, paired change with 95 % interval")
    for name, was, now, change, half in rows:
        word = report.verdict(change, half)
        print(f"  {name:13}{was:7.3f} ->{now:7.3f}   {change:+.4f} ± {half:.4f}   {word}")
    print("  a change is not yet learning: `kvpo-train verify` runs the controls")
    keys = ("measure", "before", "after", "change", "half_width_95")
    record = [dict(zip(keys, row, strict=True)) for row in rows]
    (out / "evaluation.json").write_text(json.dumps(record, indent=1))
    metrics = session.read_metrics(out / "metrics.jsonl")
    facts = {
        "weights": f"{weights.checksum} (what the run began with)",
        "rollouts": str(trainer.step_index),
        "prompts per rollout": str(config.kvpo.prompts_per_step),
        "branches": str(config.kvpo.routing.num_branches),
        "seed": str(config.seed),
        "torch": torch.__version__,
        "minutes": f"{(time.perf_counter() - started) / 60:.1f}",
    }
    page = report.render(
        "KVPO run",
        dump_yaml(config),
        facts,
        metrics,
        before,
        after,
        prompts,
        last[0] if last else None,
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    print(f"report: {(out / 'report.html').resolve()}")
    if options.figure is not None and metrics:
        report.readme_figure(metrics, before, after).savefig(options.figure, dpi=130)


def _evaluation(
    generator: Generator,
    weights: Weights,
    config: RunConfig,
    prompts: Sequence[Prompt],
    name: str,
) -> Evaluation:
    print(f"evaluating {len(prompts)} held-out prompts ({name})", flush=True)
    return evaluate(
        generator,
        weights.reward_model,
        weights.judge,
        config.kvpo.rewards,
        prompts,
        config.train.evaluation_seed,
    )


def _policy(options: argparse.Namespace, config: RunConfig) -> tuple[Weights, RunConfig]:
    """Weights, with the newest policy of a run in place of the generator where one is named."""
    weights = load_weights(options.weights)
    if options.average and options.checkpoint is None:
        raise ConfigurationError("--average is of a run: give --checkpoint")
    if options.checkpoint is not None:
        checkpoint = latest_checkpoint(options.checkpoint / "checkpoints")
        if checkpoint is None:
            raise CheckpointError(f"{options.checkpoint}: no checkpoint; give the run's own folder")
        owner = "ema/" if options.average else "policy/"
        tensors = checkpoint.tensors.items()
        own = {k.removeprefix(owner): v for k, v in tensors if k.startswith(owner)}
        try:
            fill(weights.generator, own, checkpoint.path)
        except CheckpointError as error:
            raise CheckpointError(
                f"is it a run of {options.weights} (--weights)? {error}"
            ) from error
        # A run is judged as it was trained, but for what the command line says.
        run, default = from_mapping(RunConfig, checkpoint.config), RunConfig()
        if config.history == default.history:
            config = replace(config, history=run.history)
        if config.kvpo.rewards == default.kvpo.rewards:
            config = replace(config, kvpo=replace(config.kvpo, rewards=run.kvpo.rewards))
    weights.generator.history = config.history
    return weights, config


def _evaluate(options: argparse.Namespace, config: RunConfig) -> int:
    weights, config = _policy(options, config)
    prompts = split_prompts()[1][: config.train.evaluation_prompts]
    result = _evaluation(weights.generator, weights, config, prompts, "now")
    for name, values in result.scores.items():
        half = 1.96 * float(values.std()) / len(prompts) ** 0.5
        print(f"  {name:13}{float(values.mean()):.3f} ± {half:.3f}")
    return 0


def _sample(options: argparse.Namespace, config: RunConfig) -> int:
    prompts = [Prompt.parse(text) for text in options.prompts]
    weights, config = _policy(options, config)
    options.out.mkdir(parents=True, exist_ok=True)
    result = _evaluation(weights.generator, weights, config, prompts, "sampling")
    for i, prompt in enumerate(prompts):
        path = options.out / f"{i:02d}-{prompt.text.replace(',', '').replace(' ', '-')}.gif"
        path.write_bytes(report.gif(result.videos[i]))
        print(path)
    return 0


def _diversity(options: argparse.Namespace, config: RunConfig) -> int:
    if options.rollouts < 1:
        raise ConfigurationError(f"--rollouts must be at least 1, got {options.rollouts}")
    weights, config = _policy(options, config)
    check_routing(config.kvpo.routing, weights.config.data)
    found = diversity.measure(
        weights.generator,
        weights.reward_model,
        config.kvpo.rewards,
        config.kvpo.routing,
        split_prompts()[0],
        config.kvpo.prompts_per_step,
        options.rollouts,
        config.seed,
    )
    of = weights.checksum if options.checkpoint is None else str(options.checkpoint)
    summary = diversity.summarise(found, config, of)
    if options.record is not None:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.write_text(json.dumps(summary, indent=1) + "\n")
    print(diversity.table(summary))
    return 0


def _verify(options: argparse.Namespace, config: RunConfig) -> int:
    started = time.perf_counter()
    if options.seeds < 2 or options.processes < 1:
        raise ConfigurationError(
            "--seeds must be at least 2, which have a standard error, and --processes at least 1"
        )
    weights = load_weights()
    config = of_weights(config, weights.config)
    seeds = list(range(config.seed + 1, config.seed + 1 + options.seeds))
    passed_on = ["--config", options.config] if options.config else []
    passed_on += [word for override in options.set for word in ("--set", override)]
    command = verify.arm_command(passed_on)
    # What ends this process must end the arms.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        results = verify.run_all(
            command, seeds, options.out, config, weights.checksum, options.processes
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    summary = verify.summarise(results, seeds, config)
    summary["minutes"] = round((time.perf_counter() - started) / 60, 1)
    text = json.dumps(summary, indent=1)
    for path in (options.out / "summary.json", options.record):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
    print(verify.table(summary))
    return 0 if summary["passed"] else 1


def _verify_arm(options: argparse.Namespace, config: RunConfig) -> int:
    verify.run_arm(config, options.arm, options.seed, options.out)
    return 0
