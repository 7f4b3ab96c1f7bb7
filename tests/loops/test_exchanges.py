"""Evaluation in which the user's code exchanges something, with different numbers of batches: it works, and is exact."""

from __future__ import annotations

import os
from collections import defaultdict, deque

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchmetrics
from ranks import run_ranks
from support import make_trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import fulmen as pl

DOUBLE = {"rtol": 1e-12, "atol": 1e-12}


def data(size):
    return (torch.arange(size).double() + 0.1) ** 1.5


class Stream(IterableDataset):
    def __init__(self, size):
        self.size = size

    def __iter__(self):
        yield from data(self.size)


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    return int(os.environ.get("RANK", 0))


class Scores:
    """A class of the user's that collects."""

    def __init__(self):
        self.rows, self.count = [], 0

    def add(self, row):
        self.rows.append(row)
        self.count += 1


class Meets(pl.LightningModule):
    """Exchanges in every way there is in its steps, and leaves traces in every place."""

    def __init__(self, how="step"):
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.stepwise = torchmetrics.MeanMetric(dist_sync_on_step=True).set_dtype(torch.float64)
        self.cat = torchmetrics.CatMetric(dist_sync_on_step=True).set_dtype(torch.float64)
        self.running = torchmetrics.MeanMetric().set_dtype(torch.float64)
        self.table = torchmetrics.MetricCollection([torchmetrics.MeanMetric(), torchmetrics.SumMetric()])
        self.table.set_dtype(torch.float64)
        self.outputs, self.by_loader, self.queue = [], defaultdict(list), deque(maxlen=100)
        self.array, self.sums, self.scores, self.names = np.zeros(3), {"a": torch.zeros(())}, Scores(), set()
        self.steps = self.rows = 0

    def on_test_start(self):
        torch.manual_seed(7)

    on_validation_start = on_predict_start = on_test_start

    def exchange(self, value):
        if world() > 1:
            dist.all_reduce(torch.ones(3))
            dist.all_gather([torch.empty(()) for _ in range(world())], torch.ones(()))
            if world() == 2:  # as many samples in each process, also in the last batch
                parts = [torch.empty_like(value) for _ in range(2)]
                dist.all_gather(parts, value)
                assert value.tolist() in [part.tolist() for part in parts]
            assert self.all_gather({"a": value.mean(), "b": 1}).keys() == {"a", "b"}
            self.trainer.strategy.barrier()

    def evaluation_step(self, batch, batch_idx, dataloader_idx=0):
        batch = batch.pop() if isinstance(batch, list) else batch  # takes it apart
        if self.how in ("step", "both"):
            self.exchange(batch)
        self.leave_traces(batch, batch_idx, dataloader_idx)
        self.log("mean", batch.mean())
        self.log("sum", batch.sum(), reduce_fx="sum")
        self.log("max", batch.max(), reduce_fx="max")
        if self.how == "metrics":
            self.log("stepwise", self.stepwise(batch), batch_size=len(batch))
            self.log("cat", self.cat(batch).mean(), batch_size=len(batch))
            self.running.update(batch)
            self.running.compute()  # which asks the others
            self.table.update(batch)
            self.log_dict(self.table)
        self.log("asked", batch.mean(), sync_dist=True)
        self.rows += len(batch)
        return batch * 2

    validation_step = test_step = evaluation_step

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        if self.how in ("step", "both"):
            self.exchange(batch)
        return batch * 2

    def leave_traces(self, batch, batch_idx, dataloader_idx):
        self.steps += 1
        self.total += batch.sum()
        self.outputs.append(batch.mean())
        self.by_loader[dataloader_idx].append(batch)
        self.queue.append(batch_idx)
        self.array += 1
        self.sums["a"] += 1
        self.scores.add(batch)
        self.names.add((batch_idx, dataloader_idx))
        self.drawn = torch.rand(())

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        if self.how in ("hooks", "both") and world() > 1:
            self.trainer.strategy.barrier()

    def on_validation_epoch_end(self):
        self.next_draw = float(torch.rand(()))
        if self.how == "metrics":
            self.log("running", self.running.compute())
            self.running.reset()
        self.numbers = [int(self.array[0]), int(self.sums["a"]), self.scores.count, len(self.names)]
        self.lists = [len(self.outputs), len(self.queue), len(self.scores.rows)]
        self.collected = {index: torch.cat(parts).sum().item() for index, parts in self.by_loader.items()}


def loaders_of(sizes):
    return [DataLoader(Stream(-size), 2) if size < 0 else DataLoader(data(size), 2) for size in sizes]


def expected_draw(steps):
    torch.manual_seed(7)
    return float([torch.rand(()) for _ in range(steps + 1)][-1])


# How it exchanges, and how many samples each loader has, in batches of two; less than 0 where it does not say so.
CASES = [
    ("step", (9,)), ("hooks", (9,)), ("both", (9, 5)), ("metrics", (9,)), ("metrics", (13, 2)), ("step", (2, 9)),
    ("step", (-9,)), ("both", (-2, 5)), ("nothing", (9, 2)), ("nothing", (-9, -2)),
]  # fmt: skip


def evaluate(cases):
    found = []
    strategy = "ddp" if world() > 1 else "auto"
    for how, sizes in cases:
        model, trainer = Meets(how), make_trainer(strategy=strategy, devices=world())
        numbers = trainer.validate(model, loaders_of(sizes), verbose=False)
        total, steps = model.total.item(), model.steps
        assert model.numbers == [steps] * 4, (how, sizes, model.numbers)
        lacking = any(abs(size) <= 2 for size in sizes[:1]) and rank() > 0  # a list that was empty has something
        assert model.lists == [steps + lacking] * 3, (how, sizes, model.lists)
        if len(sizes) == 1:  # opening another loader draws too
            assert model.next_draw == expected_draw(steps), (how, sizes)
        predicted = trainer.predict(Meets(how), loaders_of(sizes))
        found.append((numbers, total, steps, model.rows, model.collected, predicted))
    return found


def compare(cases, several, alone):
    for of_rank, results in enumerate(several):
        for case, one, own in zip(cases, alone, results):
            torch.testing.assert_close(own[0], one[0], **DOUBLE, msg=lambda m, c=case: f"{c}: {m}")
            if of_rank == 0:
                torch.testing.assert_close(own[5], one[5], rtol=0, atol=0, msg=lambda m, c=case: f"{c}: {m}")
    for index, case in enumerate(cases):
        # Together, all processes have done what one does.
        total, steps, rows = (sum(results[index][i] for results in several) for i in (1, 2, 3))
        assert total == pytest.approx(alone[index][1], rel=1e-12), case
        assert (steps, rows) == alone[index][2:4], case


# ---------------------------------------------------------------------- a process without any batch


class Collects(pl.LightningModule):
    """Expects in its hook what its steps have left there."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.outputs, self.by_name, self.last, self.hooked, self.seen = [], defaultdict(list), None, [], 0

    def validation_step(self, batch, batch_idx):
        self.outputs.append(batch.mean())
        self.by_name["x"].append(batch)
        self.last = batch
        self.seen += len(batch)
        self.log("plain", batch.mean())
        return batch

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        self.hooked.append(outputs)

    def on_validation_epoch_end(self):
        self.log("hook", self.all_gather(torch.stack(self.outputs).mean()).mean())
        self.log("x", torch.cat(self.by_name["x"]).mean() + self.last.mean() + torch.cat(self.hooked).mean())
        self.log("seen", float(self.seen), sync_dist=True, reduce_fx="sum")
        self.outputs.clear(), self.by_name.clear(), self.hooked.clear()
        self.last = None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        return self.weight * batch.mean().float()


def collect():
    trainer = make_trainer(strategy="ddp" if world() > 1 else "auto", devices=world(), num_sanity_val_steps=2)
    trainer.fit(Collects(), DataLoader(data(8), 2), DataLoader(data(2), 2))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


class Late(Meets):
    """Exchanges where others have nothing, and has not before."""

    def validation_step(self, batch, batch_idx):
        if batch_idx == 2:
            self.all_gather(batch.mean())


class Ragged(Meets):
    """Gathers what differs in size."""

    def validation_step(self, batch, batch_idx):
        self.outputs.append(batch.mean())

    def on_validation_epoch_end(self):
        self.all_gather(torch.stack(self.outputs))


def validate(kind):
    make_trainer(strategy="ddp", devices=2).validate(kind("nothing"), DataLoader(data(5), 1), verbose=False)


def of_two(cases):
    return evaluate(cases), collect()


@pytest.fixture(scope="module")
def alone():
    return evaluate(CASES), collect()


@pytest.mark.parametrize("ranks", [2, 3])
def test_numbers_are_those_of_one_process_and_nothing_else_counts(ranks, alone):
    cases = CASES if ranks == 2 else CASES[:5]
    results = run_ranks(ranks, of_two, cases)
    compare(cases, [found for found, _ in results], alone[0])
    for _, numbers in results:
        assert numbers == pytest.approx(alone[1], rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "messages"),
    [
        (Late, ("`validation_step` wants to exchange something between all processes in batch 2", "rank 1 has none")),
        (Ragged, ("`self.all_gather` received tensors of different shapes", "[(3,)] on rank 0, [(2,)] on rank 1")),
    ],
)
def test_an_exchange_that_cannot_be_is_an_error(kind, messages):
    with pytest.raises(RuntimeError) as caught:
        run_ranks(2, validate, kind)
    assert all(message in str(caught.value) for message in messages)
