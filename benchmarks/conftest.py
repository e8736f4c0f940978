"""pytest-benchmark over the cases of `kvpo_kernels.bench`: what `bench_*.py` here have in common.

    pytest benchmarks --benchmark-only -k "routed_attention and bfloat16"
    pytest benchmarks --benchmark-disable      every case once, at a size where only results matter

A group is a case of an op, a row is a backend, a baseline or a yardstick. pytest-benchmark times
each row by itself; beside that all selected rows of a case are timed in turns, and `extra_info` has
that ratio to ours, and all else that is in a record of `python -m kvpo_kernels bench`.
"""

import contextlib
from typing import Any

import pytest
import torch

from kvpo_kernels.bench import catalogue, machine
from kvpo_kernels.bench.case import Case
from kvpo_kernels.bench.measurement import Measurement
from kvpo_kernels.bench.timing import CudaTimer

SLOW_SECONDS = 0.3  # a call that takes longer gets a fixed number of rounds
SLOW_ROUNDS = 3
CUDA_ROUNDS = 50


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvpo_kernels")
    group.addoption("--small", action="store_true", help="sizes at which only results matter")
    group.addoption("--bars", action="store_true", help="fail where a bar is missed")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--kvpo-device", choices=("cpu", "cuda"), default=default)


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("needs pytest-benchmark: pip install 'kvpo_kernels[bench]'")
    # of torch's own compiler
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit:DeprecationWarning")
    machine.keep_memory()


def only_results(config: pytest.Config) -> bool:
    return bool(config.getoption("benchmark_disable"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`test_OP(timed)` gets every case of OP and every row of the case."""
    if "timed" not in metafunc.fixturenames:
        return
    op = metafunc.function.__name__.removeprefix("test_")
    device = metafunc.config.getoption("--kvpo-device")
    small = metafunc.config.getoption("--small") or only_results(metafunc.config)
    rows = [
        pytest.param((case, row), id=f"{case.part}-{case.name}-{case.dtype_name}-{row}")
        for case in catalogue.cases(op, device, small)
        for row in case.rows()
    ]
    metafunc.parametrize("timed", rows, indirect=True)


class Session:
    """The case that is measured now: its rows come one after another and share their inputs."""

    def __init__(self) -> None:
        self.measurement: Measurement | None = None
        self.records: dict[str, dict[str, Any]] = {}

    def of(self, case: Case, request: pytest.FixtureRequest) -> Measurement:
        if self.measurement is None or self.measurement.case is not case:
            self.measurement = None  # its memory goes before the next one's comes
            params = [getattr(item, "callspec", None) for item in request.session.items]
            chosen = [p.params["timed"] for p in params if p and "timed" in p.params]
            rows = {row for other, row in chosen if other is case}
            rows |= {yardstick.name for yardstick in case.yardsticks}  # for the fraction
            self.measurement = Measurement(case, rows=rows)
            self.records = {}
            if not only_results(request.config):
                records = self.measurement.time().records()
                self.records = {r["baseline"]: r for r in records}
        return self.measurement


@pytest.fixture(scope="session")
def _session() -> Session:
    return Session()


@pytest.fixture(scope="session")
def _cuda_timer() -> CudaTimer | None:
    return CudaTimer() if torch.cuda.is_available() else None


@pytest.fixture
def timed(
    request: pytest.FixtureRequest, benchmark: Any, _session: Session, _cuda_timer: CudaTimer | None
) -> Any:
    """Runs one row under pytest-benchmark, if its result is right, and says what it found."""
    case, row = request.param
    measured = _session.of(case, request)

    def run() -> None:
        benchmark.group = case.group
        for name in (row, measured.backend):  # without ours there is no ratio
            if name in measured.failures:
                pytest.fail(f"{name} is not timed: {measured.failures[name]}", pytrace=False)
        call = measured.calls[row]
        if only_results(request.config):
            benchmark(call)
            return
        record = _session.records.get(row) or ours(measured, _session.records)
        benchmark.extra_info.update(record)
        if case.device == "cuda":
            assert _cuda_timer is not None

            def prepare() -> None:
                _cuda_timer.flush()
                torch.cuda.synchronize()

            def synchronized() -> None:
                call()
                torch.cuda.synchronize()

            seconds = measured.times[row].median_ms / 1e3
            rounds = SLOW_ROUNDS if seconds > SLOW_SECONDS else CUDA_ROUNDS
            benchmark.pedantic(synchronized, setup=prepare, rounds=rounds, warmup_rounds=1)
        elif measured.times[row].median_ms / 1e3 > SLOW_SECONDS:
            benchmark.pedantic(call, rounds=SLOW_ROUNDS)
        else:
            benchmark(call)
        say(request.config, case, row, measured, record)
        missed = [c for c in record["checks"] if not c["holds"]]
        if missed and request.config.getoption("--bars"):
            pytest.fail(f"{case.group}: missed {missed}", pytrace=False)

    return run


def ours(measured: Measurement, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The record of ours: that of any row, without what is the row's."""
    any_row = next(iter(records.values()))
    own = {k: v for k, v in any_row.items() if not k.startswith("baseline") and k != "yardstick"}
    return own | {"ratio": 1.0, "checks": []}


def say(config: pytest.Config, case: Case, row: str, measured: Measurement, record: Any) -> None:
    """A line as soon as a row is done."""
    ms, ratio = measured.times[row].median_ms, record["ratio"]
    what = f"{case.group}: {row} {ms:.4g} ms"
    if row == measured.backend:
        share = f", {record['fraction']:.2f} of {record['fraction_of']}"
        what += f", {record['useful_tflops']:.3g} TFLOP/s{share if record['fraction'] else ''}"
    elif record["yardstick"]:
        what += f", ours reaches {ratio:.2f} of it"
    else:
        what += f", ours is x{ratio:.2f}"
    missed = [c for c in record["checks"] if not c["holds"]]
    what += "".join(f" ({c['what']}: bar {c['bar']:.2f} MISSED)" for c in missed)
    capture = config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        print(f"\n{what}  ", end="", flush=True)
