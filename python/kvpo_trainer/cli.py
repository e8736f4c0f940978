"""`kvpo-train`: pretrain, train, evaluate, sample, diversity, verify."""

import argparse
import io
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kvpo_kernels import __version__
from kvpo_trainer import console, diversity, report, session, verify
from kvpo_trainer.checkpoint import CheckpointError, latest_checkpoint
from kvpo_trainer.config import (
    ConfigurationError,
    RunConfig,
    dump_yaml,
    from_mapping,
    load_config,
    of_weights,
    whole_number,
)
from kvpo_trainer.data import Prompt, split_prompts
from kvpo_trainer.evaluation import Evaluation, evaluate
from kvpo_trainer.files import write_whole
from kvpo_trainer.generator import Generator
from kvpo_trainer.pretrain import pretrain
from kvpo_trainer.progress import Progress
from kvpo_trainer.rewards import HEADS, train_reward_models
from kvpo_trainer.rollout import check_routing
from kvpo_trainer.signals import Interrupted, raised
from kvpo_trainer.update import StepResult, Trainer
from kvpo_trainer.video import EncoderMissing, check_encoder, mp4
from kvpo_trainer.weights import SHIPPED, Weights, fill, load_weights, save_weights

log = logging.getLogger(__name__)
CONFIGS = Path(__file__).parent / "configs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    with console.telling():
        logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
        options = _parser().parse_args(arguments)
        try:
            with raised():
                code = _run(options)
            lost = console.lost_output()
            if lost is not None and options.told and getattr(options, "record", None) is None:
                raise OSError(f"the result, which is in no file, could not be written: {lost}")
            return code
        except Interrupted as stop:
            print(f"kvpo-train: {stop}", file=sys.stderr)
            return stop.exit_code
        except KeyboardInterrupt:
            print("kvpo-train: interrupted", file=sys.stderr)
            return 130
        except (
            CheckpointError,
            session.RunError,
            verify.VerifyError,
            EncoderMissing,
            ValueError,
            OSError,
        ) as error:
            print(f"kvpo-train: {' '.join(str(error).split())}", file=sys.stderr)
            return 2


def _run(options: argparse.Namespace) -> int:
    config = _config(options)
    if config.threads:
        torch.set_num_threads(config.threads)
    code: int = options.run(options, config)
    return code


_EXAMPLES = """examples:
  kvpo-train train --config demo --out runs/first       three minutes, and a report
  kvpo-train train --out runs/first --resume            go on where it was stopped
  kvpo-train train --out runs/second --set train.iterations=20 --set kvpo.rewards.vq=0
  kvpo-train evaluate --checkpoint runs/first
  kvpo-train sample "a 3 moves left slowly, then turns up" --checkpoint runs/first --out clips
  kvpo-train COMMAND --help                             its options
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvpo-train",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=f"example: kvpo-train {name} {example}"
        )
        sub.set_defaults(run=run, told=False)
        sub.add_argument(
            "--config",
            help=f"a YAML file, or one of the shipped: {', '.join(_shipped_configs())}",
        )
        sub.add_argument(
            "--set", action="append", default=[], metavar="key.path=value", help="override a key"
        )
        return sub

    def weights_of(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--weights", type=Path, help="folder of `pretrain`; the run's own, or the shipped one"
        )

    def policy_of(sub: argparse.ArgumentParser, done: str) -> None:
        weights_of(sub)
        sub.add_argument(
            "--checkpoint", type=Path, help=f"run folder whose newest policy is {done}"
        )
        sub.add_argument(
            "--average", action="store_true", help="of the run, the average of its weights"
        )

    sub = command(
        "pretrain",
        _pretrain,
        "train generator, reward models and judge from a seed",
        "--out runs/weights",
    )
    sub.add_argument("--out", type=Path, required=True, help="folder of the weights")
    sub = command(
        "train",
        _train,
        "align the generator by KVPO, and report",
        "--out runs/first --set train.iterations=20",
    )
    sub.add_argument("--out", type=Path, required=True, help="run folder")
    weights_of(sub)
    sub.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint, with the run's own configuration",
    )
    sub.add_argument(
        "--strict-resume",
        action="store_true",
        help="--resume, but a damaged newest one is an error",
    )
    sub.add_argument(
        "--figure", type=Path, help="also draw the rewards and a clip there; .png, .svg or .pdf"
    )
    sub = command(
        "evaluate",
        _evaluate,
        "score weights or a run on held-out prompts",
        "--checkpoint runs/first",
    )
    sub.set_defaults(told=True)
    policy_of(sub, "scored")
    sub = command(
        "sample",
        _sample,
        "write a clip for each prompt",
        '"a 3 moves left slowly, then turns up" --out clips',
    )
    sub.add_argument("prompts", nargs="+", help='such as "a 3 moves left slowly, then turns up"')
    sub.add_argument("--out", type=Path, required=True, help="folder of the clips")
    sub.add_argument(
        "--format",
        choices=("gif", "mp4"),
        default="gif",
        help="gif; mp4 takes an encoder, pip install 'kvpo_kernels[video]'",
    )
    policy_of(sub, "sampled")
    sub = command(
        "diversity",
        _diversity,
        "how different the branches are, beside other noise",
        "--config first_block --rollouts 5",
    )
    sub.set_defaults(told=True)
    policy_of(sub, "rolled out")
    sub.add_argument("--rollouts", type=_count, default=20, help="how many; 20")
    sub.add_argument("--record", type=Path, help="also write the numbers there")
    sub = command(
        "verify",
        _verify,
        "does it learn: signed test and shuffled-advantage control, from the shipped weights; about"
        " 25 minutes on two cores",
        "--out runs/verify --seeds 3",
    )
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("runs/verify"),
        help="folder of the arms' results, which are not run again; runs/verify",
    )
    sub.add_argument("--seeds", type=_count, default=3, help="training seeds, at least 2; 3")
    sub.add_argument("--processes", type=_count, default=2, help="arms at a time; 2")
    sub.add_argument("--record", type=Path, help="also write the summary there")
    sub = command(
        "verify-arm",
        _verify_arm,
        "one arm of `verify`, which runs it",
        "--arm plus --seed 1 --out plus-1.json",
    )
    sub.add_argument("--arm", choices=(*verify.ARMS, verify.START), required=True)
    sub.add_argument("--seed", type=_count, required=True)
    sub.add_argument("--out", type=Path, required=True)
    return parser


def _count(text: str) -> int:
    try:
        return whole_number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _shipped_configs() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def _config(options: argparse.Namespace) -> RunConfig:
    path = None
    if options.config is not None:
        shipped = CONFIGS / f"{options.config}.yaml"
        path = shipped if options.config in _shipped_configs() else Path(options.config)
    base = session.stored_config(options.out) if _resumes(options) else None
    return load_config(path, options.set, base)


def _resumes(options: argparse.Namespace) -> bool:
    return getattr(options, "resume", False) or getattr(options, "strict_resume", False)


def _weights(options: argparse.Namespace, run: Path | None) -> Weights:
    """The weights that are named, else those that the run began with, else the shipped ones."""
    record = None if run is None else session.recorded_weights(run)
    folder = options.weights or (None if record is None else record[0]) or SHIPPED
    try:
        weights = load_weights(folder)
    except CheckpointError as error:
        if record is None or options.weights is not None:
            raise
        raise CheckpointError(f"the weights that {run} began with, --weights: {error}") from error
    # Another's policy may be scored by models that are named; what goes on is with its own.
    asked = options.weights is not None and not _resumes(options)
    if record is not None and not asked and weights.checksum != record[1]:
        raise session.RunError(
            f"{run} began with other weights: pass the same --weights, not {folder}"
        )
    return weights


def _pretrain(options: argparse.Namespace, config: RunConfig) -> int:
    options.out.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before it all
    print("reward models and judge", flush=True)
    reward_model, judge = train_reward_models(config.data, config.seed)
    with Progress("generator", "step", config.pretrain.steps) as progress:

        def show(step: int, metrics: dict[str, float], average: Generator) -> None:
            progress.step(loss=metrics["loss"])

        generator = pretrain(config.generator, config.data, config.pretrain, config.seed, show)
        save_weights(options.out, generator, reward_model, judge, config)
    print(f"weights in {options.out}")
    return 0


def _train(options: argparse.Namespace, config: RunConfig) -> int:
    started = time.perf_counter()
    out: Path = options.out
    weights = _weights(options, out if _resumes(options) else None)
    weights.generator.history = config.history
    config = of_weights(config, weights.config)
    if options.figure is not None:
        _check_figure(options.figure)
    train, held_out = split_prompts()
    prompts = held_out[: config.train.evaluation_prompts]
    with session.run_folder(out):
        trainer = Trainer(weights.generator, weights.reward_model, train, config.kvpo, config.seed)
        resumed = False
        if _resumes(options):
            resumed = session.resume(trainer, out, config, options.strict_resume)
            if not resumed:
                print("nothing to resume: starting anew")
            elif trainer.step_index >= config.train.iterations and _reported(out):
                print(f"nothing left to do: all {trainer.step_index} rollouts are done, see {out}")
                return 0
        elif any((out / "checkpoints").glob("step-*")):
            raise session.RunError(f"{out} holds a run: pass --resume, or another --out")
        if not resumed:
            (out / "metrics.jsonl").unlink(missing_ok=True)  # of a run that never saved
            session.record_weights(out, options.weights, weights.checksum)
        if options.figure is not None:
            options.figure.parent.mkdir(parents=True, exist_ok=True)
        before = _evaluation(trainer.initial, weights, config, prompts, "before")
        limit = config.train.minutes
        last: list[StepResult] = []
        what = f"KVPO, {limit:g} minutes" if limit else "KVPO"
        total = None if limit else config.train.iterations
        with Progress(what, "rollout", total, trainer.step_index) as progress:

            def show(result: StepResult) -> None:
                last[:] = [result]
                shown = {head: result.metrics[f"{head}_branches"] for head in (*HEADS, "reward")}
                progress.step(**shown)

            session.train_loop(trainer, out, config, show)
        after = _evaluation(trainer.policy, weights, config, prompts, "after")
        _write_report(options, config, trainer, before, after, prompts, last, started, weights)
    return 0


def _reported(out: Path) -> bool:
    return all((out / name).exists() for name in ("evaluation.json", "report.html"))


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
    keys = ("measure", "before", "after", "change", "half_width_95")
    record = [dict(zip(keys, row, strict=True)) for row in rows]
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

    def page() -> str:
        return report.render(
            "KVPO run",
            dump_yaml(config),
            facts,
            metrics,
            before,
            after,
            prompts,
            last[0] if last else None,
        )

    def figure() -> bytes:
        buffer = io.BytesIO()
        made = report.run_figure(metrics, before, after)
        made.savefig(buffer, format=options.figure.suffix[1:], dpi=130)
        return buffer.getvalue()

    contents: dict[Path, Callable[[], str | bytes]] = {
        out / "evaluation.json": lambda: json.dumps(record, indent=1),
        out / "report.html": page,
    }
    if options.figure is not None and metrics:
        contents[options.figure] = figure
    missing = []
    for path, make in contents.items():  # one that fails does not take the others with it
        try:
            write_whole(path, make())
        except Exception as error:
            log.error("%s not written: %s", path, error, exc_info=not isinstance(error, OSError))
            missing.append(str(path))
    print(f"\nheld-out prompts, {trainer.step_index} rollouts, paired change with 95 % interval")
    for name, was, now, change, half in rows:
        word = report.verdict(change, half)
        print(f"  {name:13}{was:7.3f} ->{now:7.3f}   {change:+.4f} ± {half:.4f}   {word}")
    print("  a change is not yet learning: `kvpo-train verify` runs the controls")
    if missing:
        raise session.RunError(
            f"could not be written: {', '.join(missing)}; the policy is saved, --resume writes what"
            " is missing"
        )
    print(f"report: {(out / 'report.html').resolve()}")


def _evaluation(
    generator: Generator,
    weights: Weights,
    config: RunConfig,
    prompts: Sequence[Prompt],
    name: str,
) -> Evaluation:
    """Of held-out prompts, `name` says when; or samples of any prompts, for "" as name."""
    n = f"{len(prompts)} {'held-out ' if name else ''}prompt{'s' if len(prompts) != 1 else ''}"
    print(f"evaluating {n} ({name})" if name else f"sampling {n}", flush=True)
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
    weights = _weights(options, options.checkpoint)
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
                f"is it a run of {options.weights or 'the shipped weights'} (--weights)? {error}"
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
    if options.format == "mp4":
        check_encoder()
    weights, config = _policy(options, config)
    options.out.mkdir(parents=True, exist_ok=True)
    result = _evaluation(weights.generator, weights, config, prompts, "")
    encode = mp4 if options.format == "mp4" else report.gif
    for i, prompt in enumerate(prompts):
        name = prompt.text.replace(",", "").replace(" ", "-")
        path = options.out / f"{i:02d}-{name}.{options.format}"
        write_whole(path, encode(result.videos[i]))
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
    try:
        if options.record is not None:
            options.record.parent.mkdir(parents=True, exist_ok=True)
            write_whole(options.record, json.dumps(summary, indent=1) + "\n")
    finally:
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
    results = verify.run_all(
        command, seeds, options.out, config, weights.checksum, options.processes
    )
    summary = verify.summarise(results, seeds, config)
    summary["minutes"] = round((time.perf_counter() - started) / 60, 1)
    text = json.dumps(summary, indent=1)
    try:
        for path in (options.out / "summary.json", options.record):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, text + "\n")
    finally:
        print(verify.table(summary))
    return 0 if summary["passed"] else 1


def _verify_arm(options: argparse.Namespace, config: RunConfig) -> int:
    verify.run_arm(config, options.arm, options.seed, options.out)
    return 0
