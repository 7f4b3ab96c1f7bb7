"""Averages of weights: against loops written by hand, after resuming, and while validation fails."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support import Regression, make_loader, make_trainer
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import fulmen
from fulmen.callbacks import (
    Callback,
    Checkpoint,
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from fulmen.utilities.errors import MisconfigurationException

DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


class Net(Regression):
    """A frozen layer, batch norm and Adam; at the batches of `broken` the loss is infinite."""

    def __init__(self, broken=()):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.first.requires_grad_(False)
        self.broken = broken

    def forward(self, x):
        return self.layer(self.norm(self.first(x)))

    def training_step(self, batch, batch_idx):
        return self.loss(batch) * (float("inf") if batch_idx in self.broken else 1.0)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


def net(*args):
    torch.manual_seed(3)
    return Net(*args)


def tensors(module):
    """Copies of parameters and buffers."""
    return [t.detach().clone() for t in module.state_dict().values()]


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))


def fit(model, callbacks, epochs=2, ckpt_path=None, loader=None, val=True, **kwargs):
    trainer = make_trainer(
        max_epochs=epochs, callbacks=callbacks, enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
        **kwargs,
    )  # fmt: skip
    loader = make_loader(24, 4) if loader is None else loader
    trainer.fit(model, loader, make_loader(8, seed=5) if val else None, ckpt_path=ckpt_path)
    return trainer


def train_by_hand(model, after_step, precision="32-true", window=1, epochs=2):
    """The same training in plain PyTorch; `after_step` is not called for steps the loss scaler skipped."""
    (optimizer,), (scheduler,) = model.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")
    for _ in range(epochs):
        for i, batch in enumerate(make_loader(24, 4)):
            with torch.autocast("cpu", DTYPES.get(precision), enabled=precision in DTYPES):
                loss = model.training_step(batch, i)
            scaler.scale(loss / window).backward()
            if (i + 1) % window == 0:
                before = model.layer.weight.detach().clone()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                if not torch.equal(before, model.layer.weight):
                    after_step()
        scheduler.step()


class EMAByHand:
    """`average = decay * average + (1 - decay) * weight`, tensor by tensor; buffers too, counters rounded down."""

    def __init__(self, model, decay):
        self.model, self.decay, self.average, self.count = model, decay, None, 0

    def __call__(self):
        self.count += 1
        now = tensors(self.model)
        if self.average is None:
            self.average = now
            return
        for average, tensor in zip(self.average, now):
            average.copy_(self.decay * average + (1 - self.decay) * tensor)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_ema_is_the_one_written_by_hand(precision, window):
    broken = (2, 3) if precision == "16-mixed" else ()
    model, average = net(broken), EMAWeightAveraging(decay=0.9)
    trainer = fit(model, [average], precision=precision, accumulate_grad_batches=window, val=False)
    hand = net(broken)
    ema = EMAByHand(hand, 0.9)
    train_by_hand(hand, ema, precision, window)
    assert same(tensors(model), ema.average)
    assert trainer.global_step == 12 // window
    assert average.weights_state()["n_averaged"] == ema.count
    assert (ema.count < trainer.global_step) == bool(broken)


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize(
    "formula",
    [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, {"avg_fn": lambda average, weight, n: average + (weight - average) / n}],
    ids=["equal weights", "for lists", "for tensors"],
)  # fmt: skip
def test_formulas_are_those_of_torch(formula, use_buffers):
    model, hand = net(), net()
    fit(model, [WeightAveraging(use_buffers=use_buffers, **formula)], val=False)
    averaged = AveragedModel(hand, use_buffers=use_buffers, **formula)
    train_by_hand(hand, lambda: averaged.update_parameters(hand))
    assert same(tensors(model), tensors(averaged.module))


class Watch(Callback):
    """Notes weights, lr and number of averaged weights at the start of validation, and after each epoch."""

    def __init__(self):
        self.seen = []

    def on_validation_start(self, trainer, pl_module):
        self.seen.append(("start", tensors(pl_module)))

    def on_validation_batch_start(self, trainer, pl_module, *args):
        self.seen.append(("inside", tensors(pl_module)))

    def on_validation_end(self, trainer, pl_module):
        self.seen.append(("end", tensors(pl_module)))

    def of(self, moment):
        return [seen for name, seen in self.seen if name == moment]


@pytest.mark.parametrize("use_buffers", [True, False])
def test_validation_sees_the_average_and_training_goes_on_with_the_weights(use_buffers):
    watch, hand, plain = Watch(), net(), net()
    averaged = AveragedModel(hand, use_buffers=use_buffers)
    averages, weights = [], []

    def after_step():
        averaged.update_parameters(hand)
        averages.append(tensors(averaged.module))
        weights.append(tensors(hand))

    train_by_hand(hand, after_step)
    fit(plain, [WeightAveraging(use_buffers=use_buffers), watch], val_check_interval=3)
    at = [2, 5, 8, 11]
    assert [same(a, averages[i]) for a, i in zip(watch.of("inside")[::2], at)] == [True] * 4
    assert [same(a, weights[i]) for a, i in zip(watch.of("start"), at)] == [True] * 4
    assert [same(a, weights[i]) for a, i in zip(watch.of("end"), at)] == [True] * 4


def test_average_in_half_precision_moves_and_is_kept_in_float32(tmp_path):
    class Note(Callback):
        def __init__(self):
            self.average = None

        def on_train_batch_end(self, trainer, pl_module, *args):
            now = [p.detach().float() for p in pl_module.parameters()]
            self.average = now if self.average is None else [0.999 * a + 0.001 * w for a, w in zip(self.average, now)]

    model, note = net(), Note()
    saver = ModelCheckpoint(dirpath=tmp_path, filename="x", save_on_train_epoch_end=True)
    trainer = fit(model, [EMAWeightAveraging(decay=0.999), note, saver], epochs=4, precision="bf16-true")
    assert trainer.global_step == 24
    assert model.layer.weight.dtype is torch.bfloat16
    assert same([p.detach() for p in model.parameters()], [a.bfloat16() for a in note.average])
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    names = [name for name, _ in model.named_parameters()]
    assert same([content["state_dict"][name] for name in names], note.average)
    assert content["current_model_state"]["layer.weight"].dtype is torch.bfloat16
    stands_still = torch.tensor(1.0).bfloat16() * 0.999 + torch.tensor(1.1).bfloat16() * 0.001
    assert stands_still == 1, "the reason for float32"


def saved_at(path, epoch, batch):
    """A callback that writes a checkpoint at the end of a batch, or (None) at the start of the epoch."""

    class SaveAt(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, _, batch_idx):
            if (trainer.current_epoch, batch_idx) == (epoch, batch):
                trainer.save_checkpoint(path)

        def on_train_epoch_start(self, trainer, pl_module):
            if (trainer.current_epoch, None) == (epoch, batch):
                trainer.save_checkpoint(path)

    return SaveAt()


class Resumable:
    """A loader that can go on inside an epoch."""

    def __init__(self, left_out=()):
        self.batches = [batch for i, batch in enumerate(make_loader(24, 4)) if i not in left_out]
        self.position = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.position %= len(self)
        while self.position < len(self):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


AVERAGES = {
    "equal": lambda: WeightAveraging(use_buffers=False),
    "ema": lambda: EMAWeightAveraging(decay=0.8, update_every_n_steps=2, update_starting_at_epoch=1),
    "swa": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=2),
}


def outcome(model, trainer, callback):
    """Everything that must be the same: weights, optimizer, learning rate, average and its counters."""
    state = callback.weights_state()
    found = [*tensors(model), *state["average"], torch.as_tensor(state["n_averaged"])]
    found += [torch.as_tensor(trainer.optimizers[0].param_groups[0]["lr"]), torch.as_tensor(trainer.global_step)]
    for moments in trainer.optimizers[0].state_dict()["state"].values():
        found += [torch.as_tensor(value) for value in moments.values()]
    return found


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", AVERAGES)
def test_resumed_run_ends_in_the_same_bits(tmp_path, kind, precision):
    broken = (2,) if precision == "16-mixed" else ()
    whole, callback = net(broken), AVERAGES[kind]()
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    early, late = ((0, 3), (2, 0), (3, 5)), ((0, 2), (1, 1), (2, None), (2, 5), (3, 2), (4, None), (4, 1))
    # Files that are written by callbacks before and behind this one: the first hold weights it has not followed yet.
    savers = [[saved_at(tmp_path / f"{e}-{b}.ckpt", e, b) for e, b in at] for at in (early, late)]
    trainer = fit(whole, [*savers[0], callback, *savers[1], saver], 4, loader=Resumable(), precision=precision)
    expected = outcome(whole, trainer, callback)
    files = sorted(path.name for path in tmp_path.glob("*.ckpt"))
    assert len(files) == (15 if kind == "swa" else 12)
    for name in files:
        model, again = net(broken), AVERAGES[kind]()
        trainer = fit(model, [again], 4, tmp_path / name, Resumable(), precision=precision)
        assert same(outcome(model, trainer, again), expected), name


@pytest.mark.parametrize("kind", ["equal", "ema"])
def test_a_file_written_after_fit_holds_the_weights_too(tmp_path, kind):
    whole, callback = net(), AVERAGES[kind]()
    expected = outcome(whole, fit(whole, [callback], 4), callback)
    fit(net(), [AVERAGES[kind]()], 2).save_checkpoint(tmp_path / "after.ckpt")
    model, again = net(), AVERAGES[kind]()
    assert same(outcome(model, fit(model, [again], 4, tmp_path / "after.ckpt"), again), expected)


class Failing(Callback):
    """Breaks the second validation."""

    def __init__(self):
        self.validations = 0

    def on_validation_batch_end(self, trainer, pl_module, *args):
        self.validations += 1
        if self.validations == 3:
            raise RuntimeError("no space left")


def test_a_failing_validation_leaves_the_weights_and_a_file_to_go_on_from(tmp_path):
    whole, callback, hand, broken = net(), AVERAGES["equal"](), net(), net()
    expected = outcome(whole, fit(whole, [callback], 4), callback)
    train_by_hand(hand, lambda: None)
    with pytest.raises(RuntimeError, match="no space"):
        fit(broken, [OnExceptionCheckpoint(tmp_path), AVERAGES["equal"](), Failing()], 4)
    # the second epoch's scheduler step changes no weights
    assert same(tensors(broken), tensors(hand))
    model, again = net(), AVERAGES["equal"]()
    assert same(outcome(model, fit(model, [again], 4, tmp_path / "on_exception.ckpt"), again), expected)


class Adversarial(Regression):
    """Two optimizers, stepped by hand in each batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(4, 1)
        self.history = []

    def training_step(self, batch, batch_idx):
        for layer, optimizer in zip((self.layer, self.other), self.optimizers()):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(layer(batch[0]), batch[1]))
            optimizer.step()
        self.history.append(torch.cat([p.detach().flatten() for p in self.parameters()]))

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.layer, self.other)]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_several_optimizers_are_followed_once_per_batch(every):
    model, callback = Adversarial(), EMAWeightAveraging(decay=0.5, update_every_n_steps=every)
    trainer = fit(model, [callback], 1, val=False)
    assert trainer.global_step == 12
    due = [i for i in range(6) if any(step % every == 0 for step in (2 * i, 2 * i + 1))]
    average = model.history[due[0]]
    for i in due[1:]:
        average = 0.5 * average + 0.5 * model.history[i]
    assert callback.weights_state()["n_averaged"] == len(due)
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), average)


@pytest.mark.parametrize("first", ["average", "guard"])
def test_a_step_that_was_left_out_is_not_followed(first):
    class Guard(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step in (2, 3, 7):
                trainer.optimization.drop_step(optimizer)

    average = EMAWeightAveraging(decay=0.5, update_every_n_steps=2)
    trainer = fit(net(), [average, Guard()] if first == "average" else [Guard(), average], val=False)
    assert (trainer.global_step, average.weights_state()["n_averaged"]) == (12, 5)


def test_without_an_update_the_weights_are_used(tmp_path):
    watch, hand, model = Watch(), net(), net()
    train_by_hand(hand, lambda: None)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="x")
    fit(model, [EMAWeightAveraging(update_starting_at_step=1000), watch, saver])
    assert same(tensors(model), tensors(hand)) and same(watch.of("inside")[-1], tensors(hand))
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert same(list(content["state_dict"].values()), tensors(hand))
    assert int(content["averaging_state"]["n_averaged"]) == 0


def test_steps_and_epochs_to_follow_can_be_chosen():
    class Asked(EMAWeightAveraging):
        asked = ()

        def should_update(self, step_idx=None, epoch_idx=None):
            answer = super().should_update(step_idx, epoch_idx)
            self.asked = (*self.asked, (step_idx, epoch_idx, answer))
            return answer

    callback = Asked(update_every_n_steps=2, update_starting_at_step=1, update_starting_at_epoch=1)
    fit(net(), [callback], accumulate_grad_batches=2)
    steps = [(0, None, False), (1, None, False), (2, None, True), (None, 0, False)]
    assert callback.asked == (*steps, (3, None, False), (4, None, True), (5, None, False), (None, 1, True))
    assert callback.weights_state()["n_averaged"] == 3
    assert not EMAWeightAveraging(update_every_n_steps=0).should_update(step_idx=0)
    assert not WeightAveraging().should_update(epoch_idx=3)


def test_checkpoints_hold_both_and_are_loaded_for_what_they_are_needed(tmp_path, caplog):
    model, watch = net(), Watch()
    saver = ModelCheckpoint(dirpath=tmp_path, filename="x")
    trainer = fit(model, [EMAWeightAveraging(decay=0.5), watch, saver])
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert same(list(content["state_dict"].values()), watch.of("inside")[-1])
    assert same(list(content["current_model_state"].values()), watch.of("end")[-1])
    assert int(content["averaging_state"]["n_averaged"]) == 12
    assert content["callbacks"]["EMAWeightAveraging"] == {"latest_update_step": 12}
    assert same(tensors(Net.load_from_checkpoint(tmp_path / "x.ckpt")), watch.of("inside")[-1])
    fresh = net()
    with caplog.at_level("INFO", logger="fulmen"):
        make_trainer(callbacks=[EMAWeightAveraging()]).test(fresh, make_loader(4), tmp_path / "x.ckpt", verbose=False)
    assert "without training" in caplog.text
    assert same(tensors(fresh), watch.of("inside")[-1])
    trainer.validate(model, make_loader(8, seed=5), verbose=False)
    assert same(watch.of("inside")[-1], tensors(fresh)) and same(tensors(model), tensors(fresh))
    other = net()
    trainer.validate(other, make_loader(8, seed=5), verbose=False)
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    assert same(list(torch.load(tmp_path / "other.ckpt", weights_only=True)["state_dict"].values()), tensors(other))
    with pytest.warns(UserWarning, match="saved without an average"):
        fit(net(), [], 1).save_checkpoint(tmp_path / "plain.ckpt")
        average = EMAWeightAveraging(update_every_n_steps=5)
        fit(net(), [average], 2, tmp_path / "plain.ckpt")
    assert average.weights_state()["n_averaged"] == 1, "of the steps 6 to 11 only 10 is due"


def test_a_file_of_weights_only_holds_the_average(tmp_path):
    watch = Watch()
    saver = ModelCheckpoint(dirpath=tmp_path, filename="x", monitor="val_loss", save_top_k=-1, save_weights_only=True)
    fit(net(), [EMAWeightAveraging(decay=0.5), watch, saver], 1)
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert same(list(content["state_dict"].values()), watch.of("inside")[-1])


def test_a_buffer_that_is_assigned_is_followed():
    class Counter(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def on_train_batch_start(self, batch, batch_idx):
            self.seen = self.seen + 1

    torch.manual_seed(3)
    model = Counter()
    fit(model, [WeightAveraging()], 1)
    assert model.seen == 3.5


def test_layers_of_configure_model_and_compiled_ones_are_followed():
    class Late(Net):
        def configure_model(self):
            if not hasattr(self, "extra"):
                self.extra = torch.compile(nn.Linear(1, 1, bias=False), backend="eager")

        def forward(self, x):
            return self.extra(super().forward(x))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Note(Callback):
        weights = ()

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.weights = (*self.weights, pl_module.extra.weight.detach().double().clone())

    torch.manual_seed(3)
    model, note = torch.compile(Late(), backend="eager"), Note()
    fit(model, [WeightAveraging(), note], 1)
    mean = torch.stack(note.weights).mean(dim=0)
    assert torch.allclose(model.extra.weight.double(), mean, atol=1e-7) and not torch.equal(mean, note.weights[-1])


@pytest.mark.parametrize("kind", AVERAGES)
def test_a_pickled_callback_starts_anew(kind):
    first, model, again = AVERAGES[kind](), net(), net()
    fit(model, [first], 3)
    second = pickle.loads(pickle.dumps(first))
    fit(again, [second], 3)
    assert same(tensors(again), tensors(model))
    fit(model, [first], 1)  # also the callback itself can be used again


class Rewinding(Callback):
    """Keeps everything before one batch and comes back to it after another, as when a loss is not finite."""

    def __init__(self, average, keep, back):
        self.average, self.keep, self.back = average, keep, back

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.keep:
            self.kept = copy.deepcopy((pl_module.state_dict(), self.average.weights_state()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.back:
            pl_module.load_state_dict(self.kept[0])
            self.average.load_weights_state(self.kept[1])


class Plain(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", ["equal", "ema"])
def test_the_average_goes_back_with_the_weights(kind, order):
    rewound, straight, average = Plain(), Plain(), AVERAGES[kind]()
    straight.load_state_dict(rewound.state_dict())
    fit(rewound, [average, Rewinding(average, (0, 2), (0, 3))][::order], 1, loader=Resumable(), val=False)
    fit(straight, [AVERAGES[kind]()], 1, loader=Resumable(left_out=(2, 3)), val=False)
    assert same(tensors(rewound), tensors(straight))


def test_the_mean_over_epochs_goes_back_with_the_weights():
    model, average = Plain(), StochasticWeightAveraging(0.05, swa_epoch_start=1)
    rewinding = Rewinding(average, (1, 0), (2, 0))
    fit(model, [average, rewinding], 3, val=False)
    kept = rewinding.kept[1]
    assert average.n_averaged == kept["n_averaged"] == 2
    assert same(average.weights_state()["average"], kept["average"])
    assert same([p.detach() for p in model.parameters()], kept["average"][: len(list(model.parameters()))])


# ---------------------------------------------------------------------- the mean over epochs


def swa_by_hand(model, precision="32-true", epochs=4, start=1, window=1):
    """Plain PyTorch: the mean of the weights at the start of the epochs from `start` on, and `update_bn`."""
    (optimizer,), (scheduler,) = model.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")
    autocast = torch.autocast("cpu", DTYPES.get(precision), enabled=precision in DTYPES)
    averaged, rates = AveragedModel(model), []
    for epoch in range(epochs):
        if epoch == start:
            scheduler = SWALR(optimizer, 0.01, anneal_epochs=2)
        if epoch >= start:
            averaged.update_parameters(model)
        rates.append(optimizer.param_groups[0]["lr"])
        for i, batch in enumerate(make_loader(24, 4)):
            with autocast:
                loss = model.training_step(batch, i)
            scaler.scale(loss / window).backward()
            if (i + 1) % window == 0:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        scheduler.step()
    with autocast:
        update_bn(make_loader(24, 4), averaged.module)
    return averaged.module, rates


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize(("precision", "window"), [("32-true", 1), ("32-true", 2), ("bf16-mixed", 1), ("16-mixed", 1)])
def test_mean_and_statistics_are_those_of_torch(caplog, precision, window):
    broken = (1,) if precision == "16-mixed" else ()
    model, rates = net(broken), Rates()
    average = StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=2)
    with caplog.at_level("INFO", logger="fulmen"):
        trainer = fit(model, [average, rates], 4, precision=precision, accumulate_grad_batches=window)
    expected, rates_by_hand = swa_by_hand(net(broken), precision, window=window)
    assert same(tensors(model), tensors(expected))
    assert rates.seen == [*rates_by_hand, 0.01]
    assert (average.swa_start, average.swa_end, average.n_averaged) == (1, 3, 3)
    assert "SWALR in the place of the scheduler StepLR" in caplog.text
    assert (trainer.current_epoch, trainer.max_epochs, model.norm.momentum) == (5, 4, 0.1)


class Manual(Net):
    def __init__(self, broken=()):
        super().__init__(broken)
        self.automatic_optimization = False
        self.history = []

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        optimizer.step()
        self.history.append(self.layer.weight.detach().clone())
        if batch_idx == 5:
            self.lr_schedulers().step()
        return loss


class Backwards(Callback):
    epochs = ()

    def on_before_backward(self, trainer, pl_module, loss):
        self.epochs = (*self.epochs, trainer.current_epoch)


def test_statistics_are_measured_without_learning_also_in_manual_optimization():
    torch.manual_seed(3)
    model, backwards = Manual(), Backwards()
    trainer = fit(model, [StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=2), backwards], 4)
    assert same(tensors(model), tensors(swa_by_hand(net())[0]))
    assert (trainer.global_step, backwards.epochs.count(3), backwards.epochs.count(4)) == (25, 6, 0)


def test_steps_a_scaler_skipped_in_manual_optimization_are_not_followed():
    torch.manual_seed(3)
    model, average = Manual(broken=(2, 4)), EMAWeightAveraging(decay=0.5)
    weights = [model.layer.weight.detach().clone()]
    fit(model, [average], precision="16-mixed", val=False)
    weights += model.history
    made = sum(not torch.equal(before, after) for before, after in pairwise(weights))
    assert average.weights_state()["n_averaged"] == made < 12


def test_without_a_scheduler_the_rate_is_annealed_all_the_same():
    rates, optimizer = Rates(), Plain().configure_optimizers()
    fit(Plain(), [StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=2), rates], 4)
    scheduler, expected = None, []
    for epoch in range(5):
        scheduler = SWALR(optimizer, 0.01, anneal_epochs=2) if epoch == 1 else scheduler
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    assert rates.seen == expected and expected[-1] == 0.01


def test_a_run_resumed_after_its_last_epoch_has_the_mean(tmp_path):
    torch.manual_seed(0)
    whole, again = Regression(), Regression()
    saver = ModelCheckpoint(dirpath=tmp_path, filename="x")
    fit(whole, [StochasticWeightAveraging(0.01, swa_epoch_start=1), saver], 3)
    fit(again, [StochasticWeightAveraging(0.01, swa_epoch_start=1)], 3, tmp_path / "x.ckpt")
    assert same(tensors(again), tensors(whole))
    assert not torch.equal(
        torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]["layer.weight"], whole.layer.weight
    )


def test_the_module_that_was_measured_is_the_newest_checkpoint(tmp_path):
    model, saver = net(), ModelCheckpoint(dirpath=tmp_path, filename="{epoch}")
    fit(model, [saver, StochasticWeightAveraging(0.01, swa_epoch_start=2)], 3)
    assert saver.best_model_path.endswith("epoch=3.ckpt")
    content = torch.load(saver.best_model_path, weights_only=True)
    assert same(list(content["state_dict"].values()), tensors(model))
    state = content["callbacks"]["StochasticWeightAveraging"]
    assert (state["n_averaged"], state["latest_update_epoch"]) == (2, 2)
    assert torch.equal(state["average_model_state"]["layer.weight"], model.layer.weight)
    assert state["scheduler_state"] == content["lr_schedulers"][0]


def test_a_layer_in_eval_mode_keeps_its_statistics():
    class Frozen(Net):
        def on_train_epoch_start(self):
            self.norm.eval()

    torch.manual_seed(3)
    model = Frozen().train()
    model.norm.eval().running_mean.fill_(0.25)
    fit(model, [StochasticWeightAveraging(0.01)], 2)
    assert (model.norm.running_mean == 0.25).all() and model.norm.momentum == 0.1


def test_mean_of_half_precision_is_taken_in_float32():
    class Note(Callback):
        weights = ()

        def on_train_epoch_start(self, trainer, pl_module):
            self.weights = (*self.weights, pl_module.layer.weight.detach().clone())

    model, note = net(), Note()
    average = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    fit(model, [average, note], 3, precision="bf16-true")
    mean = note.weights[0].float()
    for n, weight in enumerate(note.weights[1:3], start=1):
        mean = mean + (weight.float() - mean) / (n + 1)
    assert torch.equal(model.layer.weight, mean.bfloat16())


class Stop(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == 2


def test_training_that_ends_before_its_time():
    watch = Watch()
    model = net()
    with pytest.warns(UserWarning, match="ended after epoch 2"):
        trainer = fit(model, [StochasticWeightAveraging(0.01, swa_epoch_start=2), Stop(), watch], 4)
    assert same(watch.of("end")[-1], tensors(model)) and trainer.max_epochs == 4
    average = StochasticWeightAveraging(0.01, swa_epoch_start=2)
    with pytest.warns(UserWarning, match="before the statistics of batch norm"):
        fit(model, [average, Stop()], 3)
    assert torch.equal(model.layer.weight, average.weights_state()["average"][0])
    with pytest.warns(UserWarning, match="before the statistics of batch norm"):
        trainer = fit(model, [average], -1, max_steps=18)
    assert torch.equal(model.layer.weight, average.weights_state()["average"][0]) and trainer.max_epochs == -1


def test_a_failure_leaves_limits_and_momentum_as_they_were():
    class Break(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 2:
                assert pl_module.norm.momentum is None
                raise RuntimeError("no power")

    model, average = net(), StochasticWeightAveraging(0.01, swa_epoch_start=1)
    trainer = make_trainer(max_epochs=2, callbacks=[average, Break()])
    with pytest.raises(RuntimeError, match="no power"):
        trainer.fit(model, make_loader())
    assert (trainer.max_epochs, model.norm.momentum) == (2, 0.1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"swa_lrs": 0.0}, {"swa_lrs": -0.1}, {"swa_lrs": "0.1"}, {"swa_lrs": [0.1, -0.1]}, {"swa_lrs": []},
        {"swa_epoch_start": 0}, {"swa_epoch_start": 1.5}, {"swa_epoch_start": -0.1}, {"swa_epoch_start": "1"},
        {"annealing_epochs": -1}, {"annealing_epochs": 1.5}, {"annealing_strategy": "cosine"}, {"avg_fn": 3}, {"device": 3},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments_of_the_mean_over_epochs(wrong):
    with pytest.raises(MisconfigurationException, match=next(iter(wrong))):
        StochasticWeightAveraging(**{"swa_lrs": 0.1, **wrong})


def test_what_the_mean_over_epochs_cannot_be_used_with():
    class TwoSchedulers(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1) for _ in "ab"]

    class FSDPLike(fulmen.strategies.SingleDeviceStrategy):
        pass

    FSDPLike.__name__ = "FSDPStrategy"
    average = StochasticWeightAveraging(0.1)
    for model, settings, message in (
        (Adversarial(), {}, "2 optimizers"),
        (TwoSchedulers(), {}, "2 schedulers"),
        (net(), {"max_epochs": -1, "max_steps": 3}, "there is no limit"),
        (net(), {"strategy": FSDPLike("cpu")}, "FSDPStrategy"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            make_trainer(callbacks=[average], **settings).fit(model, make_loader())
    with pytest.raises(MisconfigurationException, match="list of 2"):
        model = Adversarial()
        model.automatic_optimization = True
        model.configure_optimizers = lambda: torch.optim.SGD([{"params": p} for p in model.layer.parameters()], lr=0.1)
        make_trainer(callbacks=[StochasticWeightAveraging([0.1])]).fit(model, make_loader())


@pytest.mark.parametrize("order", [1, -1])
def test_one_average_at_a_time(order):
    with pytest.raises(MisconfigurationException, match="Averaging, .*Averaging"):
        fit(net(), [EMAWeightAveraging(), StochasticWeightAveraging(0.1)][::order])


def test_wrong_arguments_of_averages():
    for decay in (-0.1, 1.1):
        with pytest.raises(ValueError, match="decay"):
            EMAWeightAveraging(decay=decay)
    with pytest.raises(ValueError, match="two formulas"):
        WeightAveraging(avg_fn=max, multi_avg_fn=max)
    with pytest.raises(TypeError, match="decya"):
        EMAWeightAveraging(decya=0.9)


# ---------------------------------------------------------------------- on a GPU, and with files of the reference


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device", [None, "cpu"])
def test_on_a_gpu(device):
    class NoSync(EMAWeightAveraging):
        def on_train_batch_end(self, *args):
            torch.cuda.set_sync_debug_mode("error" if device is None else "default")
            super().on_train_batch_end(*args)
            torch.cuda.set_sync_debug_mode("default")

    class Note(Callback):
        ema = None

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.ema = self.ema or EMAByHand(pl_module, 0.9)
            self.ema()

    model, note, average = net(), Note(), NoSync(device, decay=0.9)
    fit(model, [average, note], accelerator="gpu", devices=1)
    assert same(tensors(model), [value.cpu() for value in note.ema.average])
    assert all(value.device.type == "cpu" for value in average.weights_state()["average"])


REFERENCE = os.environ.get("FULMEN_REFERENCE_PYTHON", "")
SCRIPT = """
import importlib, json, sys, warnings
warnings.simplefilter("ignore")
import torch
from torch.utils.data import DataLoader, TensorDataset
name, kind, epochs, folder, *path = sys.argv[1:]
pl, callbacks = importlib.import_module(name), importlib.import_module(name + ".callbacks")

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = torch.nn.Linear(3, 1), torch.nn.BatchNorm1d(3)
    def training_step(self, batch, batch_idx):
        return self.layer(self.norm(batch[0])).add(1).pow(2).mean()
    def validation_step(self, batch, batch_idx):
        pass
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

torch.manual_seed(0)
loader = DataLoader(TensorDataset(torch.randn(8, 3)), batch_size=2)
average = {"equal": lambda: callbacks.WeightAveraging(use_buffers=False),
           "ema": lambda: callbacks.EMAWeightAveraging(decay=0.7, update_every_n_steps=3),
           "swa": lambda: callbacks.StochasticWeightAveraging(0.01, 2, 3)}[kind]()
saver = callbacks.ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
trainer = pl.Trainer(max_epochs=int(epochs), accelerator="cpu", logger=False, callbacks=[average, saver],
                     num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False)
model = Model()
trainer.fit(model, loader, loader, ckpt_path=path[0] if path else None)
lr = trainer.optimizers[0].param_groups[0]["lr"]
print("STATE " + json.dumps([lr, *(value.flatten().tolist() for value in model.state_dict().values())]))
"""


@pytest.mark.skipif(not REFERENCE, reason="needs FULMEN_REFERENCE_PYTHON: a Python that has Lightning 2.x installed")
@pytest.mark.parametrize("writer, reader", [("lightning.pytorch", "fulmen"), ("fulmen", "lightning.pytorch")])
@pytest.mark.parametrize("kind", AVERAGES)
def test_the_other_ones_file_is_continued(tmp_path, kind, writer, reader):
    def call(package, *arguments):
        ours = package == "fulmen"
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]) if ours else ""}
        command = [sys.executable if ours else REFERENCE, "-c", SCRIPT, package, kind, "4", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
        return next(line for line in done.stdout.splitlines() if line.startswith("STATE "))

    whole = call(writer, tmp_path / "whole")
    for epoch in (0, 2):
        assert call(reader, tmp_path / f"{epoch}", tmp_path / "whole" / f"epoch={epoch}.ckpt") == whole
