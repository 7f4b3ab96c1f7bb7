"""Training ends in the same bits as the loop one would have written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, cycle, islice
from typing import Any

import pytest
import torch
from support import make_loader, make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import fulmen as pl

EPOCHS = 3
pytestmark = pytest.mark.filterwarnings("ignore:.*validation_step", "ignore:.*returned `None`")


class Net(pl.LightningModule):
    """Two layers with dropout between them: a random number drawn too much or too little shows in the weights."""

    def __init__(self, make_optimizer: Callable[[Iterable[Tensor]], Any], dropout: float = 0.2) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layers(x), y)

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def by_hand(
    net: Net,
    loader: Any,
    *,
    scheduler: Callable[[Any], Any] | None = None,
    interval: str = "epoch",
    accumulate: int = 1,
    clip: Callable[[Iterable[Tensor]], Any] | None = None,
    val_loader: Any = None,
    val_every: int | None = None,
) -> None:
    """The loop: a step per window of batches, validation after `val_every` batches (default: the epoch)."""
    optimizer = net.make_optimizer(net.parameters())
    lr_scheduler = scheduler(optimizer) if scheduler is not None else None
    for _ in range(EPOCHS):
        for number, batch in enumerate(loader, start=1):
            first = (number - 1) // accumulate * accumulate
            loss = net.loss(batch) / min(accumulate, len(loader) - first)
            if number % accumulate == 1 or accumulate == 1:
                optimizer.zero_grad()
            loss.backward()
            if number % accumulate == 0 or number == len(loader):
                if clip is not None:
                    clip(net.parameters())
                optimizer.step()
                if lr_scheduler is not None and interval == "step":
                    lr_scheduler.step()
            if lr_scheduler is not None and interval == "epoch" and number == len(loader):
                lr_scheduler.step()
            if val_loader is not None and number % (val_every or len(loader)) == 0:
                net.eval()
                with torch.no_grad():
                    for val_batch in val_loader:
                        net.loss(val_batch)
                net.train()


def pair(make: Callable[[], Net]) -> tuple[Net, Net]:
    """The same module twice, with the same weights."""
    modules = []
    for _ in range(2):
        torch.manual_seed(3)
        modules.append(make())
    return modules[0], modules[1]


def fit(module: Net, *loaders: Any, seed: int = 7, **arguments: Any) -> pl.Trainer:
    torch.manual_seed(seed)
    trainer = make_trainer(**{"max_epochs": EPOCHS, "limit_val_batches": 1.0 if len(loaders) > 1 else 0, **arguments})
    trainer.fit(module, *loaders)
    return trainer


def assert_same_bits(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{name} differs by {(a - b).abs().max():.3g}"


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": sgd,
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers(make_optimizer):
    ours, theirs = pair(lambda: Net(make_optimizer))
    fit(ours, make_loader(20))
    torch.manual_seed(7)
    by_hand(theirs, make_loader(20))
    assert_same_bits(ours, theirs)


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "Cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "OneCycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=40),
    "Exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.9),
}


@pytest.mark.filterwarnings("ignore:.*OneCycleLR")
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers(scheduler, interval):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = self.make_optimizer(self.parameters())
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler(optimizer), "interval": interval}}

    ours, theirs = pair(lambda: Scheduled(lambda p: torch.optim.AdamW(p, lr=0.05)))
    fit(ours, make_loader(20))
    torch.manual_seed(7)
    by_hand(theirs, make_loader(20), scheduler=scheduler, interval=interval)
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("samples", [20, 24], ids=["last window is shorter", "even windows"])
@pytest.mark.parametrize("window", [2, 3])
def test_accumulation_divides_by_what_the_window_holds_and_always_steps_on_the_last_batch(window, samples):
    ours, theirs = pair(lambda: Net(sgd))
    fit(ours, make_loader(samples), accumulate_grad_batches=window)
    torch.manual_seed(7)
    by_hand(theirs, make_loader(samples), accumulate=window)
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "clip"),
    [
        ({"gradient_clip_val": 0.1}, lambda p: nn.utils.clip_grad_norm_(p, 0.1)),
        ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, lambda p: nn.utils.clip_grad_value_(p, 0.01)),
        ({"gradient_clip_val": 0}, None),
    ],
    ids=["norm", "value", "off"],
)
@pytest.mark.parametrize("window", [1, 2])
def test_clipping(arguments, clip, window):
    ours, theirs = pair(lambda: Net(sgd))
    fit(ours, make_loader(20), accumulate_grad_batches=window, **arguments)
    torch.manual_seed(7)
    by_hand(theirs, make_loader(20), clip=clip, accumulate=window)
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("val_every", [None, 2])
def test_shuffling_and_validation_draw_the_same_random_numbers(val_every):
    """The order of samples and the dropout come from one generator, and validation loaders draw from it too."""
    ours, theirs = pair(lambda: Net(sgd))
    train, val = make_loader(20, shuffle=True), make_loader(8, seed=5)
    interval = {} if val_every is None else {"val_check_interval": val_every}
    fit(ours, train, val, num_sanity_val_steps=2, **interval)
    torch.manual_seed(7)
    by_hand(theirs, train, val_loader=val, val_every=val_every)
    assert_same_bits(ours, theirs)


def test_lbfgs_evaluates_the_loss_as_often_as_it_likes():
    def lbfgs(parameters):
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=4)

    ours, theirs = pair(lambda: Net(lbfgs))
    fit(ours, make_loader())
    torch.manual_seed(7)
    optimizer = lbfgs(theirs.parameters())
    for _ in range(EPOCHS):
        for batch in make_loader():

            def closure(batch=batch):
                loss = theirs.loss(batch)
                optimizer.zero_grad()
                loss.backward()
                return loss

            optimizer.step(closure)
    assert_same_bits(ours, theirs)


def test_no_training_step_result_still_steps_on_what_is_there():
    """A step that returns None has no gradients: momentum is not even applied."""

    class EveryOther(Net):
        def training_step(self, batch, batch_idx):
            return self.loss(batch) if batch_idx % 2 else None

    ours, theirs = pair(lambda: EveryOther(sgd))
    trainer = fit(ours, make_loader(20))
    assert trainer.global_step == EPOCHS * 5
    torch.manual_seed(7)
    optimizer = sgd(theirs.parameters())
    for _ in range(EPOCHS):
        for number, batch in enumerate(make_loader(20)):
            if number % 2:
                loss = theirs.loss(batch)
                optimizer.zero_grad()
                loss.backward()
            else:
                optimizer.zero_grad()
            optimizer.step()
    assert_same_bits(ours, theirs)


def test_a_dict_with_the_loss_is_the_loss():
    class Dict(Net):
        def training_step(self, batch, batch_idx):
            return {"loss": self.loss(batch), "size": batch[0].size(0)}

    ours, theirs = pair(lambda: Dict(sgd))
    fit(ours, make_loader(20))
    torch.manual_seed(7)
    by_hand(theirs, make_loader(20))
    assert_same_bits(ours, theirs)


# ---------------------------------------------------------------------- several loaders, other kinds of data


def test_a_dict_of_loaders_cycles_the_shorter_one():
    class Two(Net):
        def training_step(self, batch, batch_idx):
            return self.loss(batch["long"]) + self.loss(batch["short"])

    ours, theirs = pair(lambda: Two(sgd, dropout=0.0))
    long, short = make_loader(20), make_loader(8, seed=9)
    trainer = fit(ours, {"long": long, "short": short})
    assert trainer.num_training_batches == 5
    optimizer = sgd(theirs.parameters())
    for _ in range(EPOCHS):
        for one, other in zip(long, islice(cycle(list(short)), 5)):
            loss = theirs.loss(one) + theirs.loss(other)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize(("mode", "batches"), [("min_size", 2), ("max_size", 5)])
def test_a_combined_loader_of_the_user_keeps_its_mode(mode, batches):
    from fulmen.utilities import CombinedLoader

    seen = []

    class Two(Net):
        def training_step(self, batch, batch_idx):
            seen.append([part is not None for part in batch])
            return sum(self.loss(part) for part in batch if part is not None)

    module = Two(sgd)
    fit(module, CombinedLoader([make_loader(20), make_loader(8)], mode), max_epochs=1)
    assert len(seen) == batches
    assert seen == [[True, number < 2] for number in range(batches)]


class Stream(IterableDataset):
    """Samples that come one after the other, nobody knows how many."""

    def __init__(self, samples: int) -> None:
        self.loader = make_loader(samples)

    def __iter__(self):
        return chain.from_iterable(zip(*batch) for batch in self.loader)


def test_an_iterable_dataset():
    ours, theirs = pair(lambda: Net(sgd, dropout=0.0))
    trainer = fit(ours, DataLoader(Stream(20), batch_size=4))
    assert trainer.global_step == EPOCHS * 5
    by_hand(theirs, make_loader(20))
    assert_same_bits(ours, theirs)


def test_any_iterable_is_a_loader():
    class Batches(dict):
        """A mapping of its own kind is data, not a dict of loaders; iterating it gives its batches."""

        def __iter__(self):
            return iter(self.values())

    batches = Batches(enumerate(make_loader(20)))
    ours, theirs = pair(lambda: Net(sgd))
    fit(ours, batches)
    torch.manual_seed(7)
    by_hand(theirs, batches)
    assert_same_bits(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_a_step_may_pull_its_batches_itself():
    class Pulls(Net):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self.loss(batch)

    ours, theirs = pair(lambda: Pulls(sgd))
    trainer = fit(ours, make_loader(20))
    assert trainer.global_step == EPOCHS * 5
    torch.manual_seed(7)
    by_hand(theirs, make_loader(20))
    assert_same_bits(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_a_step_may_pull_several_batches():
    class Pulls(Net):
        def training_step(self, dataloader_iter):
            (one, _, _), (other, _, _) = next(dataloader_iter), next(dataloader_iter)
            return self.loss(one) + self.loss(other)

    ours, theirs = pair(lambda: Pulls(sgd, dropout=0.0))
    trainer = fit(ours, make_loader(16))
    assert trainer.global_step == EPOCHS * 2
    optimizer = sgd(theirs.parameters())
    for _ in range(EPOCHS):
        batches = iter(make_loader(16))
        for one, other in zip(batches, batches):
            loss = theirs.loss(one) + theirs.loss(other)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_same_bits(ours, theirs)


# ---------------------------------------------------------------------- manual optimization


class Adversaries(pl.LightningModule):
    """Two nets with an optimizer each, and one loss that would train both."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.maker = nn.Linear(4, 4)
        self.judge = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def fool(self, batch) -> Tensor:
        return -self.judge(self.maker(batch[0])).mean()

    def tell(self, batch) -> Tensor:
        return self.judge(self.maker(batch[0])).mean() - self.judge(batch[0]).mean()

    def configure_optimizers(self):
        maker = torch.optim.Adam(self.maker.parameters(), lr=0.01)
        judge = torch.optim.SGD(self.judge.parameters(), lr=0.02)
        return [maker, judge]


def adversaries_by_hand(module: Adversaries) -> None:
    maker, judge = module.configure_optimizers()
    for _ in range(EPOCHS):
        for batch in make_loader(20):
            for optimizer, loss in ((maker, module.fool), (judge, module.tell)):
                optimizer.zero_grad()
                loss(batch).backward()
                optimizer.step()


class Toggles(Adversaries):
    def training_step(self, batch, batch_idx):
        maker, judge = self.optimizers()
        for optimizer, loss, frozen in ((maker, self.fool, self.judge), (judge, self.tell, self.maker)):
            self.toggle_optimizer(optimizer)
            assert not any(p.requires_grad for p in frozen.parameters())
            optimizer.zero_grad()
            self.manual_backward(loss(batch))
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            assert all(p.requires_grad for p in self.parameters())


class TogglesInContext(Adversaries):
    def training_step(self, batch, batch_idx):
        maker, judge = self.optimizers()
        with maker.toggle_model():
            assert not any(p.requires_grad for p in self.judge.parameters())
            maker.zero_grad()
            self.manual_backward(self.fool(batch))
            maker.step()
        with self.toggled_optimizer(judge):
            assert not any(p.requires_grad for p in self.maker.parameters())
            judge.zero_grad()
            self.manual_backward(self.tell(batch))
            judge.step()


class Closures(Adversaries):
    def training_step(self, batch, batch_idx):
        for optimizer, loss in zip(self.optimizers(), (self.fool, self.tell)):

            def closure(optimizer=optimizer, loss=loss):
                value = loss(batch)
                optimizer.zero_grad()
                self.manual_backward(value)
                return value

            optimizer.step(closure=closure)


@pytest.mark.parametrize("kind", [Toggles, TogglesInContext, Closures])
def test_two_optimizers_by_hand(kind):
    ours, theirs = pair(kind)
    trainer = fit(ours, make_loader(20))
    assert trainer.global_step == 2 * EPOCHS * 5
    adversaries_by_hand(theirs)
    assert_same_bits(ours, theirs)


def test_manual_optimization_with_a_scheduler_accumulation_and_clipping():
    class Manual(Net):
        def __init__(self, make_optimizer) -> None:
            super().__init__(make_optimizer)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(self.loss(batch) / 2)
            if (batch_idx + 1) % 2 == 0 or self.trainer.is_last_batch:
                self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()
            if self.trainer.is_last_batch:
                self.lr_schedulers().step()

        def configure_optimizers(self):
            optimizer = self.make_optimizer(self.parameters())
            return [optimizer], [SCHEDULERS["StepLR"](optimizer)]

    ours, theirs = pair(lambda: Manual(sgd))
    fit(ours, make_loader(20))
    torch.manual_seed(7)
    by_hand(
        theirs,
        make_loader(20),
        accumulate=2,
        clip=lambda p: nn.utils.clip_grad_norm_(p, 0.1),
        scheduler=SCHEDULERS["StepLR"],
    )
    assert_same_bits(ours, theirs)


# ---------------------------------------------------------------------- overridden steps of the optimization


def test_optimizer_step_may_warm_the_learning_rate_up():
    class WarmsUp(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (self.trainer.global_step + 1)
            optimizer.step(closure=optimizer_closure)

    ours, theirs = pair(lambda: WarmsUp(sgd))
    fit(ours, make_loader(20))
    torch.manual_seed(7)
    optimizer = sgd(theirs.parameters())
    for step, batch in enumerate(chain.from_iterable([make_loader(20)] * EPOCHS), start=1):
        optimizer.param_groups[0]["lr"] = 0.01 * step
        optimizer.zero_grad()
        theirs.loss(batch).backward()
        optimizer.step()
    assert_same_bits(ours, theirs)


def test_optimizer_step_may_skip_the_update_but_not_the_closure():
    class Skips(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    ours, theirs = pair(lambda: Skips(sgd))
    trainer = fit(ours, make_loader(20))
    assert trainer.global_step == EPOCHS * 5
    torch.manual_seed(7)
    optimizer = sgd(theirs.parameters())
    for _ in range(EPOCHS):
        for number, batch in enumerate(make_loader(20)):
            optimizer.zero_grad()
            theirs.loss(batch).backward()
            if number % 2:
                optimizer.step()
    assert_same_bits(ours, theirs)


def test_backward_zero_grad_and_clipping_may_be_replaced():
    class Replaces(Net):
        def backward(self, loss, *args, **kwargs):
            (2 * loss).backward(*args, **kwargs)

        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=False)
            self.zeroed = self.layers[0].weight.grad is not None

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            nn.utils.clip_grad_value_(self.parameters(), 0.05)

    ours, theirs = pair(lambda: Replaces(sgd))
    fit(ours, make_loader(20))
    assert ours.zeroed
    torch.manual_seed(7)
    optimizer = sgd(theirs.parameters())
    for batch in chain.from_iterable([make_loader(20)] * EPOCHS):
        optimizer.zero_grad(set_to_none=False)
        (2 * theirs.loss(batch)).backward()
        nn.utils.clip_grad_value_(theirs.parameters(), 0.05)
        optimizer.step()
    assert_same_bits(ours, theirs)


def test_gradients_may_be_changed_in_hooks():
    class Noisy(Net):
        def on_after_backward(self):
            for parameter in self.parameters():
                parameter.grad.mul_(0.5)

        def on_before_optimizer_step(self, optimizer):
            self.layers[0].weight.grad.zero_()

    ours, theirs = pair(lambda: Noisy(sgd))
    fit(ours, make_loader(20))
    torch.manual_seed(7)
    optimizer = sgd(theirs.parameters())
    for batch in chain.from_iterable([make_loader(20)] * EPOCHS):
        optimizer.zero_grad()
        theirs.loss(batch).backward()
        for parameter in theirs.parameters():
            parameter.grad.mul_(0.5)
        theirs.layers[0].weight.grad.zero_()
        optimizer.step()
    assert_same_bits(ours, theirs)


def test_an_optimizer_of_another_package_gets_the_closure():
    class Foreign(torch.optim.SGD):
        """Asks for the loss twice, and steps on the second gradients."""

        def step(self, closure=None):
            with torch.enable_grad():
                closure()
                loss = closure()
            super().step()
            return loss

    ours, theirs = pair(lambda: Net(lambda p: Foreign(p, lr=0.05)))
    fit(ours, make_loader())
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05)
    for batch in chain.from_iterable([make_loader()] * EPOCHS):
        for _ in range(2):
            loss = theirs.loss(batch)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    assert_same_bits(ours, theirs)


def test_a_run_in_two_calls_of_fit_goes_on_with_the_epochs_and_new_optimizers():
    ours, theirs = pair(lambda: Net(sgd, dropout=0.0))
    trainer = fit(ours, make_loader(20), max_epochs=EPOCHS)
    trainer.fit_loop.max_epochs = 2 * EPOCHS
    trainer.fit(ours, make_loader(20))
    assert trainer.current_epoch == 2 * EPOCHS
    assert trainer.global_step == 2 * EPOCHS * 5
    by_hand(theirs, make_loader(20))
    by_hand(theirs, make_loader(20))
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_other_precisions(precision):
    ours, theirs = pair(lambda: Net(sgd))
    fit(ours, make_loader(20), precision=precision)
    torch.manual_seed(7)
    dtype = {"64-true": torch.float64}.get(precision)
    if dtype is not None:
        theirs.to(dtype)
    optimizer = sgd(theirs.parameters())
    for batch in chain.from_iterable([make_loader(20)] * EPOCHS):
        batch = [part if dtype is None else part.to(dtype) for part in batch]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None, cache_enabled=False):
            loss = theirs.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_same_bits(ours, theirs)


def scaler(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)


@pytest.mark.parametrize("scale", [2.0**8, 2.0**24], ids=["usual", "overflows at first"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_loss_scaler_unscales_before_clipping_and_skips_steps_that_overflow(scale, clip):
    """Skipped steps change nothing, and count all the same."""
    from fulmen.plugins import MixedPrecision

    ours, theirs = pair(lambda: Net(sgd))
    own, loss_scaler = scaler(scale), scaler(scale)
    precision = MixedPrecision("16-mixed", "cpu", own)
    trainer = fit(ours, make_loader(20), plugins=[precision], gradient_clip_val=clip)
    assert trainer.global_step == EPOCHS * 5
    torch.manual_seed(7)
    optimizer = sgd(theirs.parameters())
    for batch in chain.from_iterable([make_loader(20)] * EPOCHS):
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            loss = theirs.loss(batch)
        optimizer.zero_grad()
        loss_scaler.scale(loss).backward()
        loss_scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        loss_scaler.step(optimizer)
        loss_scaler.update()
    assert own.get_scale() == loss_scaler.get_scale() != scale
    assert_same_bits(ours, theirs)
