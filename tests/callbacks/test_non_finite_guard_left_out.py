"""A batch that `NonFiniteGuard` leaves out is in no buffer, metric or mean of the epoch, in any process."""

from __future__ import annotations

import copy

import pytest
import torch
import torchmetrics
from ranks import run_ranks
from support import make_trainer
from torch import nn
from torch.utils.data import DataLoader

import fulmen as pl
from fulmen.callbacks import EMAWeightAveraging, NonFiniteGuard

pytestmark = pytest.mark.filterwarnings("ignore:In epoch")


class Net(pl.LightningModule):
    """Batch norm, spectral norm, a buffer that is replaced, one that is not saved, metrics, and sums of every kind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        first = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6))
        self.net = nn.Sequential(first, nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))
        self.register_buffer("center", torch.zeros(4))
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.mean, self.all = (
            torchmetrics.MeanMetric(nan_strategy="disable"),
            torchmetrics.CatMetric(nan_strategy="disable"),
        )

    def training_step(self, batch, batch_idx):
        self.center = 0.9 * self.center + 0.1 * batch.mean(0)
        self.seen += 1
        loss = self.net(batch - self.center).pow(2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("sum", loss.item(), on_step=False, on_epoch=True, reduce_fx="sum")
        self.mean(loss.detach())
        self.all.update(loss.detach())
        self.log("metric", self.mean, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self):
        self.log("count", float(len(self.all.compute())))
        self.all.reset()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def batches(bad=(), count=8):
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(4, 4, generator=generator) for _ in range(count)]
    for number in bad:
        data[number][1, 2] = float("nan")
    return data


def fit(data, guard=None, **kwargs):
    net = Net()
    trainer = make_trainer(callbacks=[guard] if guard else [], **{"max_epochs": 2, **kwargs})
    trainer.fit(net, DataLoader(data, batch_size=None))
    return net, trainer


def alike(one, other):
    for (name, a), b in zip([*one.named_parameters(), *one.named_buffers()], [*other.parameters(), *other.buffers()]):
        assert torch.equal(a, b), name


def without(data, left_out):
    return [batch for number, batch in enumerate(data) if number not in left_out]


@pytest.mark.parametrize(("bad", "window"), [((4,), 1), ((0, 7), 1), ((3, 4), 1), ((5,), 2), ((0,), 4)])
def test_everything_is_as_without_those_batches(bad, window):
    """With accumulation, those of the window whose step is skipped."""
    left_out = {number for number in range(8) if any(number // window == wrong // window for wrong in bad)}
    guard = NonFiniteGuard("skip", max_in_a_row=9)
    ours, trainer = fit(batches(bad), guard, accumulate_grad_batches=window)
    theirs, plain = fit(without(batches(bad), left_out), accumulate_grad_batches=window)
    assert len(guard.quarantine) == 2 * len({wrong // window for wrong in bad})
    alike(ours, theirs)
    assert ours.center is dict(ours.named_buffers())["center"]
    for name in ("loss_epoch", "largest", "sum", "metric", "count"):
        assert trainer.callback_metrics[name] == plain.callback_metrics[name], name


def test_a_rollback_takes_out_all_that_it_undoes():
    """Read every third step: the batches 3, 4 and 5 are undone, also in the second epoch, which begins in between."""
    guard = NonFiniteGuard("rollback", every_n_steps=3)
    ours, trainer = fit(batches((4,), 6), guard)
    theirs, plain = fit(without(batches((4,), 6), {3, 4, 5}))
    assert len(guard.quarantine) == 2
    alike(ours, theirs)
    for name in ("loss_epoch", "largest", "sum", "metric", "count"):
        assert trainer.callback_metrics[name] == plain.callback_metrics[name], name


def test_a_rollback_to_before_the_epoch_has_nothing_of_that_before():
    guard = NonFiniteGuard("rollback", every_n_steps=50)

    class Second(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch * float("nan") if self.current_epoch == 1 else batch, batch_idx)

    net = Second()
    trainer = make_trainer(callbacks=[guard], max_epochs=2)
    trainer.fit(net, DataLoader(batches(), batch_size=None))
    theirs, _ = fit(batches(), max_epochs=1)
    alike(net, theirs)
    assert "loss_epoch" in trainer.callback_metrics  # of the first epoch: the second one has nothing to show
    assert trainer.callback_metrics["loss_epoch"].isfinite()


def test_an_average_with_buffers_and_a_loss_scaler():
    for precision, callbacks in (("32-true", [EMAWeightAveraging(decay=0.5)]), ("16-mixed", [])):
        net = Net()
        trainer = make_trainer(callbacks=[NonFiniteGuard("skip"), *callbacks], max_epochs=2, precision=precision)
        trainer.fit(net, DataLoader(batches((2,)), batch_size=None))
        assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
        assert trainer.callback_metrics["loss_epoch"].isfinite()


class Shifted(Net):
    """The loss of one rank is infinite in one batch, its gradients are not."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        wrong = self.trainer.global_rank == 1 and batch_idx == 2 and self.current_epoch == 0
        return loss + torch.tensor(float("inf")) if wrong else loss


def several():
    return {policy: one_of_several(policy, torch.distributed.get_rank()) for policy in ("skip", "rollback")}


def one_of_several(policy, rank):
    guard, data = NonFiniteGuard(policy, every_n_steps=2), batches(count=12)
    made = make_trainer(devices=2, strategy="ddp", max_epochs=2, callbacks=[guard], use_distributed_sampler=False)
    net = Shifted()
    mine = data[rank::2][: 6 - rank]  # the other rank has fewer batches
    made.fit(net, DataLoader(mine, batch_size=None), DataLoader(batches(count=2), batch_size=None))
    weights = [p.detach() for p in net.parameters()]
    return [str(fault) for fault in guard.quarantine], weights, dict(made.callback_metrics)


def test_all_processes_leave_out_what_one_has_found():
    first, second = run_ranks(2, several)
    for policy, (said, weights, metrics) in first.items():
        other_said, other_weights, other_metrics = second[policy]
        (fault,) = said
        assert said == other_said
        assert fault == "epoch 0, batch 2, step 2, rank 1: the loss is not finite"
        assert all(torch.equal(a, b) for a, b in zip(weights, other_weights))
        assert metrics["loss_epoch"].isfinite() and metrics["loss_epoch"] == other_metrics["loss_epoch"]


class Manual(Net):
    """Logs after the step that is skipped."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, loss = self.optimizers(), self.net(batch).pow(2).mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.mean(loss.detach())
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.log("metric", self.mean, on_step=False, on_epoch=True)

    def on_train_epoch_end(self):
        pass


def test_what_a_manual_step_logs_afterwards():
    found = []
    for data, callbacks in ((batches((4,)), [NonFiniteGuard("skip")]), (without(batches(), {4}), [])):
        net, trainer = Manual(), make_trainer(callbacks=callbacks, max_epochs=2)
        trainer.fit(net, DataLoader(data, batch_size=None))
        found.append((net, dict(trainer.callback_metrics)))
    alike(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_capturing_draws_no_random_numbers_and_changes_nothing():
    plain, _ = fit(batches())
    for policy in ("skip", "rollback"):
        guarded, _ = fit(batches(), NonFiniteGuard(policy, every_n_steps=3))
        alike(plain, copy.deepcopy(guarded))
