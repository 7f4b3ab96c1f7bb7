"""The search for a learning rate on two real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from searches import Searched, random_states
from support import Regression, make_loader, make_trainer

from fulmen.callbacks import LearningRateFinder
from fulmen.tuner import Tuner


class SearchesAtEpochs(LearningRateFinder):
    def on_fit_start(self, *args) -> None:
        pass

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.lr_find(trainer, pl_module)


def search_and_train() -> list:
    """Of one rank: what `Tuner` finds, and what training is like with searches inside and without."""
    torch.manual_seed(3)
    model = Regression()
    trainer = make_trainer(devices=2, strategy="ddp", limit_val_batches=0)
    arguments = {"num_training": 30, "early_stop_threshold": None}
    curve = Tuner(trainer).lr_find(model, make_loader(24, 4), **arguments)
    found = [curve.results["lr"], curve.results["loss"], model.hparams.lr]
    ends = []
    for search in (True, False):
        torch.manual_seed(5)
        # Uneven: one rank has a batch more.
        module = Searched(batch_size=4, samples=20)
        finder = SearchesAtEpochs(num_training_steps=7, update_attr=False)
        callbacks = [finder] if search else []
        trainer = make_trainer(devices=2, strategy="ddp", max_epochs=2, callbacks=callbacks, limit_val_batches=2)
        trainer.fit(module)
        weights = {name: value.tolist() for name, value in module.state_dict().items()}
        ends.append([weights, random_states(), module.seen[-4:]])
        assert not search or finder.optimal_lr is not None
    return [found, *ends]


def test_two_processes_find_what_one_does_with_the_whole_batch():
    (first, searched, plain), (second, searched_there, plain_there) = run_ranks(2, search_and_train)
    assert first == second and searched == plain and searched_there == plain_there
    torch.manual_seed(3)
    model = Regression()
    loader = make_loader(24, 8)
    # Two ranks with batches of 4 see the samples of one with batches of 8, dealt out one by one.
    order = [start + offset for start in range(0, 24, 8) for offset in (0, 2, 4, 6, 1, 3, 5, 7)]
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(loader.dataset, order), batch_size=8)
    curve = Tuner(make_trainer()).lr_find(model, loader, num_training=30, early_stop_threshold=None)
    assert first[0] == curve.results["lr"]
    assert first[1] == pytest.approx(curve.results["loss"], rel=1e-5)
    assert first[2] == model.hparams.lr


def find_in_other_processes(start: str) -> float:
    model = Regression()
    trainer = make_trainer(devices=2, strategy=start)
    curve = Tuner(trainer).lr_find(model, make_loader(24), num_training=30, early_stop_threshold=None)
    assert curve is not None and model.hparams.lr == curve.suggestion()
    assert trainer.callbacks == []
    return model.hparams.lr


@pytest.mark.slow
@pytest.mark.parametrize("start", ["ddp_spawn", "ddp_fork"])
def test_what_other_processes_found_is_set_here(start):
    lines = ["import sys", "sys.path[:0] = ['tests', 'tests/tuner']", "import test_ranks"]
    lines += ["if __name__ == '__main__':", f"    assert test_ranks.find_in_other_processes({start!r}) != 0.1"]
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
