"""Going on from a checkpoint: where in the story, and with which bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import Regression, Storyteller, make_loader, make_trainer
from torch.utils.data import DataLoader, IterableDataset

from fulmen.callbacks import ModelCheckpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*validation_step", "ignore:.*not empty", "ignore:.*states of callbacks"
)


class Story(Storyteller):
    """Also tells the number of the epoch: "e0 t0 t1 v |"."""

    def on_train_epoch_start(self):
        self.told.append(f"e{self.current_epoch}")


class Unsized(IterableDataset):
    def __iter__(self):
        return iter([(torch.ones(4), torch.ones(1))] * 16)


LOADERS = {"sized": lambda: make_loader(16), "unsized": lambda: DataLoader(Unsized(), batch_size=4)}

# what is saved when, in two epochs of 4 batches -> file, what happens after it
PLACES = [
    pytest.param({"every_n_epochs": 1}, {}, "epoch=0-step=4", "s e1 t0 t1 t2 t3 v |", id="end of an epoch"),
    pytest.param(
        {"monitor": "val_loss"}, {"val_check_interval": 2}, "epoch=0-step=2", "t2 t3 v | e1 t0 t1 v t2 t3 v |",
        id="validation inside an epoch",
    ),
    pytest.param(
        {"monitor": "val_loss"}, {"val_check_interval": 2}, "epoch=0-step=4", "| e1 t0 t1 v t2 t3 v |",
        id="validation after the last batch",
    ),
    pytest.param({"every_n_train_steps": 3}, {}, "epoch=0-step=3", "t3 v | e1 t0 t1 t2 t3 v |", id="a batch"),
    pytest.param(
        {"every_n_train_steps": 2}, {"val_check_interval": 2, "limit_val_batches": 0}, "epoch=0-step=4",
        "| e1 t0 t1 t2 t3 |", id="the last batch",
    ),
]  # fmt: skip


CASES = [pytest.param(kind, *place.values, id=f"{place.id}, {kind}") for place in PLACES for kind in LOADERS]


@pytest.mark.parametrize(("kind", "trigger", "arguments", "name", "story"), CASES)
def test_where_a_resumed_run_goes_on(tmp_path, kind, trigger, arguments, name, story):
    def run(path: Path | None, epochs: int, **more: Any) -> Story:
        model = Story()
        trainer = make_trainer(max_epochs=epochs, num_sanity_val_steps=1, **arguments, **more)
        trainer.fit(model, LOADERS[kind](), make_loader(4), ckpt_path=path)
        assert trainer.current_epoch == epochs
        assert trainer.global_step == 4 * epochs
        return model

    saver = ModelCheckpoint(tmp_path, save_top_k=-1, **trigger)
    run(None, 1, callbacks=[saver], enable_checkpointing=True)
    assert run(tmp_path / f"{name}.ckpt", 2).story == story


class Shuffled(Regression):
    """Order of samples, dropout, momentum and a schedule over the whole run: all must go on where they were."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@pytest.mark.parametrize("validates", [True, False])
def test_a_loader_that_was_asked_for_its_length_goes_on_with_the_same_samples(tmp_path, validates):
    def run(path: Path | None = None, **arguments: Any) -> Shuffled:
        torch.manual_seed(5)
        model = Shuffled()
        loaders = [make_loader(20, shuffle=True), make_loader(8) if validates else None]
        trainer = make_trainer(max_epochs=4, num_sanity_val_steps=2, **arguments)
        trainer.fit(model, *loaders, ckpt_path=path)
        return model

    saver = ModelCheckpoint(tmp_path, save_top_k=-1)
    whole = run(callbacks=[saver], enable_checkpointing=True)
    resumed = run(tmp_path / "epoch=1-step=10.ckpt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b) and not a.isnan().any()


def test_a_run_that_was_over_does_nothing_and_one_that_was_longer_is_refused(tmp_path):
    from fulmen.utilities.errors import MisconfigurationException

    trainer = make_trainer(max_epochs=2)
    trainer.fit(Regression(), make_loader())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    model = Story()
    trainer = make_trainer(max_epochs=2)
    trainer.fit(model, make_loader(), ckpt_path=tmp_path / "two.ckpt")
    assert model.story == "" and (trainer.current_epoch, trainer.global_step) == (2, 6)
    with pytest.raises(MisconfigurationException, match="max_epochs"):
        make_trainer(max_epochs=1).fit(Story(), make_loader(), ckpt_path=tmp_path / "two.ckpt")
