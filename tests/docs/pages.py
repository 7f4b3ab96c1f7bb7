"""Pages of docs/ that are written from docstrings: ``python tests/docs/pages.py`` writes them anew."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from fulmen import Callback, LightningDataModule, LightningModule, Trainer, hooks  # noqa: E402

SECTION = re.compile(r"^Arguments: (.+)$")
ENTRY = re.compile(r"^    (\w+): (.+)$")


class Argument(NamedTuple):
    """One argument as a docstring explains it."""

    group: str
    name: str
    meaning: str


def explained_arguments(docstring: str) -> Iterator[Argument]:
    """The entries of all sections ``Arguments: <group>``, in order, each as one line."""
    group, name, words = "", "", [""]
    for line in [*inspect.cleandoc(docstring).splitlines(), "Raises:"]:
        section, entry = SECTION.match(line), ENTRY.match(line)
        if line.startswith("        ") and name:
            words.append(line.strip())
            continue
        if name:
            yield Argument(group, name, " ".join(words))
            name = ""
        if section or (line and not line.startswith(" ")):
            group = section[1] if section else ""
        if entry and group:
            name, words = entry[1], [entry[2]]


def table_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("``", "`")


def trainer_page() -> str:
    """docs/trainer.md: the arguments of the Trainer in tables, with the types and defaults of the signature."""
    parameters = inspect.signature(Trainer).parameters
    introduction = inspect.cleandoc(str(Trainer.__doc__)).split("\n\nArguments:")[0].partition("\n\n")[2]
    lines = [
        "# The Trainer's arguments",
        "",
        introduction,
        "",
        "This page is written from the docstring of `fulmen.Trainer` by `python tests/docs/pages.py`; see also",
        "[precision, gradients and steps](optimization.md), [several devices](devices.md) and",
        "[never lose a run](never-lose-a-run.md).",
    ]
    group = ""
    for argument in explained_arguments(str(Trainer.__doc__)):
        if argument.group != group:
            group = argument.group
            lines += [
                "",
                f"## {group.capitalize()}",
                "",
                "| argument | type | default | meaning |",
                "|---|---|---|---|",
            ]
        parameter = parameters[argument.name]
        cells = (f"`{parameter.annotation}`", f"`{parameter.default!r}`", argument.meaning)
        lines.append(f"| `{argument.name}` | {' | '.join(map(table_cell, cells))} |")
    return "\n".join(lines) + "\n"


def hooks_page() -> str:
    """docs/hooks.md: when the hooks run, and what each of them is for."""
    introduction, _, timeline = inspect.cleandoc(str(hooks.__doc__)).partition("::\n")
    timeline, _, end = timeline.partition("\n\nWith several devices")
    lines = ["# Hooks", "", introduction + ":", "", "```text", textwrap.dedent(timeline).strip("\n"), "```", ""]
    lines += [
        "With several devices" + end,
        "",
        "This page is written from docstrings by `python tests/docs/pages.py`.",
        "",
        "## What may be logged",
        "",
        "*Logs per step*: the value of the step, unless `on_epoch=True` asks for one over the epoch. *Logs per epoch*:",
        "the value reduced over the epoch, and with `on_step=True` each of them. *Logs only per epoch*: there is no",
        "step. *Logs nothing*: `self.log` raises.",
    ]
    for title, owner in (("callbacks", Callback), ("modules", LightningModule), ("datamodules", LightningDataModule)):
        lines += ["", f"## Hooks of {title}", "", "| hook | when |", "|---|---|"]
        for name in hook_names(owner):
            docstring = inspect.cleandoc(str(getattr(owner, name).__doc__))
            what, _, rest = docstring.partition("\n")
            if "Logs " not in what and (logs := re.search(r"Logs [^.]+\.", rest)):
                what = f"{what} {logs[0]}"
            lines.append(f"| `{name}` | {table_cell(what)} |")
    return "\n".join(lines) + "\n"


def hook_names(owner: type) -> list[str]:
    """What of the table a class has, in the order of the table, and behind it the hooks around data."""
    data = [name for name, value in vars(hooks.DataHooks).items() if callable(value) and not name.startswith("_")]
    own = [] if owner is Callback else [name for name in data if name not in ("setup", "teardown")]
    if owner is LightningDataModule:
        return ["setup", "teardown", *own, "on_exception"]
    return [hook.name for hook in hooks.HOOKS if hasattr(owner, hook.name)] + own


PAGES = {"trainer.md": trainer_page, "hooks.md": hooks_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page(), encoding="utf-8")
