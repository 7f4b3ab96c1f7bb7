"""What the benchmarks share: the package to measure, the loop written by hand, and a table at the end."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import platform
import random
import socket
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--package", default="fulmen", help="what to measure; lightning.pytorch where it is installed")
    parser.add_argument("--quick", action="store_true", help="few repetitions: shows that it runs, not how fast")
    return parser


def load(package: str) -> SimpleNamespace:
    """The names the benchmarks need from a package with the API of fulmen."""
    root = importlib.import_module(package)
    loggers = importlib.import_module(f"{package}.loggers")
    callbacks = importlib.import_module(f"{package}.callbacks")
    # Alternated with single-threaded loops and compared with them: the machine's other cores are not the subject.
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in (package, "fulmen", "lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return SimpleNamespace(
        name=package,
        version=getattr(root, "__version__", "?"),
        Trainer=root.Trainer,
        Fabric=importlib.import_module(f"{package.removesuffix('.pytorch')}.fabric").Fabric,
        Module=root.LightningModule,
        Callback=callbacks.Callback,
        CSVLogger=loggers.CSVLogger,
    )


# Everything a Trainer does beyond the loop, turned off.
NOTHING_ON = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Net(nn.Module):
    """The smallest model that has a forward, a loss and parameters to step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def loss(self, batch: Tensor) -> Tensor:
        # Linear in the weights: gradients stay what they are, and no step gets slow on tiny numbers.
        return self.layer(batch).mean()


def tiny_module(pl: SimpleNamespace, log: Callable[[Any, Tensor], None] | None = None) -> Any:
    """``Net`` as a module of the package; ``log(module, loss)`` runs in each training step."""

    class Tiny(pl.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.net.loss(batch)
            if log is not None:
                log(self, loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Tiny()


def bare_loop(net: Net, optimizer: torch.optim.Optimizer, batches: Any) -> None:
    """What one would write without a framework."""
    for batch in batches:
        loss = net.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Marked:
    """The same batch ``steps`` times, calling ``mark()`` before the first and after each ``every`` batches."""

    def __init__(self, steps: int, every: int, mark: Callable[[], None]) -> None:
        self.batch = torch.randn(4, 8)
        self.steps, self.every, self.mark = steps, every, mark

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Tensor]:
        self.mark()
        for _ in range(self.steps // self.every):
            for _ in range(self.every):
                yield self.batch
            self.mark()


def fit(pl: SimpleNamespace, module: Any, batches: Any, folder: Path, **arguments: Any) -> Any:
    """One epoch over ``batches`` with a screen that takes everything and shows nothing."""
    with silent_terminal():
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, num_sanity_val_steps=0, default_root_dir=folder, **arguments
        )
        trainer.fit(module, batches)
    if trainer.global_step != len(batches):
        raise RuntimeError(f"{pl.name} took {trainer.global_step} steps for {len(batches)} batches.")
    return trainer


@contextlib.contextmanager
def silent_terminal() -> Iterator[None]:
    """Standard output and error go to a terminal nobody sees: bars draw as for a person, tables stay readable."""
    with open(os.devnull, "w") as sink:
        sink.isatty = lambda: True  # type: ignore[method-assign]
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def free_port() -> int:
    """One for processes to meet at; below those that the system gives to connections, or one of them may take it first."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def spread(values: list[float], digits: int = 1) -> str:
    """``median (best .. worst)``"""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"


def print_table(title: str, pl: SimpleNamespace, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A plain table, the first column left and the others right."""
    widths = [max(len(row[at]) for row in (header, *rows)) for at in range(len(header))]

    def line(cells: tuple[str, ...]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))
        return "  ".join((cells[0].ljust(widths[0]), *rest)).rstrip()

    print(f"\n{title}: {pl.name} {pl.version}, torch {torch.__version__}, Python {platform.python_version()}")
    print(line(header))
    print("-" * len(line(header)))
    for row in rows:
        print(line(row))
