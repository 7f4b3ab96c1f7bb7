"""Several optimizers without manual mode: `training_step` yields one loss for each, compared with loops written by hand."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from support import Regression, make_loader, make_trainer
from torch import nn

import fulmen as pl
from fulmen.utilities.errors import MisconfigurationException

MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Gan(pl.LightningModule):
    """A discriminator and a generator; the latter's loss needs the discriminator's weights after its step."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def score(self, sample, real):
        logits = self.discriminator(sample)
        target = torch.ones_like(logits) if real else torch.zeros_like(logits)
        return nn.functional.binary_cross_entropy_with_logits(logits, target)

    def discriminator_loss(self, x):
        fake = self.generator(x[:, :2])  # not detached: its gradients are kept to the discriminator all the same
        return self.score(x, True) + self.score(fake, False)

    def generator_loss(self, x):
        return self.score(self.generator(x[:, :2]), True)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        loss = self.discriminator_loss(x)
        self.log("d_loss", loss)
        yield loss
        loss = self.generator_loss(x)
        self.log("g_loss", loss)
        yield loss

    def configure_optimizers(self):
        return [
            torch.optim.Adam(self.discriminator.parameters(), lr=0.02),
            torch.optim.SGD(self.generator.parameters(), lr=0.1, momentum=0.9),
        ]


def by_hand(gan, loader, *, epochs=2, window=1, clip=None, dtype=None, scheduler=None, scaler=None):
    """The same written out, with `zero_grad` and `backward(inputs=...)` for each optimizer in turn."""
    optimizers = gan.configure_optimizers()
    if isinstance(optimizers, tuple):
        optimizers = optimizers[0]
    schedulers = [scheduler(optimizer) for optimizer in optimizers] if scheduler else []
    losses = (gan.discriminator_loss, gan.generator_loss)
    nets = (gan.discriminator, gan.generator)
    batches = list(loader)
    for _ in range(epochs):
        for number, (x, _) in enumerate(batches):
            size = min(window, len(batches) - number // window * window)
            steps = (number + 1) % window == 0 or number + 1 == len(batches)
            for index, (optimizer, loss_of, net) in enumerate(zip(optimizers, losses, nets)):
                with torch.autocast("cpu", dtype, cache_enabled=False) if dtype else nullcontext():
                    loss = loss_of(x)
                if number % window == 0:
                    optimizer.zero_grad()
                loss = loss / size if window > 1 else loss
                (scaler.scale(loss) if scaler else loss).backward(inputs=list(net.parameters()))
                if not steps:
                    continue
                if scaler:
                    scaler.unscale_(optimizer)
                if clip:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                scaler.step(optimizer) if scaler else optimizer.step()
                if schedulers and index == len(optimizers) - 1:
                    for one in schedulers:
                        one.step()
            if steps and scaler:
                scaler.update()


def twins(kind=Gan):
    torch.manual_seed(3)
    ours = kind()
    return ours, copy.deepcopy(ours)


def assert_same_bits(ours, theirs):
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{name} differs by {(a - b).abs().max():.3g}"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_weights_are_those_of_the_loop_written_by_hand(window, clip, precision):
    ours, theirs = twins()
    trainer = make_trainer(
        max_epochs=2, accumulate_grad_batches=window, gradient_clip_val=clip, precision=precision, callbacks=[]
    )
    trainer.fit(ours, make_loader(20))
    scaler = torch.amp.GradScaler("cpu") if precision == "16-mixed" else None
    by_hand(theirs, make_loader(20), window=window, clip=clip, dtype=MIXED.get(precision), scaler=scaler)
    assert_same_bits(ours, theirs)
    assert trainer.global_step == 2 * 2 * -(-5 // window)  # every step of every optimizer counts
    assert {"d_loss", "g_loss"} <= trainer.callback_metrics.keys()


@pytest.mark.parametrize("name", ["optimizer_step", "backward"])
def test_overridden_methods_are_called_for_each_turn(name):
    seen = []

    class Overrides(Gan):
        if name == "optimizer_step":

            def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
                seen.append(type(optimizer).__name__)
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

        else:

            def backward(self, loss, *args, **kwargs):
                seen.append(len(kwargs["inputs"]))
                super().backward(loss, *args, **kwargs)

    ours, theirs = twins(Overrides)
    make_trainer(max_epochs=2).fit(ours, make_loader(8))
    by_hand(theirs, make_loader(8))
    assert_same_bits(ours, theirs)
    assert seen == (["LightningAdam", "LightningSGD"] if name == "optimizer_step" else [4, 4]) * 4


def test_only_the_optimizers_own_parameters_get_gradients():
    class Watched(Gan):
        def on_after_backward(self):
            seen.append([part.weight.grad is not None for part in (self.discriminator[0], self.generator[0])])

        def on_before_zero_grad(self, optimizer):
            optimizer.zero_grad()

    seen = []
    make_trainer(limit_train_batches=1).fit(Watched(), make_loader())
    assert seen == [[True, False], [True, True]]  # the discriminator's stay from its own turn, unchanged


def test_hooks_run_once_per_turn_in_the_usual_order():
    told = []

    class Told(Gan):
        def on_before_zero_grad(self, optimizer):
            told.append(f"zero {type(optimizer).__name__}")

        def on_before_backward(self, loss):
            told.append("backward")

        def on_before_optimizer_step(self, optimizer):
            told.append(f"step {type(optimizer).__name__}")

        def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
            told.append("clip")

    make_trainer(limit_train_batches=1).fit(Told(), make_loader())
    turns = [[f"zero {name}", "backward", f"step {name}", "clip"] for name in ("Adam", "SGD")]
    assert told == turns[0] + turns[1]


def test_schedulers_of_all_optimizers_advance():
    class Scheduled(Gan):
        def configure_optimizers(self):
            optimizers = super().configure_optimizers()
            timing = {"interval": "step"}
            return [{"optimizer": o, "lr_scheduler": {"scheduler": schedule(o), **timing}} for o in optimizers]

    def schedule(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)

    ours, theirs = twins(Scheduled)
    make_trainer(max_epochs=2).fit(ours, make_loader(12))
    theirs.configure_optimizers = lambda: Gan.configure_optimizers(theirs)
    by_hand(theirs, make_loader(12), scheduler=schedule)
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("window", [1, 2])
def test_an_optimizer_without_a_loss_sits_out_and_its_schedule_waits(window):
    rates = []

    class EveryOther(Gan):
        """The generator has a loss in every fourth batch only."""

        def training_step(self, batch, batch_idx):
            x, _ = batch
            yield self.discriminator_loss(x)
            yield self.generator_loss(x) if batch_idx % 4 == 0 else None

        def configure_optimizers(self):
            optimizers = super().configure_optimizers()
            schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in optimizers]
            return optimizers, [{"scheduler": one, "interval": "step"} for one in schedulers]

        def on_train_batch_end(self, outputs, batch, batch_idx):
            rates.append([scheduler.last_epoch for scheduler in self.lr_schedulers()])

    module = EveryOther()
    trainer = make_trainer(accumulate_grad_batches=window)
    trainer.fit(module, make_loader(32))
    if window == 1:
        assert rates == [[1, 1], [2, 1], [3, 1], [4, 1], [5, 2], [6, 2], [7, 2], [8, 2]]
        assert trainer.global_step == 8 + 2
    else:
        assert rates == [[0, 0], [1, 1], [1, 1], [2, 1], [2, 1], [3, 2], [3, 2], [4, 2]]
        assert trainer.global_step == 4 + 2


def test_actor_and_critic_with_weights_and_other_outputs():
    class ActorCritic(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.actor, self.critic = nn.Linear(4, 2), nn.Linear(4, 1)

        def losses(self, batch):
            x, y = batch
            advantage = y - self.critic(x)
            yield -(self.actor(x).log_softmax(1)[:, :1] * advantage.detach()).sum()
            yield advantage.square().sum()

        def training_step(self, batch, batch_idx):
            actor, critic = self.losses(batch)
            yield {"loss": actor, "weight": len(batch[0]), "kept": 1}
            yield critic, len(batch[0])

        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen.append(outputs)

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.actor, self.critic)]

    seen = []
    ours, theirs = twins(ActorCritic)
    make_trainer(accumulate_grad_batches=2).fit(ours, make_loader(10))  # batches of 4, 4 and 2
    batches = list(make_loader(10))
    optimizers = theirs.configure_optimizers()
    for window in (batches[:2], batches[2:]):
        for batch in window:
            for loss, part in zip(theirs.losses(batch), (theirs.actor, theirs.critic)):
                (loss / sum(len(x) for x, _ in window)).backward(inputs=list(part.parameters()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert seen[0]["kept"] == 1 and len(seen[0]["losses"]) == 2
    assert torch.equal(seen[0]["loss"], seen[0]["losses"][0] + seen[0]["losses"][1])


def test_one_optimizer_may_be_written_this_way_too():
    class Yields(Regression):
        def training_step(self, batch, batch_idx):
            yield self.loss(batch)
            self.told = batch_idx  # behind the last yield: after the step

    ours, theirs = twins(Yields)
    make_trainer().fit(ours, make_loader())
    plain = Regression()
    plain.load_state_dict(theirs.state_dict())
    make_trainer().fit(plain, make_loader())
    assert_same_bits(ours, plain)
    assert ours.told == 2


def test_a_resumed_run_continues_both_optimizers(tmp_path):
    whole, half = twins()
    make_trainer(max_epochs=2).fit(whole, make_loader(12))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(half, make_loader(12))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Gan()
    make_trainer(max_epochs=2).fit(resumed, make_loader(12), ckpt_path=tmp_path / "half.ckpt")
    assert_same_bits(resumed, whole)


class Yielding(Gan):
    def training_step(self, batch, batch_idx):
        for _ in range(self.number):
            yield self.discriminator_loss(batch[0])


@pytest.mark.parametrize(("number", "words"), [(0, "yielded 0"), (1, "yielded 1"), (3, "yielded more than 2")])
def test_the_wrong_number_of_losses_is_refused_in_the_first_batch(number, words):
    module = Yielding()
    module.number = number
    if number == 3:
        module.generator_loss = module.discriminator_loss
    with pytest.raises(MisconfigurationException, match=f"{words} losses.*2 optimizers \\['Adam', 'SGD'\\]"):
        make_trainer().fit(module, make_loader())
    assert module.trainer.global_step <= 2


def test_what_a_generator_cannot_do_is_refused():
    class Lbfgs(Yielding):
        number = 1

        def configure_optimizers(self):
            return torch.optim.LBFGS(self.discriminator.parameters(), max_iter=3)

    class Manual(Gan):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    class Narrow(Gan):
        def backward(self, loss):
            loss.backward()

    class Shared(Gan):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]

    class Wrong(Gan):
        def training_step(self, batch, batch_idx):
            yield 1.0
            yield 2.0

    for module, words, arguments in (
        (Lbfgs(), "LBFGS evaluates the loss several times.*generator", {}),
        (Manual(), "is a generator, which manual optimization would never start", {}),
        (Narrow(), "takes no argument `inputs`", {}),
        (Shared(), "belongs to two optimizers", {"accumulate_grad_batches": 2}),
        (Wrong(), "yielded a float: 1.0", {}),
    ):
        with pytest.raises(MisconfigurationException, match=words):
            make_trainer(**arguments).fit(module, make_loader())


# ---------------------------------------------------------------------- what global_step counts


class NoLoss(Regression):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx == 4 else None


class Twice(Regression):
    """An optimizer that evaluates the loss several times in a step."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=3)


class NoOptimizer(Regression):
    def configure_optimizers(self):
        return None


class Skips(Regression):
    """Every loss overflows in float16: no step is ever made."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * float("inf")


class Manual(Regression):
    steps, wrapped = 1, True

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers(self.wrapped) if self.number > 1 else [self.optimizers(self.wrapped)]:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    number = 1

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.01) for _ in range(self.number)]


class ManualTwo(Manual):
    number = 2


class ManualRaw(Manual):
    wrapped = False


class StopsEarly(Regression):
    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 3 else None


STEPS_OF_FIVE_BATCHES = [
    ("a step per batch", Regression, {}, 5),
    ("a step per window of 2, the last one shorter", Regression, {"accumulate_grad_batches": 2}, 3),
    ("no loss: the step is made, and changes nothing", NoLoss, {}, 5),
    ("skipped by the loss scaler", Skips, {"precision": "16-mixed"}, 5),
    ("several evaluations are one step", Twice, {}, 5),
    ("no optimizer", NoOptimizer, {}, 5),
    ("manual, one optimizer", Manual, {}, 5),
    ("manual, two optimizers", ManualTwo, {}, 10),
    ("manual, around the wrapped optimizer: not seen", ManualRaw, {}, 0),
    ("yielding, two optimizers", Gan, {}, 10),
    ("yielding, two optimizers, windows of 2", Gan, {"accumulate_grad_batches": 2}, 6),
    ("the rest of the epoch is skipped", StopsEarly, {}, 3),
]


@pytest.mark.filterwarnings("ignore:.*returned `None`", "ignore:.*will run with no optimizer")
@pytest.mark.parametrize(("kind", "arguments", "steps"), [row[1:] for row in STEPS_OF_FIVE_BATCHES],
                         ids=[row[0] for row in STEPS_OF_FIVE_BATCHES])  # fmt: skip
def test_global_step_counts_the_steps_that_optimizers_were_told_to_make(kind, arguments, steps):
    """One rule: each time an optimizer is told to step, by the loop or through `LightningOptimizer`, is one."""
    trainer = make_trainer(max_epochs=2, **arguments)
    trainer.fit(kind(), make_loader(20))
    assert trainer.global_step == 2 * steps
