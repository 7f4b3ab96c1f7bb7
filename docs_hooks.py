"""What `make docs` writes into the pages: every public name of a package, and the picture of who imports whom."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from fulmen.compat.check import GRADES

ROOT = Path(__file__).parent
PACKAGE = ROOT / "fulmen"
MARK = re.compile(r"<!-- every public name of (fulmen\.\w+) -->")
GRADES_MARK = "<!-- every private name and its grade -->"
PICTURE_MARK = "<!-- the picture of who imports whom -->"

# Sizes of the picture, in pixels.
WIDTH, ROW, BOX, GAP, MARGIN = 960, 84, 34, 14, 16


def public_names(package: str) -> list[str]:
    """The names in the `__all__` of a package, read without importing it."""
    folder = ROOT / package.replace(".", "/")
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{path} has no literal `__all__`.")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the picture, and one entry of the reference per public name, where a page asks for them."""

    def entries(match: re.Match[str]) -> str:
        return "\n\n".join(f"::: {match[1]}.{name}" for name in sorted(public_names(match[1]), key=str.lower))

    if GRADES_MARK in markdown:
        markdown = markdown.replace(GRADES_MARK, grades_table())
    return MARK.sub(entries, markdown.replace(PICTURE_MARK, "![Who imports whom](imports.svg)"))


def grades_table() -> str:
    """The private names that are served, in a table."""
    rows = [f"| `{name}` | {grade.grade} | {grade.note} |" for name, grade in sorted(GRADES.items())]
    return "\n".join(["| name | grade | note |", "|---|---|---|", *rows])


def on_files(files: Files, config: Any) -> Files:
    """Adds the picture, which is drawn anew each time."""
    files.append(File.generated(config, "imports.svg", content=draw_imports()))
    return files


def layers() -> list[list[str]]:
    """The rows of pyproject.toml, highest first; only parts that there are."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^layers = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    rows = [re.findall(r"\w+", row) for row in re.findall(r'"([^"]+)"', block[1])]
    there = [[part for part in row if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()] for row in rows]
    return [row for row in there if row]


def imports_between_parts() -> Counter[tuple[str, str]]:
    """How many files of one part import another part when they are imported."""
    found: Counter[tuple[str, str]] = Counter()
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        targets = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
        others = {target.split(".")[1] for target in targets if target.startswith("fulmen.")}
        found.update((part, other) for other in others if other != part)
    return found


def draw_imports() -> str:
    """An SVG of the layers as rows, a box per part, and a line down to each part it imports."""
    rows = layers()
    boxes: dict[str, tuple[float, float, float]] = {}  # part -> left, top, width
    for number, row in enumerate(rows):
        width = min(150.0, (WIDTH - 2 * MARGIN - GAP * (len(row) - 1)) / len(row))
        left = (WIDTH - width * len(row) - GAP * (len(row) - 1)) / 2
        for place, part in enumerate(row):
            boxes[part] = (left + place * (width + GAP), MARGIN + number * ROW, width)
    height = 2 * MARGIN + (len(rows) - 1) * ROW + BOX
    lines = []
    for (part, other), count in sorted(imports_between_parts().items()):
        if part not in boxes or other not in boxes or boxes[part][1] >= boxes[other][1]:
            continue  # parts of one row may know each other; they stand side by side
        (left, top, width), (low_left, low_top, low_width) = boxes[part], boxes[other]
        x, y, to_x, to_y = left + width / 2, top + BOX, low_left + low_width / 2, low_top
        bend = (to_y - y) / 2
        path = f"M{x:.0f} {y:.0f} C{x:.0f} {y + bend:.0f} {to_x:.0f} {to_y - bend:.0f} {to_x:.0f} {to_y:.0f}"
        title = f"<title>{part} imports {other} in {count} file{'s' * (count > 1)}</title>"
        lines.append(f'<path d="{path}" stroke-width="{min(4, 0.6 + count / 4):.1f}">{title}</path>')
    shapes = []
    for part, (left, top, width) in boxes.items():
        shapes.append(f'<rect x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{BOX}" rx="6"/>')
        shapes.append(f'<text x="{left + width / 2:.0f}" y="{top + BOX / 2 + 5:.0f}">{part}</text>')
    style = (
        "path{fill:none;stroke:#8f9bd4;opacity:.45}rect{fill:#3f51b5}"
        "text{fill:#fff;font:14px sans-serif;text-anchor:middle}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="The parts of fulmen and who imports whom"><style>{style}</style>'
        f"{''.join(lines)}{''.join(shapes)}</svg>"
    )
