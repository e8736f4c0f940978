"""`kvpo-train`, also as `python -m kvpo_trainer`."""

import sys


def main() -> int:
    """Run the command line, or say what it is that is not installed."""
    try:
        from kvpo_trainer.cli import main
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("kvpo_kernels", "kvpo_trainer"):
            raise
        print(
            f"kvpo-train: {missing} is not installed; pip install 'kvpo_kernels[train]' brings what"
            " the trainer needs",
            file=sys.stderr,
        )
        return 2
    return main()


if __name__ == "__main__":
    sys.exit(main())
