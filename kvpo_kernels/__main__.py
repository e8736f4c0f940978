"""`python -m kvpo_kernels doctor|bench`."""

import argparse
import subprocess
import sys
from pathlib import Path

from kvpo_kernels import doctor

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks" / "run.py"


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m kvpo_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="doctor|bench")
    commands.add_parser("doctor", help="which backends work on this machine, and why others do not")
    commands.add_parser(
        "bench", help="the benchmarks of a source checkout; see bench --help", add_help=False
    )
    args, rest = parser.parse_known_args(arguments)
    if args.command == "bench":
        if not BENCHMARKS.exists():
            print(
                f"bench: {BENCHMARKS} is not there. The benchmarks are in the repository and not in"
                " the installed package: clone it and run `make bench`.",
                file=sys.stderr,
            )
            return 2
        return subprocess.run([sys.executable, BENCHMARKS, *rest], check=False).returncode
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    print(doctor.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
