"""``fulmen check``: which names of Lightning a program uses, and which of them there are here. Nothing of it is run."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fulmen.compat.foreign import OTHERS, PACKAGES, TOP_NAMES, describe_absence, find_holder, home_of
from fulmen.compat.grades import GRADES, Grade
from fulmen.utilities.errors import suggest_name
from fulmen.utilities.lazy import has_module

Places = dict[str, list[str]]  # "file:line" by name
SKIPPED = ("site-packages", "__pycache__", "node_modules")


class Finding(NamedTuple):
    """One name, how far it is served ("full", "read-only" or "absent"), what is different, and where it is used."""

    name: str
    grade: str
    note: str
    places: list[str]


class NameCollector(ast.NodeVisitor):
    """The names of Lightning in one file: imported ones, what is read from them, and private parts of a trainer.

    Attributes:
        places: where each name stands.
    """

    def __init__(self, file: str, places: Places) -> None:
        self.places = places
        self._file = file
        self._bound: dict[str, str] = {}  # the path behind a name of this file

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            root = alias.name.partition(".")[0]
            if root in PACKAGES:
                self._note(alias.name, node)
                self._bound[alias.asname or root] = alias.name if alias.asname else root

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level == 0 and module.partition(".")[0] in PACKAGES:
            for alias in node.names:
                path = module if alias.name == "*" else f"{module}.{alias.name}"
                self._note(path, node)
                self._bound[alias.asname or alias.name] = path

    def visit_Attribute(self, node: ast.Attribute) -> None:
        words: list[str] = []
        below: ast.expr = node
        while isinstance(below, ast.Attribute):
            words.insert(0, below.attr)
            below = below.value
        if isinstance(below, ast.Name) and below.id in self._bound:
            self._note(".".join([self._bound[below.id], *words]), node)
            return
        if isinstance(below, ast.Name):
            words.insert(0, below.id)
        if "trainer" in words:
            path = ".".join(words[words.index("trainer") :])
            known = next((known for known in shorten_path(path) if known in GRADES), None)
            if known is not None:
                self._note(known, node)
        self.visit(below)

    def _note(self, path: str, node: ast.stmt | ast.expr) -> None:
        places = self.places.setdefault(path, [])
        place = f"{self._file}:{node.lineno}"
        if place not in places:
            places.append(place)


def shorten_path(path: str) -> Iterator[str]:
    """The path, and what it is below, the nearest first.

    Example:
        >>> list(shorten_path("a.b.c"))
        ['a.b.c', 'a.b', 'a']
    """
    while path:
        yield path
        path = path.rpartition(".")[0]


def grade_name(path: str) -> Grade:
    """How far a name is served.

    Args:
        path: as it is imported, such as "lightning.pytorch.Trainer", or a private part such as
            "trainer._checkpoint_connector".

    Example:
        >>> grade_name("lightning.pytorch.Trainer.fit").grade, grade_name("lightning.app.LightningApp").grade
        ('full', 'absent')
    """
    if path in GRADES:
        return GRADES[path]
    module = next((part for part in shorten_path(path) if has_module(home_of(part) or "")), None)
    if module is None or path.removeprefix("lightning.").partition(".")[0] in OTHERS:
        return Grade("absent", describe_absence(path).removeprefix(": ") or "fulmen has no such module")
    names = path.removeprefix(module).lstrip(".").split(".")
    if names == [""] or names[0] == "__version__":
        return Grade("full")
    return _grade_content(module, home_of(module) or "", names)


def _grade_content(module: str, home: str, names: Sequence[str]) -> Grade:
    """Of what a module holds, which shows one of our own."""
    known = GRADES.get(f"{home}.{names[0]}".removeprefix("fulmen."))
    if known is not None:
        return known
    shown = importlib.import_module(home)
    holder = find_holder(module, shown, names[0])
    if holder is None:
        public = TOP_NAMES if module == "lightning" else [name for name in dir(shown) if not name.startswith("_")]
        return Grade("absent", suggest_name(names[0], public).strip() or f"`{module}` has no such name in fulmen")
    return _grade_member(vars(holder).get(names[0]), names)


def _grade_member(value: object, names: Sequence[str]) -> Grade:
    """Of a class, members whose name begins with an underscore are looked up; others may come with its objects."""
    if len(names) < 2 or not inspect.isclass(value):
        return Grade("full")
    known = GRADES.get(".".join(names[:2]))
    private = names[1].startswith("_") and not names[1].startswith("__")
    if known is None and private and not hasattr(value, names[1]):
        return Grade("absent", f"`{names[0]}` has no such private member in fulmen")
    return known or Grade("full")


def find_sources(paths: Iterable[Path]) -> Iterator[Path]:
    """The files themselves, and all Python files of folders, without what is installed or hidden there."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        for file in sorted(path.rglob("*.py")):
            parts = file.relative_to(path).parts
            if not any(part.startswith(".") or part in SKIPPED for part in parts):
                yield file


def check_program(paths: Iterable[Path]) -> list[Finding]:
    """What a program uses of Lightning, sorted by name, what is absent first.

    Args:
        paths: Python files, and folders of them.

    Raises:
        OSError: a file cannot be read.
        SyntaxError: a file is no Python.

    Example:
        >>> from pathlib import Path
        >>> Path("script.py").write_text("from lightning.pytorch import Trainer")
        37
        >>> check_program([Path("script.py")])
        [Finding(name='lightning.pytorch.Trainer', grade='full', note='', places=['script.py:1'])]
    """
    places: Places = {}
    for path in find_sources(paths):
        NameCollector(str(path), places).visit(ast.parse(path.read_bytes(), str(path)))
    found = [Finding(name, *grade_name(name), where) for name, where in places.items()]
    order = ("absent", "read-only", "full")
    return sorted(found, key=lambda finding: (order.index(finding.grade), finding.name))


def describe_findings(found: Sequence[Finding]) -> str:
    """The findings as a table in plain text."""
    if not found:
        return "No name of Lightning is used."
    width = max(len(finding.name) for finding in found)
    lines = []
    for finding in found:
        more = f" and {len(finding.places) - 1} more" if len(finding.places) > 1 else ""
        lines.append(f"{finding.grade:9}  {finding.name:{width}}  {finding.places[0]}{more}")
        lines += [f"{'':9}  {finding.note}"] if finding.note else []
    absent = sum(finding.grade == "absent" for finding in found)
    return "\n".join([*lines, "", f"{len(found)} names, {absent} absent."])


def run_check(arguments: Sequence[str] | None = None) -> None:
    """The command line.

    Raises:
        SystemExit: with status 1 if a name is absent, 2 if a file cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="fulmen check", description="Lists the names of Lightning in a program, without running it, and says of"
        " each whether fulmen serves it: in full, to be read only, or not at all.",
    )  # fmt: skip
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="Python files, or folders of them")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    options = parser.parse_args(arguments)
    try:
        found = check_program(options.paths)
    except (OSError, SyntaxError, ValueError) as error:
        parser.error(f"cannot be read: {error}")
    print(json.dumps([finding._asdict() for finding in found], indent=1) if options.json else describe_findings(found))
    sys.exit(int(any(finding.grade == "absent" for finding in found)))
