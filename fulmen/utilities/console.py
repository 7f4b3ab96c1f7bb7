"""What is printed for people (tables, counts, text that a terminal can show), and whether one sits there."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

LIGHTNING_LOGO = r"""
     __
    / /    fulmen
   / /_
  /__  /   trains PyTorch modules
    / /
   /_/
"""


def cli_lightning_logo() -> None:
    """Prints `LIGHTNING_LOGO`.

    Examples:
        >>> cli_lightning_logo()  # doctest: +ELLIPSIS
        <BLANKLINE>
        ...fulmen...
    """
    print(LIGHTNING_LOGO)


def format_table(columns: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Columns, each with its header, as lines of text between two rules."""
    widths = [max(map(len, [header, *cells])) for header, cells in columns]
    rows = zip(*([header, *cells] for header, cells in columns))
    head, *body = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
    rule = "-" * (sum(widths) + 3 * (len(widths) - 1))
    return "\n".join([head, rule, *body, rule])


def get_human_readable_count(number: int) -> str:
    """A count with one of the units K, M, B, T: ``1234`` is ``"1.2 K"``; below 1000 the unit is blank."""
    power = min(int(math.log10(number)) // 3, 4) if number > 0 else 0
    value = number / 1000**power
    text = f"{value:,.1f}" if power > 0 and value < 100 else f"{int(value):,d}"
    return f"{text} {' KMBT'[power]}"


def is_interactive() -> bool:
    """Does a person type into this interpreter, who wants to continue after an interrupt?"""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def get_rich_console() -> Any:
    """A console on the standard output; in a log file tables keep their full width and have no colours."""
    from rich import get_console
    from rich.console import Console

    console = get_console()
    if console.is_terminal or console.is_jupyter:
        return console
    return Console(file=sys.stdout, width=160)  # nobody can say how wide the page is


def escape_unencodable(text: str, stream: object) -> str:
    """The text with escapes for what a stream cannot encode: a name of a metric shall not end a run."""
    encoding = (stream.encoding if hasattr(stream, "encoding") else None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
