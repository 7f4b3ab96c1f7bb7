"""The page about a loop of one's own and the example run as they are written."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def test_the_code_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "fabric.md").read_text(encoding="utf-8")
    space: dict = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/fabric.md", "exec"), space)
    errors = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(errors) == 3 and errors[-1] < errors[0]


def test_the_example_learns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", ["mnist_fabric.py", "--epochs", "2", "--out", "out"])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    runpy.run_path(str(ROOT / "examples" / "mnist_fabric.py"), run_name="__main__")
    first, last = re.search(r"error +([\d.]+) -> ([\d.]+), of epoch 1", capsys.readouterr().out).groups()
    assert float(last) < float(first) / 2
    assert sorted(torch.load("out/best.ckpt", weights_only=True)) == ["epoch", "model", "optimizer"]
