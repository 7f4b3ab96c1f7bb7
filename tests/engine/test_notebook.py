"""`strategy="ddp_notebook"` in a real Jupyter kernel."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

DEFINE = """
import os, time, warnings
warnings.simplefilter("ignore")
import torch
import fulmen as pl
from torch.utils.data import DataLoader, Dataset

class Data(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return torch.full((4,), index / 16)

class Model(pl.LightningModule):
    def __init__(self, failing=False, slow=False):
        super().__init__()
        self.net, self.failing, self.slow = torch.nn.Linear(4, 1), failing, slow

    def training_step(self, batch, batch_idx):
        if self.failing and self.global_rank == 1:
            raise ValueError("on purpose")
        if self.slow:
            open(f"running-{self.global_rank}", "w").write(str(os.getpid()))
            time.sleep(0.2)
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

def train(model, epochs=1, **more):
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_notebook", max_epochs=epochs, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, **more,
    )
    trainer.fit(model, DataLoader(Data(), batch_size=4))
    return trainer
"""
# The parent has used autograd and a pool of threads before it forks, as notebooks do.
BEFORE = "Model().net(torch.randn(512, 4)).square().mean().backward(); print(torch.get_num_threads() > 0)"
TRAIN = """
model = Model()
before = model.net.weight.detach().clone()
trainer = train(model)
print(trainer.global_step, bool((model.net.weight != before).any()), os.getpid())
"""
FAIL = """
try:
    train(Model(failing=True))
except ValueError as error:
    print("caught", error)
"""


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Runs cells; what they print comes back."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    notebook = nbformat.v4.new_notebook()
    client = nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}})

    def run(source: str) -> str:
        cell = nbformat.v4.new_code_cell(source)
        notebook.cells.append(cell)
        client.execute_cell(cell, len(notebook.cells) - 1)
        return "".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stdout")

    with client.setup_kernel():
        yield run


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_cells_train_again_and_again_after_errors_and_an_interrupt(kernel, tmp_path) -> None:
    kernel(DEFINE)
    assert kernel(BEFORE) == "True\n"
    pids = set()
    for _ in range(5):
        steps, learned, pid = kernel(TRAIN).split()
        assert (steps, learned) == ("2", "True")
        pids.add(pid)
    assert len(pids) == 1

    assert kernel(FAIL) == "caught on purpose\n"

    def interrupt() -> None:
        deadline = time.monotonic() + 600
        while not all((tmp_path / f"running-{rank}").exists() for rank in range(2)) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(os.getpgid(int(pid)), signal.SIGINT)  # what the button does

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="KeyboardInterrupt|SystemExit"):
        kernel("train(Model(slow=True), epochs=1000)")
    thread.join()
    ranks = [int((tmp_path / f"running-{rank}").read_text()) for rank in range(2)]
    assert not any(map(alive, ranks))

    assert kernel(TRAIN).split() == ["2", "True", pid]
