"""Numbers of several processes: what one process would report, with nothing to switch on."""

from __future__ import annotations

import itertools
import os
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torchmetrics
from ranks import run_ranks
from support import Regression, make_trainer
from torch.utils.data import DataLoader, IterableDataset

import fulmen as pl

DOUBLE = {"rtol": 1e-12, "atol": 1e-12}


def data(size):
    return (torch.arange(size).double() + 0.1) ** 1.5


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    return int(os.environ.get("RANK", 0))


def trainer_of_all(**kwargs):
    return make_trainer(strategy="ddp" if world() > 1 else "auto", devices=world(), **kwargs)


class Judge(pl.LightningModule):
    """Logs one thing in every way there is."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.mean = torchmetrics.MeanMetric().set_dtype(torch.float64)
        self.all = torchmetrics.CatMetric().set_dtype(torch.float64)
        self.spread = torchmetrics.PearsonCorrCoef().set_dtype(torch.float64)
        self.first = torchmetrics.MeanMetric().set_dtype(torch.float64)
        self.double_mean = self.first + self.first

    def evaluation_step(self, batch, batch_idx, dataloader_idx=0):
        value = batch.mean()
        self.log("mean", value)
        for name in ("sum", "min", "max"):
            self.log(name, value, reduce_fx=name)
        self.log("samples", len(batch), reduce_fx="sum")
        self.log("number", float(value), batch_size=1)
        self.log("asked", value, sync_dist=True)
        self.mean.update(batch)
        self.log("metric", self.mean)
        self.first.update(batch)
        self.log("composed", self.double_mean)
        self.all.update(batch)
        self.spread.update(batch, batch**2)
        return batch * 2

    validation_step = test_step = evaluation_step

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return batch * 2


def judge(cases):
    """What `validate`, `test` and `predict` return here, for each (size, batch size)."""
    results = []
    for size, batch_size in cases:
        trainer, module, loader = trainer_of_all(), Judge(), DataLoader(data(size), batch_size)
        validated = trainer.validate(module, loader, verbose=False)
        tested = trainer.test(module, [loader, DataLoader(data(3), 2)], verbose=False)
        results.append((validated, tested, trainer.predict(module, loader)))
    return results


GRID = [*itertools.product((1, 2, 5, 21, 50), (1, 2, 3, 8)), (21, 7), (34, 5)]


@pytest.fixture(scope="module")
def alone():
    return judge(GRID)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_evaluation_and_prediction_are_those_of_one_process(ranks, alone):
    cases = GRID[ranks % 2 :: ranks]
    expected = [result for case, result in zip(GRID, alone) if case in cases]
    for of_rank, results in enumerate(run_ranks(ranks, judge, cases)):
        for case, one, several in zip(cases, expected, results):
            torch.testing.assert_close(several[:2], one[:2], **DOUBLE, msg=lambda m, c=case: f"{c}: {m}")
            own = one[2] if of_rank == 0 else one[2][of_rank::ranks]
            torch.testing.assert_close(several[2], own, rtol=0, atol=0)


def test_the_example_that_padding_gets_wrong(two_ranks):
    assert {round(numbers["mean"], 12) for numbers, _, _ in two_ranks} == {10.0}


def twenty_one():
    return trainer_of_all().validate(Judge(), DataLoader(torch.arange(21).double(), 1), verbose=False)[0]


def all_three():
    return twenty_one(), exchanges(), learn()


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(2, all_three)


# ---------------------------------------------------------------------- all that may differ between ranks


class Particular(Judge):
    """Logs what only some ranks have, and what each says for itself."""

    def __init__(self, group=None):
        super().__init__()
        self.group = group
        self.in_hook = {}

    def validation_step(self, batch, batch_idx):
        if rank() == 1:
            self.log("one", batch.mean())
            self.all.update(batch)
        if rank() == 0 and batch_idx == 0:
            self.log("zero only", 7.0, rank_zero_only=True)
            self.mean.update(batch)
            self.log("zero metric", self.mean, rank_zero_only=True)
        if rank() == 1:
            self.first.update(batch)
            self.log("metric of one", self.first)
        self.log("pair", float(rank()), sync_dist=True, sync_dist_group=self.group)
        self.log("step", float(rank()), on_step=True, on_epoch=False, sync_dist=True)
        self.log("largest", float(rank()), on_step=True, on_epoch=False, sync_dist=True, reduce_fx="max")
        self.log("own", float(rank()), on_step=True, on_epoch=False)

    def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
        names = ("step", "largest", "own")
        self.in_hook[batch_idx] = {n: float(self.trainer.logged_metrics.get(n, -1)) for n in names}

    def on_validation_epoch_end(self):
        self.in_hook["epoch"] = float(self.trainer.callback_metrics["one"])
        self.log("hook", float(rank()))
        self.log("hook of all", float(rank()), sync_dist=True)
        if rank() == 2:
            self.log("hook of two", 5.0, sync_dist=True)


def particular():
    group = dist.new_group([0, 1])
    module, trainer = Particular(group), trainer_of_all()
    (numbers,) = trainer.validate(module, DataLoader(data(10), 1), verbose=False)
    return numbers, module.in_hook


@pytest.fixture(scope="module")
def particulars():
    return run_ranks(3, particular)


def test_a_name_of_one_rank_is_known_to_all_and_nobody_waits(particulars):
    for numbers, in_hook in particulars:
        of_rank_one = data(10)[1::3].mean().item()
        assert numbers["one"] == pytest.approx(of_rank_one, abs=1e-12)
        assert numbers["metric of one"] == pytest.approx(of_rank_one, abs=1e-6)  # it computes in float32
        assert in_hook["epoch"] == numbers["one"]
        assert numbers["hook of two"] == 5.0


def test_what_is_for_rank_zero_only_stays_there(particulars):
    assert [numbers.get("zero only") for numbers, _ in particulars] == [7.0, None, None]
    assert [numbers.get("zero metric") for numbers, _ in particulars] == [pytest.approx(data(1).item()), None, None]


def test_a_group_reduces_among_its_members(particulars):
    # 4 batches on rank 0, 3 on rank 1
    assert [numbers["pair"] for numbers, _ in particulars] == [pytest.approx(3 / 7), pytest.approx(3 / 7), 2.0]


def test_what_the_epoch_hook_logs_is_reduced_if_asked_for(particulars):
    assert [numbers["hook"] for numbers, _ in particulars] == [0.0, 1.0, 2.0]
    assert [numbers["hook of all"] for numbers, _ in particulars] == [1.0, 1.0, 1.0]


def test_values_of_a_step_are_reduced_over_those_that_have_the_batch(particulars):
    for of_rank, (_, in_hook) in enumerate(particulars):
        for batch_idx in range(3):
            assert in_hook[batch_idx] == {"step": 1.0, "largest": 2.0, "own": float(of_rank)}
    assert particulars[0][1][3] == {"step": 0.0, "largest": 0.0, "own": 0.0}
    assert 3 not in particulars[1][1]


# ---------------------------------------------------------------------- exchanges


COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "barrier", "gather", "broadcast_object_list")


def counted(act):
    """How often each collective of torch is called meanwhile, by the time the loops are at work."""
    calls, originals = Counter(), {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name):
        def call(*args, **kwargs):
            calls[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        act(calls)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return calls


class Counting(Regression):
    def __init__(self, calls, asking=False):
        super().__init__()
        self.calls, self.asking = calls, asking
        self.at_batches, self.at_evaluation = [], []

    def training_step(self, batch, batch_idx):
        self.log("metric", batch[0].mean(), on_epoch=True)
        self.log("a", 1.0, sync_dist=self.asking)
        self.log("b", batch[0].mean(), sync_dist=self.asking)
        self.log("c", 1.0, sync_dist=self.asking, reduce_fx="max")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        for name in "abcdefgh":
            self.log(f"val_{name}", batch[0].mean())
        self.at_evaluation.append(sum(self.calls.values()))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.at_batches.append(sum(self.calls.values()))

    def on_validation_end(self):
        self.at_evaluation.append(sum(self.calls.values()))


def exchanges():
    from support import make_loader

    seen = {}
    for asking in (False, True):

        def act(calls, asking=asking):
            module = Counting(calls, asking)
            trainer_of_all().fit(module, make_loader(32, 4), make_loader(12, 4))
            seen[asking] = module.at_batches, module.at_evaluation

        counted(act)
    return seen


def test_batches_exchange_nothing_but_gradients_and_what_was_asked_for(two_ranks):
    for _, seen, _ in two_ranks:
        for asking, per_batch in ((False, 0), (True, 2)):  # one sum for two names, one maximum
            steps = [later - earlier for earlier, later in itertools.pairwise(seen[asking][0])]
            assert steps == [per_batch] * 3
        evaluation = [later - earlier for earlier, later in itertools.pairwise(seen[False][1])]
        assert evaluation == [0] * (len(evaluation) - 1) + [1]


# ---------------------------------------------------------------------- training


class Learning(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.metric = torchmetrics.MeanMetric().set_dtype(torch.float64)

    def training_step(self, batch, batch_idx):
        self.log("loss", batch.mean(), on_step=True, on_epoch=True)
        self.log("total", batch.sum(), reduce_fx="sum", on_step=False, on_epoch=True)
        self.metric.update(batch)
        self.log("metric", self.metric, on_step=False, on_epoch=True)
        return self.weight * batch.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Epochs(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def learn():
    epochs = Epochs()
    trainer_of_all(max_epochs=2, callbacks=epochs).fit(Learning(), DataLoader(data(24), 3))
    return epochs.seen


def test_epoch_values_of_training_are_over_all_processes_too(two_ranks):
    for _, _, seen in two_ranks:
        for epoch in seen:
            assert epoch["loss_epoch"] == pytest.approx(data(24).mean().item(), abs=1e-12)
            assert epoch["total"] == pytest.approx(data(24).sum().item(), abs=1e-9)
            assert epoch["metric"] == pytest.approx(data(24).mean().item(), abs=1e-6)


# ---------------------------------------------------------------------- steps that need all processes


class Together(pl.strategies.DDPStrategy):
    """Stands for strategies that gather weights in each forward pass."""

    forward_is_collective = True


class Exchanging(Judge):
    def evaluation_step(self, batch, batch_idx, dataloader_idx=0):
        dist.all_reduce(torch.ones(()))
        super().evaluation_step(batch, batch_idx, dataloader_idx)

    validation_step = evaluation_step


def together():
    found = []
    for size in (5, 1):
        module, trainer = Exchanging(), make_trainer(strategy=Together(), devices=2)
        found += trainer.validate(module, DataLoader(data(size), 1), verbose=False)
    return found


def test_steps_that_need_all_processes_get_them_and_numbers_stay_exact():
    expected = [make_trainer().validate(Judge(), DataLoader(data(size), 1), verbose=False)[0] for size in (5, 1)]
    for numbers in run_ranks(2, together):
        torch.testing.assert_close(numbers, expected, **DOUBLE)


# ---------------------------------------------------------------------- prediction


class Stream(IterableDataset):
    def __iter__(self):
        yield from data(7)


class Writer(pl.callbacks.BasePredictionWriter):
    def __init__(self, folder):
        super().__init__("batch_and_epoch")
        self.folder = folder

    def write_on_batch_end(self, trainer, module, prediction, indices, batch, batch_idx, dataloader_idx):
        torch.save((indices, prediction), f"{self.folder}/{trainer.global_rank}-{batch_idx}")

    def write_on_epoch_end(self, trainer, module, predictions, batch_indices):
        torch.save((batch_indices, predictions), f"{self.folder}/epoch-{trainer.global_rank}")


def predictions(folder):
    module, loaders = Judge(), [DataLoader(data(7), 2), DataLoader(data(3), 1)]
    written = trainer_of_all(callbacks=Writer(folder)).predict(module, loaders[0], return_predictions=False)
    streamed = trainer_of_all().predict(module, DataLoader(Stream(), 2))
    return written, trainer_of_all().predict(module, loaders), streamed


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    return run_ranks(2, predictions, str(folder)), folder


def test_predictions_are_complete_and_in_order(predicted):
    results = predicted[0]
    expected = [[data(size)[i : i + step] * 2 for i in range(0, size, step)] for size, step in ((7, 2), (3, 1))]
    assert [written for written, _, _ in results] == [None, None]
    torch.testing.assert_close(results[0][1], expected, rtol=0, atol=0)
    torch.testing.assert_close(results[1][1], [each[1::2] for each in expected], rtol=0, atol=0)
    torch.testing.assert_close(results[0][2], expected[0], rtol=0, atol=0)


def test_writers_write_every_sample_once(predicted):
    found = {}
    for path in predicted[1].iterdir():
        indices, prediction = torch.load(path)
        if "epoch" in path.name:
            assert [i for loader in indices for batch in loader for i in batch] == [[0, 1, 4, 5], [2, 3, 6]][
                int(path.name[-1])
            ]
            continue
        for index, value in zip(indices, prediction):
            assert index not in found
            found[index] = value.item()
    assert found == {index: value.item() * 2 for index, value in enumerate(data(7))}


def test_predictions_of_started_processes_come_back():
    trainer = make_trainer(strategy="ddp_fork", devices=2)
    found = trainer.predict(Judge(), DataLoader(data(5), 2))
    torch.testing.assert_close(found, [data(5)[i : i + 2] * 2 for i in (0, 2, 4)], rtol=0, atol=0)
    (numbers,) = trainer.validate(Judge(), DataLoader(data(5), 2), verbose=False)
    assert numbers["mean"] == pytest.approx(data(5).mean().item(), abs=1e-12)
