"""What a type checker knows of a trainer."""

import os
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import assert_type

import fulmen as pl
from fulmen.accelerators import Accelerator, CPUAccelerator
from fulmen.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint, ProgressBar, TQDMProgressBar
from fulmen.loggers import CSVLogger, Logger
from fulmen.plugins import MixedPrecision, Precision
from fulmen.profilers import SimpleProfiler
from fulmen.strategies import DDPStrategy, Strategy
from fulmen.utilities.types import RunningStage

trainer = pl.Trainer(
    accelerator="cpu", strategy="ddp", devices=2, num_nodes=1, precision="bf16-mixed", logger=CSVLogger("."),
    callbacks=[ModelCheckpoint(monitor="loss"), EarlyStopping("loss"), TQDMProgressBar()], fast_dev_run=False,
    max_epochs=3, min_epochs=1, max_steps=-1, max_time={"hours": 8}, limit_train_batches=0.1, limit_val_batches=10,
    overfit_batches=0.0, val_check_interval="00:00:30:00", check_val_every_n_epoch=None, num_sanity_val_steps=0,
    log_every_n_steps=10, accumulate_grad_batches=2, gradient_clip_val=0.5, gradient_clip_algorithm="norm",
    deterministic="warn", benchmark=False, profiler="simple", default_root_dir=Path("."), strict_resume=False,
)  # fmt: skip
pl.Trainer(
    accelerator=CPUAccelerator(), strategy=DDPStrategy(), devices="auto", precision=32, logger=[CSVLogger(".")],
    callbacks=EarlyStopping("loss"), max_time=timedelta(hours=8), plugins=[MixedPrecision("16-mixed", "cuda")],
    profiler=SimpleProfiler(),
)  # fmt: skip

assert_type(trainer.max_epochs, int | None)
assert_type(trainer.max_steps, int)
assert_type(trainer.current_epoch, int)
assert_type(trainer.global_step, int)
assert_type(trainer.global_rank, int)
assert_type(trainer.world_size, int)
assert_type(trainer.is_global_zero, bool)
assert_type(trainer.accelerator, Accelerator)
assert_type(trainer.strategy, Strategy)
assert_type(trainer.precision_plugin, Precision)
assert_type(trainer.scaler, torch.amp.GradScaler | None)
assert_type(trainer.lightning_module, pl.LightningModule)
assert_type(trainer.model, torch.nn.Module | None)
assert_type(trainer.datamodule, pl.LightningDataModule | None)
assert_type(trainer.optimizers, list[Optimizer])
assert_type(trainer.callbacks, list[pl.Callback])
assert_type(trainer.checkpoint_callback, Checkpoint | None)
assert_type(trainer.checkpoint_callbacks, list[Checkpoint])
assert_type(trainer.early_stopping_callback, EarlyStopping | None)
assert_type(trainer.progress_bar_callback, ProgressBar | None)
assert_type(trainer.logger, Logger | None)
assert_type(trainer.loggers, list[Logger])
assert_type(trainer.log_dir, str | None)
assert_type(trainer.default_root_dir, str)
assert_type(trainer.ckpt_path, str | os.PathLike[str] | None)
assert_type(trainer.callback_metrics, dict[str, Tensor])
assert_type(trainer.logged_metrics, dict[str, Tensor])
assert_type(trainer.progress_bar_metrics, dict[str, float])
assert_type(trainer.train_dataloader, Iterable[Any] | None)
assert_type(trainer.num_training_batches, float)
assert_type(trainer.num_val_batches, list[float])
assert_type(trainer.device_ids, list[int])
assert_type(trainer.training, bool)
assert_type(trainer.sanity_checking, bool)
assert_type(trainer.state.stage, RunningStage | None)
assert_type(trainer.should_stop, bool)
trainer.should_stop = True
trainer.max_epochs = 5
trainer.ckpt_path = "a.ckpt"

model = pl.LightningModule()
loader = DataLoader(TensorDataset(torch.ones(8)))
trainer.fit(model, loader, [loader, loader], ckpt_path=Path("a.ckpt"), weights_only=True)
trainer.fit(model, datamodule=pl.LightningDataModule(), ckpt_path="auto")
assert_type(trainer.validate(model, loader), list[dict[str, float]])
assert_type(trainer.test(ckpt_path="best", verbose=False), list[dict[str, float]])
assert_type(trainer.predict(model, pl.LightningDataModule()), list[Any] | None)
trainer.save_checkpoint("b.ckpt", weights_only=True)
with trainer.init_module(empty_init=True):
    pl.LightningModule()
