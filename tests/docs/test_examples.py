"""The examples in docstrings: each one runs, and prints what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import fulmen

PACKAGE = Path(fulmen.__file__).parent
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


WITH_EXAMPLES = [module_of(path) for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text("utf-8")]


def examples_of(module_name: str) -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for test in finder.find(importlib.import_module(module_name)) if test.examples]


@pytest.mark.parametrize("module_name", WITH_EXAMPLES)
def test_examples_run_as_they_are_written(module_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    report: list[str] = []
    for test in examples_of(module_name):
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


def test_there_are_examples_that_run() -> None:
    examples = [test for name in WITH_EXAMPLES for test in examples_of(name)]
    run = [test for test in examples if any(doctest.SKIP not in example.options for example in test.examples)]
    assert len(run) >= 40, [test.name for test in run]
