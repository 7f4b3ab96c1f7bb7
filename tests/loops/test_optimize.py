"""One training batch: what the hooks see, what is returned, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Regression, make_loader, make_trainer

import fulmen as pl
from fulmen.utilities.errors import MisconfigurationException

pytestmark = pytest.mark.filterwarnings("ignore:.*validation_step", "ignore:.*returned `None`", "ignore:.*gradient")


class Outputs(pl.Callback):
    """Remembers what `on_train_batch_end` gets."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs)


def fit(model: pl.LightningModule, samples: int = 16, **arguments: Any) -> pl.Trainer:
    trainer = make_trainer(limit_val_batches=0, **arguments)
    trainer.fit(model, make_loader(samples))
    return trainer


def manual(step) -> pl.LightningModule:
    """A module whose `training_step` is `step(self, batch)`, in manual optimization."""

    class Manual(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            return step(self, batch)

    return Manual()


def automatic(step) -> pl.LightningModule:
    class Automatic(Regression):
        def training_step(self, batch, batch_idx):
            return step(self, batch)

    return Automatic()


# ---------------------------------------------------------------------- the order things happen in


def test_gradients_of_the_step_before_are_there_in_training_step_and_gone_before_backward():
    seen = []

    class Model(Regression):
        def training_step(self, batch, batch_idx):
            seen.append(("step", self.layer.weight.grad is not None))
            return super().training_step(batch, batch_idx)

        def on_before_backward(self, loss):
            seen.append(("backward", self.layer.weight.grad is not None))

    fit(Model(), samples=8)
    assert seen == [("step", False), ("backward", False), ("step", True), ("backward", False)]


def test_the_batch_is_moved_and_changed_before_on_train_batch_start():
    seen = []

    class Model(Regression):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return x.double(), y.double()

        def on_train_batch_start(self, batch, batch_idx):
            seen.append(batch[0].dtype)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return self.loss((x.float(), y.float()))

    fit(Model(), samples=4)
    assert seen == [torch.float64]


def test_on_train_batch_start_may_skip_the_rest_of_the_epoch():
    steps = []

    class Model(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

        def training_step(self, batch, batch_idx):
            steps.append((self.current_epoch, batch_idx))
            return super().training_step(batch, batch_idx)

    trainer = fit(Model(), max_epochs=2)
    assert steps == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert trainer.global_step == 4
    assert trainer.current_epoch == 2


# ---------------------------------------------------------------------- what training_step returns


def test_outputs_of_a_tensor_is_the_detached_loss():
    outputs = Outputs()
    fit(Regression(), callbacks=[outputs])
    assert [set(seen) for seen in outputs.seen] == [{"loss"}] * 4
    assert all(seen["loss"].shape == () and not seen["loss"].requires_grad for seen in outputs.seen)


def test_outputs_of_a_dict_has_its_other_values_too():
    outputs = Outputs()
    model = automatic(lambda self, batch: {"loss": self.loss(batch), "size": 4, "x": self(batch[0])})
    fit(model, callbacks=[outputs])
    assert [set(seen) for seen in outputs.seen] == [{"loss", "size", "x"}] * 4
    assert not any(seen["loss"].requires_grad for seen in outputs.seen)


def test_the_loss_in_outputs_is_divided_by_the_window():
    plain, divided = Outputs(), Outputs()
    torch.manual_seed(0)
    fit(Regression(lr=0.0), callbacks=[plain])
    torch.manual_seed(0)
    fit(Regression(lr=0.0), callbacks=[divided], accumulate_grad_batches=4)
    for window, whole in zip(divided.seen, plain.seen, strict=True):
        assert torch.equal(window["loss"], whole["loss"] / 4)


def test_none_skips_backward_but_counts_as_a_step():
    outputs, events = Outputs(), []

    class Model(Regression):
        def training_step(self, batch, batch_idx):
            events.append("step")
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

        def on_before_backward(self, loss):
            events.append("backward")

        def on_before_optimizer_step(self, optimizer):
            events.append("optimizer")

    trainer = fit(Model(), samples=8, callbacks=[outputs])
    assert events == ["step", "optimizer", "step", "backward", "optimizer"]
    assert outputs.seen[0] == {} and set(outputs.seen[1]) == {"loss"}
    assert trainer.global_step == 2


def test_none_is_warned_about_once(recwarn):
    """A run in which one batch is bad says so, not in every batch."""
    fit(automatic(lambda self, batch: None if self.global_step % 2 else self.loss(batch)), max_epochs=2)
    assert len([w for w in recwarn if "returned `None`" in str(w.message)]) <= 1


@pytest.mark.parametrize("value", [{"x": 1}, 1.0, "loss", [1.0]], ids=["dict without loss", "number", "str", "list"])
def test_other_results_are_refused(value):
    with pytest.raises(MisconfigurationException, match="training_step"):
        fit(automatic(lambda self, batch: value))


class SomeNone:
    """Three batches of which one is None, as a collate function returns that found nothing usable."""

    def __init__(self, none_at: int) -> None:
        full = next(iter(make_loader()))
        self.batches = [None if number == none_at else full for number in range(3)]

    def __len__(self):
        return 3

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("none_at", [1, 2])
def test_a_batch_that_is_none_is_skipped_with_a_warning(none_at):
    steps = []

    class Model(Regression):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [halving(optimizer)]

        def on_train_batch_start(self, batch, batch_idx):
            steps.append(batch_idx)

    outputs = Outputs()
    trainer = make_trainer(limit_val_batches=0, callbacks=[outputs])
    with pytest.warns(UserWarning, match="gave None"):
        trainer.fit(Model(), SomeNone(none_at))
    assert trainer.global_step == 2
    assert steps == [number for number in range(3) if number != none_at]
    assert [seen is None for seen in outputs.seen] == [number == none_at for number in range(3)]
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5, "the epoch is over all the same"


# ---------------------------------------------------------------------- signatures


def test_batch_idx_may_be_left_out():
    class Model(Regression):
        def training_step(self, batch):
            return self.loss(batch)

        def validation_step(self, batch):
            self.log("val_loss", self.loss(batch))

    trainer = make_trainer()
    trainer.fit(Model(), make_loader(), make_loader())
    assert trainer.global_step == 3 and "val_loss" in trainer.callback_metrics


def test_arguments_may_have_any_name():
    seen = []

    class Model(Regression):
        def training_step(self, samples, number):
            seen.append(number)
            return self.loss(samples)

    fit(Model())
    assert seen == [0, 1, 2, 3]


def test_optimizer_idx_is_refused_with_the_way_out():
    class Model(Regression):
        def training_step(self, batch, batch_idx, optimizer_idx):
            return self.loss(batch)

    with pytest.raises(RuntimeError, match="manual optimization"):
        fit(Model())


# ---------------------------------------------------------------------- accumulation


@pytest.mark.parametrize(
    ("batches", "window", "stepping"), [(5, 2, [1, 3, 4]), (4, 2, [1, 3]), (3, 5, [2]), (4, 1, [0, 1, 2, 3])]
)
def test_a_window_ends_with_its_last_batch_or_the_epoch(batches, window, stepping):
    seen = []

    class Model(Regression):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen.append((self.current_epoch, batch_idx, self.global_step))

    trainer = fit(Model(), samples=4 * batches, accumulate_grad_batches=window, max_epochs=2)
    counts = iter(seen)
    steps = 0
    for epoch in range(2):
        for batch_idx in range(batches):
            steps += batch_idx in stepping
            assert next(counts) == (epoch, batch_idx, steps)
    assert trainer.global_step == 2 * len(stepping)


def test_the_window_may_change_during_training():
    class Model(Regression):
        def on_train_epoch_start(self):
            self.trainer.accumulate_grad_batches = 1 + self.current_epoch

    assert fit(Model(), max_epochs=2).global_step == 4 + 2


def test_an_open_window_keeps_its_gradients_over_a_validation():
    grads = []

    class Model(Regression):
        def on_validation_start(self):
            grads.append(self.layer.weight.grad is not None)

    trainer = make_trainer(accumulate_grad_batches=2, val_check_interval=1)
    trainer.fit(Model(), make_loader(16), make_loader(4))
    assert grads == [True, False, True, False]


# ---------------------------------------------------------------------- clipping


def test_clipping_hook_gets_the_values_of_the_trainer_also_when_they_are_off():
    seen = []

    class Model(Regression):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            seen.append((gradient_clip_val, gradient_clip_algorithm))

    fit(Model(), samples=4)
    fit(Model(), samples=4, gradient_clip_val=0.5, gradient_clip_algorithm="value")
    assert seen[0] == (None, None)
    assert seen[1] == (0.5, "value")


def test_clip_gradients_takes_the_trainers_values_and_no_others():
    def step(self, batch):
        self.manual_backward(self.loss(batch))
        self.clip_gradients(self.optimizers(), gradient_clip_val=0.01)
        assert sum(p.grad.norm() ** 2 for p in self.parameters()).sqrt() <= 0.0101
        self.optimizers().step()

    fit(manual(step), samples=4)

    class Model(Regression):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clip_gradients(optimizer, gradient_clip_val=3.0)

    with pytest.raises(MisconfigurationException, match="gradient_clip_val"):
        fit(Model(), gradient_clip_val=0.5)

    class Other(Regression):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")

    with pytest.raises(MisconfigurationException, match="gradient_clip_algorithm"):
        fit(Other(), gradient_clip_val=0.5, gradient_clip_algorithm="value")


# ---------------------------------------------------------------------- optimizers and closures


def test_optimizer_step_must_run_the_closure():
    class Model(Regression):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.optimizer.step()

    with pytest.raises(MisconfigurationException, match="closure hasn't been executed"):
        fit(Model())


def test_optimizer_step_is_told_where_training_is():
    seen = []

    class Model(Regression):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            seen.append((epoch, batch_idx, isinstance(optimizer, torch.optim.SGD)))
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    fit(Model(), samples=8, max_epochs=2)
    assert seen == [(0, 0, True), (0, 1, True), (1, 0, True), (1, 1, True)]


def test_several_optimizers_need_manual_optimization():
    class Model(Regression):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]

    with pytest.raises(RuntimeError, match="manual optimization"):
        fit(Model())


def test_without_an_optimizer_nothing_is_learned_but_steps_are_counted():
    class Model(Regression):
        def configure_optimizers(self):
            return None

    model = Model()
    before = model.layer.weight.clone()
    with pytest.warns(UserWarning, match="no optimizer"):
        trainer = fit(model)
    assert torch.equal(before, model.layer.weight)
    assert trainer.global_step == 4


def test_hooks_of_torch_on_the_optimizer_are_called():
    """Pre-hooks may look at the arguments of `step`, so the closure is passed to them."""
    calls = []

    class Model(Regression):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            optimizer.register_step_pre_hook(lambda *args: calls.append("before"))
            optimizer.register_step_post_hook(lambda *args: calls.append("after"))
            return optimizer

    fit(Model(), samples=8)
    assert calls == ["before", "after"] * 2


def test_a_hook_on_the_optimizer_set_during_training_is_called():
    calls = []

    class Late(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                trainer.optimizers[0].register_step_pre_hook(lambda *args: calls.append("before"))

    fit(Regression(), callbacks=[Late()])
    assert calls == ["before"] * 3


def test_the_state_of_the_optimizer_may_be_read_through_both_objects():
    class Model(Regression):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            wrapped, raw = self.optimizers(), self.optimizers(use_pl_optimizer=False)
            assert wrapped.optimizer is raw and type(raw) is torch.optim.Adam
            assert isinstance(wrapped, torch.optim.Adam)
            assert wrapped.state is raw.state and wrapped.param_groups is raw.param_groups
            assert type(wrapped).__name__ == "LightningAdam"

    fit(Model())


# ---------------------------------------------------------------------- manual optimization


@pytest.mark.parametrize(
    ("step", "outputs"),
    [
        (lambda self, batch: None, {}),
        (lambda self, batch: self.loss(batch), {"loss"}),
        (lambda self, batch: {"a": 1, "b": self.loss(batch)}, {"a", "b"}),
    ],
    ids=["nothing", "tensor", "mapping"],
)
def test_what_manual_steps_may_return(step, outputs):
    seen = Outputs()
    fit(manual(step), samples=4, callbacks=[seen])
    (found,) = seen.seen
    assert set(found) == set(outputs)


def test_other_results_of_manual_steps_are_refused():
    with pytest.raises(MisconfigurationException):
        fit(manual(lambda self, batch: 1.0))


@pytest.mark.parametrize("arguments", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_what_manual_optimization_does_itself_cannot_be_asked_of_the_trainer(arguments):
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        fit(manual(lambda self, batch: None), **arguments)


def test_manual_backward_needs_manual_optimization():
    with pytest.raises(MisconfigurationException, match="automatic"):
        fit(automatic(lambda self, batch: self.manual_backward(self.loss(batch))))


def test_every_step_of_every_optimizer_is_a_global_step():
    class Model(Regression):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            one, other = self.optimizers()
            self.manual_backward(self.loss(batch))
            one.step()
            if batch_idx % 2:
                other.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]

    assert fit(Model()).global_step == 4 + 2


def test_the_closure_of_an_optimizer_must_be_a_function():
    with pytest.raises(MisconfigurationException, match="closure"):
        fit(manual(lambda self, batch: self.optimizers().step(closure=1.0)))


def test_manual_backward_takes_the_arguments_of_backward():
    def step(self, batch):
        loss = self.loss(batch)
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss)
        self.optimizers().step()
        self.optimizers().zero_grad()

    fit(manual(step), samples=4)


def test_toggling_keeps_what_was_frozen_frozen():
    class Model(Regression):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.other = torch.nn.Linear(4, 1)
            self.layer.bias.requires_grad_(False)

        def training_step(self, batch, batch_idx):
            one, _ = self.optimizers()
            self.toggle_optimizer(one)
            inside = [p.requires_grad for p in (*self.layer.parameters(), *self.other.parameters())]
            assert inside == [True, False, False, False]
            self.untoggle_optimizer(one)
            outside = [p.requires_grad for p in (*self.layer.parameters(), *self.other.parameters())]
            assert outside == [True, False, True, True]

        def configure_optimizers(self):
            layers = self.layer, self.other
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers]

    fit(Model(), samples=4)


def test_toggling_leaves_a_parameter_on_that_two_optimizers_share():
    class Model(Regression):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                with optimizer.toggle_model():
                    assert self.layer.weight.requires_grad
                    assert self.layer.bias.requires_grad is (optimizer is self.optimizers()[0])
            assert all(p.requires_grad for p in self.parameters())

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD([self.layer.weight], lr=0.1)]

    fit(Model(), samples=4)


# ---------------------------------------------------------------------- schedulers


def learning_rates(configure, samples: int = 16, **arguments: Any) -> list[float]:
    """The learning rate at the start of each batch."""
    seen = []

    class Model(Regression):
        def configure_optimizers(self):
            return configure(self, torch.optim.SGD(self.parameters(), lr=1.0))

        def training_step(self, batch, batch_idx):
            seen.append(self.optimizers().param_groups[0]["lr"])
            self.log("flat", 1.0, on_step=True, on_epoch=True)
            return 0 * self.loss(batch)

    fit(Model(), samples=samples, **arguments)
    return seen


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def test_schedulers_step_once_per_epoch_by_default():
    rates = learning_rates(lambda self, opt: ([opt], [halving(opt)]), max_epochs=3)
    assert rates == [1.0] * 4 + [0.5] * 4 + [0.25] * 4


def stepped_every(frequency, **more):
    def configure(self, opt):
        settings = {"scheduler": halving(opt), "interval": "step", "frequency": frequency}
        return {"optimizer": opt, "lr_scheduler": {**settings, **more}}

    return configure


@pytest.mark.parametrize(
    ("frequency", "arguments", "expected"),
    [
        (1, {}, [1.0, 0.5, 0.25, 0.125]),
        (3, {}, [1.0, 1.0, 1.0, 0.5]),
        (3, {"max_epochs": 2}, [1.0] * 3 + [0.5] * 3 + [0.25] * 2),  # over the ends of epochs
        (6, {"max_epochs": 2}, [1.0] * 6 + [0.5] * 2),  # more than an epoch has
        (2, {"accumulate_grad_batches": 2, "max_epochs": 2}, [1.0] * 4 + [0.5] * 4),  # steps, not batches
        (3, {"accumulate_grad_batches": 3, "max_epochs": 2}, [1.0] * 7 + [0.5]),  # two steps per epoch
    ],
)
def test_the_frequency_of_step_schedulers_counts_optimizer_steps_of_the_run(frequency, arguments, expected):
    assert learning_rates(stepped_every(frequency), **arguments) == expected


def test_the_frequency_of_each_scheduler_counts_the_steps_of_its_own_optimizer():
    rates = []

    class Two(Regression):
        def training_step(self, batch, batch_idx):
            rates.append([o.param_groups[0]["lr"] for o in self.optimizers()])
            yield self.loss(batch)
            yield self.loss(batch) if batch_idx % 2 else None

        def configure_optimizers(self):
            optimizers = [torch.optim.SGD([p], lr=1.0) for p in self.parameters()]
            every = [{"scheduler": halving(o), "interval": "step", "frequency": 2} for o in optimizers]
            return optimizers, every

    make_trainer(max_epochs=2, limit_val_batches=0).fit(Two(), make_loader(16))
    assert [first for first, _ in rates] == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert [second for _, second in rates] == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]


def test_a_plateau_that_is_watched_per_step_counts_steps_of_the_run():
    def configure(self, opt):
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0)
        watched = {"scheduler": plateau, "monitor": "flat_step", "interval": "step", "frequency": 3}
        return {"optimizer": opt, "lr_scheduler": watched}

    assert learning_rates(configure, max_epochs=3) == [1.0] * 6 + [0.5] * 3 + [0.25] * 3


def test_a_resumed_run_counts_the_steps_of_the_run_before(tmp_path):
    """Saved inside and between epochs of four steps; also if the file has no chapter of ours."""

    class Model(Regression):
        def training_step(self, batch, batch_idx):
            self.rates.append(self.optimizers().param_groups[0]["lr"])
            return 0 * self.loss(batch)

        def configure_optimizers(self):
            return stepped_every(3)(self, torch.optim.SGD(self.parameters(), lr=1.0))

    def rates_of(path=None, **arguments):
        model = Model()
        model.rates = []
        make_trainer(limit_val_batches=0, max_epochs=3, **arguments).fit(model, make_loader(16), ckpt_path=path)
        return model.rates

    saver = pl.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = rates_of(callbacks=[saver], enable_checkpointing=True)
    for step in (1, 3, 4, 5, 8):
        ours, foreign = tmp_path / f"step={step}.ckpt", tmp_path / "foreign.ckpt"
        content = torch.load(ours, weights_only=True)
        del content["fulmen"]
        torch.save(content, foreign)
        assert rates_of(ours) == rates_of(foreign) == whole[step:], step


def test_the_frequency_of_epoch_schedulers_counts_epochs():
    def configure(self, opt):
        return {"optimizer": opt, "lr_scheduler": {"scheduler": halving(opt), "frequency": 2}}

    assert learning_rates(configure, samples=4, max_epochs=5) == [1.0, 1.0, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_plateau_schedulers_watch_a_metric(interval):
    def configure(self, opt):
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=0)
        monitor = "flat_step" if interval == "step" else "flat_epoch"
        return {"optimizer": opt, "lr_scheduler": {"scheduler": plateau, "monitor": monitor, "interval": interval}}

    # the first value is the best so far, every later one is no better
    expected = {"step": [1.0, 1.0, 0.5, 0.25, 0.125, 0.0625], "epoch": [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]}
    assert learning_rates(configure, samples=8, max_epochs=3) == expected[interval]


def test_a_metric_that_is_missing_is_an_error_unless_the_scheduler_is_not_strict():
    def configure(strict):
        def configure(self, opt):
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": plateau, "monitor": "flet", "strict": strict}}

        return configure

    with pytest.raises(MisconfigurationException, match="flet"):
        learning_rates(configure(True))
    with pytest.warns(RuntimeWarning, match="flet"):
        learning_rates(configure(False))


def test_lr_scheduler_step_may_be_overridden_for_schedulers_of_any_kind():
    class Halves:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def advance(self, epoch):
            self.optimizer.param_groups[0]["lr"] = 1 / (epoch + 2)

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    class Model(Regression):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [Halves(optimizer)]

        def lr_scheduler_step(self, scheduler, metric):
            assert metric is None
            scheduler.advance(epoch=self.current_epoch)

    trainer = fit(Model(), max_epochs=2)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("arguments", "stop", "expected"),
    [({"max_steps": 6}, False, 1), ({}, True, 1), ({}, False, 2)],
    ids=["max_steps", "should_stop", "to the end"],
)
def test_epoch_schedulers_are_not_stepped_in_an_epoch_that_ended_early(arguments, stop, expected):
    class Model(Regression):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [halving(optimizer)]

        def training_step(self, batch, batch_idx):
            if stop and self.current_epoch == 1 and batch_idx == 1:
                self.trainer.should_stop = True
            return super().training_step(batch, batch_idx)

    model = Model()
    trainer = fit(model, max_epochs=2, **arguments)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5**expected


def test_the_loss_in_manual_outputs_lets_go_of_its_graph() -> None:
    kept = []

    class Manual(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            return {"loss": loss, "more": 1}

        def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
            kept.append(outputs)

    make_trainer().fit(Manual(), make_loader())
    assert kept and all(outputs["more"] == 1 and not outputs["loss"].requires_grad for outputs in kept)
