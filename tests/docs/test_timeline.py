"""The timeline of hooks in `fulmen.hooks`, compared with what runs record."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch.utils.data import DataLoader

import fulmen as pl
from fulmen import hooks

Block = list[Any]  # names of hooks, and pairs of a heading and what stands under it


def read_timeline() -> dict[str, Block]:
    """The blocks of the docstring, by name."""
    text = inspect.cleandoc(str(hooks.__doc__)).partition("::\n")[2].partition("\n\nWith several devices")[0]
    root: Block = []
    open_blocks = [(-1, root)]
    for line in filter(str.strip, text.splitlines()):
        indent, entry = len(line) - len(line.lstrip()), re.split(r"\s{2,}", line.strip())[0]
        while indent <= open_blocks[-1][0]:
            open_blocks.pop()
        if entry.endswith(":"):
            block: Block = []
            open_blocks[-1][1].append((entry[:-1], block))
            open_blocks.append((indent, block))
        else:
            open_blocks[-1][1].append(entry)
    return dict(root)


def names_in(block: Block) -> set[str]:
    return set().union(*(names_in(entry[1]) if isinstance(entry, tuple) else {entry} for entry in block))


@dataclass
class Run:
    """One call of the Trainer, and what its timeline should be."""

    verb: str
    epochs: int = 2
    batches: int = 3  # of each loader
    accumulate: int = 2
    sanity: int = 1
    resumes: bool = False
    first_of_node: bool = True
    asked: set[str] = field(default_factory=set)  # loaders are asked for once

    def expected(self) -> list[str]:
        self.blocks = read_timeline()
        return [hook for hook in self.expand(self.blocks[self.verb], self.batches, 0) if self.runs(hook)]

    def runs(self, hook: str) -> bool:
        if hook.endswith("_dataloader"):
            first = hook not in self.asked
            self.asked.add(hook)
            return first
        return hook != "prepare_data" or self.first_of_node

    def expand(self, block: Block, batches: int, batch: int) -> Iterator[str]:
        sanity = False
        for entry in block:
            if isinstance(entry, tuple):
                heading, inner = entry
                for index in self.turns(heading, batches, batch):
                    yield from self.expand(inner, batches, index)
            elif entry.startswith("("):
                count = (self.sanity if sanity else self.batches) if entry == "(validation)" else batches
                yield from self.expand(self.blocks[entry.strip("()")], count, batch)
            else:
                sanity = entry == "on_sanity_check_start"
                yield entry

    def turns(self, heading: str, batches: int, batch: int) -> range | tuple[int, ...]:
        """How often what stands under a heading happens now, with the number of the batch."""
        last = batch == batches - 1
        once = {
            "start of accumulation": batch % self.accumulate == 0,
            "end of accumulation": (batch + 1) % self.accumulate == 0 or last,
            "validating": True,
            "validation is due": last,
            "resuming": self.resumes,
            "saving": True,
        }
        if heading in once:
            return (batch,) if once[heading] else ()
        return {"each epoch": range(self.epochs), "each batch": range(batches)}[heading]


def recording(base: type, log: list[str]) -> type:
    """A subclass that notes each of its hooks, and what the timeline names beside them."""
    found = {name for name in names_in(list(read_timeline().items())) if hasattr(base, name)}

    def noted(name: str) -> Callable[..., Any]:
        original = getattr(base, name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            log.append(name)
            return original(self, *args, **kwargs)

        return method

    return type(f"Recording{base.__name__}", (base,), {name: noted(name) for name in found})


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx): ...

    def test_step(self, batch, batch_idx): ...

    def forward(self, batch):
        return self.layer(batch)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def make_loader(self):
        return DataLoader(torch.ones(3 * self.trainer.world_size, 2))

    def train_dataloader(self):
        return self.make_loader()

    def val_dataloader(self):
        return self.make_loader()

    def test_dataloader(self):
        return self.make_loader()

    def predict_dataloader(self):
        return self.make_loader()


def recorded(run: Run, folder: Path, devices: int = 1, ckpt_path: Path | None = None) -> tuple[list[str], list[str]]:
    """What the module and what a callback saw."""
    seen_by_module: list[str] = []
    seen_by_callback: list[str] = []
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, max_epochs=run.epochs, accumulate_grad_batches=run.accumulate,
        num_sanity_val_steps=run.sanity, callbacks=recording(pl.Callback, seen_by_callback)(), logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    getattr(trainer, run.verb)(recording(Net, seen_by_module)(), ckpt_path=ckpt_path)
    return seen_by_module, seen_by_callback


def compare(run: Run, seen_by_module: list[str], seen_by_callback: list[str]) -> None:
    expected = run.expected()
    assert seen_by_module == [name for name in expected if not name.startswith("on_sanity_check")]
    assert seen_by_callback == [name for name in expected if hasattr(pl.Callback, name)]


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_a_run_calls_what_the_timeline_says(verb: str, tmp_path: Path) -> None:
    run = Run(verb)
    compare(run, *recorded(run, tmp_path))


def test_a_resumed_run_calls_what_the_timeline_says(tmp_path: Path) -> None:
    recorded(Run("fit", epochs=1), tmp_path)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    run = Run("fit", epochs=1, resumes=True)
    seen = recorded(Run("fit", epochs=2), tmp_path, ckpt_path=checkpoint)
    compare(run, *seen)


def on_one_rank(folder: str) -> tuple[list[str], list[str]]:
    return recorded(Run("fit"), Path(folder), devices=2)


def test_all_processes_call_what_the_timeline_says(tmp_path: Path) -> None:
    for rank, seen in enumerate(run_ranks(2, on_one_rank, str(tmp_path))):
        compare(Run("fit", first_of_node=rank == 0), *seen)
