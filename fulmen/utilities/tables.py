"""Tables for people: plain text, and a Rich console wide enough for them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


def text_table(columns: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Columns, each with its header, as lines of text between two rules."""
    widths = [max(map(len, [header, *cells])) for header, cells in columns]
    rows = zip(*([header, *cells] for header, cells in columns))
    head, *body = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
    rule = "-" * (sum(widths) + 3 * (len(widths) - 1))
    return "\n".join([head, rule, *body, rule])


def rich_console() -> Any:
    """A console on the standard output; in a log file tables keep their full width and have no colours."""
    from rich import get_console
    from rich.console import Console

    console = get_console()
    if console.is_terminal or console.is_jupyter:
        return console
    return Console(file=sys.stdout, width=160)  # nobody can say how wide the page is


def encodable(text: str, stream: Any) -> str:
    """The text with escapes for what a stream cannot encode: a name of a metric shall not end a run."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
