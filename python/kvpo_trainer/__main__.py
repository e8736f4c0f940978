"""`kvpo-train`, also as `python -m kvpo_trainer`."""

import os
import sys

from kvpo_trainer import console

_SPINS = "3000"  # some 30 microseconds; GNU's default is 300,000
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def main() -> int:
    """Run the command line, or say what it is that is not installed."""
    console.keep_standard_descriptors()
    wait_without_spinning()
    with console.telling():
        try:
            from kvpo_trainer.cli import main
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing in ("kvpo_kernels", "kvpo_trainer"):
                raise
            print(
                f"kvpo-train: {missing} is not installed; pip install 'kvpo_kernels[train]' brings"
                " what the trainer needs",
                file=sys.stderr,
            )
            return 2
        except KeyboardInterrupt:
            print("kvpo-train: interrupted", file=sys.stderr)
            return 130
        return main()


def wait_without_spinning() -> None:
    """Let idle OpenMP threads sleep, before torch loads the runtime, which reads this once.

    Torch and the kernels share one: GNU's on Linux, LLVM's on macOS, Intel's or Microsoft's on
    Windows. Its threads spin for milliseconds at each barrier, which on cores that are shared keeps
    from running what they wait for. `OMP_WAIT_POLICY` is known to all but Microsoft's; GNU's still
    spins as briefly as `GOMP_SPINCOUNT` says, so that on a quiet machine nothing is lost between
    two kernels. Whoever sets one of these keeps what he set.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ["GOMP_SPINCOUNT"] = _SPINS


if __name__ == "__main__":
    sys.exit(main())
