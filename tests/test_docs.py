"""The numbers on the pages are what the code says."""

import doctest
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_derivations_hold() -> None:
    failed, tried = doctest.testfile(str(DOCS / "objective.md"), module_relative=False)
    assert failed == 0 and tried > 30
