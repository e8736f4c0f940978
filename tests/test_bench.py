"""`python -m kvpo_kernels bench` and the device suite, on small cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvpo_kernels import bench
from kvpo_kernels.__main__ import main
from kvpo_kernels.bench import norm_rope, routed_attention, timing

ROOT = Path(__file__).parent.parent
KEYS = {
    *("case", "op", "shape", "dtype", "ours_ms", "ours_min_ms", "baseline", "baseline_ms", "ratio"),
    *("useful_tflops", "gemm_tflops", "bytes", "copy_tbps", "peak_extra_bytes", "device", "driver"),
    *("torch", "triton", "commit", "date"),
}


def test_the_command_measures_prints_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "deep" / "out.json", tmp_path / "out.png"
    command = ["bench", "--device", "cpu", "--quick", "--out", str(out), "--plot", str(picture)]
    assert main(command) == 0
    assert "dense, keys already joined" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["failures"] == []
    records = {r["case"]: r for r in written["records"]}
    attention = {"F1", "F2", "F3", "F5", "F6", "B1"}
    memory_bound = {f"{case}{of}" for case in ("T1", "R1") for of in ("", "/compile", "/copy")}
    assert records.keys() == attention | memory_bound
    for r in records.values():
        assert r.keys() >= KEYS
        assert r["ours_ms"] >= r["ours_min_ms"] > 0 and r["baseline_ms"] > 0 and r["ratio"] > 0

    shape, live = records["F1"]["shape"], records["F1"]["shape"]["block_frames"]
    queries = live * shape["frame_tokens"]
    keys = (shape["routed_frames"] + live) * shape["frame_tokens"]
    flops = 4 * shape["branches"] * shape["heads"] * queries * keys * shape["head_size"]
    rate = flops / records["F1"]["ours_ms"] / 1e9
    assert records["F1"]["useful_tflops"] == pytest.approx(rate, rel=1e-12)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_part_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: object) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(routed_attention.Bench, "forward", fail)
    out = tmp_path / "out.json"
    command = ["--device", "cpu", "--quick", "--op", "routed_attention", "--out", str(out)]
    assert bench.main(command) == 1
    written = json.loads(out.read_text())
    assert [r["case"] for r in written["records"]] == ["B1"]
    assert "broken on purpose" in written["failures"][0]["error"]
    assert "FAILED routed_attention, default, main, forward" in capsys.readouterr().out


def test_records_are_added_to_a_file(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    command = ["--device", "cpu", "--quick", "--op", "tve_grpo", "--out", str(out)]
    assert bench.main(command) == 0
    first = json.loads(out.read_text())["records"]
    assert bench.main([*command, "--add"]) == 0
    both = json.loads(out.read_text())["records"]
    assert both[: len(first)] == first and len(both) == 2 * len(first)


def test_a_write_that_is_wrong_or_missing_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = norm_rope.CASES[0].smaller()
    for slots, name in ((slice(0), "missing"), (slice(None), "wrong")):

        def block(turn, angles, q, k, v, q_weight, k_weight, k_pool, *rest, slots=slots):
            k_pool[slots] = 123.0
            return turn(q, q_weight, *angles)

        monkeypatch.setattr(norm_rope, "block_in_torch", block)
        of_case = norm_rope.Bench(case, torch.bfloat16, "cpu", None, quick=True)
        failed = [r["failed"] for r in of_case.run(1.0) if "failed" in r]
        assert len(failed) == 2 and all("of the largest value" in f for f in failed), name


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = routed_attention.CASES[0].smaller()
    wrong = routed_attention.Bench(case, torch.bfloat16, "cpu", None, quick=True)
    right = wrong.work.loop
    monkeypatch.setattr(wrong.work, "loop", lambda: 1.1 * right())
    records = list(wrong.forward())
    assert {r["case"] for r in records if "failed" not in r} == {"F1", "F2", "F5", "F6"}
    (failed,) = (r["failed"] for r in records if "failed" in r)
    assert failed.startswith("F3, per branch") and "of the largest value" in failed


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda"])
    assert "torch sees no GPU" in capsys.readouterr().err


def test_candidates_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.interleaved(calls, quick=True, rounds=3, min_sample_ms=0.0)
    assert order[4:] == ["a", "b", "b", "a", "a", "b"]
    assert all(len(t.samples_ms) == 3 for t in times.values())
    half = timing.Timing(2.0, 2.0, (2.0, 4.0, 6.0))
    assert timing.ratio(half, timing.Timing(1.0, 1.0, (1.0, 2.0, 2.0))) == 2.0


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
