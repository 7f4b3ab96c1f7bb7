"""Runs that are killed and go on: do they end in the same bits as the one that was never stopped?

python -m trials.resume                           # 200 trials of each of 8 mixes
python -m trials.resume --mix workers --trial 17  # one of them again
python -m trials.resume --million                 # seconds to the first batch in the middle of a long epoch

Each trial is a run in a process of its own, and the same run ended with SIGKILL at a moment that the trial's number
decides, once or twice, and resumed from its newest file. Compared are the SHA-256 of weights, of the optimizer's state,
of the averages, of the newest logged values, and of the rows in `metrics.csv`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import logging
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler
from torchmetrics import MeanSquaredError

import fulmen as pl
from benchmarks.harness import scratch_folder, silent_terminal
from fulmen.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from fulmen.loggers import CSVLogger
from fulmen.utilities.combined_loader import CombinedLoader

SAMPLES = 23


class Augmented(Dataset):
    """Draws from every generator for each sample, in the worker if there are workers."""

    def __init__(self, samples: int = SAMPLES, noise: bool = True) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x, self.noise = torch.randn(samples, 4, generator=generator), noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = self.x[index]
        y = x.sum().reshape(1)
        if self.noise:
            x = x + torch.randn(4) * 0.1 + random.random() * 0.1 + float(numpy.random.rand()) * 0.1
        return x, y


class Stream(IterableDataset):
    """Samples without indices or length."""

    def __iter__(self) -> Any:
        return iter(Augmented(noise=False)[index] for index in range(SAMPLES))


class Uneven(Stream):
    """Gives one process more than the other."""

    def __iter__(self) -> Any:
        rank = torch.distributed.get_rank()
        return iter(Augmented(noise=False)[index] for index in range(*((0, 15), (15, SAMPLES))[rank]))


class Net(pl.LightningModule):
    """Dropout, batch norm, momentum, two schedulers, values of steps and epochs, and noise from python."""

    def __init__(self, metric: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        if metric:
            self.error = MeanSquaredError()

    def loss(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            return sum(self.loss(part) for part in batch.values() if part is not None)  # type: ignore[return-value]
        x, y = batch
        out = self.net(x)
        if hasattr(self, "error") and self.training:
            self.error.update(out.detach(), y)
        return nn.functional.mse_loss(out, y) * (1 + 0.1 * random.random() * self.training)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=4)
        self.log("largest", loss.detach(), on_step=False, on_epoch=True, reduce_fx="max", batch_size=4)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), on_step=True, on_epoch=True, batch_size=4)

    def on_train_epoch_end(self) -> None:
        if hasattr(self, "error"):
            self.log("error", self.error.compute())
            self.error.reset()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        step = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7)
        schedulers = [{"scheduler": step, "interval": "step"}, {"scheduler": plateau, "monitor": "loss_epoch"}]
        return [optimizer], schedulers


class Killer(Callback):
    """Saves at every so-many-th moment, and ends the process, or all of the run's, at one of them.

    Arguments:
        kill_at: number of the moment; None lives.
    """

    monitors = True  # at the end of an epoch it comes after the module, as `ModelCheckpoint` does
    HOOKS = (
        "on_train_start", "on_train_epoch_start", "on_train_batch_end", "on_validation_start",
        "on_validation_batch_end", "on_validation_end", "on_train_epoch_end",
    )  # fmt: skip

    def __init__(self, folder: Path, every: int, kill_at: int | None) -> None:
        self.folder, self.every, self.kill_at, self.moments = folder, every, kill_at, 0
        self.resumes = any(folder.glob("*.ckpt"))

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        # A new process has other generators: what the run draws has to come from the file.
        seed = trainer.global_rank + (99 if self.resumes else 3)
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            trainer.logger.experiment.save()
            found = digests(pl_module, trainer, self.folder)
            (self.folder / "result").write_bytes(pickle.dumps((found, self.moments)))

    def moment(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.sanity_checking:
            return
        self.moments += 1
        if self.every and self.moments % self.every == 0:
            number = len(list(self.folder.glob("*.ckpt")))
            trainer.strategy.barrier()
            trainer.save_checkpoint(self.folder / f"{number:04}.ckpt")
        if self.moments == self.kill_at:
            os.killpg(0, signal.SIGKILL)


for name in Killer.HOOKS:
    setattr(Killer, name, Killer.moment)


def shuffled(dataset: Dataset, rng: random.Random, **arguments: Any) -> DataLoader:
    """A loader whose order is drawn in one of the ways there are."""
    way = rng.randrange(4)
    own = torch.Generator().manual_seed(7)
    if way == 0:
        return DataLoader(dataset, 4, shuffle=True, **arguments)
    if way == 1:
        return DataLoader(dataset, 4, shuffle=True, generator=own, **arguments)
    if way == 2:
        weights = torch.arange(1.0, SAMPLES + 1)
        return DataLoader(dataset, 4, sampler=WeightedRandomSampler(weights, SAMPLES, generator=own), **arguments)
    sampler = RandomSampler(dataset, replacement=True, num_samples=SAMPLES)  # type: ignore[arg-type]
    return DataLoader(dataset, 4, sampler=sampler, drop_last=True, **arguments)


def tensors(samples: int = SAMPLES) -> TensorDataset:
    data = Augmented(samples, noise=False)
    return TensorDataset(data.x, data.x.sum(1, keepdim=True))


def workers(rng: random.Random) -> dict[str, Any]:
    stays = rng.random() < 0.4
    count = rng.choice([1, 2, 3])
    return {"train": shuffled(Augmented(), rng, num_workers=count, persistent_workers=stays), "max_epochs": 2}


def shuffle(rng: random.Random) -> dict[str, Any]:
    return {"train": shuffled(rng.choice([Augmented(), tensors()]), rng), "metric": rng.random() < 0.3}


def accumulation(rng: random.Random) -> dict[str, Any]:
    train = DataLoader(tensors(), 4, shuffle=True) if rng.random() < 0.8 else DataLoader(Stream(), 4)
    clip = rng.choice([None, 0.5])
    return {"train": train, "accumulate_grad_batches": rng.choice([2, 3, 4]), "gradient_clip_val": clip}


def precision(rng: random.Random) -> dict[str, Any]:
    kind, window = rng.choice(["bf16-mixed", "16-mixed"]), rng.choice([1, 2])
    return {"train": shuffled(tensors(), rng), "precision": kind, "accumulate_grad_batches": window}


def average(rng: random.Random) -> dict[str, Any]:
    ema = EMAWeightAveraging(decay=0.9, update_every_n_steps=rng.choice([1, 2]), update_starting_at_step=2)
    stopping = EarlyStopping("val_loss_epoch", patience=1)
    return {"train": DataLoader(tensors(), 4, shuffle=True), "callbacks": [ema, stopping], "max_epochs": 4}


def loaders(rng: random.Random) -> dict[str, Any]:
    mode = rng.choice(["max_size_cycle", "max_size", "min_size"])
    parts = {
        "a": DataLoader(tensors(10), 4, shuffle=True),
        "b": shuffled(Augmented(), rng),
        "c": DataLoader(Augmented(14), 4, num_workers=rng.choice([0, 0, 1])),
    }
    return {"train": CombinedLoader(parts, mode), "max_epochs": 2}


def validation(rng: random.Random) -> dict[str, Any]:
    val = [DataLoader(Augmented(10), 4), shuffled(tensors(), rng)] if rng.random() < 0.5 else shuffled(Augmented(), rng)
    return {"train": DataLoader(tensors(), 4, shuffle=True), "val": val, "val_check_interval": rng.choice([2, 3, 0.5])}


def ranks(rng: random.Random) -> dict[str, Any]:
    window = rng.choice([1, 2])
    more = {"devices": 2, "strategy": "ddp_fork", "accumulate_grad_batches": window, "max_epochs": 2}
    if rng.random() < 0.25:
        return {"train": DataLoader(Uneven(), 4), **more}
    return {"train": DataLoader(rng.choice([Augmented(), tensors()]), 4, shuffle=rng.random() < 0.7), **more}


MIXES: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "workers": workers, "shuffle": shuffle, "accumulation": accumulation, "mixed precision": precision, "EMA": average,
    "several loaders": loaders, "mid-validation": validation, "2 ranks": ranks,
}  # fmt: skip


class TwoLoaders(Net):
    """The same with several validation loaders."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
        super().validation_step(batch, batch_idx)


def train(mix: str, trial: int, folder: Path, kill_at: int | None, every: int) -> None:
    """One run of the trial in this process: from its newest file, if there is one."""
    rng = random.Random(f"{mix} {trial}")
    resumed = sorted(folder.glob("*.ckpt"))
    torch.manual_seed(99 if resumed else 3)
    given = {"max_epochs": 3, "val": DataLoader(tensors(8), 4), "metric": False, "callbacks": [], **MIXES[mix](rng)}
    several = isinstance(given["val"], list)
    model, loader, val = (TwoLoaders if several else Net)(given.pop("metric")), given.pop("train"), given.pop("val")
    if resumed:
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    killer = Killer(folder, every, kill_at)
    saver = ModelCheckpoint(folder / "model", every_n_train_steps=3, save_top_k=-1)
    logger = CSVLogger(folder, name="", version="log", flush_logs_every_n_steps=rng.choice([1, 100]))
    trainer = pl.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, logger=logger, log_every_n_steps=2,
        num_sanity_val_steps=rng.choice([0, 2]), default_root_dir=folder,
        **{**given, "callbacks": [*given["callbacks"], killer, saver]},
    )  # fmt: skip
    trainer.fit(model, loader, val, ckpt_path=resumed[-1] if resumed else None)


def digests(model: Any, trainer: Any, folder: Path) -> dict[str, str]:
    """SHA-256 of all that has to be the same."""
    names = ("weights", "optimizer", "metrics", "rows")
    metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
    rows = (folder / "log" / "metrics.csv").read_bytes()
    parts = (model.state_dict(), trainer.optimizers[0].state_dict(), metrics, rows)
    return {name: hashlib.sha256(_plain(part)).hexdigest() for name, part in zip(names, parts)}


def _plain(value: Any) -> bytes:
    if isinstance(value, Tensor):
        return value.detach().cpu().double().numpy().tobytes()
    if isinstance(value, dict):
        return b"".join(str(key).encode() + _plain(part) for key, part in value.items())
    return b"".join(map(_plain, value)) if isinstance(value, (list, tuple)) else repr(value).encode()


def forked(function: Callable[..., None], *arguments: Any, log: Path) -> int:
    """Runs a function in a child with a group of its own. Returns how it ended, as `os.waitstatus_to_exitcode`."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code
    try:
        os.setsid()
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        warnings.filterwarnings("ignore")
        function(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def trial(mix: str, number: int, folder: Path) -> list[str]:
    """What differs between the run that was killed and the one that was not; nothing if all is well."""
    rng = random.Random(f"kills {mix} {number}")
    whole, part = folder / "whole", folder / "part"
    whole.mkdir()
    part.mkdir()
    every = rng.choice([1, 2, 3, 5])
    log = folder / "output"
    if code := forked(train, mix, number, whole, None, 0, log=log):
        return [f"the run that was not stopped ended with {code}: {log.read_text()[-2000:]}"]
    expected, moments = pickle.loads((whole / "result").read_bytes())
    kills = sorted(rng.sample(range(2, moments), rng.choice([1, 1, 2])))
    for kill in kills:
        code = forked(train, mix, number, part, kill if kill == kills[0] else kill - kills[0], every, log=log)
        if code not in (0, -signal.SIGKILL):
            return [f"the run to be killed ended with {code}: {log.read_text()[-2000:]}"]
    if not (part / "result").exists() and (code := forked(train, mix, number, part, None, every, log=log)):
        return [f"the resumed run ended with {code}: {log.read_text()[-3000:]}"]
    found, _ = pickle.loads((part / "result").read_bytes())
    return [name for name in expected if expected[name] != found[name]]


@contextlib.contextmanager
def trial_folder() -> Iterator[Path]:
    """In memory where possible: a process dies here, not a machine."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Path(folder)


def run_trials(mix: str, numbers: range, report: Callable[[str], None] = print) -> int:
    """Runs these trials. Returns how many were not as the run that was never stopped."""
    warm_up()
    failed = 0
    for number in numbers:
        with trial_folder() as folder:
            if differing := trial(mix, number, folder):
                failed += 1
                report(f"--mix '{mix}' --trial {number}: not equal: {', '.join(differing)}")
    return failed


@functools.cache
def warm_up() -> None:
    """What is imported on first use is imported before the forks."""
    torch.set_num_threads(1)
    with scratch_folder() as folder, silent_terminal(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train("accumulation", 0, folder, None, 3)


class Million(Dataset):
    """Samples that take a millisecond each to load, unless somebody is in a hurry."""

    def __init__(self, seconds: float, samples: int) -> None:
        self.seconds, self.samples = seconds, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        if self.seconds:
            time.sleep(self.seconds)
        return torch.full((8,), float(index % 7))


class Clock(Callback):
    """Ends training after the first batch, and knows when it came; or saves after so many."""

    def __init__(self, path: Path, save_after: int | None) -> None:
        self.path, self.save_after, self.began = path, save_after, time.monotonic()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seconds, self.index = time.monotonic() - self.began, batch_idx
        trainer.should_stop = self.save_after is None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.save_after:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


class Linear(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def first_batch(folder: Path, workers: int, samples: int, batch_size: int = 32) -> tuple[float, float]:
    """Seconds to the first batch at the start of an epoch, and in its middle."""
    path, middle = folder / "middle.ckpt", samples // batch_size // 2

    def fit(seconds: float, save_after: int | None, resumes: bool) -> Clock:
        data = Million(seconds, samples)
        loader = DataLoader(data, batch_size, shuffle=True, num_workers=workers)
        clock = Clock(path, save_after)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[clock], default_root_dir=folder, **quiet)
        clock.began = time.monotonic()
        trainer.fit(Linear(), loader, ckpt_path=path if resumes else None)
        return clock

    fit(0, middle, False)
    start, resumed = fit(0.001, None, False), fit(0.001, None, True)
    if resumed.index != middle:
        raise RuntimeError(f"Resumed at batch {resumed.index}, not at {middle}.")
    return start.seconds, resumed.seconds


def million(samples: int) -> int:
    """Prints the row of each number of workers."""
    worst = 0.0
    for workers in (0, 2):
        with scratch_folder() as folder:
            start, middle = first_batch(folder, workers, samples)
        worst = max(worst, middle - start)
        where = f"first of {samples:,} samples at the start {start:.2f} s, in the middle {middle:.2f} s"
        print(f"{workers} workers: {where}, {middle - start:+.2f} s", flush=True)
    return int(worst > 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", choices=list(MIXES), help="only this one")
    parser.add_argument("--trials", type=int, default=200, help="of each mix")
    parser.add_argument("--trial", type=int, help="only this one")
    parser.add_argument("--keep", type=Path, help="a folder for the files of that one trial")
    parser.add_argument("--million", action="store_true", help="the time to the first batch, and nothing else")
    parser.add_argument("--quick", action="store_true", help="two trials of each mix")
    arguments = parser.parse_args()
    warm_up()
    if arguments.million:
        logging.getLogger("fulmen").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        return million(100_000 if arguments.quick else 1_000_000)
    if arguments.keep:
        print(trial(arguments.mix, arguments.trial, arguments.keep))
        return 0
    count = 2 if arguments.quick else arguments.trials
    numbers = range(count) if arguments.trial is None else range(arguments.trial, arguments.trial + 1)
    failed = 0
    for mix in [arguments.mix] if arguments.mix else MIXES:
        began = time.monotonic()
        wrong = run_trials(mix, numbers)
        failed += wrong
        each = (time.monotonic() - began) / len(numbers)
        print(f"{mix:16} {len(numbers) - wrong} of {len(numbers)} equal, {each:.2f} s each", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
