"""Who may import whom: upwards never, sideways between packages of a row never, in circles never."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fulmen"

# Row by row from the bottom. Parts of one row that are joined here may know each other.
ROWS: tuple[tuple[set[str], ...], ...] = (
    ({"utilities"},),
    ({"storage"}, {"supervision"}, {"hooks"}),
    ({"engine"},),
    ({"metrics"}, {"data"}),
    ({"checkpoint"},),
    ({"module", "datamodule", "optimizers", "hparams", "export"},),
    ({"callbacks"}, {"loggers"}, {"profilers"}, {"fabric"}, {"strategies"}, {"plugins"}, {"accelerators"}),
    ({"loops"}, {"integrations"}),
    ({"trainer", "trainer_properties", "settings", "defaults"},),
    ({"cli"}, {"tuner"}, {"serve"}, {"compat"}, {"demos"}),
    ({"console", "__main__"},),
)
PLACE = {part: (row, group) for row, groups in enumerate(ROWS) for group, parts in enumerate(groups) for part in parts}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def is_type_checking(node: ast.If) -> bool:
    test = node.test
    return getattr(test, "id", getattr(test, "attr", None)) == "TYPE_CHECKING"


def imports(path: Path) -> Iterator[tuple[ast.stmt, str, bool]]:
    """(statement, imported module of fulmen, inside a function?) of each import that runs."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[ast.stmt, str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and is_type_checking(child):
                for other in child.orelse:
                    yield from walk(other, inside)
            elif isinstance(child, ast.Import):
                for alias in child.names:
                    yield child, alias.name, inside
            elif isinstance(child, ast.ImportFrom):
                base = absolute(path, child)
                # `from package import module` imports the module; `from module import name` the one it names.
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    yield child, full if full in MODULES else base, inside
            else:
                yield from walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    for statement, name, inside in walk(ast.parse(path.read_text()), False):
        if name == "fulmen" or name.startswith("fulmen."):
            yield statement, name, inside


def absolute(path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = path.relative_to(ROOT).parent.parts
    base = package[: len(package) - node.level + 1]
    return ".".join((*base, node.module) if node.module else base)


def part(module: str) -> str | None:
    """The package or single file directly under fulmen that a module belongs to; None for fulmen itself."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else None


def where(path: Path, node: ast.stmt) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def test_every_file_has_a_row() -> None:
    homeless = {part(name) for name in MODULES} - set(PLACE) - {None}
    assert not homeless, f"Give these a row in ROWS and in pyproject.toml: {sorted(homeless)}"


def test_imports_point_downwards() -> None:
    wrong = []
    for path in FILES:
        own = part(module_name(path))
        if own is None:
            continue
        for node, name, _ in imports(path):
            other = part(name)
            if other == own:
                continue
            if other is None:
                wrong.append(f"{where(path, node)} imports fulmen itself; import the module that defines the name")
                continue
            (row, group), (other_row, other_group) = PLACE[own], PLACE[other]
            if other_row > row or (other_row == row and other_group != group):
                wrong.append(f"{where(path, node)} `{own}` (row {row}) imports `{name}` (row {other_row})")
    assert not wrong, "\n".join(wrong)


def test_the_package_itself_loads_its_names_lazily() -> None:
    eager = {name for _, name, _ in imports(PACKAGE / "__init__.py")} - {"fulmen"}
    assert {part(name) for name in eager} <= {"utilities", "compat"}, eager


def test_no_import_of_fulmen_hides_in_a_function() -> None:
    hidden = [
        f"{where(path, node)} imports `{name}`" for path in FILES for node, name, inside in imports(path) if inside
    ]
    assert not hidden, "\n".join(hidden)


def test_imports_form_no_circle() -> None:
    edges = {
        name: {target for _, target, inside in imports(path) if target in MODULES and not inside} - {name}
        for name, path in MODULES.items()
    }
    finished: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            pytest.fail(" -> ".join((*trail[trail.index(name) :], name)))
        if name not in finished:
            for target in sorted(edges[name]):
                visit(target, (*trail, name))
            finished.add(name)

    for name in sorted(edges):
        visit(name, ())


def test_there_is_one_folder_level() -> None:
    deep = [str(path.relative_to(ROOT)) for path in FILES if len(path.relative_to(PACKAGE).parts) > 2]
    assert not deep, deep
