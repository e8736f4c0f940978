"""Counts of an iteration against known numbers, a counter of operations, and each other."""

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kvpo_kernels import FramePool, Slots, Timeline, plan_history_routing
from kvpo_kernels.__main__ import main
from kvpo_kernels.cost.iteration import CACHE, LOCAL, SINK, Run, forward, memory, phases
from kvpo_kernels.cost.sizes import SIZES, GeneratorSize
from kvpo_kernels.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
SMALL, LARGE = Run(SIZES["wan-1.3b"]), Run(SIZES["wan-14b"])


def test_known_sizes() -> None:
    """As counted by hand for Wan 2.1 and its streaming descendants."""
    for run, frame, cache, private, parameters in (
        (SMALL, 287.5e6, 9.49e9, 75.9e9, 1.39e9),
        (LARGE, 1278e6, 42.2e9, 337e9, 14.05e9),
    ):
        assert run.frame_bytes == pytest.approx(frame, rel=1e-3)
        assert CACHE * run.frame_bytes == pytest.approx(cache, rel=1e-3)
        assert 8 * CACHE * run.frame_bytes == pytest.approx(private, rel=2e-3)
        assert run.parameters == pytest.approx(parameters, rel=2e-3)
    assert SMALL.size.latent_values == 299_520


def test_known_operations_of_a_layer() -> None:
    for run, linear, attention in (
        (SMALL, 88.3 + 44.2 + 257.6, 538.3 + 14.7),
        (LARGE, 981.5 + 490.7 + 1325, 1794.2 + 49.1),
    ):
        one = forward(run, adapters=False)
        assert one.linear / run.size.layers == pytest.approx(linear * 1e9, rel=1e-3)
        assert one.attention / run.size.layers == pytest.approx(attention * 1e9, rel=1e-3)
    # Rank 256 on all linear layers adds a tenth to the 28.3 TFLOP of the small model.
    both = [forward(SMALL, adapters=a) for a in (False, True)]
    assert both[0].linear + both[0].attention == pytest.approx(28.3e12, rel=2e-3)
    assert both[1].linear - both[0].linear == pytest.approx(2.8e12, rel=0.02)


def test_known_forwards_of_an_iteration() -> None:
    work = phases(SMALL, "today")
    assert work["prefix"].forwards + work["rollout"].forwards == 360
    whole = phases(dataclasses.replace(SMALL, whole_video=True), "today")
    assert whole["prefix"].forwards + whole["rollout"].forwards == 1305
    # 29 or 24 forwards per branch and policy, from a fork with 6 or 5 blocks to its chunk's end
    assert work["replay"].forwards == 8 * (29 + 24) / 2
    assert work["gradient"].forwards == 8 * 2 * (6 + 5) / 2
    ours = phases(SMALL, "ours")
    assert ours["replay, old"].forwards == work["replay, old"].forwards / 2
    assert sum(w.host for w in ours.values()) == 0
    # About 123 GB to save and restore the state, 228 GB for the replays' caches.
    assert sum(w.host for w in work.values()) == pytest.approx((123 + 228) * 1e9, rel=0.01)


def test_operations_as_a_counter_counts_them() -> None:
    import todays_trainer
    import trainers
    from wan import PATCH

    size = GeneratorSize(2, 48, 3, 96, (2, 3), 1, 4)
    problem = trainers.make_problem(size, 1, 1, False, "cpu", torch.float32)
    today = todays_trainer.Today(problem)
    cache = todays_trainer.Cache.empty(problem)
    with torch.no_grad():
        for first in range(0, 12, 3):
            today._sample_block(today.old, cache, first, None)
        # The counter knows products, not the fused attention of a CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            x = problem.noise_of(12)[:1]
            today._x0(today.old, cache, 12, 1.0, None, x)
    one = forward(Run(size), adapters=False)
    N, M, values = 3 * 6, size.dim, PATCH * size.latent_channels
    around = 2 * 2 * N * M * values + 2 * (64 * M + M * 6 * M)  # patches, and the noise level
    assert counter.get_total_flops() == one.linear + one.attention + around


def test_more_never_costs_less() -> None:
    def total(run: Run) -> tuple[float, float]:
        work = phases(run, "ours").values()
        return sum(w.linear + w.attention for w in work), sum(memory(run, "ours").values())

    for field, values in (
        ("branches", (1, 2, 7, 8, 16)),
        ("frames", (57, 147, 300)),
        ("micro_batch", (1, 2, 8)),
        ("gradient_steps", (0, 1, 4)),
    ):
        costs = [total(dataclasses.replace(SMALL, **{field: v})) for v in values]
        for less, more in itertools.pairwise(costs):
            assert more[0] >= less[0] and more[1] >= less[1], field
    spread = [total(dataclasses.replace(SMALL, gpus=n)) for n in (1, 2, 3, 8, 64)]
    assert spread == sorted(spread, reverse=True)
    assert dataclasses.replace(SMALL, gpus=64).prompts_at_once == 8


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    example = "--model wan-14b --branches 16 --frames 1200 --gpus 8 --memory 80"
    assert main(["plan", *example.split(" ")]) == 1
    out = capsys.readouterr().out
    assert "2 of 16 branches per GPU" in out and "DOES NOT FIT" in out and "--history int8" in out
    assert main(["plan", *example.split(" "), "--history", "int8"]) == 0
    assert main(["plan", *example.replace("80", "60").split(" ")]) == 1
    assert "more memory" in capsys.readouterr().out
    assert main(["plan", "--memory", "80"]) == 0
    out = capsys.readouterr().out
    assert "fits" in out and "assumed" in out  # no time without its origin
    assert main(["plan", "--memory", "17", "--micro-batch", "4"]) == 1
    out = capsys.readouterr().out
    ways = [line.partition("fit: ")[2] for line in out.splitlines() if "to make it fit" in line]
    assert ways == ["--micro-batch 1", "--history int8", "--gpus 2: 4 branches on each"]
    assert main(["plan", "--memory", "17", "--gpus", "2", "--history", "int8"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(("model", "gigabytes"), [("wan-1.3b", 20), ("wan-14b", 90)])
def test_history_of_eight_branches(model: str, gigabytes: int) -> None:
    """As a pool of this size would count it, and at most so much without the anchor."""
    run = Run(SIZES[model])
    s, history = run.size, memory(run, "ours")["history"]
    slots = round(history / run.frame_bytes)
    sizes = (slots, s.frame_tokens, s.layers, s.heads, s.head_dim)
    assert FramePool(*sizes, device="meta").stats().bytes == history
    assert (slots - LOCAL) * run.frame_bytes < gigabytes * 1e9
    for name, dtype in (("int8", torch.int8), ("float8", torch.float8_e4m3fn)):
        small = memory(dataclasses.replace(run, history=name), "ours")["history"]
        pool = FramePool(*sizes, device="meta", page_dtype=dtype)
        assert pool.stats().bytes == small < 0.51 * history


@pytest.mark.parametrize("branches", [2, 8])
def test_history_is_the_peak_of_a_pool_that_is_driven_so(branches: int) -> None:
    """The rollout of an iteration, and a prefix that is kept for the replays."""
    run = dataclasses.replace(SMALL, branches=branches)
    pool = FramePool(200, 1, 1, 1, 16, dtype=torch.float32)
    for start in run.starts:
        plan = plan_history_routing(run.routing, run.frames, start_frame=start)
        window = lambda first: {*range(SINK), *range(first + 3 - LOCAL, first)}

        def block(rows: list[Timeline], first: int, slots: list[Slots], keep: set[int]) -> None:
            _, new = pool.advance(rows, 3, keep, pool.routes(slots))
            frames = torch.full((len(rows), 3, 1, 1, 16), float(first))
            pool.write(0, new, frames, frames)

        prefix = pool.timeline()
        for first in range(0, start, 3):
            rest = window(first).union(plan.candidates)
            block([prefix], first, [prefix.window(SINK, LOCAL)], rest)
        rows = prefix.fork(branches + 1)
        for first in range(start, plan.end_frame, 3):
            routed = zip(rows[:-1], plan.attended, strict=True)
            slots = [row.routed(SINK, frames, nearest=1) for row, frames in routed]
            slots.append(rows[-1].window(SINK, LOCAL))
            block(rows, first, slots, window(first).union(plan.candidates))
        for timeline in (prefix, *rows):
            timeline.release()
    assert pool.stats().free_slots == 200
    slots = memory(run, "ours")["history"] / run.frame_bytes
    assert pool.stats().peak_slots == slots


def test_rates_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = tmp_path / "h200.json"
    record = {"case": "F1", "driver": "580.1", "useful_tflops": 600.0, "gemm_tflops": 700.0}
    record["copy_tbps"] = 4.0
    on_cpu = {**record, "driver": "none", "useful_tflops": 900.0}
    slower = {**record, "useful_tflops": 500.0}
    measured.write_text(json.dumps({"records": [record, slower, on_cpu]}))
    command = ["plan", "--json", "--rates", str(measured), "--gemm-tflops", "400"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    rates = result["rates"]
    assert (rates["attention_tflops"], rates["gemm_tflops"], rates["copy_tbps"]) == (600, 400, 4)
    assert rates["origin"]["gemm_tflops"] == "given on the command line"
    assert str(measured) in rates["origin"]["attention_tflops"]
    work = result["ours"]["phases"]["replay"]
    expected = work["linear"] / 400e12 + work["attention"] / 600e12 + work["memory"] / 4e12
    assert work["seconds"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model wan-2b", "invalid choice: 'wan-2b'"),
        ("--heads 7", "dim must be a multiple of heads = 7, got 1536"),
        ("--grid 30", "--grid must look like 30x52, got '30'"),
        ("--branches 0", "branches must be at least 1, got 0"),
        ("--frames 12", "no block of a video of 12 frames can be perturbed"),
        ("--layers -1", "layers must be at least 1, got -1"),
        ("--copy-tbps 0", "--copy-tbps must be > 0 and finite, got 0.0"),
        ("--rates /dev/null", "not the JSON of"),
        ("--memory nan", "--memory must be > 0 and finite, got nan"),
        ("--memory -80", "--memory must be > 0 and finite, got -80.0"),
    ],
)
def test_what_cannot_be_planned(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["plan", *arguments.split(" ")])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "not the JSON of"),
        ({"records": 5}, "not the JSON of"),
        ({"records": [7]}, "not the JSON of"),
        ({"records": [{"case": "F1", "driver": "580.1"}]}, "not the JSON of"),
        ({"records": [{"case": "F1", "driver": "none"}]}, "no record on a GPU of case F1"),
        ({"copy_tbps": 0}, "copy_tbps must be > 0 and finite, got 0"),
        ({"gemm_tflops": math.nan}, "gemm_tflops must be > 0 and finite, got nan"),
    ],
)
def test_rates_that_cannot_be_meant(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"case": "F1", "driver": "1", "useful_tflops": 1, "gemm_tflops": 1, "copy_tbps": 1}
    if isinstance(content, dict) and "records" not in content:
        content = {"records": [record | content]}
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        main(["plan", "--rates", str(path)])
    assert message in capsys.readouterr().err


def test_gradient_steps_within_the_schedule() -> None:
    with pytest.raises(ConfigError, match=r"gradient_steps must be in \[0, 4\], got 5"):
        Run(SIZES["tiny"], gradient_steps=5)
