"""The one harness: cases, yardsticks, interleaved ratios, records, a picture.

`python -m kvpo_kernels bench`, `pytest benchmarks` and `benchmarks/device_suite.sh` measure the
cases of the files here (`catalogue.OPS`); a new one is written once.
"""

from kvpo_kernels.bench.command import main

__all__ = ["main"]
