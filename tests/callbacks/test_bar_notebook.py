"""Bars in a real Jupyter kernel that has no ipywidgets."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("rich")

DEFINE = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import time
from support import Regression, make_loader, make_trainer
from fulmen.callbacks import RichProgressBar, TQDMProgressBar

class Slow(Regression):
    def training_step(self, batch, batch_idx):
        time.sleep(0.04)
        self.log("loss", loss := self.loss(batch), prog_bar=True)
        return loss

def fit(bar):
    trainer = make_trainer(callbacks=[bar], enable_progress_bar=True, max_epochs=2)
    trainer.fit(Slow(), make_loader(20), make_loader(8))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ipywidgets") is not None, reason="is about kernels without ipywidgets")
def test_bars_are_shown_and_replaced_without_ipywidgets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [DEFINE, "fit(RichProgressBar())", "fit(RichProgressBar(leave=False))", "fit(TQDMProgressBar())"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    replaced = []

    class Client(nbclient.NotebookClient):
        def process_message(self, message, cell, index):
            if message["msg_type"] == "update_display_data":
                replaced.append(index)
            return super().process_message(message, cell, index)

    Client(notebook, timeout=1200, kernel_name="python3").execute()
    shown = [[out["data"]["text/plain"] for out in cell.outputs if "data" in out] for cell in notebook.cells]
    assert [[re.match(r"Epoch (\d)/1 .* 5/5 .*loss: ", text)[1] for text in texts] for texts in shown[1:3]] == [
        ["0", "1"],
        ["1"],
    ]
    assert replaced.count(1) >= 4 and replaced.count(2) >= 4
    text = "".join(out.get("text", "") for out in notebook.cells[3].outputs)
    assert re.search(r"Epoch 0: 100%.* 5/5 .*loss=", text) and "Epoch 1: 100%" in text and "\x1b[A" not in text
