"""Walks the table in docs/state.md: each row has a check here, and each check a row."""

from __future__ import annotations

import copy
import logging
import os
import random
import re
import resource
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchmetrics
from ranks import run_ranks
from support import Regression, make_loader, make_trainer
from torch import nn
from torch.utils.data import DataLoader

import fulmen as pl
from fulmen.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint, NonFiniteGuard
from fulmen.loggers import CSVLogger

PAGE = Path(__file__).parents[2] / "docs" / "state.md"
HERE, MOMENT = "saved.ckpt", (1, 3)  # epoch and batch before which is looked
pytestmark = pytest.mark.filterwarnings("ignore")


def rows():
    """The cells of each row, by the first one."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {name: rest for name, *rest in cells if name != "state"}


# ---------------------------------------------------------------------- a run that changes whatever it can


class Extra(nn.Module):
    count = 0

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]


class Model(pl.LightningModule):
    def __init__(self, width=1):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.layer, self.extra, self.mean = nn.Linear(4, 1), Extra(), torchmetrics.MeanMetric()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(()), persistent=False)
        self.own, self.batches = 0.0, []
        self.backbone[0].requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.batches.append(x[:, 0].tolist())
        noise = random.random() + float(np.random.rand()) + torch.rand(())
        loss = (self.layer(self.backbone(x)) - y).pow(2).mean() * noise
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.mean(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("v", (self.layer(self.backbone(batch[0])) - batch[1]).pow(2).mean())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen += 1
        self.scratch += 1
        self.own += 1
        self.extra.count += 1

    def configure_optimizers(self):
        optimizer = torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.05, momentum=0.9)
        steps = {"interval": "step", "frequency": 2}
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9), **steps}]


class Data(pl.LightningDataModule):
    def __init__(self, samples):
        super().__init__()
        self.asked, self.samples, self.generator = 0, samples, torch.Generator().manual_seed(5)

    def train_dataloader(self):
        return DataLoader(make_loader(self.samples).dataset, 4, shuffle=True, generator=self.generator)

    def val_dataloader(self):
        return make_loader(8)

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state_dict):
        self.asked = state_dict["asked"]


class Changes(Callback):
    """Switches in the second epoch what can be switched, and says what is there as it begins and at one moment later."""

    def __init__(self):
        self.found = self.first = None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        now = (trainer.current_epoch, batch_idx)
        if self.first is None:
            self.first = look(trainer)
        if now == MOMENT:
            self.found = look(trainer)
        if now == (1, 0):
            (optimizer,), (layer, norm, dropout) = trainer.optimizers, module.backbone
            layer.requires_grad_(True)
            optimizer.add_param_group({"params": [*layer.parameters()], "lr": 0.01})
            optimizer.param_groups[0]["weight_decay"] = 0.01
            trainer.lr_scheduler_configs[0].scheduler.base_lrs.append(0.01)
            norm.eval()
            norm.momentum, dropout.p = 0.3, 0.25

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.datamodule.asked += 1
        trainer.gradient_clip_val = 100.0


def host(value):
    """Copies, so that what a run does later is not seen."""
    return copy.deepcopy(value.detach() if isinstance(value, torch.Tensor) else value)


def by_name(named):
    return {name: host(value) for name, value in named}


def optimizer_of(trainer):
    return trainer.optimizers[0].state_dict()


def group_members(trainer):
    names = {id(p): name for name, p in trainer.lightning_module.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in trainer.optimizers[0].param_groups]


def generators(trainer):
    python = random.getstate()
    return [python, list(np.random.get_state()[1:3]), torch.get_rng_state()]


def sums(trainer):
    entries = trainer.book.scopes["train"].entries.values()
    return [(entry.callback_name, host(entry.total), entry.weight) for entry in entries]


def averages(trainer):
    state = next(c for c in trainer.callbacks if isinstance(c, EMAWeightAveraging)).weights_state()
    return state["n_averaged"], (state["average"] or [])[:6]  # of the parameters: a buffer that no file has differs


def window(trainer):
    return by_name((n, p.grad) for n, p in trainer.lightning_module.named_parameters() if p.grad is not None)


# What is looked at, by row: of what the file has.
OF_THE_FILE = {
    "parameters": lambda t: by_name(t.lightning_module.named_parameters()),
    "buffers": lambda t: by_name((n, b) for n, b in t.lightning_module.named_buffers() if n != "scratch"),
    "`get_extra_state` of a module": lambda t: t.lightning_module.extra.count,
    "`requires_grad` of parameters": lambda t: [p.requires_grad for p in t.lightning_module.parameters()],
    "train and eval mode": lambda t: [part.training for part in t.lightning_module.modules()],
    "numbers of torch's layers (`p`, `momentum`, `eps`, `track_running_stats`)": lambda t: repr(t.lightning_module),
    "gradients that wait for a step": window,
    "states of optimizers": lambda t: optimizer_of(t)["state"],
    "options of parameter groups (`lr`, `weight_decay`, ...)": lambda t: optimizer_of(t)["param_groups"],
    "members of parameter groups": group_members,
    "states of schedulers": lambda t: t.lr_scheduler_configs[0].scheduler.state_dict(),
    "counters (`current_epoch`, `global_step`, batch)": lambda t: t.fit_loop.progress.state_dict(),
    "state of callbacks": lambda t: {k: v for k, v in t.early_stopping_callback.state_dict().items() if k != "patience"},
    "averages of weights": averages,
    "the order of samples (generators and samplers of loaders)": lambda t: t.datamodule.generator.get_state(),
    "state of the datamodule": lambda t: t.datamodule.asked,
    "sums of the epoch": sums,
    "states of torchmetrics": lambda t: [t.lightning_module.mean.mean_value, t.lightning_module.mean._update_count],
    "`callback_metrics`, `logged_metrics`, `progress_bar_metrics`": lambda t: [
        dict(t.callback_metrics), dict(t.logged_metrics), dict(t.progress_bar_metrics),
    ],
    "random generators of Python, NumPy and torch, and of CUDA": generators,
}  # fmt: skip
# Of what the script says.
OF_THE_SCRIPT = {
    "buffers with `persistent=False`": lambda t: t.lightning_module.scratch.clone(),
    "attributes of your own classes": lambda t: t.lightning_module.own,
    "arguments of the Trainer": lambda t: t.gradient_clip_val,
}


def look(trainer):
    return {name: host(probe(trainer)) for name, probe in {**OF_THE_FILE, **OF_THE_SCRIPT}.items()}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def tell(folder, ckpt_path=None, seed=0, width=1, patience=8, **kwargs):
    """One run; without `ckpt_path` it leaves a file inside an accumulation window of its second epoch."""
    for seeds in (random.seed, np.random.seed, torch.manual_seed):
        seeds(seed)
    changes = Changes()
    module, data = Model(width), Data(24 * kwargs.get("devices", 1))
    file = os.path.join(folder, HERE)

    class AsIs(Model):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            super().on_train_batch_end(outputs, batch, batch_idx)
            if ckpt_path is None and (self.current_epoch, batch_idx) == (MOMENT[0], MOMENT[1] - 1):
                self.trainer.save_checkpoint(file)

    module.__class__ = AsIs
    trainer = make_trainer(
        max_epochs=3, accumulate_grad_batches=2, val_check_interval=2, log_every_n_steps=1, default_root_dir=folder,
        callbacks=[changes, EarlyStopping("v", patience=patience), EMAWeightAveraging(decay=0.5)],
        logger=CSVLogger(folder, version="one", flush_logs_every_n_steps=1), **kwargs,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return SimpleNamespace(module=module, trainer=trainer, first=changes.first, found=changes.found, folder=folder)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A run without a stop, its file of one moment, and a run of another process's script that goes on from there."""
    folder = tmp_path_factory.mktemp("story")
    whole = tell(folder)
    rows_written = (folder / "lightning_logs" / "one" / "metrics.csv").read_text()
    content = torch.load(folder / HERE, weights_only=True)
    resumed = tell(folder, folder / HERE, seed=9, width=2, patience=7)
    return SimpleNamespace(whole=whole, resumed=resumed, content=content, rows_written=rows_written, folder=folder)


def of_the_file(name):
    def check(story, _):
        assert equal(story.resumed.found[name], story.whole.found[name])
        assert not equal(story.whole.first[name], story.whole.found[name])
        assert equal(story.resumed.first[name], story.resumed.found[name])  # it is the first thing that run sees

    return check


def of_the_script(name):
    def check(story, _):
        assert not equal(story.whole.first[name], story.whole.found[name])
        assert equal(story.resumed.first[name], story.whole.first[name])

    return check


CHECKS = {**{name: of_the_file(name) for name in OF_THE_FILE}, **{name: of_the_script(name) for name in OF_THE_SCRIPT}}


def checks(name):
    def keep(check):
        CHECKS[name] = check
        return check

    return keep


# ---------------------------------------------------------------------- rows that need a look of their own


@checks("hyper-parameters")
def _(story, _):
    assert story.content["hyper_parameters"] == {"width": 1}
    assert story.resumed.module.hparams.width == 2
    assert Model.load_from_checkpoint(story.folder / HERE, strict=False).hparams.width == 1


@checks("kinds and number of optimizers")
def _(story, _):
    class Other(Regression):
        many = 1

        def configure_optimizers(self):
            return [torch.optim.Adam(self.parameters(), 0.1) for _ in range(self.many)]

    trainer = make_trainer()
    trainer.fit(Regression(), make_loader())
    trainer.save_checkpoint(story.folder / "sgd.ckpt")
    with pytest.warns(UserWarning, match="the state of a `SGD`.*returned a `Adam`"):
        make_trainer(max_epochs=1).fit(Other(), make_loader(), ckpt_path=story.folder / "sgd.ckpt")
    two = Other()
    two.many, two.automatic_optimization = 2, False
    with pytest.raises(RuntimeError, match="1 optimizers, but `configure_optimizers` returned 2"):
        make_trainer(max_epochs=2).fit(two, make_loader(), ckpt_path=story.folder / "sgd.ckpt")


@checks("when a scheduler steps (`interval`, `frequency`, `monitor`)")
def _(story, _):
    class Decays(Regression):
        frequency = 1

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            steps = {"interval": "step", "frequency": self.frequency}
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), **steps}]

    trainer = make_trainer()
    trainer.fit(Decays(), make_loader())
    trainer.save_checkpoint(story.folder / "decays.ckpt")
    again, module = make_trainer(max_epochs=2), Decays()
    module.frequency = 100
    again.fit(module, make_loader(), ckpt_path=story.folder / "decays.ckpt")
    assert [t.optimizers[0].param_groups[0]["lr"] for t in (trainer, again)] == [0.1 / 8] * 2


@checks("steps that a scheduler does not follow")
def _(story, _):
    assert story.content["fulmen"]["schedulers"].keys() >= {"missed", "moved", "idle"}
    rates = [[group["lr"] for group in run.trainer.optimizers[0].param_groups] for run in (story.whole, story.resumed)]
    assert rates[0] == rates[1]


def precise(story, precision, key):
    path = story.folder / f"{precision}.ckpt"
    trainer = make_trainer(precision=precision)
    trainer.fit(Regression(), make_loader())
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)[key]
    again = make_trainer(precision=precision)
    assert again.precision_plugin.state_dict() != state
    again.fit(Regression(), make_loader(), ckpt_path=path)
    assert again.precision_plugin.state_dict() == state
    return trainer


@checks("loss scale")
def _(story, _):
    class Scaled(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 1e-3

    trainer = make_trainer(precision="16-mixed", max_epochs=1)
    trainer.precision_plugin.scaler.set_growth_interval(2)
    trainer.fit(Scaled(), make_loader())
    trainer.save_checkpoint(story.folder / "scale.ckpt")
    state = torch.load(story.folder / "scale.ckpt", weights_only=True)["MixedPrecision"]
    again = make_trainer(precision="16-mixed", max_epochs=1)
    assert again.precision_plugin.state_dict() != state
    again.fit(Scaled(), make_loader(), ckpt_path=story.folder / "scale.ckpt")
    assert again.precision_plugin.state_dict() == state


@checks("count of steps in 16 bits, which seeds the rounding")
def _(story, _):
    precise(story, "bf16-true", "HalfPrecision")


@checks("hooks that precision has on optimizers")
def _(story, _):
    for wrong in (False, True):
        trainer, module = make_trainer(precision="16-mixed"), Breaks("training_step" if wrong else None)
        with pytest.raises(Boom) if wrong else warnings.catch_warnings():
            trainer.fit(module, make_loader(), make_loader())
        assert not trainer.optimizers[0]._optimizer_step_post_hooks


@checks("`should_stop`")
def _(story, _):
    class Asks(Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = True

    path = story.folder / "stopped.ckpt"
    for stopping, epochs in ((EarlyStopping("train_loss", patience=1, mode="max", min_delta=99.0), 2), (Asks(), 4)):
        first = make_trainer(max_epochs=4, callbacks=[stopping])
        first.fit(Regression(), make_loader())
        first.save_checkpoint(path)
        again = make_trainer(max_epochs=4, callbacks=[] if isinstance(stopping, Asks) else [copy.deepcopy(stopping)])
        again.fit(Regression(), make_loader(), ckpt_path=path)
        assert again.current_epoch == epochs


@checks("arguments of callbacks (`patience`, `save_top_k`, `duration`, ...)")
def _(story, _):
    (key,) = (key for key in story.content["callbacks"] if key.startswith("EarlyStopping"))
    assert story.content["callbacks"][key]["patience"] == 8
    assert story.resumed.trainer.early_stopping_callback.patience == 7


@checks("callbacks that another Trainer fitted with")
def _(story, _):
    stopping = EarlyStopping("train_loss", patience=9, mode="max")
    make_trainer(max_epochs=3, callbacks=[stopping]).fit(Regression(), make_loader())
    counted = stopping.wait_count
    make_trainer(callbacks=[stopping]).validate(Regression(), make_loader(), verbose=False)
    assert stopping.wait_count == counted == 2
    make_trainer(max_epochs=1, callbacks=[stopping]).fit(Regression(), make_loader())
    assert stopping.wait_count == 0


@checks("buffers, metrics and sums, if `NonFiniteGuard` leaves a step out")
def _(story, _):
    module = nn.BatchNorm1d(4)

    class Bad(Regression):
        def training_step(self, batch, batch_idx):
            bad = float("nan") if batch_idx == 1 else 1.0
            loss = self.layer(self.norm(batch[0] * bad)).mean()
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

    broken = Bad()
    broken.norm = module
    trainer = make_trainer(callbacks=[NonFiniteGuard("skip")])
    trainer.fit(broken, make_loader())
    assert module.running_mean.isfinite().all() and module.num_batches_tracked == 2
    assert trainer.callback_metrics["loss_epoch"].isfinite()


@checks("the place in the epoch")
def _(story, _):
    done = 6 * MOMENT[0] + MOMENT[1]
    assert story.resumed.module.batches == story.whole.module.batches[done:]
    assert len(story.whole.module.batches) == 18


class Counting:
    """A stream with a state."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 6:
            self.at += 1
            yield torch.full((2, 4), float(self.at)), torch.ones(2, 1)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state_dict):
        self.at = state_dict["at"]


@checks("loaders and streams that have a `state_dict`")
def _(story, _):
    class Sees(Regression):
        def training_step(self, batch, batch_idx):
            self.seen = [*getattr(self, "seen", []), int(batch[0][0, 0])]
            return super().training_step(batch, batch_idx)

    path = story.folder / "stream.ckpt"
    saving = ModelCheckpoint(story.folder, "stream", every_n_train_steps=4, save_top_k=1)
    make_trainer(max_steps=4, callbacks=[saving], enable_checkpointing=True).fit(Sees(), Counting())
    assert torch.load(path, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    again = Sees()
    make_trainer(max_epochs=1).fit(again, Counting(), ckpt_path=path)
    assert again.seen == [5, 6]


@checks("workers of loaders")
def _(story, outcomes):
    before = {process.pid for process in torch.multiprocessing.active_children()}
    loader = DataLoader(make_loader().dataset, 4, num_workers=1)
    with pytest.raises(Boom):
        make_trainer().fit(Breaks("training_step"), loader, make_loader())
    assert {process.pid for process in torch.multiprocessing.active_children()} == before


@checks("what loggers have written")
def _(story, _):
    again = (story.folder / "lightning_logs" / "one" / "metrics.csv").read_text()
    assert again == story.rows_written


# ---------------------------------------------------------------------- the process


class Boom(Exception):
    """A mistake of the user's."""


class Breaks(Regression):
    """Raises at one place."""

    def __init__(self, place=None, error=Boom):
        super().__init__()
        self.norm, self.place, self.error = nn.BatchNorm1d(4).eval(), place, error

    def at(self, place):
        if place == self.place:
            raise self.error(place)

    def training_step(self, batch, batch_idx):
        self.at("training_step")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.at("validation_step")
        super().validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        self.at("predict_step")
        return super().predict_step(batch, batch_idx)

    def configure_model(self):
        self.at("configure_model")

    def backward(self, loss):
        self.at("backward")
        loss.backward()

    def on_fit_end(self):
        self.at("on_fit_end")


def loggings():
    found = [logging.getLogger(name) for name in ("", "fulmen", "torch", "py.warnings")]
    return [(one.level, [*one.handlers], [*one.filters], one.propagate, one.disabled) for one in found]


OF_THE_PROCESS = {
    "grad mode and inference mode": lambda: (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    "autocast, and its cache": lambda: (
        torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled(),
    ),
    "default dtype and default device": lambda: (torch.get_default_dtype(), torch.get_default_device()),
    "anomaly detection of autograd": lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
    "matmul precision, threads of torch, kinds of attention, printing options": lambda: (
        torch.get_float32_matmul_precision(), torch.get_num_threads(), torch.get_num_interop_threads(),
        torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(), torch.backends.mkldnn.enabled,
        copy.deepcopy(vars(torch._tensor_str.PRINT_OPTS)), np.geterr(), np.get_printoptions(),
    ),
    "warnings filters, levels and handlers of loggers": lambda: ([*warnings.filters], loggings()),
    "signal handlers": lambda: {number: signal.getsignal(number) for number in signal.valid_signals()},
    "environment variables": lambda: dict(os.environ),
    "working directory, file creation mask, recursion limit, standard streams": lambda: (
        os.getcwd(), umask(), sys.getrecursionlimit(), sys.stdout, sys.stderr, resource.getrlimit(resource.RLIMIT_NOFILE),
    ),
    "exception hooks, threads, torch's function modes": lambda: (
        sys.excepthook, threading.excepthook, sys.unraisablehook, Threads(threading.enumerate()),
        torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(),
    ),
}  # fmt: skip


class Threads(frozenset):
    """Alike if none was added: those of earlier tests may end in between."""

    def __eq__(self, after):
        return after <= self

    __hash__ = None


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


PLACES = (None, "training_step", "validation_step", "backward", "configure_model", "on_fit_end")


@pytest.fixture(scope="module")
def outcomes():
    """What each probe gave before and after runs of all verbs, which end well, by an exception and by Ctrl-C."""
    found = {name: [] for name in OF_THE_PROCESS}
    make_trainer().fit(Breaks(), make_loader(), make_loader())  # what torch imports, sets and starts once

    def run(verb, place, error, **kwargs):
        trainer, module = make_trainer(num_sanity_val_steps=0, **kwargs), Breaks(place, error)
        modes = [part.training for part in module.modules()]
        loaders = [make_loader()] * (2 if verb == "fit" else 1)
        before = {name: probe() for name, probe in OF_THE_PROCESS.items()}
        with pytest.raises((Boom, SystemExit)) if place else warnings.catch_warnings():
            getattr(trainer, verb)(module, *loaders)
        for name, probe in OF_THE_PROCESS.items():
            found[name].append((before[name], probe(), (verb, place, error, kwargs)))
        assert [part.training for part in module.modules()] == modes, (verb, place)

    for precision in ("64-true", "bf16-mixed"):
        for place in PLACES:
            for error in (Boom, KeyboardInterrupt):
                run("fit", place, error, precision=precision, detect_anomaly=precision == "64-true")
        for verb, place in (("validate", "validation_step"), ("predict", "predict_step"), ("test", None)):
            run(verb, place, Boom, precision=precision, inference_mode=precision != "64-true")
    return found


def of_the_process(name):
    def check(_, outcomes):
        for before, after, run in outcomes[name]:
            assert before == after, run
        assert len(outcomes[name]) == 30

    return check


CHECKS.update({name: of_the_process(name) for name in OF_THE_PROCESS})


@checks("deterministic algorithms, `cudnn.benchmark`, `CUBLAS_WORKSPACE_CONFIG`")
def _(story, _):
    now = lambda: (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)  # noqa: E731
    before, workspace = now(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    try:
        trainer = make_trainer(deterministic=True, benchmark=False)
        assert now() == (True, False) and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with pytest.raises(Boom):
            trainer.fit(Breaks("training_step"), make_loader(), make_loader())
        make_trainer().fit(Regression(), make_loader())  # None leaves them
        assert now() == (True, False)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


# ---------------------------------------------------------------------- the table


def test_each_row_has_a_check_and_each_check_a_row():
    assert {*rows()} == {*CHECKS}
    assert all(len(cells) == 4 and all(cells) for cells in rows().values())


@pytest.mark.parametrize("name", CHECKS)
def test_the_row(name, story, outcomes):
    CHECKS[name](story, outcomes)


def test_the_keys_that_the_table_names_are_in_the_file(story):
    chapter = story.content["fulmen"]
    inside = {*chapter, *chapter["ranks"][0]}
    for name, (saved, *_) in rows().items():
        if saved.startswith(("no", "as ", "-", "under")):
            continue
        outer, _, inner = saved.partition("`fulmen`")
        assert {*re.findall(r"`(\w+)`", outer)} <= {*story.content, "MixedPrecision", "HalfPrecision"}, name
        assert {*re.findall(r"`(\w+)`", inner)} <= inside, name


def test_the_run_that_was_resumed_is_the_one_without_a_stop(story):
    for (name, a), b in zip(story.whole.module.state_dict().items(), story.resumed.module.state_dict().values()):
        assert equal(a, b), name
    assert equal(dict(story.whole.trainer.callback_metrics), dict(story.resumed.trainer.callback_metrics))


def test_flags_that_were_toggled_are_put_back_after_an_error():
    class Toggles(Regression):
        def __init__(self):
            super().__init__()
            self.other, self.automatic_optimization = nn.Linear(4, 1), False

        def training_step(self, batch, batch_idx):
            self.toggle_optimizer(self.optimizers()[0])
            raise Boom

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.layer, self.other)]

    module = Toggles()
    with pytest.raises(Boom):
        make_trainer().fit(module, make_loader())
    assert all(p.requires_grad for p in module.parameters())


def story_on_ranks(folder):
    """What differs between the two runs, by row."""
    machine = {"devices": 2, "strategy": "ddp"}
    whole = tell(folder, **machine)
    resumed = tell(folder, os.path.join(folder, HERE), seed=9, **machine)
    names = [*OF_THE_FILE]
    own = "random generators of Python, NumPy and torch, and of CUDA"
    return [name for name in names if not equal(whole.found[name], resumed.found[name])], str(whole.found[own])


@pytest.mark.slow
def test_each_process_has_its_own_part(tmp_path):
    (differs, state), (other_differs, other_state) = run_ranks(2, story_on_ranks, str(tmp_path))
    assert differs == other_differs == []
    assert state == other_state  # seeded alike here, and each restored
