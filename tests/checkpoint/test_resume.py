"""Resuming at the end of an epoch: the same bits as the run that was never stopped."""

from __future__ import annotations

import random

import pytest
import torch
from support import Regression, SavesAfterFirstEpoch, make_loader, make_trainer
from torch import nn

from fulmen.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from fulmen.loggers import CSVLogger
from fulmen.utilities.errors import MisconfigurationException


class Noisy(Regression):
    """Draws random numbers in every place a module may draw them in."""

    def __init__(self, draws_at_epoch_start=False):
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.norm = nn.BatchNorm1d(4)
        self.draws_at_epoch_start = draws_at_epoch_start

    def forward(self, x):
        return self.layer(self.dropout(self.norm(x)) + random.random() * 0.01)

    def on_train_epoch_start(self):
        if self.draws_at_epoch_start:
            torch.rand(3)

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]


def run(folder, epochs, ckpt_path=None, draws=False, callbacks=(), **kwargs):
    torch.manual_seed(3)
    random.seed(3)
    model = Noisy(draws)
    if ckpt_path is not None:  # a new process would have other generators: the file must bring them
        torch.manual_seed(99)
        random.seed(99)
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    trainer = make_trainer(max_epochs=epochs, callbacks=[saver, *callbacks], enable_checkpointing=True, **kwargs)
    trainer.fit(model, make_loader(22, 4, shuffle=True), make_loader(8, 4, seed=5), ckpt_path=ckpt_path)
    return model, trainer


def everything(model, trainer):
    """Weights, buffers and the optimizer's state, in one list of tensors."""
    found = list(model.state_dict().values())
    for state in trainer.optimizers[0].state_dict()["state"].values():
        found += [torch.as_tensor(value) for value in state.values()]
    return found


@pytest.mark.parametrize("draws", [False, True], ids=["plain", "draws at epoch start"])
@pytest.mark.parametrize(
    "settings", [{}, {"num_sanity_val_steps": 2}, {"val_check_interval": 0.5}, {"accumulate_grad_batches": 4}], ids=str
)
def test_resumed_run_ends_in_the_same_bits(tmp_path, draws, settings):
    whole = everything(*run(tmp_path / "whole", 4, draws=draws, **settings))
    run(tmp_path / "part", 2, draws=draws, **settings)
    saved = sorted((tmp_path / "part").glob("epoch=1*.ckpt"))[-1]
    resumed = everything(*run(tmp_path / "rest", 4, ckpt_path=saved, draws=draws, **settings))
    assert len(whole) == len(resumed)
    for a, b in zip(whole, resumed):
        assert torch.equal(a, b)


def test_without_the_stored_generators_the_bits_would_differ(tmp_path):
    whole = everything(*run(tmp_path / "whole", 4))
    run(tmp_path / "part", 2)
    saved = next((tmp_path / "part").glob("epoch=1*.ckpt"))
    content = torch.load(saved, weights_only=True)
    del content["fulmen"]["generators"]
    torch.save(content, tmp_path / "bare.ckpt")
    resumed = everything(*run(tmp_path / "rest", 4, ckpt_path=tmp_path / "bare.ckpt"))
    assert not all(torch.equal(a, b) for a, b in zip(whole, resumed))


def test_counters_continue(tmp_path):
    run(tmp_path, 2)
    seen = []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append((trainer.current_epoch, trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]))

    _, trainer = run(tmp_path / "rest", 4, ckpt_path=tmp_path / "epoch=1.ckpt", callbacks=[Watch()])
    assert seen == [(2, 12, pytest.approx(0.05 * 0.7**2)), (3, 18, pytest.approx(0.05 * 0.7**3))]
    assert (trainer.current_epoch, trainer.global_step) == (4, 24)


def test_loggers_continue_their_axis(tmp_path):
    logs = []
    for name, epochs, path in (("a", 2, None), ("b", 3, tmp_path / "a" / "epoch=1.ckpt")):
        logger = CSVLogger(tmp_path, version=name)
        run(tmp_path / name, epochs, ckpt_path=path, logger=logger, log_every_n_steps=1)
        rows = (tmp_path / "lightning_logs" / name / "metrics.csv").read_text().splitlines()
        step = rows[0].split(",").index("step")
        logs.append([int(row.split(",")[step]) for row in rows[1:]])
    assert max(logs[0]) == 11
    assert min(logs[1]) == 12 and max(logs[1]) == 17


def test_smaller_max_epochs_than_stored_is_refused_and_equal_does_nothing(tmp_path):
    run(tmp_path, 3)
    with pytest.raises(MisconfigurationException, match="current_epoch=3.*max_epochs=2"):
        run(tmp_path / "rest", 2, ckpt_path=tmp_path / "epoch=2.ckpt")
    _, trainer = run(tmp_path / "rest", 3, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert trainer.global_step == 18


def test_file_loads_with_weights_only(tmp_path):
    run(tmp_path, 1, callbacks=[EarlyStopping("val_loss")])
    content = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert {"epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops", "callbacks"} <= content.keys()
    assert {"optimizer_states", "lr_schedulers", "fulmen"} <= content.keys()
    assert content["epoch"] == 0 and content["global_step"] == 6
    assert content["fulmen"]["progress"]["position"] == "EPOCH_END"


def test_weights_only_file_cannot_be_resumed_but_evaluated(tmp_path):
    model, trainer = run(tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "optimizer_states" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(KeyError, match="weights only"):
        run(tmp_path / "rest", 2, ckpt_path=tmp_path / "weights.ckpt")
    fresh = Noisy()
    make_trainer().validate(fresh, make_loader(8), ckpt_path=tmp_path / "weights.ckpt", verbose=False)
    assert torch.equal(fresh.layer.weight, model.layer.weight)


def test_checkpoint_of_another_model_lists_the_keys(tmp_path):
    run(tmp_path, 1)
    with pytest.raises(RuntimeError, match=r"does not fit Regression.*unexpected: norm\.weight"):
        make_trainer(max_epochs=3).fit(Regression(), make_loader(), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_callbacks_missing_from_the_new_trainer_are_named(tmp_path):
    run(tmp_path, 1, callbacks=[EarlyStopping("val_loss")])
    with pytest.warns(UserWarning, match="EarlyStopping"):
        run(tmp_path / "rest", 2, ckpt_path=tmp_path / "epoch=0.ckpt")


def test_early_stopping_goes_on_waiting_after_resume(tmp_path):
    stopping = EarlyStopping("val_loss", patience=7)
    run(tmp_path, 2, callbacks=[stopping])
    again = EarlyStopping("val_loss", patience=7)
    run(tmp_path / "rest", 2, ckpt_path=tmp_path / "epoch=1.ckpt", callbacks=[again])
    assert again.best_score == stopping.best_score and again.wait_count == stopping.wait_count


def test_best_and_last_are_found(tmp_path):
    saver = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_last=True)
    trainer = make_trainer(max_epochs=2, callbacks=[saver], enable_checkpointing=True)
    trainer.fit(Regression(), make_loader(), make_loader(8))
    trainer.test(Regression(), make_loader(4), ckpt_path="best", verbose=False)
    assert trainer.ckpt_path == saver.best_model_path
    trainer.test(Regression(), make_loader(4), ckpt_path="last", verbose=False)
    assert trainer.ckpt_path.endswith("last.ckpt")


def test_learning_rate_monitor_can_be_combined(tmp_path):
    _, trainer = run(tmp_path, 2, callbacks=[LearningRateMonitor()], logger=CSVLogger(tmp_path))
    assert trainer.callback_metrics["lr-Adam"] == pytest.approx(0.05 * 0.7)


class Counting:
    """A loader that can be resumed: it yields the numbers from where it is."""

    def __init__(self):
        self.position = 0

    def __len__(self):
        return 6

    def __iter__(self):
        while self.position < 6:
            self.position += 1
            yield torch.full((2, 4), float(self.position - 1)), torch.zeros(2, 1)
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_a_loader_with_a_state_goes_on_inside_the_epoch(tmp_path, recwarn):
    def fit(folder, ckpt_path=None):
        seen = []

        class Watch(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                seen.append((batch_idx, int(batch[0][0, 0])))

        saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = make_trainer(callbacks=[saver, Watch()], enable_checkpointing=True)
        trainer.fit(Regression(lr=1e-4), Counting(), ckpt_path=ckpt_path)
        return seen

    assert fit(tmp_path) == [(i, i) for i in range(6)]
    recwarn.clear()
    assert fit(tmp_path / "rest", tmp_path / "step=3.ckpt") == [(3, 3), (4, 4), (5, 5)]
    assert not [w for w in recwarn if "starts again" in str(w.message)]
    fresh = [(i, i) for i in range(6)]
    assert fit(tmp_path / "again") == fresh


def test_another_number_of_optimizers_is_refused(tmp_path):
    run(tmp_path, 1)

    class Two(Noisy):
        def configure_optimizers(self):
            return [torch.optim.Adam(self.parameters()), torch.optim.SGD(self.parameters(), lr=0.1)]

    model = Two()
    model.automatic_optimization = False
    with pytest.raises(RuntimeError, match=r"1 optimizer.*2"):
        make_trainer(max_epochs=2).fit(model, make_loader(), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_an_optimizer_of_another_kind_is_warned_of(tmp_path):
    run(tmp_path, 1)

    class Other(Noisy):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)]

    trainer = make_trainer(max_epochs=2)
    with pytest.warns(UserWarning, match="has the state of a `Adam`, and .* returned a `AdamW`"):
        trainer.fit(Other(), make_loader(22, 4), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert trainer.global_step == 12


@pytest.mark.parametrize("kinds", [("Adam", "SGD"), ("SGD", "Adam"), ("SGD", "RMSprop")])
def test_an_optimizer_of_another_kind_takes_over_the_options_that_both_have(tmp_path, kinds):
    class Trains(Regression):
        def __init__(self, kind, lr):
            super().__init__(lr)
            self.kind = kind

        def configure_optimizers(self):
            options = {} if self.kind == "Adam" else {"momentum": 0.9}
            return getattr(torch.optim, self.kind)(self.parameters(), lr=self.hparams.lr, weight_decay=0.25, **options)

    make_trainer(callbacks=SavesAfterFirstEpoch(tmp_path / "a.ckpt")).fit(Trains(kinds[0], 0.05), make_loader())
    trainer, model = make_trainer(max_epochs=2), Trains(kinds[1], 0.3)
    with pytest.warns(UserWarning, match=f"state of a `{kinds[0]}`, .* a `{kinds[1]}`: .* averages start anew"):
        trainer.fit(model, make_loader(), ckpt_path=tmp_path / "a.ckpt")
    (group,) = trainer.optimizers[0].param_groups
    assert (group["lr"], group["weight_decay"]) == (0.05, 0.25)
    assert set(trainer.optimizers[0].defaults) <= set(group)

    alone = Trains(kinds[1], 0.05)
    alone.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    optimizer = alone.configure_optimizers()
    for batch in make_loader():
        optimizer.zero_grad()
        alone.loss(batch).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters()))


class Frozen(Regression):
    """A batch norm that is frozen during training, from the second epoch on, and never touched again."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)
        self.modes = []

    def forward(self, x):
        return self.layer(self.norm(x))

    def on_train_batch_start(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (1, 0):
            self.norm.eval()
        self.modes.append((self.current_epoch, self.training, self.layer.training, self.norm.training))


@pytest.mark.filterwarnings("ignore:.*in eval mode", "ignore:Checkpoint directory")
@pytest.mark.parametrize("moment", ["after validation", "during validation", "in the middle of an epoch"])
def test_a_frozen_batch_norm_stays_frozen_over_validation_and_resume(tmp_path, moment):
    """Wherever the file was written: while validating all modules are in eval mode, and only one of them stays so."""

    class Saves(Callback):
        def save(self, trainer):
            if trainer.current_epoch == 1 and not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

        def on_validation_end(self, trainer, pl_module):
            if moment == "after validation":
                assert not pl_module.training
                self.save(trainer)

        def on_validation_batch_start(self, trainer, *_):
            if moment == "during validation":
                self.save(trainer)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if moment == "in the middle of an epoch" and batch_idx == 1:
                self.save(trainer)

    whole = Frozen()
    make_trainer(max_epochs=4, callbacks=[Saves()]).fit(whole, make_loader(), make_loader())
    assert whole.modes == [(0, True, True, True)] * 3 + [(e, True, True, False) for e in (1, 2, 3) for _ in range(3)]
    resumed = Frozen()
    trainer = make_trainer(max_epochs=4)
    trainer.fit(resumed, make_loader(), make_loader(), ckpt_path=tmp_path / "saved.ckpt")
    assert resumed.modes and all(mode[1:] == (True, True, False) for mode in resumed.modes)
    assert torch.equal(whole.norm.running_mean, resumed.norm.running_mean)
