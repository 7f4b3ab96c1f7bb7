"""What a training step costs beyond the loop written by hand, in Python calls: exact, and the same on every machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

OVER_THE_BARE_LOOP = 40
FURTHER_LOG = 12
EPOCH_TURN = 560
# A first call more or less in one block of a hundred is no cost per step.
ROUNDING = 0.05


def python_calls(fulmen, folder: Path, log=None, **arguments) -> float:
    from benchmarks import calls

    return calls.fit_calls(fulmen, folder, log, **arguments)[0]


@pytest.fixture(scope="module")
def nothing_on(fulmen, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Calls of a step with every extra of the Trainer off."""
    return python_calls(fulmen, tmp_path_factory.mktemp("nothing_on"))


def test_a_step_costs_at_most_forty_calls_over_the_bare_loop(nothing_on: float) -> None:
    from benchmarks import calls

    extra = nothing_on - calls.bare_calls()[0]
    print(f"\n{extra:.2f} calls over the bare loop, {OVER_THE_BARE_LOOP} allowed")
    assert extra <= OVER_THE_BARE_LOOP


def test_the_turn_of_an_epoch_compiles_and_reads_nothing_anew(fulmen, tmp_path: Path) -> None:
    from benchmarks import calls

    extra = calls.epoch_turn_calls(fulmen, tmp_path)[0]
    print(f"\n{extra:.0f} calls for an epoch of one training and one validation batch, {EPOCH_TURN} allowed")
    assert extra <= EPOCH_TURN


@pytest.mark.parametrize(
    "options",
    [{}, {"on_epoch": True}, {"prog_bar": True}, {"on_step": False, "on_epoch": True, "reduce_fx": "max"}],
    ids=["on_step", "both", "bar", "max"],
)
def test_each_further_log_costs_at_most_twelve_calls(fulmen, tmp_path: Path, options: dict) -> None:
    from benchmarks.calls import FURTHER

    def log_times(number: int):
        names = [f"value_{index}" for index in range(number)]

        def log(module, loss: Tensor) -> None:
            for name in names:
                module.log(name, loss, **options)

        return log

    one, more = (python_calls(fulmen, tmp_path, log_times(number)) for number in (1, 1 + FURTHER))
    each = (more - one) / FURTHER
    print(f"\n{each:.2f} calls per further self.log({options}), {FURTHER_LOG} allowed")
    assert each <= FURTHER_LOG


def test_a_callback_without_hooks_costs_nothing(fulmen, tmp_path: Path, nothing_on: float) -> None:
    idle = [type(f"Idle{number}", (fulmen.Callback,), {})() for number in range(10)]
    assert abs(python_calls(fulmen, tmp_path, callbacks=idle) - nothing_on) <= ROUNDING


def test_a_hook_that_is_not_per_batch_costs_nothing_per_batch(fulmen, tmp_path: Path, nothing_on: float) -> None:
    class AtTheEnds(fulmen.Callback):
        def on_train_start(self, trainer, pl_module) -> None: ...
        def on_train_epoch_end(self, trainer, pl_module) -> None: ...
        def on_train_end(self, trainer, pl_module) -> None: ...

    extra = python_calls(fulmen, tmp_path, callbacks=[AtTheEnds()]) - nothing_on
    assert abs(extra) <= ROUNDING


def test_a_hook_costs_its_own_call_and_two_around_it(fulmen, tmp_path: Path, nothing_on: float) -> None:
    class Listens(fulmen.Callback):
        def on_before_backward(self, trainer, pl_module, loss) -> None: ...

    extra = python_calls(fulmen, tmp_path, callbacks=[Listens()]) - nothing_on
    # the empty hook that was there before is replaced: one who calls, one who hands on, and the hook itself
    assert extra <= 2 + ROUNDING


def test_accumulated_batches_stay_within_the_budget(fulmen, tmp_path: Path) -> None:
    """Three of four batches only add to the gradients: they may not cost more than a whole step does."""
    from benchmarks import calls, harness

    count = calls.Count()
    batches = harness.Marked(calls.EVERY * calls.BLOCKS, calls.EVERY, count.mark)
    net = harness.Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for number, batch in enumerate(batches):
        loss = net.loss(batch) / 4
        if number % 4 == 0:
            optimizer.zero_grad()
        loss.backward()
        if number % 4 == 3:
            optimizer.step()
    bare = count.per_step()[0]

    count = calls.Count()
    batches = harness.Marked(calls.EVERY * calls.BLOCKS, calls.EVERY, count.mark)
    with harness.silent_terminal():
        trainer = fulmen.Trainer(
            accelerator="cpu", max_epochs=1, accumulate_grad_batches=4, default_root_dir=tmp_path, **harness.NOTHING_ON
        )
        trainer.fit(harness.tiny_module(fulmen), batches)
    assert trainer.global_step == calls.EVERY * calls.BLOCKS // 4
    assert count.per_step()[0] - bare <= OVER_THE_BARE_LOOP


def test_the_batches_of_a_data_loader_stay_within_the_budget(fulmen, tmp_path: Path) -> None:
    """A real loader over samples in memory: calls for all of fit, over the same epochs of the loop written by hand."""
    import sys

    from benchmarks import calls, harness

    loader = DataLoader(torch.randn(400, 8), batch_size=4)

    def counted(run) -> int:
        count = calls.Count()
        sys.setprofile(count.event)
        try:
            run()
        finally:
            sys.setprofile(None)
        return count.python

    def bare(epochs: int):
        net = harness.Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        return lambda: [harness.bare_loop(net, optimizer, loader) for _ in range(epochs)]

    def fit(epochs: int):
        trainer = fulmen.Trainer(accelerator="cpu", max_epochs=epochs, default_root_dir=tmp_path, **harness.NOTHING_ON)
        return lambda: trainer.fit(harness.tiny_module(fulmen), loader)

    with harness.silent_terminal():
        # two epochs against one: what happens once per run is no cost of a step
        ours = counted(fit(3)) - counted(fit(1))
        theirs = counted(bare(3)) - counted(bare(1))
    extra = (ours - theirs) / (2 * len(loader))
    print(f"\n{extra:.2f} calls per step of a whole epoch over the bare loop")
    assert extra <= OVER_THE_BARE_LOOP
