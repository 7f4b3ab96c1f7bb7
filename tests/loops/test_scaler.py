"""Loss scaling: learning rates that move only with the optimizer, gradients unscaled before anybody looks, exact resume."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from support import ManualRegression, Regression, make_loader, make_trainer
from torch.optim import lr_scheduler as schedules

import fulmen as pl
from fulmen.plugins import MixedPrecision
from fulmen.utilities.errors import MisconfigurationException

BATCHES, EPOCHS = 6, 2
SCHEDULES = {
    "exponential": lambda o: schedules.ExponentialLR(o, 0.8),
    "steps": lambda o: schedules.StepLR(o, step_size=2, gamma=0.5),
    "one cycle": lambda o: schedules.OneCycleLR(o, max_lr=0.2, total_steps=40),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, T_max=7),
    "warm-up": lambda o: schedules.LambdaLR(o, lambda step: min(1.0, (step + 1) / 4)),
}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
}
# (schedule, interval, frequency, accumulation window, optimizer, batches of the run whose loss is infinite)
CASES = [
    ("exponential", "step", 1, 1, "SGD", {0}),
    ("exponential", "step", 1, 1, "SGD", {0, 1, 2}),
    ("exponential", "step", 1, 1, "Adam", {3, 7}),
    ("exponential", "step", 1, 1, "fused", {0, 5, 6}),
    ("exponential", "step", 2, 1, "SGD", {1, 2}),
    ("exponential", "step", 2, 1, "fused", {0, 4}),
    ("exponential", "step", 2, 2, "SGD", {3}),
    ("exponential", "step", 3, 1, "Adam", {0, 1, 8}),
    ("steps", "step", 1, 1, "Adam", {2, 3}),
    ("steps", "step", 1, 2, "SGD", {1, 6}),
    ("steps", "step", 1, 4, "fused", {5, 11}),
    ("steps", "epoch", 1, 1, "SGD", {0, 1, 2, 3, 4, 5}),
    ("steps", "epoch", 1, 1, "Adam", {0, 1, 2, 3, 4}),
    ("steps", "epoch", 1, 3, "fused", {1, 4}),
    ("one cycle", "step", 1, 1, "SGD", {0, 9}),
    ("one cycle", "step", 1, 1, "fused", {10, 11}),
    ("cosine", "step", 1, 2, "Adam", {0, 2, 4}),
    ("cosine", "epoch", 1, 1, "SGD", {6, 7, 8, 9, 10, 11}),
    ("warm-up", "step", 1, 1, "Adam", {0, 1}),
    ("warm-up", "step", 1, 3, "SGD", set()),
]


def new_scaler():
    return torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=3)


class Net(pl.LightningModule):
    def __init__(self, make_optimizer, make_schedule, interval, frequency, infinite):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.make_optimizer, self.make_schedule = make_optimizer, make_schedule
        self.timing = {"interval": interval, "frequency": frequency}
        self.infinite, self.rates, self.count = infinite, [], 0

    def loss(self, batch, number):
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.layer(x), y)
        return loss * float("inf") if number in self.infinite else loss

    def training_step(self, batch, batch_idx):
        self.count += 1
        return self.loss(batch, self.count - 1)

    def on_train_batch_end(self, *_):
        self.rates.append(self.optimizers().param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make_schedule(optimizer), **self.timing}}


def by_hand(net, interval, frequency, window):
    """A step per window; the scheduler follows the steps that were made in the whole run, or the epochs with one."""
    scaler, rates, number, in_steps = new_scaler(), [], 0, 0
    parts = net.configure_optimizers()
    optimizer, scheduler = parts["optimizer"], parts["lr_scheduler"]["scheduler"]
    for _ in range(EPOCHS):
        moved = False
        for index, batch in enumerate(make_loader(4 * BATCHES)):
            size = min(window, BATCHES - index // window * window)
            with torch.autocast("cpu", torch.float16, cache_enabled=False):
                loss = net.loss(batch, number)
            number += 1
            if index % window == 0:
                optimizer.zero_grad()
            scaler.scale(loss / size if window > 1 else loss).backward()
            if (index + 1) % window == 0 or index + 1 == BATCHES:
                scaler.unscale_(optimizer)
                found = not all(p.grad.isfinite().all() for p in net.parameters())
                scaler.step(optimizer)
                scaler.update()
                if not found:
                    moved, in_steps = True, in_steps + 1
                    if interval == "step" and in_steps % frequency == 0:
                        scheduler.step()
            if interval == "epoch" and index + 1 == BATCHES and moved:
                scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
    return rates, scaler.get_scale()


@pytest.mark.filterwarnings("ignore:.*OneCycleLR", "ignore:.*lr_scheduler.step")
@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_learning_rates_are_those_written_by_hand(case):
    """20 cases with injected infinities: the same rates after every batch, the same scale, the same bits of weights."""
    schedule, interval, frequency, window, optimizer, infinite = CASES[case]
    ours = Net(OPTIMIZERS[optimizer], SCHEDULES[schedule], interval, frequency, infinite)
    theirs = copy.deepcopy(ours)
    precision = MixedPrecision("16-mixed", "cpu", new_scaler())
    trainer = make_trainer(max_epochs=EPOCHS, accumulate_grad_batches=window, plugins=[precision])
    trainer.fit(ours, make_loader(4 * BATCHES))
    rates, scale = by_hand(theirs, interval, frequency, window)
    assert ours.rates == rates
    assert trainer.scaler.get_scale() == scale
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert trainer.global_step == EPOCHS * -(-BATCHES // window)  # skipped ones count there


@pytest.mark.parametrize("optimizer", ["SGD", "fused"])
@pytest.mark.parametrize(("infinite", "words"), [({1, 2, 8}, "skipped 3 of 12"), (set(), None)])
def test_the_log_says_once_how_often_steps_were_skipped(caplog, infinite, words, optimizer):
    net = Net(OPTIMIZERS[optimizer], SCHEDULES["steps"], "step", 1, infinite)
    with caplog.at_level(logging.INFO):
        make_trainer(max_epochs=EPOCHS, plugins=[MixedPrecision("16-mixed", "cpu", new_scaler())]).fit(
            net, make_loader(4 * BATCHES)
        )
    said = [record.message for record in caplog.records if "loss scaler" in record.message]
    assert len(said) == (words is not None) and (not said or words in said[0])


class Seen(pl.Callback):
    """The norm of the gradients where they are complete."""

    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms.append(torch.stack([p.grad.float().norm() for p in pl_module.parameters()]).norm().item())


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("optimizer", ["SGD", "fused"])
def test_gradients_are_unscaled_before_they_are_looked_at_and_clipped(optimizer, clip):
    """Also those of a fused optimizer, which would unscale them inside its step, too late."""

    def run(precision):
        torch.manual_seed(1)
        seen = Seen()
        net = Net(OPTIMIZERS[optimizer], SCHEDULES["steps"], "step", 1, set())
        make_trainer(plugins=precision, callbacks=[seen], gradient_clip_val=clip).fit(net, make_loader(4 * BATCHES))
        return seen.norms, net

    full, ours = run([])
    mixed, theirs = run([MixedPrecision("16-mixed", "cpu", new_scaler())])
    assert mixed == pytest.approx(full, rel=0.02)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3)


def test_a_fused_optimizer_that_nobody_looks_at_unscales_by_itself():
    """One pass over the gradients less; the same weights."""
    states = []
    for callbacks in ([], [Seen()]):
        torch.manual_seed(1)
        net = Net(OPTIMIZERS["fused"], SCHEDULES["exponential"], "epoch", 1, {2})
        make_trainer(plugins=[MixedPrecision("16-mixed", "cpu", new_scaler())], callbacks=callbacks).fit(
            net, make_loader(4 * BATCHES)
        )
        states.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*states):
        torch.testing.assert_close(a, b)


def test_manual_clipping_is_of_unscaled_gradients():
    ours, theirs = ManualRegression(clip=0.3), Regression()
    theirs.load_state_dict(ours.state_dict())
    make_trainer(plugins=[MixedPrecision("16-mixed", "cpu", new_scaler())]).fit(ours, make_loader())
    scaler, optimizer, norms = new_scaler(), theirs.configure_optimizers(), []
    for batch in make_loader():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            loss = theirs.loss(batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.3).item())
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    assert ours.norms == norms


def test_two_manual_optimizers_share_the_scale_their_losses_were_multiplied_with():
    """Both backwards, then both steps: the scale may not grow between the steps."""

    class Two(ManualRegression):
        def __init__(self):
            super().__init__()
            self.other = torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            x, y = batch
            for optimizer in (first, second):
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.manual_backward(torch.nn.functional.mse_loss(self.other(x), y))
            first.step()
            second.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.layer, self.other)]

    torch.manual_seed(2)
    ours = Two()
    theirs = copy.deepcopy(ours)
    growing = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1)
    make_trainer(plugins=[MixedPrecision("16-mixed", "cpu", growing)]).fit(ours, make_loader())
    make_trainer(precision="32-true").fit(theirs, make_loader())
    assert growing.get_scale() == 2.0 * 2**3
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize("window", [1, 3])
def test_a_batch_without_a_loss_is_passed_over(window):
    class Sometimes(Regression):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (0, 2) else super().training_step(batch, batch_idx)

    results = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", new_scaler())]):
        torch.manual_seed(4)
        net = Sometimes()
        make_trainer(plugins=plugins, accumulate_grad_batches=window, max_epochs=2).fit(net, make_loader())
        results.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3)


def test_a_step_the_user_leaves_out_does_not_confuse_the_scaler():
    class Skipping(Regression):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            if batch_idx == 1:
                optimizer_closure()
            else:
                optimizer.step(closure=optimizer_closure)

    results = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", new_scaler())]):
        torch.manual_seed(4)
        net = Skipping()
        make_trainer(plugins=plugins, gradient_clip_val=0.5).fit(net, make_loader())
        results.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("optimizer", ["Adam", "fused"])
def test_a_resumed_run_continues_with_the_scale_and_its_growth(tmp_path, optimizer):
    """An epoch of six batches, a growth every four good steps: the tracker stands between two growths at the save."""

    def build():
        torch.manual_seed(5)
        return Net(OPTIMIZERS[optimizer], SCHEDULES["exponential"], "step", 1, set())

    def trainer(epochs):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=4)
        return make_trainer(max_epochs=epochs, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])

    whole, half = build(), build()
    unstopped, first = trainer(3), trainer(1)
    unstopped.fit(whole, make_loader(4 * BATCHES))
    first.fit(half, make_loader(4 * BATCHES))
    first.save_checkpoint(tmp_path / "half.ckpt")
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["MixedPrecision"]["_growth_tracker"] == 2
    resumed, second = build(), trainer(3)
    second.fit(resumed, make_loader(4 * BATCHES), ckpt_path=tmp_path / "half.ckpt")
    assert second.scaler.state_dict() == unstopped.scaler.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters()))


def test_an_optimizer_that_cannot_work_with_a_scaler_is_refused_before_the_first_step():
    steps = []

    class Lbfgs(Regression):
        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    for precision in ("16-mixed", "16-true"):
        with pytest.raises(MisconfigurationException, match=f"{precision}.*LBFGS.*bf16"):
            make_trainer(precision=precision).fit(Lbfgs(), make_loader())
        assert not steps
    make_trainer(precision="bf16-mixed").fit(Lbfgs(), make_loader())
