"""Exact counts, the same on every machine: frames and Python calls between `fit` and the user's `training_step`.

    python -m benchmarks.calls [--package lightning.pytorch]

Calls are the ``call`` events of ``sys.setprofile`` (Python functions entered, generators resumed), built-ins beside
them; both are per step, over those of the hand-written loop.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness

EVERY, BLOCKS = 100, 4
FURTHER = 10


class Count:
    """Events between marks of the batches. The first block, a warm-up, and the last, the end of the epoch, are left out."""

    def __init__(self) -> None:
        self.python = self.builtin = self.marks = 0

    def mark(self) -> None:
        self.marks += 1
        sys.setprofile(self.event if 1 < self.marks < BLOCKS else None)

    def event(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self.python += 1
        elif event == "c_call":
            self.builtin += 1

    def per_step(self) -> tuple[float, float]:
        steps = EVERY * (BLOCKS - 2)
        return self.python / steps, self.builtin / steps


def batches(count: Count) -> harness.Marked:
    return harness.Marked(EVERY * BLOCKS, EVERY, count.mark)


def bare_calls() -> tuple[float, float]:
    count, net = Count(), harness.Net()
    harness.bare_loop(net, torch.optim.SGD(net.parameters(), lr=0.01), batches(count))
    return count.per_step()


def fit_calls(pl: SimpleNamespace, folder: Path, log: Any = None, **arguments: Any) -> tuple[float, float]:
    count = Count()
    try:
        harness.fit(pl, harness.tiny_module(pl, log), batches(count), folder, **{**harness.NOTHING_ON, **arguments})
    finally:
        sys.setprofile(None)
    return count.per_step()


def profiled(run: Callable[[], Any]) -> tuple[int, int]:
    """The Python and built-in calls of one function call."""
    count = Count()
    sys.setprofile(count.event)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count.python, count.builtin


def epoch_turn_calls(pl: SimpleNamespace, folder: Path) -> tuple[float, float]:
    """Calls of an epoch of one training and one validation batch, over those of the two batches by hand."""
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(1, 8)))

    class Module(pl.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = harness.Net()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.net.loss(batch[0])

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.net.loss(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def by_trainer(epochs: int) -> tuple[int, int]:
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=epochs, num_sanity_val_steps=0, default_root_dir=folder, **harness.NOTHING_ON
        )
        with harness.silent_terminal():
            return profiled(lambda: trainer.fit(Module(), data, data))

    def by_hand(epochs: int) -> tuple[int, int]:
        module = Module()
        optimizer = module.configure_optimizers()
        batch = [torch.randn(1, 8)]

        def run() -> None:
            for _ in range(epochs):
                optimizer.zero_grad()
                module.training_step(batch, 0).backward()
                optimizer.step()
                with torch.no_grad():
                    module.validation_step(batch, 0)

        return profiled(run)

    few, many = 5, 25
    by_trainer(1)  # what the first run imports
    counts = [run(number) for run in (by_trainer, by_hand) for number in (few, many)]
    python, builtin = ((counts[1][i] - counts[0][i] - counts[3][i] + counts[2][i]) / (many - few) for i in range(2))
    return python, builtin


def frames_from_fit(pl: SimpleNamespace, folder: Path) -> list[str]:
    """The stack from `Trainer.fit` to `training_step`, both included."""
    stack: list[str] = []

    def remember(module: Any, loss: Tensor) -> None:
        # The module's own frame is one up; from there outwards until the call of `fit`.
        frame: FrameType | None = sys._getframe(1)
        names = []
        while frame is not None:
            code = frame.f_code
            names.append(f"{Path(code.co_filename).name}:{getattr(code, 'co_qualname', code.co_name)}")
            if code.co_name == "fit" and isinstance(frame.f_locals.get("self"), pl.Trainer):
                break
            frame = frame.f_back
        stack[:] = reversed(names)

    module = harness.tiny_module(pl, remember)
    # The stack of a step in the middle: the first may come through another door.
    harness.fit(pl, module, harness.Marked(4, 1, lambda: None), folder, **harness.NOTHING_ON)
    return stack


def log_times(number: int) -> Any:
    names = [f"value_{index}" for index in range(number)]

    def log(module: Any, loss: Tensor) -> None:
        for name in names:
            module.log(name, loss)

    return log


def main() -> None:
    parser = harness.parser("Frames and Python calls a Trainer adds to each training step.")
    parser.add_argument("--stack", action="store_true", help="print the frames as well")
    args = parser.parse_args()
    pl = harness.load(args.package)
    with harness.scratch_folder() as folder:
        stack = frames_from_fit(pl, folder)
        bare = bare_calls()
        nothing = fit_calls(pl, folder)
        callbacks = fit_calls(pl, folder, callbacks=[type(f"Idle{i}", (pl.Callback,), {})() for i in range(FURTHER)])
        turn = epoch_turn_calls(pl, folder)
        one, more = (fit_calls(pl, folder, log_times(number)) for number in (1, 1 + FURTHER))

    def difference(name: str, many: tuple[float, float], few: tuple[float, float], times: int = 1) -> tuple[str, ...]:
        return (name, *(f"{(a - b) / times:+.2f}" for a, b in zip(many, few)))

    rows = [
        ("bare loop, per step", *(f"{count:.2f}" for count in bare)),
        difference("over the bare loop, nothing on", nothing, bare),
        difference("first self.log", one, nothing),
        difference("each further self.log", more, one, FURTHER),
        difference("each callback without hooks", callbacks, nothing, FURTHER),
        ("epoch of 1 + 1 batches, over the batches", *(f"{count:.0f}" for count in turn)),
        ("frames from fit to training_step", str(len(stack)), ""),
    ]
    harness.print_table("calls per step", pl, ("", "Python", "built-in"), rows)
    if args.stack:
        print("\n" + "\n".join(stack))


if __name__ == "__main__":
    main()
