"""Resuming inside an epoch: everything that waits for the rest of it is there, whatever the moment."""

from __future__ import annotations

import csv

import pytest
import torch
from ranks import run_ranks
from support import Regression, make_loader, make_trainer
from torch.utils.data import DataLoader, Dataset

from fulmen.callbacks import Callback, EarlyStopping, GradientAccumulationScheduler
from fulmen.loggers import CSVLogger, TensorBoardLogger
from fulmen.utilities.errors import MisconfigurationException

pytestmark = pytest.mark.filterwarnings("ignore")

MOMENTS = (
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_validation_batch_end",
    "on_validation_epoch_end", "on_validation_end", "on_train_epoch_end",
)  # fmt: skip


class At(Callback):
    """Saves at the so-many-th call of a hook."""

    def __init__(self, path, moment, call):
        self.path, self.call, self.calls = path, call, 0
        setattr(self, moment, self.act)

    def act(self, trainer, *_, **__):
        self.calls += 1
        if self.calls == self.call:
            trainer.save_checkpoint(self.path)


class Waiting(Regression):
    """Logs means of the epoch, steps a schedule per step, and has a plateau."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("mean", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}, {"scheduler": plateau, "monitor": "mean"}]


class ByHand(Waiting):
    """Accumulates two batches, with its own hands."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


class Taking(Regression):
    """Two optimizers in turn; the second one rests in some batches."""

    def training_step(self, batch, batch_idx):
        yield self.loss(batch)
        yield None if batch_idx in (0, 5) else self.loss(batch)

    def configure_optimizers(self):
        parts = [self.layer.weight], [self.layer.bias]
        return [torch.optim.Adam(part, lr=0.05) for part in parts]


def end_of(model, trainer):
    states = [optimizer.state_dict() for optimizer in trainer.optimizers]
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    numbers = [value for state in states for part in state["state"].values() for value in part.values()]
    mean = trainer.callback_metrics.get("mean", 0.0)
    return [*model.state_dict().values(), *map(torch.as_tensor, [*numbers, *rates, mean])]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def fit(make, path=None, window=1, callbacks=(), loader=None, **more):
    torch.manual_seed(1)
    model = make()
    if path is not None:
        torch.manual_seed(50)
    window = {"accumulate_grad_batches": window} if make is not ByHand else {}
    trainer = make_trainer(callbacks=list(callbacks), **{"max_epochs": 2, "val_check_interval": 3, **window, **more})
    trainer.fit(model, loader or make_loader(27, 4, shuffle=True), make_loader(8), ckpt_path=path)
    return end_of(model, trainer)


@pytest.mark.parametrize(("make", "window"), [(Waiting, 1), (Waiting, 3), (ByHand, 1), (Taking, 3)])
def test_no_moment_loses_what_was_accumulated(tmp_path, make, window):
    for moment in MOMENTS:
        if make is not Waiting and moment in MOMENTS[1:5]:
            continue  # inside of a step that the user makes, or one of several: what of it was done is not known
        for call in (2, 5) if "epoch" not in moment else (1,):
            path = tmp_path / f"{moment}-{call}.ckpt"
            path.unlink(missing_ok=True)
            whole = fit(make, window=window, callbacks=[At(path, moment, call)])
            if path.exists():
                found = fit(make, path, window=window)
                inside = make is Waiting and moment in MOMENTS[:5]  # its mean counts twice what is repeated
                assert same(found[:-1] if inside else found, whole[:-1] if inside else whole), (moment, call)


def test_a_window_is_stored_only_while_it_is_open(tmp_path):
    for batch, there in ((1, True), (3, False)):
        fit(Regression, window=3, callbacks=[At(tmp_path / "saved.ckpt", "on_train_batch_end", batch)])
        content = torch.load(tmp_path / "saved.ckpt", weights_only=True)
        assert (content["fulmen"]["ranks"][0]["window"] is not None) is there


def test_the_window_of_a_schedule_goes_on(tmp_path):
    def schedule():
        return GradientAccumulationScheduler({0: 2, 1: 4})

    path = tmp_path / "saved.ckpt"
    whole = fit(Waiting, callbacks=[schedule(), At(path, "on_train_batch_end", 7 + 6)])
    assert same(fit(Waiting, path, callbacks=[schedule()]), whole)


def test_a_run_that_was_told_to_stop_early_stops(tmp_path):
    def stopping():
        return EarlyStopping("val_loss", patience=1, min_delta=100.0, check_on_train_epoch_end=False)

    path = tmp_path / "saved.ckpt"
    whole = fit(Waiting, callbacks=[stopping(), At(path, "on_validation_end", 2)], max_epochs=3)
    assert same(fit(Waiting, path, callbacks=[stopping()], max_epochs=3), whole)


# ---------------------------------------------------------------------- loggers


def rows(folder):
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def logged(tmp_path, name, path=None, **more):
    fit(Waiting, path, logger=CSVLogger(tmp_path, name="", version=name), log_every_n_steps=1, **more)
    return rows(tmp_path / name)


def test_rows_of_a_run_are_there_once_after_it_resumed_and_those_of_others_stay(tmp_path):
    path = tmp_path / "saved.ckpt"
    whole = logged(tmp_path, "whole")
    assert logged(tmp_path, "part", callbacks=[At(path, "on_train_batch_end", 9)]) == whole
    assert logged(tmp_path, "part", path) == whole
    logged(tmp_path, "other", max_epochs=1, window=3)
    logger = CSVLogger(tmp_path, name="", version="other")
    with pytest.warns(UserWarning, match="exists and is not empty"):
        fit(Waiting, path, logger=logger, log_every_n_steps=1)
    assert rows(tmp_path / "other") == whole[-len(rows(tmp_path / "other")) :]


def test_events_of_a_run_are_there_once_after_it_resumed(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def points(name, path=None, **more):
        logger = TensorBoardLogger(tmp_path, name="", version=name)
        fit(Waiting, path, logger=logger, log_every_n_steps=1, **more)
        events = EventAccumulator(str(tmp_path / name)).Reload()
        return {tag: [(p.step, p.value) for p in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    path = tmp_path / "saved.ckpt"
    whole = points("whole")
    whole.pop("hp_metric")
    assert points("part", callbacks=[At(path, "on_train_batch_end", 9)]).items() >= whole.items()
    assert points("part", path).items() >= whole.items()
    assert points("part", path).items() >= whole.items()  # also of a run that ended before it saved anything


# ---------------------------------------------------------------------- other data, other processes


class Numbers(Dataset):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.full((4,), float(index)), torch.zeros(1)


def test_other_data_is_refused_with_the_numbers_or_the_next_epoch_begins(tmp_path):
    path = tmp_path / "saved.ckpt"
    fit(Waiting, callbacks=[At(path, "on_train_batch_end", 2)])
    for loader, said in (
        (make_loader(20, 4, shuffle=True), "had 27 samples, and has 20"),
        (make_loader(27, 9, shuffle=True), "batches had 4 samples, and have 9"),
        ([make_loader(27, 4)], None),
    ):
        if said is None:
            continue
        with pytest.raises(MisconfigurationException, match=said):
            fit(Waiting, path, loader=loader)
        with pytest.warns(UserWarning, match=said):
            seen = []

            class Watch(Callback):
                def on_train_batch_start(self, trainer, pl_module, batch, batch_idx, seen=seen):
                    seen.append((trainer.current_epoch, batch_idx))

            fit(Waiting, path, loader=loader, strict_resume=False, callbacks=[Watch()])
        assert seen == [(1, index) for index in range(len(loader))]


class Seen(Regression):
    def __init__(self):
        super().__init__(lr=1e-6)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, [int(index) for index in batch[0][:, 0]]))
        self.log("mean", batch[0][:, 0].square().mean(), on_step=False, on_epoch=True)
        return self.loss(batch)


def go(path, batch_size, resumes, save_after=None, **more):
    """What the processes there are see of one epoch of 32 samples, and the mean that they log."""
    torch.manual_seed(9 if resumes else 8)
    model, saves = Seen(), [At(path + "+", "on_train_batch_end", 1)] if save_after else []
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    more |= {"devices": size, "strategy": "ddp"} if size > 1 else {}
    trainer = make_trainer(callbacks=saves, limit_train_batches=save_after and save_after + 1, **more)
    trainer.fit(model, DataLoader(Numbers(32), batch_size, shuffle=True), ckpt_path=path if resumes else None)
    return [index for _, batch in model.seen for index in batch], float(trainer.callback_metrics["mean"])


def in_the_middle(path):
    with pytest.raises(MisconfigurationException, match="1 processes have consumed 8 samples of its epoch, which"):
        go(path, 3, True)
    return go(path, 4, True, save_after=2)


def test_one_process_then_two_then_one_read_each_sample_of_an_epoch_once(tmp_path):
    path = str(tmp_path / "saved.ckpt")
    alone, _ = go(path, 8, False, save_after=1)
    together = run_ranks(2, in_the_middle, path + "+")
    rest, mean = go(path + "++", 4, True)
    assert len(rest) == 16  # and of what the others saw, one batch more than they saved
    assert sorted(alone[:8] + together[0][0][:4] + together[1][0][:4] + rest) == list(range(32))
    assert mean == pytest.approx(sum(value**2 for value in range(32)) / 32)


@pytest.mark.slow
def test_two_processes_then_four_then_two(tmp_path):
    path = str(tmp_path / "saved.ckpt")
    first = run_ranks(2, go, path, 4, False, 1)
    second = run_ranks(4, go, path + "+", 2, True, 2)
    last = run_ranks(2, go, path + "++", 4, True)
    parts = [seen[:4] for seen, _ in first] + [seen[:2] for seen, _ in second] + [seen for seen, _ in last]
    assert sorted(index for part in parts for index in part) == list(range(32))
    assert all(mean == pytest.approx(sum(value**2 for value in range(32)) / 32) for _, mean in last)
