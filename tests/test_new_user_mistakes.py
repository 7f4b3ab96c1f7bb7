"""Mistakes of a first afternoon: each ends with an error, or at least a warning, that names what to do instead."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from support import make_loader, make_trainer
from torch import nn

import fulmen as pl
from fulmen.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint

BASE = pl.LightningModule.validation_step
SGD, StepLR = torch.optim.SGD, torch.optim.lr_scheduler.StepLR


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))
        self.log("val_acc", 1.0)

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.1)


def net(**methods):
    return type("Mine", (Net,), methods)()


def step(fn):
    return net(training_step=lambda self, batch, batch_idx: fn(self, batch))


def optim(fn):
    return net(configure_optimizers=lambda self: fn(SGD(self.parameters(), lr=0.1)))


def init(fn):
    def __init__(self):
        Net.__init__(self)
        fn(self)

    return net(__init__=__init__)


def fit(model=None, train=None, **options):
    trainer = make_trainer(**options)
    trainer.fit(Net() if model is None else model, make_loader() if train is None else train, make_loader())
    return trainer


def logging(*args, **kwargs):
    return step(lambda self, batch: (self.log(*args, **kwargs), self.loss(batch))[1])


def with_list(layers):
    return init(lambda self: setattr(self, "layers", layers))


class Own(Callback):
    def on_train_epoch_end(self): ...


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return make_loader()


def data(**methods):
    return type("Mine", (Data,), methods)()


def setup_for_train(self, stage):
    if stage == "train":
        self.ready = True


def no_layers(self):
    self.lr = 1


def frozen():
    model = Net()
    model.requires_grad_(False)
    return model


def by_hand(self, batch):
    self.optimizers().step()
    return self.loss(batch)


def plain_weights():
    torch.save(Net().state_dict(), "weights.pt")
    make_trainer().fit(Net(), make_loader(), ckpt_path="weights.pt")


MISTAKES = {
    # the Trainer's arguments
    "misspelt argument": (lambda: make_trainer(max_epoch=3), "Did you mean `max_epochs`"),
    "argument of an older version": (lambda: make_trainer(gpus=1), "`accelerator=\"gpu\", devices=...`"),
    "resuming as in older versions": (lambda: make_trainer(resume_from_checkpoint="x"), "ckpt_path"),
    "a logger by its name": (lambda: make_trainer(logger="tb"), r"`TensorBoardLogger\(...\)`"),
    "a callback's class": (lambda: make_trainer(callbacks=[EarlyStopping]), r"pass `EarlyStopping\(...\)`"),
    "a dict of callbacks": (lambda: make_trainer(callbacks={"stop": EarlyStopping("x")}), "instances of `Callback`"),
    "misspelt accelerator": (lambda: make_trainer(accelerator="gppu"), "Did you mean `gpu`"),
    "no devices": (lambda: make_trainer(devices=0), "Use `devices=1`"),
    "misspelt strategy": (lambda: make_trainer(strategy="dpp"), "Did you mean `ddp`"),
    "unknown precision": (lambda: make_trainer(precision="fp16"), "Did you mean `16-mixed`"),
    "a text for a number": (lambda: make_trainer(max_epochs="3"), "should be an integer"),
    "a text for a switch": (lambda: make_trainer(enable_progress_bar="False"), "Pass True or False"),
    "a text for a bound": (lambda: make_trainer(gradient_clip_val="1"), "int or a float"),
    "a fraction above one": (lambda: make_trainer(limit_train_batches=1.5), "float, such as"),
    "a schedule of accumulation": (lambda: make_trainer(accumulate_grad_batches={4: 2}), "GradientAccumulationScheduler"),
    "a duration in words": (lambda: make_trainer(max_time="5 minutes"), "Write DD:HH:MM:SS"),
    "misspelt profiler": (lambda: make_trainer(profiler="simpel"), "Did you mean `simple`"),
    "a checkpoint callback switched off": (lambda: make_trainer(callbacks=[ModelCheckpoint()]), "Remove one of the two"),
    "an impossible seed": (lambda: pl.seed_everything("abc"), "Use an integer"),
    # names
    "misspelt class": (lambda: pl.Trainr, "Did you mean `Trainer`"),
    "misspelt callback": (lambda: pl.callbacks.EarlyStoping, "Did you mean `EarlyStopping`"),
    "misspelt argument of a callback": (lambda: EarlyStopping("loss", patence=3), "Did you mean `patience`"),
    "misspelt argument of fit": (lambda: make_trainer().fit(Net(), train_dataloader=1), "Did you mean `train_dataloaders`"),
    "unknown mode": (lambda: EarlyStopping("loss", mode="minimum"), "Use 'min' or 'max'"),
    "best ones without a measure": (lambda: ModelCheckpoint(save_top_k=2), "needs a `monitor`"),
    # what is passed to fit
    "model and loader swapped": (lambda: make_trainer().fit(make_loader(), Net()), "requires a `LightningModule`"),
    "a plain module": (lambda: fit(nn.Linear(4, 1)), "derived from `fulmen.LightningModule`"),
    "the module's class": (lambda: fit(Net), r"pass `Net\(...\)`, not `Net`"),
    "the datamodule's class": (lambda: make_trainer().fit(Net(), datamodule=Data), r"pass `Data\(...\)`, not `Data`"),
    "fit of the class": (lambda: pl.Trainer.fit(Net(), make_loader()), r"Make one first: `trainer = Trainer\(...\)`"),
    "no batches": (lambda: make_trainer().fit(Net()), "Pass a loader"),
    "a dataset for a loader": (lambda: fit(train=make_loader().dataset), r"`DataLoader\(dataset, batch_size=...\)`"),
    "a text for a loader": (lambda: fit(train="mnist"), "Give a `DataLoader`"),
    "a function for a loader": (lambda: fit(train=make_loader), "Give a `DataLoader`"),
    "a datamodule for validation": (lambda: make_trainer().fit(Net(), make_loader(), Data()), "as `datamodule=`"),
    "test without a model": (lambda: make_trainer().test(), "Pass `model=`"),
    "test without a test_step": (lambda: make_trainer().test(Net(), make_loader()), "Define `def test_step"),
    "a file that is not there": (lambda: make_trainer().fit(Net(), make_loader(), ckpt_path="no.ckpt"), "does not exist"),
    "a number for a file": (lambda: make_trainer().fit(Net(), make_loader(), ckpt_path=5), "Pass a path"),
    "plain weights for a checkpoint": (plain_weights, "model.load_state_dict"),
    "saving before training": (lambda: make_trainer().save_checkpoint("x.ckpt"), "Call `trainer.fit`"),
    "loading into an instance": (lambda: Net().load_from_checkpoint("x.ckpt"), "Use `loaded = "),
    # the module
    "super().__init__() forgotten": (lambda: fit(net(__init__=no_layers)), r"does not call `super\(\).__init__\(\)`"),
    "no training_step": (lambda: fit(net(training_step=pl.LightningModule.training_step)), "Define `def training_step"),
    "misspelt step": (lambda: fit(net(tset_step=Net.validation_step)), "Did you mean `test_step`"),
    "hook of an older version": (lambda: fit(net(training_epoch_end=lambda self, outputs: None)), "Use `on_train_epoch_end`"),
    "another name for validation": (lambda: fit(net(validate_step=lambda self, b, i: 0, validation_step=BASE)), "`validation_step`"),
    "nearly a hook": (lambda: fit(net(on_training_start=lambda self: None)), "Did you mean the hook `on_train_start`"),
    "wrong arguments of a hook": (lambda: fit(net(on_train_epoch_end=lambda self, outputs: None)), "Define `def on_tr"),
    "wrong arguments of a callback's hook": (lambda: fit(callbacks=[Own()]), r"end\(self, trainer, pl_module\)`"),
    "setup without a stage": (lambda: make_trainer().fit(Net(), data(setup=lambda self: None)), r"`def setup\(self, stage\)`"),
    "a stage that there is not": (lambda: make_trainer().fit(Net(), data(setup=setup_for_train)), "Did you mean 'fit'"),
    "layers in a list": (lambda: fit(with_list([nn.Linear(4, 4)])), "Use `nn.ModuleList`"),
    "layers in a dict": (lambda: fit(with_list({"a": nn.Linear(4, 4)})), "`nn.ModuleDict`"),
    "eval mode": (lambda: fit(Net().eval()), r"Call `.train\(\)`"),
    "nothing to train": (lambda: fit(frozen()), "check that parameters require gradients"),
    "the trainer in __init__": (lambda: init(lambda self: self.trainer), r"`trainer.fit\(module\)` attaches it"),
    # the step
    "a number for a loss": (lambda: fit(step(lambda self, batch: self.loss(batch).item())), "Return the loss as a tensor"),
    "a detached loss": (lambda: fit(step(lambda self, batch: self.loss(batch).detach())), "Remove `.detach"),
    "a step without a batch": (lambda: fit(net(training_step=lambda self: None)), r"Define `def training_step\(self, batch"),
    "a loss per sample": (lambda: fit(step(lambda self, batch: self(batch[0]))), r"Reduce it.*`.mean\(\)`"),
    "a dict without loss": (lambda: fit(step(lambda self, batch: {"los": self.loss(batch)})), 'Return {"loss": loss'),
    "no loss": (lambda: fit(step(lambda self, batch: None), max_epochs=40), "return loss"),
    "a loss of other weights": (lambda: fit(step(lambda self, batch: torch.ones(1, requires_grad=True).sum())), "does not depend"),
    "layers made too late": (lambda: fit(net(on_train_start=lambda self: setattr(self, "net", nn.Linear(4, 1)))), "replaced"),
    "no step in manual optimization": (
        lambda: fit(init(lambda self: setattr(self, "automatic_optimization", False))), r"self.optimizers\(\).step\(\)"
    ),
    "a step by hand": (lambda: fit(step(by_hand)), "self.automatic_optimization = False"),
    # logging
    "log in __init__": (lambda: init(lambda self: self.log("a", 1.0)), "only while `trainer.fit`"),
    "name and value swapped": (lambda: fit(logging(1.0, "loss")), "Pass a string"),
    "a text as a value": (lambda: fit(logging("a", "good")), "number.*is expected"),
    "a vector as a value": (lambda: fit(logging("a", torch.ones(3))), r"`self.log\('a', value.mean\(\)\)`"),
    "monitor misspelt": (lambda: fit(callbacks=[EarlyStopping("val_los")]), "Did you mean `val_loss`"),
    "an accuracy that should fall": (lambda: fit(callbacks=[EarlyStopping("val_acc")]), "Did you mean `mode='max'`"),
    "learning rates without a logger": (lambda: fit(callbacks=[LearningRateMonitor()]), "Pass a logger"),
    # optimizers
    "optimizers forgotten": (lambda: fit(net(configure_optimizers=pl.LightningModule.configure_optimizers)), "Define"),
    "no optimizer returned": (lambda: fit(optim(lambda optimizer: None)), "Return one"),
    "an optimizer's class": (lambda: fit(optim(lambda optimizer: SGD)), "Return an optimizer"),
    "another model's optimizer": (lambda: fit(optim(lambda o: SGD(Net().parameters(), lr=0.1))), r"Pass `self.parameters\(\)`"),
    "a scheduler alone": (lambda: fit(optim(lambda o: StepLR(o, 1))), "Return an optimizer"),
    "misspelt key": (lambda: fit(optim(lambda o: {"optimizer": o, "scheduler": StepLR(o, 1)})), "Did you mean `lr_scheduler`"),
    "a frequency of 0": (
        lambda: fit(optim(lambda o: ([o], [{"scheduler": StepLR(o, 1), "frequency": 0}]))), "whole number of 1 or more"
    ),
    "a text for a patience": (lambda: EarlyStopping("val_loss", patience="3"), "must be a number of checks"),
    "plateau of nothing": (
        lambda: fit(optim(lambda o: ([o], [torch.optim.lr_scheduler.ReduceLROnPlateau(o)]))), '"monitor": "val_loss"'
    ),
    "two optimizers": (lambda: fit(optim(lambda o: [o, SGD(o.param_groups[0]["params"], lr=0.1)])), "manual optimization"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_with_what_to_do(mistake):
    provoke, fix = MISTAKES[mistake]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            provoke()
        except Exception as error:
            answers = [str(error)]
        else:
            answers = [str(warning.message) for warning in caught]
    assert answers, "it ends in silence"
    assert re.search(fix, "\n".join(answers), flags=re.DOTALL), answers


def test_what_is_right_is_done_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*workers|.*log_every_n_steps")
        trainer = fit(
            callbacks=[EarlyStopping("val_acc", mode="max"), LearningRateMonitor()], logger=pl.loggers.CSVLogger(".")
        )
    assert trainer.global_step == 3
