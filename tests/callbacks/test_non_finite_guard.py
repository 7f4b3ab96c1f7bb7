"""Losses and gradients that are not finite are found, named, skipped or undone."""

from __future__ import annotations

import copy

import pytest
import torch
from support import Regression, make_loader, make_trainer
from torch import nn

import fulmen as pl
from fulmen.callbacks import EMAWeightAveraging, ModelCheckpoint, NonFiniteError, NonFiniteGuard
from fulmen.utilities.errors import MisconfigurationException

BATCHES, EPOCHS = 10, 2
NAN, INF = float("nan"), float("inf")


class Net(pl.LightningModule):
    """Injects one fault: into the loss of a batch, or into the gradient of one parameter in a batch."""

    def __init__(self, at=None, where="loss", value=NAN, optimizer=torch.optim.Adam, schedule=False):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 1))
        self.at, self.where, self.value = at, where, value
        self.optimizer, self.schedule = optimizer, schedule
        self.now = None
        for name, parameter in self.named_parameters():
            if name == where:
                parameter.register_hook(self.spoil)

    def spoil(self, gradient):
        gradient = gradient.clone()
        if self.now == self.at:
            gradient.view(-1)[0] = self.value
        return gradient

    def training_step(self, batch, batch_idx):
        self.now = (self.current_epoch, batch_idx)
        x, y = batch
        loss = nn.functional.mse_loss(self.layers(x), y)
        return loss * self.value if self.where == "loss" and self.now == self.at else loss

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters(), lr=0.05)
        if not self.schedule:
            return optimizer
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


def loader():
    return make_loader(4 * BATCHES)


NAMES = [f"layers.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias")]
# (where, value, epoch, batch, accumulation window, steps between readings, precision)
FAULTS = [
    ("loss", NAN, 0, 0, 1, 1, "32-true"),
    ("loss", INF, 0, 3, 1, 50, "32-true"),
    ("loss", -INF, 1, 9, 1, 7, "32-true"),
    ("loss", NAN, 1, 4, 3, 2, "32-true"),
    ("loss", NAN, 0, 5, 4, 50, "bf16-mixed"),
    ("loss", INF, 1, 2, 1, 3, "16-mixed"),
    ("loss", NAN, 0, 9, 1, 4, "16-true"),
    ("loss", NAN, 1, 0, 2, 50, "64-true"),
    (NAMES[0], NAN, 0, 1, 1, 1, "32-true"),
    (NAMES[1], INF, 0, 7, 1, 50, "32-true"),
    (NAMES[2], -INF, 1, 3, 1, 6, "32-true"),
    (NAMES[3], NAN, 1, 8, 1, 13, "32-true"),
    (NAMES[4], NAN, 0, 2, 1, 2, "bf16-mixed"),
    (NAMES[5], INF, 1, 9, 1, 50, "bf16-mixed"),
    (NAMES[0], NAN, 0, 4, 2, 50, "32-true"),
    (NAMES[1], NAN, 1, 5, 3, 1, "32-true"),
    (NAMES[2], INF, 0, 0, 5, 3, "bf16-true"),
    (NAMES[3], NAN, 1, 6, 1, 5, "16-true"),
    (NAMES[4], -INF, 0, 9, 4, 50, "64-true"),
    (NAMES[5], NAN, 0, 6, 1, 10, "32-true"),
]


@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_faults_are_found_and_named(fault):
    """20 injected faults: the epoch, batch and step of each, and the parameter."""
    where, value, epoch, batch, window, every, precision = FAULTS[fault]
    net = Net((epoch, batch), where, value)
    trainer = make_trainer(
        max_epochs=EPOCHS, accumulate_grad_batches=window, precision=precision,
        callbacks=[NonFiniteGuard("stop", every_n_steps=every)],
    )  # fmt: skip
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(net, loader())
    found = caught.value.fault
    per_epoch = -(-BATCHES // window)
    assert (found.epoch, found.step) == (epoch, epoch * per_epoch + batch // window)
    if where == "loss":
        assert found.loss and found.batch_idx == batch
        assert f"epoch {epoch}, batch {batch}, step {found.step}: the loss" in str(caught.value)
    else:
        assert (found.loss, found.parameter, found.num_parameters) == (False, where, 1)
        assert found.batch_idx == min(batch // window * window + window, BATCHES) - 1  # where the window was complete
        assert f"the gradient of `{where}` is not finite" in str(caught.value)
    assert trainer.global_step - found.step <= every  # found by the next reading


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_nothing_is_found_where_nothing_is_wrong_and_the_bits_stay_the_same(policy):
    torch.manual_seed(3)
    guarded = Net()
    free = copy.deepcopy(guarded)
    guard = NonFiniteGuard(policy, every_n_steps=3)
    make_trainer(max_epochs=EPOCHS, callbacks=[guard]).fit(guarded, loader())
    make_trainer(max_epochs=EPOCHS).fit(free, loader())
    assert all(torch.equal(a, b) for a, b in zip(guarded.state_dict().values(), free.state_dict().values()))
    assert guard.quarantine == [] and guard.state_dict() == {}


@pytest.mark.parametrize("where", ["loss", NAMES[3]])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
def test_skip_leaves_out_exactly_that_step(where, make):
    """Weights, buffers and the learning rate are those of a loop that does not have that batch."""
    torch.manual_seed(3)
    ours = Net((0, 4), where, optimizer=make, schedule=True)
    theirs = copy.deepcopy(ours)
    trainer = make_trainer(callbacks=[NonFiniteGuard("skip")])
    with pytest.warns(UserWarning, match="epoch 0, batch 4, step 4.*its step is skipped"):
        trainer.fit(ours, loader())
    (optimizer,), (scheduler,) = theirs.configure_optimizers()
    for number, (x, y) in enumerate(loader()):
        if number != 4:
            optimizer.zero_grad()
            nn.functional.mse_loss(theirs.layers(x), y).backward()
            optimizer.step()
            scheduler["scheduler"].step()
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values()):
        assert torch.equal(a, b), name
    assert trainer.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert trainer.global_step == BATCHES


@pytest.mark.filterwarnings("ignore:In epoch")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("every", [1, 4])
def test_rollback_goes_back_to_the_last_reading_and_on(every, precision):
    """By hand: the steps since the last good reading are undone, and training goes on with the next batch."""
    torch.manual_seed(3)
    ours = Net((0, 5), NAMES[0], schedule=True)
    plain = copy.deepcopy(ours)
    guard = NonFiniteGuard("rollback", every_n_steps=every)
    trainer = make_trainer(callbacks=[guard], precision=precision)
    trainer.fit(ours, loader())
    undone = range(5 // every * every, 5 // every * every + every)
    assert guard.quarantine[0].batch_idx == 5 and len(guard.quarantine) == 1
    assert all(value.isfinite().all() for value in ours.state_dict().values())
    assert trainer.global_step == BATCHES  # the batches were seen, the counter does not go back
    expected = pytest.approx(0.05 * 0.9 ** (BATCHES - every))
    assert trainer.optimizers[0].param_groups[0]["lr"] == expected
    if precision == "32-true":
        (optimizer,), _ = plain.configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for number, (x, y) in enumerate(loader()):
            if number in undone:
                continue
            optimizer.zero_grad()
            nn.functional.mse_loss(plain.layers(x), y).backward()
            optimizer.step()
            scheduler.step()
        for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values()):
            assert torch.equal(a, b), name


@pytest.mark.filterwarnings("ignore:In epoch", "ignore:.*returned `None`")
def test_rollback_takes_an_average_of_the_weights_along(tmp_path):
    net, average = Net((0, 5), NAMES[0]), EMAWeightAveraging(decay=0.5)
    trainer = make_trainer(callbacks=[average, NonFiniteGuard("rollback", every_n_steps=4)])
    trainer.fit(net, loader())  # at the end the average is copied into the module
    assert all(value.isfinite().all() for value in net.state_dict().values())


@pytest.mark.filterwarnings("ignore:In epoch", "ignore:Checkpoint directory")
@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_no_checkpoint_of_a_broken_model_is_written(policy, tmp_path):
    """Readings are far apart, a checkpoint is written at every step: the guard reads before each."""
    net = Net((0, 5), "loss")
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = make_trainer(callbacks=[NonFiniteGuard(policy), save], enable_checkpointing=True)
    if policy == "stop":
        with pytest.raises(NonFiniteError):
            trainer.fit(net, loader())
    else:
        trainer.fit(net, loader())
    files = sorted(tmp_path.glob("step=*.ckpt"))
    assert len(files) == (5 if policy == "stop" else 10)
    for file in files:
        content = torch.load(file, weights_only=True)
        assert all(value.isfinite().all() for value in content["state_dict"].values()), file.name
        for state in content["optimizer_states"][0]["state"].values():
            assert all(value.isfinite().all() for value in state.values()), file.name


@pytest.mark.parametrize("every", [1, 50])
def test_validation_never_sees_a_broken_model(every):
    class Validated(Net):
        seen = 0

        def validation_step(self, batch, batch_idx):
            assert all(value.isfinite().all() for value in self.state_dict().values())
            Validated.seen += 1

    with pytest.warns(UserWarning, match="back where it was"):
        make_trainer(
            callbacks=[NonFiniteGuard("rollback", every_n_steps=every)], val_check_interval=2, limit_val_batches=1
        ).fit(Validated((0, 3), NAMES[1]), loader(), loader())
    assert Validated.seen == 5


@pytest.mark.filterwarnings("ignore:In epoch")
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_quarantined_batches_are_kept_on_disk_and_in_the_checkpoint(policy, tmp_path):
    net = Net((0, 6), "loss")
    guard = NonFiniteGuard(policy, every_n_steps=4, dirpath=str(tmp_path / "bad"))
    trainer = make_trainer(callbacks=[guard])
    trainer.fit(net, loader())
    x, y = torch.load(tmp_path / "bad" / "epoch=0-batch=6.pt", weights_only=True)
    expected = list(loader())[6]
    assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = NonFiniteGuard(policy, every_n_steps=4)
    make_trainer(callbacks=[again], max_epochs=2).fit(Net(), loader(), ckpt_path=tmp_path / "end.ckpt")
    assert again.quarantine == guard.quarantine and again.quarantine[0].loss


@pytest.mark.filterwarnings("ignore:In epoch")
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_faults_without_end_stop_the_run(policy):
    class Broken(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * NAN if batch_idx >= 2 else loss

    net = Broken()
    with pytest.raises(NonFiniteError, match="4 faults in a row.*learning rate"):
        make_trainer(callbacks=[NonFiniteGuard(policy, every_n_steps=1, max_in_a_row=3)]).fit(net, loader())
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_overflow_under_a_loss_scaler_is_no_fault_but_a_dead_run_is():
    """The first steps overflow until the scale has come down, which is how a scaler works."""

    class Steep(Regression):
        def loss(self, batch):
            return super().loss(batch) * 100

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    trainer = make_trainer(precision="16-mixed", callbacks=[NonFiniteGuard("stop", every_n_steps=1)], max_epochs=3)
    trainer.fit(Steep(), make_loader(40))
    assert trainer.precision_plugin.skip_counts()[0] > 0

    class Dead(Net):
        def spoil(self, gradient):
            return gradient * NAN

    with pytest.raises(NonFiniteError, match="has skipped .* steps in a row.*whatever the scale"):
        make_trainer(precision="16-mixed", callbacks=[NonFiniteGuard("stop", every_n_steps=10)], max_epochs=9).fit(
            Dead(where=NAMES[0]), loader()
        )


def test_several_optimizers_and_manual_optimization_are_guarded():
    class Two(Net):
        def training_step(self, batch, batch_idx):
            for _ in range(2):
                yield Net.training_step(self, batch, batch_idx)

        def configure_optimizers(self):
            return [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in (self.layers[0], self.layers[3])]

    class Manual(Net):
        def __init__(self, *args):
            super().__init__(*args)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    for kind, where in ((Two, NAMES[5]), (Manual, NAMES[2])):
        with pytest.raises(NonFiniteError, match=f"batch 3.*`{where}`"):
            make_trainer(callbacks=[NonFiniteGuard()]).fit(kind((0, 3), where), loader())
        net = kind((0, 3), where)
        with pytest.warns(UserWarning, match="skipped"):
            make_trainer(callbacks=[NonFiniteGuard("skip")]).fit(net, loader())
        assert all(value.isfinite().all() for value in net.state_dict().values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"policy": "roll-back"}, "'roll-back'.*'stop', 'skip', 'rollback'.*rollback"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"max_in_a_row": 1.5}, "max_in_a_row=1.5"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(MisconfigurationException, match=words):
        NonFiniteGuard(**arguments)
