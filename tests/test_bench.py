"""`python -m kvpo_kernels bench`, `pytest benchmarks` and the device suite, on small cases."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import render
import torch

from kvpo_kernels import bench
from kvpo_kernels.__main__ import main
from kvpo_kernels.bench import (
    bars,
    catalogue,
    command,
    machine,
    norm_rope,
    picture,
    routed_attention,
    timing,
)
from kvpo_kernels.bench.case import Case
from kvpo_kernels.bench.measurement import Measurement, WrongResult, check

ROOT = Path(__file__).parent.parent
KEYS = {
    *("case", "op", "part", "shape", "dtype", "backend", "ours_ms", "ours_min_ms"),
    *("baseline", "baseline_ms", "ratio", "rounds", "useful_tflops", "gemm_tflops", "flops"),
    *("bytes", "copy_tbps", "fraction", "fraction_of", "peak_extra_bytes", "device"),
    *("instructions", "threads", "driver", "torch", "triton", "commit", "date"),
}
SMALL = ["--device", "cpu", "--quick", "--small"]


def case(op: str, part: str = "", dtype: torch.dtype = torch.bfloat16) -> Case:
    """The main one."""
    found = (c for c in catalogue.cases(op, "cpu", small=True) if c.dtype is dtype)
    return next(c for c in found if part in ("", c.part))


# The command --------------------------------------------------------------------------------------


def test_the_command_measures_prints_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, drawn = tmp_path / "deep" / "out.json", tmp_path / "deeper" / "out.png"
    assert main(["bench", *SMALL, "--out", str(out), "--plot", str(drawn)]) == 0
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["failures"] == []
    assert {r["op"] for r in written["records"]} == set(catalogue.OPS)
    for r in written["records"]:
        assert r.keys() >= KEYS
        assert r["ours_ms"] >= r["ours_min_ms"] > 0 and r["baseline_ms"] > 0
        assert r["ratio"] == r["baseline_ms"] / r["ours_ms"]  # the one definition
        assert f"{r['baseline_ms']:.3f} ms" in printed  # of baselines as well
        assert r["baseline_about"] in printed and r["about"] in printed
        assert r["instructions"] == machine.instructions("cpu")

    attention = {r["baseline"]: r for r in written["records"] if r["part"] == "forward"}
    torch_only = {"joined", "gather", "loop", "compile"}
    assert attention.keys() == torch_only | {"side-by-side", "per-branch", "peak"}
    r = attention["gather"]
    shape, live = r["shape"], r["shape"]["block_frames"]
    queries = live * shape["frame_tokens"]
    keys = (shape["routed_frames"] + live) * shape["frame_tokens"]
    flops = 4 * shape["branches"] * shape["heads"] * queries * keys * shape["head_size"]
    assert r["useful_tflops"] == pytest.approx(flops / r["ours_ms"] / 1e9, rel=1e-12)
    assert r["fraction"] == attention["peak"]["ratio"] and r["fraction_of"] == "peak"
    assert drawn.read_bytes().startswith(b"\x89PNG")

    found = render.rows(written)  # what a committed record would show
    assert {row.op for row in found} == {
        "routed_attention forward",
        "routed_attention forward+backward",
        "tve_grpo loss + gradient",
        "norm_rope + slot write",
        "store_frames",
    }
    assert all(row.over_torch is not None and row.shares for row in found)
    (tmp_path / "cpu-new.json").write_text(out.read_text())
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    page = "\n".join(render.kernels())
    assert f"{found[0].ours_ms:.3g} | joined" in page and "cpu-new.json" in page


def test_cases_and_baselines_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cpu", "--list"]) == 0
    printed = capsys.readouterr().out
    for op in catalogue.OPS:
        for c in catalogue.cases(op, "cpu"):
            assert f"{c.group}: {c.about}" in printed
            for name, about in c.rows().items():
                assert f"{name:20} {about}" in printed
    assert "its median time is 2.50 times the median of ours" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "foo"], "--backend foo: unknown; routed_attention has "),
        (["--op", "norm_rope", "--backend", "gluon"], "norm_rope has"),
        (["--plot", "new/a.png", "--op", "tve_grpo"], "no records of routed_attention to draw"),
        (["--plot", "new/a.png", "--backend", "cuda"], "no records of routed_attention to draw"),
        (["--add"], "--add goes with --out"),
        (["--add", "--out", "other.json"], "other.json has no records of this version"),
        (["--out", "."], "is a folder"),
        (["--plot", "."], "--plot .: is a folder"),
        (["--plot", "new/a.foo"], "--plot new/a.foo: is no picture, which ends in one of ."),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_made(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text('{"benchmarks": []}')
    monkeypatch.setattr(Measurement, "__init__", lambda *a, **k: pytest.fail("measured"))
    with pytest.raises(SystemExit) as end:
        bench.main(["--device", "cpu", "--small", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["other.json"]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda"])
    assert "torch sees no GPU" in capsys.readouterr().err


def test_records_go_into_devices_and_links_and_past_neighbours(tmp_path: Path) -> None:
    """As root a device would be replaced by a file, for the whole machine."""
    (tmp_path / "r.tmp").write_text("another's")
    (tmp_path / "link.json").symlink_to(tmp_path / "r.json")
    command.write(tmp_path / "link.json", [], [])
    assert (tmp_path / "link.json").is_symlink()
    command.write(tmp_path / "r.json", [{"op": "x"}], [])
    assert json.loads((tmp_path / "link.json").read_text())["records"] == [{"op": "x"}]
    assert (tmp_path / "r.tmp").read_text() == "another's"
    # Never /dev/null itself: a failure of this test would break the machine that it runs on.
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    command.write(tmp_path / "pipe", [], [])
    assert (tmp_path / "pipe").is_fifo()
    assert json.loads(os.read(reader, 1000))["records"] == []
    os.close(reader)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_case_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = routed_attention.Attention.__init__

    def fail(self: Any, sizes: Any, part: str, *rest: Any) -> None:
        if part == "forward":
            raise RuntimeError("broken on purpose")
        make(self, sizes, part, *rest)

    monkeypatch.setattr(routed_attention.Attention, "__init__", fail)
    out = tmp_path / "out.json"
    assert bench.main([*SMALL, "--op", "routed_attention", "--out", str(out)]) == 1
    written = json.loads(out.read_text())
    assert {r["part"] for r in written["records"]} == {"forward+backward"}
    assert "broken on purpose" in written["failures"][0]["error"]
    assert "FAILED routed_attention forward small bfloat16, default" in capsys.readouterr().out


def test_a_backend_that_cannot_run_here_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert bench.main([*SMALL, "--op", "tve_grpo", "--backend", "cuda"]) == 1
    assert "FAILED tve_grpo loss+gradient trainer bfloat16, cuda" in capsys.readouterr().out


def test_records_are_added_to_a_file(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    command = [*SMALL, "--op", "store_frames", "--out", str(out)]
    assert bench.main(command) == 0
    first = json.loads(out.read_text())["records"]
    assert bench.main([*command, "--add"]) == 0
    both = json.loads(out.read_text())["records"]
    assert both[: len(first)] == first and len(both) == 2 * len(first)


# What is measured ---------------------------------------------------------------------------------


@pytest.mark.parametrize("op", catalogue.OPS)
def test_a_wrong_answer_is_not_timed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(op)
    monkeypatch.setattr(type(c.make()), "ours", _wrong(type(c.make()).ours))
    found = Measurement(c, quick=True).time()
    assert "differs from the reference by" in found.failures["cpu"]
    assert found.times == {} and found.records() == []


def _wrong(ours: Callable[..., Any]) -> Callable[..., Any]:
    def make(self: Any, backend: str) -> Any:
        call = ours(self, backend)
        if backend == "reference":
            return call

        def run() -> Any:
            first, *rest = result if isinstance(result := call(), tuple) else (result,)
            return (1 + first if first.dtype is torch.int8 else 1.1 * first, *rest)

        return run

    return make


def test_a_baseline_that_is_wrong_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    right = routed_attention.Attention.loop
    monkeypatch.setattr(routed_attention.Attention, "loop", lambda work: 1.1 * right(work))
    found = Measurement(case("routed_attention", "forward"), quick=True).time()
    assert set(found.failures) == {"loop"}
    assert "loop" not in found.times and {"cpu", "gather", "compile"} <= found.times.keys()


def test_a_write_that_is_wrong_or_missing_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def untouched(turn, angles, q, k, v, q_weight, *rest):
        return turn(q, q_weight, *angles)

    def wrong(turn, angles, q, k, v, q_weight, k_weight, k_pool, *rest):
        k_pool[:] = 123.0
        return turn(q, q_weight, *angles)

    for block in (untouched, wrong):
        monkeypatch.setattr(norm_rope, "block_in_torch", block)
        found = Measurement(case("norm_rope"), quick=True)
        assert found.failures.keys() == {"compile", "original"}
        assert all("of the largest value" in why for why in found.failures.values())


def test_a_result_of_nan_or_another_shape_is_wrong() -> None:
    one = torch.ones(3)
    check(one, one, 0.0)
    for other in (torch.full((3,), torch.nan), torch.ones(1), torch.full((3,), 1.1)):
        with pytest.raises(WrongResult):
            check(other, one, 0.03)


def test_a_ratio_is_median_against_median_of_the_same_rounds() -> None:
    theirs, ours = timing.Timing((2.0, 40.0, 6.0)), timing.Timing((1.0, 3.0, 30.0))
    assert timing.ratio(theirs, ours) == 2.0  # of 6 and 3; the rounds' ratios are 2, 13, 0.2
    with pytest.raises(AssertionError):
        timing.ratio(theirs, timing.Timing((1.0,)))


def test_candidates_take_turns_and_slow_ones_are_capped() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.interleaved(calls, quick=True, rounds=3, min_sample_ms=0.0)
    assert order[4:] == ["a", "b", "b", "a", "a", "b"]
    assert all(len(t.samples_ms) == 3 for t in times.values())
    times = timing.interleaved(calls, rounds=50, min_sample_ms=0.0, max_seconds=0.0)
    assert all(len(t.samples_ms) == 3 for t in times.values())


def test_the_yardstick_is_the_best_rate_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch emulates its bfloat16 product, that is none."""
    emulated = "matrix product of torch, bfloat16"
    measured: list[str] = []

    def interleaved(calls: dict[str, Any], **options: Any) -> dict[str, timing.Timing]:
        measured.extend(calls)
        return {n: timing.Timing((1000.0 if n == emulated else 1.0,)) for n in calls}

    monkeypatch.setattr(machine, "interleaved", interleaved)
    machine.peak.cache_clear()
    try:
        name, _, _, rate = machine.peak(torch.bfloat16, "cpu")
        assert emulated in measured and name != emulated
        assert rate >= 2 * 1024**3 / 1e9  # the float32 product's of 1 ms
        assert "matrix product of torch, float32" in measured
    finally:
        machine.peak.cache_clear()


def test_without_instructions_for_it_no_bfloat16_loop_is_a_yardstick() -> None:
    native = pytest.importorskip("kvpo_kernels._native")
    native.set_isa_limit("avx2")
    try:
        assert not any("pairs" in name for name in machine.products(torch.bfloat16, "cpu"))
    finally:
        native.set_isa_limit("avx512_bf16")


def test_every_bar_is_of_a_case_that_there_is() -> None:
    for instructions, table in bars.BARS.items():
        device = "cuda" if instructions.startswith("sm_") else "cpu"
        for bar in table:
            cases = [c for c in catalogue.cases(bar.op, device) if c.part == bar.part]
            cases = [c for c in cases if bar.name in ("", c.name)]
            assert cases, bar
            for c in cases:
                assert bar.dtype in ("", "float32", "bfloat16")
                row = bar.row.removeprefix("memory/")
                if row != "MiB of memory below 32" and not row.startswith("kernel/"):
                    assert row in c.rows(), bar


def test_bars_are_looked_up_by_instruction_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    c = next(c for c in catalogue.cases("store_frames", "cpu") if c.part == "to-int8")
    assert bars.check("avx2", c, {"compile": 1.0}) == []
    (held,) = bars.check("avx512_bf16", c, {"compile": 2.5, "copy": 0.1})
    assert held == {"what": "compile", "value": 2.5, "bar": 2.0, "holds": True}
    monkeypatch.setattr(machine, "instructions", lambda device: "avx512_bf16")
    unreachable = (bars.Bar("store_frames", "to-int8", "compile", 1e9),)
    monkeypatch.setitem(bars.BARS, "avx512_bf16", unreachable)
    small = catalogue.cases

    def cases(op: str, device: str, small_: bool = False) -> Any:
        for each in small(op, device, True):
            object.__setattr__(each, "small", False)
            yield each

    monkeypatch.setattr(command.catalogue, "cases", cases)
    arguments = ["--device", "cpu", "--quick", "--op", "store_frames"]
    assert bench.main(arguments) == 0
    assert "(bar 1000000000.00, MISSED)" in capsys.readouterr().out
    assert bench.main([*arguments, "--bars"]) == 1


def test_labels_of_the_picture_stay_in_its_frame() -> None:
    pytest.importorskip("matplotlib")
    about = {"op": "routed_attention", "part": "forward+backward", "dtype": "bfloat16"}
    about |= {"backend": "cpu", "device": "AMD EPYC, 2 logical cores", "fraction": 0.77}
    records = [
        {**about, "case": "large", "baseline": "side-by-side", "ratio": r, "useful_tflops": 0.2}
        for r in (0.9, 12.34, 1.3)
    ]
    drawn = picture.figure(records)
    drawn.canvas.draw()
    frame = drawn.axes[0].get_window_extent()
    assert len(drawn.axes[0].texts) == 4
    for text in drawn.axes[0].texts:
        box = text.get_window_extent()
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1, text.get_text()
        assert frame.y0 <= box.y0 and box.y1 <= frame.y1, text.get_text()
    labels = [tick.get_window_extent() for tick in drawn.axes[0].get_yticklabels()]
    assert all(box.x0 >= 0 and box.x1 <= frame.x0 for box in labels)


# pytest-benchmark and the device suite ------------------------------------------------------------


def test_pytest_benchmark_has_a_group_per_case_and_a_row_per_way(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "out.json"
    options = [
        "--benchmark-only",
        "--small",
        "--benchmark-max-time=0.01",
        f"--benchmark-json={out}",
    ]
    chosen = "store_frames and bfloat16 and to-int8 and trainer"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", *options, "-k", chosen],
        cwd=ROOT,
        env={**os.environ, "PYTEST_ADDOPTS": "-p no:cacheprovider"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["benchmarks"]
    assert {r["group"] for r in rows} == {"store_frames to-int8 trainer bfloat16"}
    names = {r["name"].rpartition("bfloat16-")[2].rstrip("]"): r for r in rows}
    assert names.keys() == {"cpu", "compile", "eager", "copy"}
    for name, r in names.items():
        info = r["extra_info"]
        assert info["flops"] > 0 and info["bytes"] > 0 and info["fraction"] > 0
        assert {"device", "instructions", "commit", "threads"} <= info.keys()
        assert info["ratio"] == (1.0 if name == "cpu" else info["baseline_ms"] / info["ours_ms"])
        said = f"store_frames to-int8 trainer bfloat16: {name} "
        assert said in done.stdout


def test_the_device_suite_proves_itself_on_a_cpu(tmp_path: Path) -> None:
    env = {**os.environ, "OUT": str(tmp_path), "DEVICE": "cpu", "PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / "benchmarks" / "device_suite.sh"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = tmp_path.glob("cpu-*.json")
    assert json.loads(result.read_text())["records"]
    assert "0 parts failed" in done.stdout

    env |= {"PYTHON": "false"}  # every part fails, and each is named
    done = subprocess.run(
        [ROOT / "benchmarks" / "device_suite.sh"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 1 and "FAILED bench: exit status 1" in done.stdout
