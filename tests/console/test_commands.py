"""The `fulmen` command: what it lists, suggests and runs, and that it imports only what it runs."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fulmen
from fulmen.console.commands import COMMANDS, Command, run_command

ROOT = Path(__file__).parents[2]


def ended(arguments: list[str]) -> str | int | None:
    """What the command exits with."""
    with pytest.raises(SystemExit) as exited:
        run_command(arguments)
    return exited.value.code


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command_with_its_purpose(flag, capsys):
    run_command([flag])
    said = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in said and command.purpose in said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys):
    assert ended([name, "-h"]) in (None, 0)
    said = capsys.readouterr().out
    assert said.startswith(f"usage: fulmen {name}")


@pytest.mark.parametrize(("typed", "meant"), [("docter", "doctor"), ("upgarde", "upgrade"), ("Demo", "demo")])
def test_a_misspelt_command_is_answered_with_the_nearest(typed, meant, capsys):
    assert ended([typed]) == 2
    said = capsys.readouterr()
    assert f"There is no command '{typed}'. Did you mean `{meant}`?" in said.err and said.out == ""


def test_without_a_command_the_list_is_an_error(capsys):
    assert ended([]) == 2
    assert "Name a command." in capsys.readouterr().err


def test_version(capsys):
    run_command(["--version"])
    assert capsys.readouterr().out == f"fulmen {fulmen.__version__}\n"


def test_a_missing_package_is_one_line_with_its_extra(monkeypatch):
    monkeypatch.setitem(COMMANDS, "sing", Command("sing", "nowhere:sing", "no_such_package", "songs"))
    assert ended(["sing"]) == (
        '`fulmen sing` needs `no_such_package`, which is not installed. Run `pip install "fulmen[songs]"`.'
    )


def test_extras_that_are_named_exist():
    extras = project()["optional-dependencies"]
    assert {command.extra for command in COMMANDS.values() if command.extra} <= set(extras)


def test_the_script_that_is_installed_is_this_command():
    module, _, function = project()["scripts"]["fulmen"].partition(":")
    assert vars(importlib.import_module(module))[function] is run_command


def test_nothing_is_imported_that_is_not_run():
    """One process: the list and a misspelt name need neither torch nor any command."""
    code = """
import sys
from fulmen.console.commands import COMMANDS, run_command
run_command(["-h"])
try:
    run_command(["docter"])
except SystemExit as ended:
    assert ended.code == 2
loaded = [name for name in sys.modules if name.partition(".")[0] in ("torch", "numpy", "argparse")]
assert not loaded, loaded
assert not [name for name in sys.modules if name.startswith("fulmen.console.") and name != "fulmen.console.commands"]
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_python_m_is_the_same_command():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fulmen", "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"fulmen {fulmen.__version__}\n")


@pytest.mark.parametrize("name", ["consolidate", "upgrade"])
def test_a_path_that_is_not_there_is_one_line(name, capsys):
    assert ended([name, "nowhere"]) == 1
    said = capsys.readouterr()
    assert "nowhere" in said.out + said.err and "Traceback" not in said.err


def test_the_page_shows_commands_that_exist_and_code_that_runs(capsys, monkeypatch):
    page = (ROOT / "docs" / "console.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^fulmen ([a-z]+)", page, re.MULTILINE)) | {"validate", "test", "predict"}
    assert shown == set(COMMANDS)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(compile(code, "console.md", "exec"), {})
    assert torch.__version__ in capsys.readouterr().out


def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
