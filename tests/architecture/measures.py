"""What is counted about the source of the package: ``python tests/architecture/measures.py`` prints every row.

Only the syntax is read, with the standard library. `test_measures.py` holds each figure to its limit.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[2] / "fulmen"
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {path: ast.parse(source) for path, source in SOURCES.items()}

# What users call; its names and its length are those of the API.
FACES = ("trainer.py", "module.py")
CONTRACTS = ("fabric/collectives.py",)  # all names in it are those of the API
DOORS = (
    "strategies.py", "plugins.py", "accelerators.py", "__main__.py",
    *(f"fabric/{name}.py" for name in ("accelerators", "plugins", "strategies", "utilities")),
)  # fmt: skip

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Row(NamedTuple):
    """One figure: what it counts, its value, the most it may be, and where it comes from."""

    what: str
    value: float
    limit: float
    places: list[str]


def is_door(path: str) -> bool:
    return path.endswith("__init__.py") or path in DOORS


def nodes(kind: type | tuple[type, ...]) -> Iterator[tuple[str, ast.AST]]:
    """(file, node) of each node of that kind."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, kind):
                yield path, node


def line_count() -> int:
    return sum(source.count("\n") for source in SOURCES.values())


def code_lines() -> int:
    """Lines that are neither blank, nor comment, nor documentation."""
    total = 0
    for path, source in SOURCES.items():
        documented: set[int] = set()
        for node in ast.walk(TREES[path]):
            if isinstance(
                node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            ) and ast.get_docstring(node):
                text = node.body[0]
                documented.update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
        lines = enumerate(source.splitlines(), start=1)
        total += sum(
            bool(line.strip()) and not line.lstrip().startswith("#") and n not in documented for n, line in lines
        )
    return total


def functions() -> Iterator[tuple[str, Function]]:
    for path, node in nodes((ast.FunctionDef, ast.AsyncFunctionDef)):
        assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        yield path, node


def parameters(function: Function) -> list[ast.arg]:
    """The parameters of a function that could be annotated: all but `self`, `cls`, `*_` and the like."""
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return [arg for arg in named if arg.arg not in ("self", "cls") and not arg.arg.startswith("_")]


def is_any(annotation: ast.expr | None) -> bool:
    return isinstance(annotation, ast.Name) and annotation.id == "Any"


def any_parameters() -> Row:
    every = [(path, arg) for path, function in functions() for arg in parameters(function)]
    found = [f"{path}:{arg.lineno} {arg.arg}" for path, arg in every if is_any(arg.annotation)]
    return Row("parameters typed exactly `Any`, %", 100 * len(found) / len(every), 8, found)


def set_from_outside() -> Row:
    """`thing.attribute = value` where `thing` is not the object whose method it is."""
    found = []
    for path, node in nodes((ast.Assign, ast.AugAssign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]  # type: ignore[attr-defined]
        flat = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
        for target in flat:
            owner = target.value if isinstance(target, ast.Attribute) else None
            if owner is not None and not (isinstance(owner, ast.Name) and owner.id in ("self", "cls")):
                found.append(f"{path}:{target.lineno} {ast.unparse(target)}")
    return Row("attributes set from outside their object, per 1,000 lines", 1000 * len(found) / line_count(), 5, found)


def getattr_calls() -> Row:
    found = [
        f"{path}:{node.lineno} {ast.unparse(node)}"
        for path, node in nodes(ast.Call)
        if isinstance(node.func, ast.Name) and node.func.id == "getattr"  # type: ignore[attr-defined]
    ]
    return Row("`getattr` calls per 1,000 lines", 1000 * len(found) / line_count(), 3, found)


def one_word_functions() -> Row:
    """Functions whose name is one word: neither dunders nor those of classes that users see."""
    every = [(path, f) for path, f in functions() if not f.name.startswith("__") and path not in CONTRACTS]
    found = [f"{path}:{f.lineno} {f.name}" for path, f in every if "_" not in f.name.strip("_")]
    return Row("functions with one-word names, %", 100 * len(found) / len(every), 15, found)


def parallel_assignments() -> Row:
    found = [
        f"{path}:{node.lineno} {ast.unparse(node)}"
        for path, node in nodes(ast.Assign)
        if isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple)  # type: ignore[attr-defined]
    ]
    return Row("parallel assignments", len(found), 60, found)


def small_files() -> Row:
    found = [path for path, source in SOURCES.items() if not is_door(path) and source.count("\n") < 40]
    return Row("files under 40 lines that are no doors", len(found), 0, found)


def largest_file() -> Row:
    size, path = max((source.count("\n"), path) for path, source in SOURCES.items() if path not in FACES)
    return Row("lines of the largest file besides trainer.py and module.py", size, 600, [path])


def complexity(function: Function) -> int:
    """Ways through a function (McCabe, "A Complexity Measure", 1976); functions inside of it count for themselves."""
    branches = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.Assert, ast.comprehension)
    total, waiting = 1, list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        total += isinstance(node, branches) + (len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0)
        waiting.extend(ast.iter_child_nodes(node))
    return total


def complex_functions() -> Row:
    counts = [(complexity(f), f"{path}:{f.lineno} {f.name}") for path, f in functions()]
    found = [f"{count} {place}" for count, place in sorted(counts, reverse=True) if count > 12]
    return Row("functions with a cyclomatic complexity above 12", len(found), 0, found)


def long_parameter_lists() -> Row:
    found = [
        f"{path}:{f.lineno} {f.name} {len(parameters(f))}"
        for path, f in functions()
        if f.name.startswith("_") and not f.name.startswith("__") and len(parameters(f)) > 6
    ]
    return Row("private functions with more than 6 parameters", len(found), 0, found)


def foreign_privates() -> Row:
    """Functions outside of a class that use private attributes of a parameter: methods in disguise."""
    found = []
    for path, tree in TREES.items():
        for function in tree.body:
            if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            names = {arg.arg for arg in parameters(function)}
            for node in ast.walk(function):
                if not (
                    isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names
                ):
                    continue
                if node.attr.startswith("_") and not node.attr.startswith("__"):
                    found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
    return Row("private attributes of a parameter used in a function", len(found), 60, found)


def any_properties() -> Row:
    """Public properties of what users subclass or read that a type checker knows nothing about.

    This reads annotations; tests/typing asks mypy, which also follows helpers that make properties.
    """
    classes = {
        "trainer.py": "Trainer",
        "trainer_properties.py": "TrainerProperties",
        "module.py": "LightningModule",
        "datamodule.py": "LightningDataModule",
    }
    classes["callbacks/callback.py"] = "Callback"
    found = []
    for path, name in classes.items():
        body = next(node for node in TREES[path].body if isinstance(node, ast.ClassDef) and node.name == name).body
        for node in body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                if "property" in decorators and (node.returns is None or is_any(node.returns)):
                    found.append(f"{path}:{node.lineno} {node.name}")
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and "property" in ast.unparse(node.value)
            ):
                found.append(f"{path}:{node.lineno} {node.targets[0].id}")
    return Row("public properties typed `Any`", len(found), 0, found)


def fit_lines() -> Row:
    return Row("lines of loops/fit.py", SOURCES["loops/fit.py"].count("\n"), 330, [])


def package_lines() -> Row:
    return Row("lines of the package", line_count(), 22_500, [f"{code_lines():,} of them code"])


MEASURES = (
    fit_lines,
    any_properties,
    any_parameters,
    set_from_outside,
    getattr_calls,
    one_word_functions,
    parallel_assignments,
    small_files,
    largest_file,
    complex_functions,
    long_parameter_lists,
    foreign_privates,
    package_lines,
)


if __name__ == "__main__":
    import sys

    for measure in MEASURES:
        row = measure()
        print(f"{row.what:<64} {row.value:>9,.1f}   limit {row.limit:>8,.0f}")
        if "--places" in sys.argv:
            print(*(f"    {place}" for place in row.places), sep="\n")
