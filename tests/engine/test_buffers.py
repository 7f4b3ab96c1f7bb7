"""Buffers of several processes: validation, averages, checkpoints and resumed runs have those of rank 0."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from support import make_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fulmen as pl
from fulmen.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging

DOUBLE = {"rtol": 1e-12, "atol": 1e-12}
BATCHES = 4  # in training, on each process


class Net(pl.LightningModule):
    """With batch norm, and beside it what the kind says."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(4)
        self.kind = kind
        self.automatic_optimization = kind != "manual"
        self.net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).double()
        self.register_buffer("center", torch.zeros(1, dtype=torch.float64) if kind != "first None" else None)
        if kind in ("counter", "odd types"):
            self.register_buffer("seen", torch.zeros((), dtype=torch.uint8 if kind == "odd types" else torch.int64))
        if kind == "norm alone":
            del self.center

    def squares(self, batch):
        return (self.net(batch[0]) + getattr(self, "center", 0.0) - batch[1]) ** 2

    def training_step(self, batch, batch_idx):
        if self.kind == "frozen later" and self.trainer.global_step == 2:
            self.net[1].eval()  # from here on, its statistics are read
        if self.kind in ("counter", "odd types"):
            self.seen += len(batch[0])
        if self.kind == "in place":
            self.center += batch[0].mean() / 8
        elif self.kind != "norm alone":
            self.center = (0.0 if self.center is None else self.center * 0.9) + batch[0].mean().reshape(1) * 0.1
        loss = self.squares(batch).mean()
        if self.kind != "manual":
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def validation_step(self, batch, batch_idx):
        modes = {part.training for part in self.trainer.model.modules()}  # of the wrapper too
        assert modes == {False}
        self.log("val", self.squares(batch).mean())
        self.log("center", getattr(self, "center", torch.zeros(1)).mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


KINDS = ("norm alone", "counter", "odd types", "in place", "assigned", "manual", "frozen later")
AVERAGES = {
    "none": list,
    "ema": lambda: [EMAWeightAveraging(decay=0.5)],
    "ema without buffers": lambda: [EMAWeightAveraging(decay=0.5, use_buffers=False)],
    "equally": lambda: [WeightAveraging()],
    "swa": lambda: [StochasticWeightAveraging(0.02, swa_epoch_start=2)],
}


def loaders(world):
    """Eleven samples to validate with, which no number of processes divides."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4 * BATCHES * world, 3, generator=generator, dtype=torch.float64) * 3
    y = torch.randn(len(x), 1, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, y), 4), DataLoader(TensorDataset(x[:11], y[:11]), 4)


class Validations(pl.Callback):
    def __init__(self):
        self.values = []

    def on_validation_end(self, trainer, pl_module):
        self.values.append({name: float(trainer.callback_metrics[name]) for name in ("val", "center")})


def fitted(strategy, world, kind, average, folder, ckpt_path=None, **arguments):
    """A run of two epochs; with a file after each step. What its validations said, and the module."""
    model, seen = Net(kind), Validations()
    files = [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)] if folder else []
    trainer = make_trainer(
        strategy=strategy, devices=world, max_epochs=2, callbacks=[*AVERAGES[average](), seen, *files],
        num_sanity_val_steps=0, **{"enable_checkpointing": bool(folder), "val_check_interval": 3, **arguments},
    )  # fmt: skip
    train, val = loaders(world)
    trainer.fit(model, train, val, ckpt_path=ckpt_path)
    return seen.values, model, trainer


def alone(model, world):
    """What one process says of the weights and buffers of rank 0."""
    batch = loaders(world)[1].dataset.tensors
    model.eval()
    with torch.no_grad():
        return float(model.squares(batch).mean())


def trial(kind, average, folder, steps, options):
    """On one rank. Validations of the run and of those that are resumed, and what one process would say in the end."""
    world = int(os.environ["WORLD_SIZE"])
    strategy = lambda: pl.strategies.DDPStrategy(**options.get("strategy", {}))  # noqa: E731
    trainer_options = options.get("trainer", {"val_check_interval": BATCHES if average == "swa" else 3})
    values, model, trainer = fitted(strategy(), world, kind, average, folder, **trainer_options)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tested = trainer.test(model, loaders(world)[1], verbose=False)[0]["val"]
    resumed = []
    for step in steps:
        path = Path(folder) / f"step={step}.ckpt"
        later, other, _ = fitted(strategy(), world, kind, average, None, path, **trainer_options)
        resumed.append((later, other.state_dict()))
    return values, whole, resumed, alone(model, world), tested


def trials(cases):
    return [trial(*case) for case in cases]


def check(case, results):
    _, average, _, _, options = case
    # Of three numbers, the sum depends on the order; that of `all_reduce` changes with the buckets, which torch's wrapper
    # divides anew after the first step of a process.
    near = 0 if len(results) == 2 else 1e-12
    for values, whole, resumed, expected, tested in results:
        assert values == results[0][0], case  # all processes know the same
        assert tested == pytest.approx(expected, rel=1e-12), case
        if options.get("trainer", {}).get("val_check_interval") == BATCHES or average == "swa":
            assert values[-1]["val"] == pytest.approx(results[0][3], rel=1e-12), case
        for name, tensor in whole.items():
            torch.testing.assert_close(tensor, results[0][1][name], rtol=0, atol=0, msg=f"{case}: {name}")
        for later, state in resumed:
            assert later, case
            for found, value in zip(later, values[-len(later) :]):
                assert found == pytest.approx(value, rel=near, abs=0), case
            for name, tensor in state.items():
                torch.testing.assert_close(tensor, whole[name], rtol=near, atol=near, msg=f"{case}: {name}, resumed")


EVERY_EPOCH = {"trainer": {"val_check_interval": BATCHES}}


def test_validation_is_with_what_a_checkpoint_holds(tmp_path):
    kinds = [
        ("counter", "none", (3,), EVERY_EPOCH),
        ("odd types", "ema", (5,), EVERY_EPOCH),
        ("first None", "none", (), EVERY_EPOCH),  # torch could not load it
        ("in place", "ema without buffers", (2,), {}),
        ("manual", "equally", (5,), EVERY_EPOCH),
        ("frozen later", "none", (1,), {}),
        ("in place", "none", (2,), {"trainer": {"accumulate_grad_batches": 3, "val_check_interval": BATCHES}}),
        ("counter", "ema", (6,), {"strategy": {"broadcast_buffers": False}, **EVERY_EPOCH}),
    ]
    cases = [(kind, how, str(tmp_path / str(i)), *more) for i, (kind, how, *more) in enumerate(kinds)]
    results = run_ranks(2, trials, cases)
    for index, case in enumerate(cases):
        check(case, [of_rank[index] for of_rank in results])


def all_options():
    yield from ({"strategy": options} for options in (
        {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": False},
        {"broadcast_buffers": True}, {"bucket_cap_mb": 1, "init_sync": True},
    ))  # fmt: skip
    yield {"trainer": {"sync_batchnorm": True, "val_check_interval": BATCHES}}
    yield {"trainer": {"accumulate_grad_batches": 2, "val_check_interval": 1}, "steps": (1, 3)}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("average", AVERAGES)
def test_every_kind_of_buffer_with_every_average(ranks, average, tmp_path):
    options = [*({} for _ in KINDS), *all_options()]
    kinds = [*KINDS, *itertools.islice(itertools.cycle(("counter", "in place")), len(options) - len(KINDS))]
    cases = [
        (kind, average, str(tmp_path / str(index)), option.get("steps", ((1, 4), (3, 6))[index % 2]), option)
        for index, (kind, option) in enumerate(zip(kinds, options))
        if not (average == "swa" and kind == "frozen later")  # it measures no statistics then
    ]
    results = run_ranks(ranks, trials, cases)
    for index, case in enumerate(cases):
        check(case, [of_rank[index] for of_rank in results])
