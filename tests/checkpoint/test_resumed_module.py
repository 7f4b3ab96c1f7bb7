"""What a run had switched on its module, and in which groups its parameters are, is what it was after a resume."""

from __future__ import annotations

import random

import pytest
import torch
from support import Regression, make_loader, make_trainer
from torch import nn

from fulmen.callbacks import BackboneFinetuning, BaseFinetuning, Callback, ModelCheckpoint

EPOCHS = 5


class Net(Regression):
    def __init__(self, p=0.0):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(p))

    def forward(self, x):
        return self.layer(self.backbone(x))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1, momentum=0.5)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


class Frozen(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.05)


class Thaws(Callback):
    """Freezes as training starts and unfreezes later, with nothing but torch."""

    def on_train_start(self, trainer, pl_module):
        pl_module.backbone.requires_grad_(False)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.backbone.requires_grad_(True)


class Adds(Callback):
    """Trains the backbone later, in a group of its own, and a bias of it in one more."""

    def setup(self, trainer, pl_module, stage):
        pl_module.backbone.requires_grad_(False)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (optimizer,), layer = trainer.optimizers, pl_module.backbone[0]
        if (trainer.current_epoch, batch_idx) == (1, 0):
            layer.weight.requires_grad_(True)
            optimizer.add_param_group({"params": [layer.weight], "lr": 0.05})
        if (trainer.current_epoch, batch_idx) == (1, 1):
            layer.bias.requires_grad_(True)
            optimizer.add_param_group({"params": [layer.bias], "lr": 0.01, "momentum": 0.0})


class Freezes(Callback):
    """The head stops learning for good, in the middle of an epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            pl_module.layer.requires_grad_(False)
            pl_module.backbone[1].eval()


class Tunes(Callback):
    """Changes the numbers of layers once."""

    def on_train_epoch_start(self, trainer, pl_module):
        _, norm, dropout = pl_module.backbone
        if trainer.current_epoch == 1:
            norm.momentum, norm.eps, dropout.p = None, 0.1, 0.5
            norm.track_running_stats = False


def run(make, path=None, save_to=None, epochs=EPOCHS, p=0.0, each=False):
    torch.manual_seed(3)
    module, callbacks = Net(p), [make()]
    if save_to is not None:
        every = {"every_n_train_steps": 1} if each else {}
        callbacks.append(ModelCheckpoint(save_to, "{epoch}-{step}", save_top_k=-1, **every))
    trainer = make_trainer(callbacks=callbacks, max_epochs=epochs, enable_checkpointing=save_to is not None)
    trainer.fit(module, make_loader(12, 4, shuffle=True), make_loader(4), ckpt_path=path)
    return module


def same(one, other):
    flags = [(p.requires_grad, p.grad is not None) for p in one.parameters()]
    assert flags == [(p.requires_grad, p.grad is not None) for p in other.parameters()]
    assert [part.training for part in one.modules()] == [part.training for part in other.modules()]
    assert repr(one) == repr(other)  # the numbers of its layers
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def make_backbone(**kwargs):
    return lambda: BackboneFinetuning(1, lambda epoch: 1.0, **kwargs)


KINDS = {
    "backbone": make_backbone(), "backbone without batch norm": make_backbone(train_bn=False), "frozen": Frozen,
    "thaws": Thaws, "adds": Adds, "freezes": Freezes, "tunes": Tunes,
}  # fmt: skip


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_training_goes_on_with_what_was_switched(make, tmp_path):
    whole = run(make)
    run(make, save_to=tmp_path, epochs=3, each=True)
    # Before, in, at the end of and after the epoch in which it happens.
    for epoch, step in ((0, 2), (0, 3), (1, 4), (1, 5), (2, 9)):
        same(run(make, tmp_path / f"epoch={epoch}-step={step}.ckpt"), whole)


@pytest.mark.parametrize("kind", ["backbone", "thaws", "adds", "tunes"])
def test_also_when_it_is_resumed_again_and_again(kind, tmp_path):
    make = KINDS[kind]
    whole, path = run(make), None
    for epochs in range(1, EPOCHS + 1):
        again = run(make, path, tmp_path, epochs)
        path = tmp_path / f"epoch={epochs - 1}-step={3 * epochs}.ckpt"
    same(again, whole)


def test_what_the_run_did_not_change_is_as_the_script_says(tmp_path):
    run(Tunes, save_to=tmp_path, epochs=1, p=0.2)

    class Other(Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.layer.requires_grad_(False)
            pl_module.layer.bias.requires_grad_(True)
            pl_module.backbone[1].eval()

        def on_train_epoch_start(self, trainer, pl_module):
            self.seen = pl_module.backbone[2].p, pl_module.layer.weight.requires_grad, pl_module.backbone[1].training

    other = Other()
    module = Net(0.7)
    trainer = make_trainer(callbacks=[other], max_epochs=2)
    state = torch.load(tmp_path / "epoch=0-step=3.ckpt", weights_only=True)
    assert (state["fulmen"]["flags"], state["fulmen"]["groups"]) == ({}, {})
    module.configure_optimizers = lambda: Regression.configure_optimizers(module)
    state["lr_schedulers"] = []
    torch.save(state, tmp_path / "other.ckpt")
    trainer.fit(module, make_loader(), ckpt_path=tmp_path / "other.ckpt")
    assert other.seen == (0.7, False, False)


def test_files_that_say_nothing_of_it(tmp_path):
    """Of others, and of earlier versions: what finetuning had added is trained, and modes are those of the file."""
    whole = run(KINDS["backbone"])
    run(KINDS["backbone"], save_to=tmp_path, epochs=3)
    content = torch.load(tmp_path / "epoch=2-step=9.ckpt", weights_only=True)
    for key in ("flags", "groups"):
        del content["fulmen"][key]
    content["fulmen"]["in_eval"] = ["backbone.2"]
    torch.save(content, tmp_path / "old.ckpt")
    again = run(KINDS["backbone"], tmp_path / "old.ckpt")
    assert all(p.requires_grad for p in again.parameters())
    assert [name for name, part in again.named_modules() if not part.training] == ["backbone.2"]
    assert torch.equal(again.backbone[0].weight, whole.backbone[0].weight)


class Judge(Regression):
    """Writes a file while `toggle_optimizer` has switched gradients off."""

    def __init__(self, path):
        super().__init__()
        self.path, self.other, self.automatic_optimization = path, nn.Linear(4, 1), False

    def training_step(self, batch, batch_idx):
        _, second = self.optimizers()
        with self.toggled_optimizer(second):
            if self.path is not None:
                self.trainer.save_checkpoint(self.path)

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.layer, self.other)]


def test_what_is_switched_for_a_moment_is_not_kept(tmp_path):
    make_trainer().fit(Judge(tmp_path / "a.ckpt"), make_loader())
    again = Judge(None)
    make_trainer(max_epochs=2).fit(again, make_loader(), ckpt_path=tmp_path / "a.ckpt")
    assert all(p.requires_grad for p in again.parameters())


def test_the_metrics_of_a_finished_run_are_there_when_it_is_started_again(tmp_path):
    class Logs(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("both", loss, on_step=True, on_epoch=True)
            return loss

    found = []
    for _ in range(4):
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_last=True)
        trainer = make_trainer(callbacks=[saving], max_epochs=2, enable_checkpointing=True, num_sanity_val_steps=1)
        torch.manual_seed(len(found))
        trainer.fit(Logs(), make_loader(), make_loader(), ckpt_path="auto")
        drawn = torch.rand(()), random.random()
        found.append((trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics, drawn))
    assert {*found[0][0]} == {"train_loss", "val_loss", "both", "both_step", "both_epoch"}
    assert found[1:] == found[:1] * 3
