"""What runs on this machine, how fast, and whether a run fits it.

Installed as `kvpo-kernels`; `python -m kvpo_kernels` is the same.
"""

import argparse
import sys
from collections.abc import Sequence

from kvpo_kernels import __version__, doctor, output
from kvpo_kernels.errors import KvpoError

EXAMPLES = """examples:
  python -m kvpo_kernels doctor
  python -m kvpo_kernels bench --quick --op tve_grpo
  python -m kvpo_kernels plan --model wan-14b --gpus 8 --memory 80

`COMMAND --help` has a command's options. Exit status: 0; 1 where a part of `bench` failed or a plan
does not fit; 2 for a wrong command line or output that cannot be written; 130 for Ctrl-C; 141 where
the reader of the output has gone."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; SystemExit for --help and wrong usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return output.run(lambda: _run(words), go_on=_keeps(words))
    except KeyboardInterrupt:
        output.say("interrupted")
        return 130
    except (KvpoError, OSError) as error:
        output.say(str(error))
        return 2


def _run(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kvpo_kernels",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kvpo_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="doctor|bench|plan")
    for name, text in (
        ("doctor", "which backends work on this machine, and why others do not"),
        ("bench", "the kernels against the strongest baselines, on this machine"),
        ("plan", "memory, operations and expected time of a run of any size"),
    ):
        commands.add_parser(name, help=text, add_help=False)
    args, rest = parser.parse_known_args(words)
    if args.command == "bench":
        from kvpo_kernels import bench

        return bench.main(rest)
    if args.command == "plan":
        from kvpo_kernels.cost import command

        return command.main(rest)
    return doctor.main(rest)


def _keeps(words: list[str]) -> bool:
    """Whether the command writes a file too, which is then worth going on for without a reader."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--out")
    return parser.parse_known_args(words)[0].out is not None


if __name__ == "__main__":
    sys.exit(main())
