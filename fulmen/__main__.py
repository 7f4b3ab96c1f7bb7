"""``python -m fulmen COMMAND``: the same as the `fulmen` command."""

from __future__ import annotations

from fulmen.console.commands import run_command

if __name__ == "__main__":
    run_command()
