"""`fulmen doctor`: what it finds is what is there, and its status says whether runs will work."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import fulmen
from fulmen.console import doctor, machine
from fulmen.console.doctor import OPTIONAL_PACKAGES, examine_machine, install_line, run_doctor

ROOT = Path(__file__).parents[2]


def examined_as_json(capsys) -> dict:
    run_doctor(["--json"])
    return json.loads(capsys.readouterr().out)


def test_json_has_what_python_and_torch_say(capsys, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("COMET_API_KEY", "do not show")
    found = examined_as_json(capsys)
    assert found["versions"]["fulmen"] == fulmen.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["CUDA"] == torch.version.cuda
    assert len([name for name in found["devices"] if name.startswith("cuda")]) == torch.cuda.device_count()
    assert found["backends"]["gloo"] is torch.distributed.is_gloo_available()
    assert found["backends"]["nccl"] is torch.distributed.is_nccl_available()
    assert list(found["start methods"]) == multiprocessing.get_all_start_methods()
    assert found["packages"]["rich"] == importlib.metadata.version("rich")
    assert found["environment"]["NCCL_DEBUG"] == "INFO" and found["environment"]["COMET_API_KEY"] == "(set)"
    assert found["problems"] == []


def test_the_table_says_how_a_missing_package_is_installed(capsys, monkeypatch):
    missing = doctor.OptionalPackage("no-such-package", "bar", "nothing")
    monkeypatch.setattr(doctor, "OPTIONAL_PACKAGES", (*OPTIONAL_PACKAGES, missing))
    run_doctor([])
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "no-such-package" in line]
    assert line.split() == ["no-such-package", "-", "nothing:", "`pip", "install", '"fulmen[bar]"`']
    (torch_line,) = [line for line in lines if line.startswith("  torch ")]
    assert torch_line.split() == ["torch", torch.__version__]


def test_every_extra_brings_what_it_is_said_to():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    said = {(one.distribution, one.extra) for one in OPTIONAL_PACKAGES if one.extra}
    for distribution, extra in said:
        assert any(requirement.startswith(distribution) for requirement in extras[extra]), (distribution, extra)
    for_users = set(extras) - {"test", "check", "docs", "dist"}
    assert {extra for _, extra in said} == for_users
    assert install_line(OPTIONAL_PACKAGES[0]) == 'pip install "fulmen[bar]"'


def test_torch_that_cannot_be_imported_is_a_problem_and_status_1(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fulmen.console.machine", None)  # as if a library of torch were missing
    with pytest.raises(SystemExit) as exited:
        run_doctor([])
    said = capsys.readouterr().out
    assert exited.value.code == 1 and "torch cannot be imported" in said
    assert importlib.metadata.version("torch") in said  # it is installed, and which one is


def test_an_old_torch_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    (problem,) = machine.find_torch_problems()
    assert problem == 'torch 2.5.1+cu121 is too old. Run `pip install "torch>=2.6"`.'


def test_a_network_that_gloo_cannot_use_is_a_problem(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    (problem,) = machine.find_torch_problems()
    assert "Processes cannot meet over gloo" in problem and "`GLOO_SOCKET_IFNAME`" in problem
    assert not torch.distributed.is_initialized()


def test_advice_names_what_may_hinder(monkeypatch, tmp_path):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 * 2**20, 0, 64 * 2**20))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    advice = "\n".join(examine_machine().advice)
    assert "`WORLD_SIZE` is not" in advice
    assert not os.path.isdir("/dev/shm") or "/dev/shm has 64 MiB" in advice
