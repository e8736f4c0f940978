"""The numbers on the pages are what the code says."""

import doctest
import operator
import re
import shlex
from pathlib import Path

from kvpo_trainer.cli import _config, _parser
from kvpo_trainer.config import RunConfig

DOCS = Path(__file__).parent.parent / "docs"


def test_the_derivations_hold() -> None:
    failed, tried = doctest.testfile(str(DOCS / "objective.md"), module_relative=False)
    assert failed == 0 and tried > 30


def test_the_trainers_page_names_what_there_is() -> None:
    page = (DOCS / "trainer.md").read_text()
    lines = re.findall(r"^    kvpo-train (.+)$", page, flags=re.MULTILINE)
    assert len(lines) == 9
    commands = set()
    for line in lines:
        options = _parser().parse_args(shlex.split(line))
        _config(options)
        commands.add(line.split()[0])
    parser = _parser()._subparsers
    assert parser is not None
    (choices,) = (a.choices for a in parser._group_actions)
    assert commands == {*choices} - {"verify-arm"}  # which is `verify`'s own

    rows = re.findall(r"^\| (`.+`) \| (.+) \| .* ?\|$", page, flags=re.MULTILINE)
    assert len(rows) == 15
    for keys, defaults in rows:
        names = re.findall(r"`([^`]+)`", keys)
        for name, default in zip(names, defaults.split(", "), strict=True):
            value = operator.attrgetter(name)(RunConfig())
            assert (str(value) if isinstance(value, str) else f"{value:g}") == default, name
