"""When bars are redrawn and with what: the same for every bar that draws in a terminal."""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import sys
import time

import pytest
import torch
from support import Regression, make_loader, make_trainer

from fulmen import Callback
from fulmen.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from fulmen.loggers import CSVLogger

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True

    @property
    def text(self):
        return ANSI.sub("", self.getvalue())


class Loud(Regression):
    """Logs to the bar in every hook that matters."""

    def training_step(self, batch, batch_idx):
        self.log("loss", loss := self.loss(batch), prog_bar=True, on_epoch=True)
        self.log("half", 0.5, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val", 0.25, prog_bar=True)

    def on_train_epoch_end(self):
        self.log("last", float(self.current_epoch), prog_bar=True)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    return Terminal()


@pytest.fixture(params=[TQDMProgressBar, RichProgressBar])
def kind(request):
    if request.param is RichProgressBar:
        pytest.importorskip("rich")
    return request.param


def run(bar, terminal=None, verb="fit", model=None, batches=3, data=None, ckpt_path=None, **given):
    """One call of a trainer with this bar, in a terminal or where pytest captures it."""
    if "rich" in sys.modules:
        sys.modules["rich"]._console = None  # keeps what it found out about the terminal when it was made
    data = make_loader(4 * batches) if data is None else data
    loaders = {"dataloaders": data}
    if verb == "fit":
        loaders = {"train_dataloaders": data, "val_dataloaders": make_loader(8), "ckpt_path": ckpt_path}
    # Here and not in a fixture: pytest puts its own stream in place before each phase of a test.
    with contextlib.redirect_stdout(terminal or sys.stdout), contextlib.redirect_stderr(terminal or sys.stderr):
        trainer = make_trainer(**{"callbacks": [bar], "enable_progress_bar": True, **given})
        getattr(trainer, verb)(model or Loud(), **loaders)
        assert terminal is None or sys.stdout is sys.stderr is terminal
    return trainer


def test_the_last_state_of_an_epoch_is_drawn_with_all_its_metrics(kind, terminal):
    run(kind(leave=True), terminal, max_epochs=2)
    for epoch in (0, 1):
        last = [part for part in re.split(r"[\r\n]", terminal.text) if f"Epoch {epoch}" in part and "3/3" in part][-1]
        for name in ("loss_step", "loss_epoch", "half", "val"):
            assert name in last
        assert re.search(rf"last(=|: ){epoch}\.0", last)


def test_values_changed_by_an_override_are_drawn(kind, terminal):
    class Bar(kind):
        def get_metrics(self, trainer, pl_module):
            metrics = super().get_metrics(trainer, pl_module)
            metrics.pop("v_num")
            return {**metrics, "mine": "yes"}

    run(Bar(), terminal, logger=CSVLogger("logs"))
    assert "mine" in terminal.text and "v_num" not in terminal.text


def test_metrics_are_asked_for_only_when_redrawing(kind, terminal):
    asked = 0

    class Bar(kind):
        def get_metrics(self, trainer, pl_module):
            nonlocal asked
            asked += 1
            return super().get_metrics(trainer, pl_module)

    started = time.monotonic()
    run(Bar(), terminal, batches=200)
    # one at validation, before and after, one at the end; the others by the clock
    assert asked <= 3 + 10 * (time.monotonic() - started)
    assert terminal.text.count("Epoch 0") <= 8 + 10 * (time.monotonic() - started)


def test_a_batch_without_redraw_costs_one_look_at_the_clock(kind, terminal):
    calls = []

    class Counted(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            bar._redraw_at = time.monotonic() + 1000
            sys.setprofile(lambda frame, event, arg: calls.append(event) if "call" in event else None)
            bar.on_train_batch_end(trainer, pl_module, None, None, 5)
            sys.setprofile(None)

    bar = kind()
    run(bar, terminal, callbacks=[bar, Counted()])
    assert calls == ["call", "c_call", "c_call"]  # the hook, the clock, and `setprofile` itself


def test_a_log_file_gets_one_line_per_epoch(kind, capsys):
    run(kind(), max_epochs=3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for epoch, line in enumerate(lines):
        assert re.match(rf"Epoch {epoch}.*: 3 batches in .* it/s, .*half=0\.5, val=0\.25.*, last={epoch}$", line)
        assert "\x1b" not in line and "\r" not in line


@pytest.mark.parametrize(("verb", "line"), [("validate", "Validation"), ("test", "Testing"), ("predict", "Predicting")])
def test_a_log_file_gets_one_line_per_evaluation(kind, verb, line, capsys):
    run(kind(), verb=verb)
    found = [text for text in capsys.readouterr().out.splitlines() if "it/s" in text]
    assert len(found) == 1
    assert found[0].startswith(f"{line}: 3 batches in ")


@pytest.mark.parametrize("loaders", [1, 2])
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_ends_with_a_full_bar(kind, terminal, verb, loaders):
    class Several(Loud):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            pass

        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    data = [make_loader(12), make_loader(20)]
    run(kind(), terminal, verb, Several(), data=data if loaders > 1 else data[1])
    name = {"validate": "Validation", "test": "Testing", "predict": "Predicting"}[verb]
    if loaders > 1:
        name += " DataLoader 1"
    assert re.search(rf"{name}.* 5/5 ", terminal.text)


def test_the_sanity_check_has_a_bar_that_goes_away(kind, terminal):
    run(kind(), terminal, num_sanity_val_steps=2)
    assert re.search(r"Sanity Checking.* 2/2 ", terminal.text)
    assert "Sanity Checking" not in re.split(r"[\r\n]", terminal.text.rstrip())[-1]


def test_loaders_without_length_have_a_bar_without_end(kind, terminal):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.ones(4), torch.ones(1))] * 3)

    run(kind(), terminal, data=torch.utils.data.DataLoader(Stream()))
    assert re.search(r" 3/(\?|--) ", terminal.text)


def test_nothing_is_drawn_with_a_rate_of_zero(kind, terminal):
    bar = kind(refresh_rate=0)
    assert bar.is_disabled and not bar.is_enabled
    run(bar, terminal)
    assert "Epoch" not in terminal.text


def test_nothing_is_drawn_after_disable(kind, terminal):
    bar = kind()
    bar.disable()
    run(bar, terminal)
    assert "Epoch" not in terminal.text
    bar.enable()
    run(bar, terminal)
    assert "Epoch 0" in terminal.text


def test_prints_and_warnings_appear_on_lines_of_their_own(kind, terminal):
    class Talking(Loud):
        def training_step(self, batch, batch_idx):
            print("printed", batch_idx)
            self.print("by the module", batch_idx, sep="-")
            print("warned", batch_idx, file=sys.stderr)
            return super().training_step(batch, batch_idx)

    run(kind(), terminal, model=Talking())
    lines = [line.strip() for line in re.split(r"[\r\n]", terminal.text)]
    for batch in range(3):
        assert {f"printed {batch}", f"by the module-{batch}", f"warned {batch}"} <= set(lines)


def test_streams_are_given_back_after_an_exception(kind, terminal):
    class Failing(Loud):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            raise RuntimeError("no")

    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        with pytest.raises(RuntimeError, match="no"):
            run(kind(), terminal, model=Failing())
        assert sys.stdout is sys.stderr is terminal


def test_a_used_bar_can_be_pickled_and_used_again(kind, terminal):
    bar = kind()
    run(bar, terminal)
    bar._trainer = None
    run(pickle.loads(pickle.dumps(bar)), terminal, max_epochs=2)
    assert "Epoch 1" in terminal.text


def test_a_resumed_epoch_goes_on_where_it_was(kind, terminal):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.save_checkpoint("middle.ckpt")

    run(kind(), callbacks=[Save()], batches=5)
    run(kind(), terminal, batches=5, ckpt_path="middle.ckpt")
    assert re.search(r"Epoch 0.* 2/5 ", terminal.text)
    assert re.search(r"Epoch 0.* 5/5 ", terminal.text)


class Custom(ProgressBar):
    """A bar of one's own: the whole contract is `enable`, `disable` and the hooks."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def enable(self):
        pass

    def disable(self):
        pass

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.drawn.append((batch_idx + 1, self.total_train_batches, self.get_metrics(trainer, pl_module)))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.has_dataloader_changed(dataloader_idx):
            self.drawn.append((self.validation_description, self.total_val_batches_current_dataloader))

    def on_validation_end(self, trainer, pl_module):
        self.reset_dataloader_idx_tracker()

    def on_train_epoch_start(self, trainer, pl_module):
        self.drawn.append(self.total_val_batches)


def test_a_bar_of_ones_own_sees_totals_and_exact_metrics():
    bar = Custom()
    logger = CSVLogger("logs", version="some-long-name")
    often = {"log_every_n_steps": 1, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 1}
    run(bar, batches=1, max_epochs=2, logger=logger, **often)
    sanity, empty, first, full, second, validation = bar.drawn
    assert (sanity, empty, full) == (("Validation", 1), 0, 2)
    assert first[:2] == second[:2] == (1, 1)
    assert first[2]["v_num"] == "name" and first[2]["half"] == 0.5 and first[2]["loss_step"] > 0
    assert validation == ("Validation", 2)
    assert bar.trainer.progress_bar_callback is bar


def test_a_metric_with_the_name_of_a_standard_one_is_warned_about():
    class Clash(Regression):
        def training_step(self, batch, batch_idx):
            self.log("v_num", 1.0, prog_bar=True)
            return self.loss(batch)

    with pytest.warns(UserWarning, match="v_num"):
        run(Custom(), model=Clash(), logger=CSVLogger("logs"), log_every_n_steps=1)


def test_a_bar_without_trainer_says_so():
    with pytest.raises(TypeError, match="not attached to a trainer"):
        _ = TQDMProgressBar().trainer
