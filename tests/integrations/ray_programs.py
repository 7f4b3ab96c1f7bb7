"""What workers of Ray Train run in `test_ray.py`; they import this file by its name."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from support import Regression, make_loader

import fulmen as pl

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


class Module(Regression):
    """Kills its worker at the first batch of an epoch, if there is a file that says so, which it removes."""

    def __init__(self, order: str = "") -> None:
        super().__init__()
        self.order = order

    def on_train_epoch_start(self):
        if self.current_epoch == 2 and self.global_rank == 1 and self.order and os.path.exists(self.order):
            os.remove(self.order)
            os.kill(os.getpid(), signal.SIGKILL)


def plain(config: dict[str, Any]) -> None:
    """A script that knows nothing of Ray."""
    pl.seed_everything(1)
    trainer = pl.Trainer(max_epochs=4, **QUIET)
    model = Module(config["order"])
    trainer.fit(model, make_loader(16, shuffle=True), make_loader(16))
    note(config, trainer, model)


def documented(config: dict[str, Any]) -> None:
    """The program of Ray's documentation, with fulmen under the name that it imports."""
    serve_lightning_names()
    lightning = importlib.import_module("lightning.pytorch")
    ray_lightning = importlib.import_module("ray.train.lightning")
    lightning.seed_everything(1)
    trainer = lightning.Trainer(
        max_epochs=4, devices="auto", accelerator="auto", strategy=ray_lightning.RayDDPStrategy(),
        plugins=[ray_lightning.RayLightningEnvironment()], callbacks=[ray_lightning.RayTrainReportCallback()],
        enable_checkpointing=False, **QUIET,
    )  # fmt: skip
    trainer = ray_lightning.prepare_trainer(trainer)
    model = Module()
    trainer.fit(model, train_dataloaders=make_loader(16, shuffle=True), val_dataloaders=make_loader(16))
    note(config, trainer, model)
    refused = []
    for arguments in ({"strategy": ray_lightning.RayFSDPStrategy()}, {"devices": 3}):
        try:
            pl.Trainer(accelerator="cpu", **arguments, **QUIET)
        except Exception as error:
            refused.append(f"{type(error).__name__}: {error}")
    Path(config["folder"], f"refused-{trainer.global_rank}").write_text("\n".join(refused))


def note(config: dict[str, Any], trainer: pl.Trainer, model: Regression) -> None:
    """Writes down how a run ended."""
    found = {
        "weights": model.state_dict(), "steps": trainer.global_step, "world_size": trainer.world_size,
        "strategy": type(trainer.strategy).__name__, "callbacks": [type(one).__name__ for one in trainer.callbacks],
        "pid": os.getpid(), "resumed": str(trainer.ckpt_path),
    }  # fmt: skip
    torch.save(found, Path(config["folder"], f"end-{trainer.global_rank}.pt"))


def serve_lightning_names() -> None:
    """`lightning` and what lies below it are fulmen, by its own doors if it has them."""
    if importlib.util.find_spec("fulmen.compat.foreign") is not None:
        importlib.import_module("fulmen.compat").install()
    elif not any(isinstance(finder, StandIn) for finder in sys.meta_path):
        sys.meta_path.insert(0, StandIn())


class StandIn:
    """Serves `lightning`, and each `lightning.pytorch.x` with the attributes of `fulmen.x`."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name.split(".")[0] != "lightning":
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        if spec.name != "lightning":
            real = importlib.import_module("fulmen" + spec.name.removeprefix("lightning.pytorch"))
            module.__getattr__ = lambda name: getattr(real, name)  # type: ignore[method-assign]
            module.__version__ = "2.6.6"  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass
