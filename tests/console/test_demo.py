"""`fulmen demo`: it learns, writes what it says, and needs no other package."""

from __future__ import annotations

import csv
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from fulmen.console import demo
from fulmen.console.demo import draw_digits, format_images, load_digits, run_demo


def test_the_demo_trains_and_shows_what_came_back(capsys):
    run_demo(["--data", "drawn", "--epochs", "3", "--out", "here"])
    said = capsys.readouterr().out
    error = float(re.search(r"test loss +(\d\.\d+)", said).group(1))
    images = draw_digits(1800, torch.Generator().manual_seed(7))
    assert error < images.var().item()  # better than the mean of all pixels
    checkpoint = Path(re.search(r"checkpoint +(\S+)", said).group(1))
    metrics = Path(re.search(r"metrics +(\S+)", said).group(1))
    assert checkpoint.is_file() and checkpoint.parts[0] == "here"
    with metrics.open(newline="") as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]
    assert len(losses) == 3 and losses[2] < losses[0]


def test_without_scikit_learn_digits_are_drawn_and_the_real_ones_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(demo, "is_installed", lambda package: False)
    with pytest.raises(SystemExit) as exited:
        run_demo(["--data", "digits"])
    said = capsys.readouterr().err
    assert exited.value.code == 2 and 'pip install "fulmen[examples]"' in said and "Traceback" not in said
    with pytest.raises(SystemExit):
        run_demo(["-h"])
    assert "(default: drawn)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_digits_are_those_of_scikit_learn():
    images = load_digits()
    assert images.shape == (1797, 8, 8) and images.min() == 0 and images.max() == 1


def test_images_as_text():
    images = torch.tensor([[[0.0, 1.0], [0.5, 0.0]], [[1.0, 1.0], [0.0, 0.0]]])
    assert format_images(images) == "  @@  @@@@\n==        "
