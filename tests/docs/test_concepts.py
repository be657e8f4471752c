"""The tables of docs/concepts.md name every kind and verb of units, and methods and roles that exist."""

from __future__ import annotations

import re
from typing import get_args

import vispeft
from tests.docs.test_docs import ROOT
from vispeft.core import model_units, units
from vispeft.core.method import Method
from vispeft.core.sites import ROLES
from vispeft.core.units import Unit, UnitKind

PAGE = (ROOT / "docs/concepts.md").read_text(encoding="utf-8")
CLASSES = {
    name: value
    for module in (units, model_units)
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, Unit) and value is not Unit
}


def rows(heading: str) -> list[list[str]]:
    """Cells of the table whose first heading cell is `heading`."""
    lines = iter(PAGE.splitlines())
    assert any(line.startswith(f"| {heading} |") for line in lines)
    next(lines)
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def test_every_kind_has_a_row_with_its_class() -> None:
    table = {kind: name.strip("`") for kind, name, *_ in rows("kind")}
    assert table == {kind: cls.__name__ for cls in CLASSES.values() for kind in [cls.kind]}
    assert set(table) == set(get_args(UnitKind))


def test_methods_of_the_kinds_exist() -> None:
    for kind, *_, users in rows("kind"):
        for call in re.findall(r"`(\w+)(?:\(.*?\))?`", users):
            if call not in ("drop_path", "PeftMethod"):
                assert issubclass(getattr(vispeft, call), Method), (kind, call)


def test_the_verbs_are_those_of_the_units() -> None:
    verbs = {verb for row in rows("verb") for cell in row for verb in re.findall(r"`(\w+)`", cell)}
    functions = {name for cls in [Unit, *CLASSES.values()] for name, value in vars(cls).items() if callable(value)}
    assert verbs == {name for name in functions if not name.startswith("_")}


def test_roles_of_the_words_exist() -> None:
    (row,) = [row for row in rows("word") if row[0] == "**role**"]
    assert set(re.findall(r"`([\w.]+)`", row[1])) <= set(ROLES)
