"""`python -m kvpo_kernels doctor|bench|plan`."""

import argparse
import sys

from kvpo_kernels import doctor


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m kvpo_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="doctor|bench|plan")
    commands.add_parser("doctor", help="which backends work on this machine, and why others do not")
    commands.add_parser(
        "bench", help="the kernels against dense attention on this machine", add_help=False
    )
    commands.add_parser(
        "plan", help="memory, operations and expected time of a run of any size", add_help=False
    )
    args, rest = parser.parse_known_args(arguments)
    if args.command == "bench":
        from kvpo_kernels import bench

        return bench.main(rest)
    if args.command == "plan":
        from kvpo_kernels.cost import command

        return command.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    print(doctor.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
