"""Accumulated gradients are those of one large batch, however the samples were split; and what may be returned as a loss."""

from __future__ import annotations

import math
import random

import pytest
import torch
from support import Regression, make_loader, make_trainer
from torch import nn

import fulmen as pl
from fulmen.callbacks import GradientAccumulationScheduler
from fulmen.plugins import MixedPrecision
from fulmen.utilities.errors import MisconfigurationException

FEATURES = 5


class Batches:
    """Batches of given sizes over the samples of a data set, in order; with a length or without."""

    def __init__(self, x, y, sizes, has_length=True):
        self.parts = list(zip(x.split(sizes), y.split(sizes)))
        if has_length:
            self.__class__ = type("Sized", (Batches,), {"__len__": lambda self: len(self.parts)})

    def __iter__(self):
        return iter(self.parts)


class Net(pl.LightningModule):
    """Remembers the gradients of every step. How its loss is returned is chosen by `form`."""

    def __init__(self, form, dtype):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)
        self.form, self.gradients = form, []

    def losses(self, batch):
        x, y = batch
        return (self.layers(x) - y).square().sum(dim=1)

    def training_step(self, batch, batch_idx):
        losses = self.losses(batch)
        count = len(losses)
        return {
            "mean": lambda: losses.mean(),
            "tuple": lambda: (losses.sum(), count),
            "dict": lambda: {"loss": losses.sum(), "weight": count},
            "tensor": lambda: (losses.sum(), torch.tensor(count)),
        }[self.form]()

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append([p.grad.clone() for p in self.parameters()])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def random_split(rng: random.Random) -> tuple[list[int], int]:
    """Sizes of the batches, and a window that seldom divides their number; batches of the weighted kind may be empty."""
    sizes = [rng.randint(1, 6) for _ in range(rng.randint(1, 11))]
    return sizes, rng.randint(1, 5)


def distance(ours, theirs) -> float:
    """The largest difference, relative to the largest element."""
    scale = max(g.abs().max().item() for g in theirs)
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) / scale


def one_batch_gradients(net, batches, form):
    """By hand: all samples of a window at once. A mean of means where the batches carry no weight."""
    losses = [net.losses(batch) for batch in batches]
    loss = torch.stack([one.mean() for one in losses]).mean() if form == "mean" else torch.cat(losses).mean()
    return torch.autograd.grad(loss, list(net.parameters()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["32", "64"])
def test_gradients_of_any_split_are_those_of_one_batch(dtype, tolerance):
    """200 random splits for each dtype, with partial windows, weights, and loaders that do not know their length."""
    rng, worst = random.Random(5), 0.0
    for trial in range(200):
        form = rng.choice(["mean", "tuple", "dict", "tensor"])
        sizes, window = random_split(rng)
        torch.manual_seed(trial)
        x, y = torch.randn(sum(sizes), FEATURES, dtype=dtype), torch.randn(sum(sizes), 1, dtype=dtype)
        net = Net(form, dtype)
        batches = Batches(x, y, sizes, has_length=rng.random() < 0.7)
        if rng.random() < 0.3:
            schedule = {"callbacks": [GradientAccumulationScheduler({0: window})]}
        else:
            schedule = {"accumulate_grad_batches": window}
        make_trainer(**schedule).fit(net, batches)
        windows = [batches.parts[start : start + window] for start in range(0, len(sizes), window)]
        assert len(net.gradients) == len(windows)
        for ours, parts in zip(net.gradients, windows):
            worst = max(worst, distance(ours, one_batch_gradients(net, parts, form)))
    print(f"\nlargest difference over 200 splits in {dtype}: {worst:.2g}")
    assert 0 < worst <= tolerance


@pytest.mark.parametrize("has_length", [True, False])
@pytest.mark.parametrize("form", ["mean", "tuple"])
def test_a_batch_without_a_loss_does_not_count_in_its_window(form, has_length):
    class Sometimes(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (1, 3) else super().training_step(batch, batch_idx)

    x, y = torch.randn(12, FEATURES, dtype=torch.float64), torch.randn(12, 1, dtype=torch.float64)
    net = Sometimes(form, torch.float64)
    batches = Batches(x, y, [3, 2, 4, 3], has_length)
    make_trainer(accumulate_grad_batches=4).fit(net, batches)
    parts = [batches.parts[0], batches.parts[2]]
    assert distance(net.gradients[0], one_batch_gradients(net, parts, form)) <= 1e-12


@pytest.mark.parametrize("empty", [0, 0.0, torch.tensor(0)], ids=["int", "float", "tensor"])
@pytest.mark.parametrize("where", [0, 1])
def test_a_batch_that_weighs_nothing_adds_nothing(empty, where):
    class Padded(Net):
        def training_step(self, batch, batch_idx):
            losses = self.losses(batch)
            return (losses.sum() * 0, empty) if batch_idx == where else (losses.sum(), len(losses))

    x, y = torch.randn(9, FEATURES, dtype=torch.float64), torch.randn(9, 1, dtype=torch.float64)
    net = Padded("tuple", torch.float64)
    batches = Batches(x, y, [3, 2, 4])
    make_trainer(accumulate_grad_batches=3).fit(net, batches)
    parts = [part for index, part in enumerate(batches.parts) if index != where]
    assert distance(net.gradients[0], one_batch_gradients(net, parts, "tuple")) <= 1e-12


def test_a_single_weighted_batch_gives_the_bits_of_its_mean():
    weighted, plain = Net("tuple", torch.float32), Net("mean", torch.float32)
    plain.load_state_dict(weighted.state_dict())
    batches = Batches(torch.randn(8, FEATURES), torch.randn(8, 1), [4, 4])
    for net in (weighted, plain):
        make_trainer().fit(net, batches)
    for ours, theirs in zip(weighted.gradients, plain.gradients):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_windows_are_exact_with_precision_clipping_and_a_scaler():
    """The correction of a short window comes before unscaling and clipping."""
    batches = Batches(torch.randn(10, FEATURES), torch.randn(10, 1), [3, 3, 2, 2], has_length=False)
    found = []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", scaler)]):
        torch.manual_seed(1)
        net = Net("tuple", torch.float32)
        make_trainer(accumulate_grad_batches=3, plugins=plugins, gradient_clip_val=0.05).fit(net, batches)
        found.append(net.gradients)
    for full, mixed in zip(*found):
        assert distance(mixed, full) < 5e-3


def test_the_loss_shown_to_callbacks_is_the_one_backward_was_called_on():
    seen = []

    class Watch(pl.Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append(loss.detach())

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert torch.equal(outputs["loss"], seen[-1])

    net = Net("dict", torch.float32)
    batches = Batches(torch.randn(6, FEATURES), torch.randn(6, 1), [2, 4])
    make_trainer(accumulate_grad_batches=2, callbacks=[Watch()]).fit(net, batches)
    sums = [net.losses(batch).sum() for batch in batches]
    assert torch.allclose(seen[0], sums[0] / (2 * 2)) and torch.allclose(seen[1], sums[1] / (2 * 2))


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (lambda loss: (loss, -1), "-1 as the weight.*0 or more"),
        (lambda loss: (loss, True), "True as the weight"),
        (lambda loss: (loss, math.nan), "nan as the weight"),
        (lambda loss: (loss, torch.ones(2)), r"shape \(2,\) as the weight"),
        (lambda loss: {"loss": loss, "weight": "many"}, "'many' as the weight"),
        (lambda loss: (loss, 1, 2), "returned a tuple.*its sum, its weight"),
        (lambda loss: ("loss", 3), "returned a tuple"),
        (lambda loss: (loss.long(), 3), "dtype torch.int64 as the loss"),
        (lambda loss: loss.long(), "dtype torch.int64.*floating-point"),
    ],
)
def test_wrong_losses_and_weights_are_refused_at_step_one(output, words):
    class Wrong(Regression):
        def training_step(self, batch, batch_idx):
            return output(self.loss(batch))

    with pytest.raises(MisconfigurationException, match=f"`Wrong.training_step` .*{words}"):
        make_trainer().fit(Wrong(), make_loader())


def test_an_optimizer_that_evaluates_twice_cannot_accumulate():
    """The gradients of the earlier batches would be missing from its second evaluation, in silence."""

    class Lbfgs(Regression):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), max_iter=3)

    make_trainer().fit(Lbfgs(), make_loader())
    with pytest.raises(MisconfigurationException, match="LBFGS evaluates.*several times.*accumulate_grad_batches=1"):
        make_trainer(accumulate_grad_batches=3).fit(Lbfgs(), make_loader())


def test_a_window_that_an_early_end_left_open_is_not_carried_into_the_next_epoch():
    class Early(Net):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if (self.current_epoch, batch_idx) == (0, 1) else None

    net = Early("mean", torch.float64)
    batches = Batches(torch.randn(8, FEATURES).double(), torch.randn(8, 1).double(), [2, 2, 2, 2])
    make_trainer(accumulate_grad_batches=4, max_epochs=2).fit(net, batches)
    assert len(net.gradients) == 1
    assert distance(net.gradients[0], one_batch_gradients(net, batches.parts, "mean")) <= 1e-12
