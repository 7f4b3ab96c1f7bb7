"""The tables of results printed after validate and test."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence

from fulmen.utilities.console import escape_unencodable, format_table, get_rich_console
from fulmen.utilities.optional import is_installed
from fulmen.utilities.seed import isolate_rng

_LOADER_SUFFIX = re.compile(r"/dataloader_idx_\d+$")


@isolate_rng()  # it may import Rich
def print_results(results: Sequence[Mapping[str, float]], verb: str) -> None:
    """Prints a column per loader and a row per metric, with Rich if it is there; nothing when nothing was logged."""
    columns = result_columns(results, verb)
    if not columns[0][1]:
        return
    if not is_installed("rich", ">=10.2.2"):
        return print(escape_unencodable(format_table(columns), sys.stdout))
    from rich.table import Table

    console = get_rich_console()
    columns = [(header, [escape_unencodable(cell, console) for cell in cells]) for header, cells in columns]
    names, *loaders = columns
    name_width, *widths = (max(map(len, [header, *cells])) + 3 for header, cells in columns)
    name_width = min(name_width, console.width - max(widths) - 1)
    while loaders:
        # As many loaders as fit beside the names; the others get a table of their own below.
        count = sum(name_width + sum(widths[: i + 1]) < console.width for i in range(len(widths))) or 1
        table = Table(header_style="bold magenta")
        table.add_column(names[0], style="cyan", justify="center", overflow="fold")
        for header, _ in loaders[:count]:
            table.add_column(header, style="magenta", justify="center", no_wrap=True)
        for row in zip(names[1], *(cells for _, cells in loaders[:count])):
            table.add_row(*row)
        console.print(table)
        loaders = loaders[count:]
        widths = widths[count:]


def result_columns(results: Sequence[Mapping[str, float]], verb: str) -> list[tuple[str, list[str]]]:
    """The table by column, header first; metrics stand in the order they were logged in."""
    per_loader = [{_LOADER_SUFFIX.sub("", name): value for name, value in result.items()} for result in results]
    names = list(dict.fromkeys(name for result in per_loader for name in result))
    columns = [(f"{verb.capitalize()} metric", names)]
    for index, result in enumerate(per_loader):
        columns.append((f"DataLoader {index}", [_number(result[n]) if n in result else "" for n in names]))
    return columns


def _number(value: float) -> str:
    return f"{value:.1f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.7g}"
