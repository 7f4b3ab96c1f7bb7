"""What stands on the screen while bars are drawn, at widths people have, and what can be read from bars afterwards."""

from __future__ import annotations

import contextlib
import io
import re
import sys

import pytest
import torch
from support import Regression, make_loader, make_trainer

from fulmen import Callback
from fulmen.callbacks import RichProgressBar, TQDMProgressBar


class Screen(io.StringIO):
    """A terminal that is long enough: understands what bars send, and gives the lines that are seen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def isatty(self):
        return True

    @property
    def lines(self) -> list[str]:
        rows, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[\??[0-9;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", self.getvalue()):
            if part == "\r":
                column = 0
            elif part == "\n":
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            elif part.endswith("A") and part[0] == "\x1b":
                row -= int(part[2:-1] or 1)
            elif part.endswith("K"):
                rows[row] = "" if part == "\x1b[2K" else rows[row][:column]
            elif part[0] != "\x1b":
                rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + len(part) :]
                column += len(part)
        return [line.rstrip() for line in rows if line.strip()]


class Wordy(Regression):
    """Logs more than a line has room for."""

    names = tuple(f"{stage}/quite_a_long_metric_{number}" for stage in ("train", "other") for number in range(4))

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            print("printed in", self.current_epoch)
        self.log_dict(dict.fromkeys(self.names, 0.5), prog_bar=True)
        return self.loss(batch)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val/top1", 0.25, prog_bar=True)


class EveryBatch(Callback):
    """Lets the bar draw at each batch, however fast they are."""

    def on_train_batch_start(self, trainer, *args):
        trainer.progress_bar_callback._redraw_at = 0.0

    on_validation_batch_start = on_train_batch_start


@pytest.fixture(params=[TQDMProgressBar, RichProgressBar])
def kind(request):
    if request.param is RichProgressBar:
        pytest.importorskip("rich")
    return request.param


def fit(monkeypatch, bar, width, model=None, **given):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", "40")
    if "rich" in sys.modules:
        sys.modules["rich"]._console = None
    screen = Screen(width)
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        trainer = make_trainer(
            **{"callbacks": [bar, EveryBatch()], "enable_progress_bar": True, "max_epochs": 2, **given}
        )
        trainer.fit(model or Wordy(), make_loader(20), [make_loader(8), make_loader(8)])
    return screen.lines


@pytest.mark.parametrize("width", [80, 100])
def test_every_metric_can_be_read_and_every_epoch_leaves_a_line(kind, monkeypatch, width):
    lines = fit(monkeypatch, kind(), width)
    assert all(len(line) <= width for line in lines)
    starts = [number for number, line in enumerate(lines) if line.startswith("Epoch")]
    assert [lines[number][:7] for number in starts] == ["Epoch 0", "Epoch 1"]
    for number, end in zip(starts, [*starts[1:], len(lines)]):
        shown = re.sub(r": ", "=", " ".join(lines[number:end]))
        for name in Wordy.names:
            assert f"{name}=0.500" in shown
        assert shown.count("val/top1/dataloader_idx_1=0.250") == 1
    assert [line for line in lines if line.startswith("printed")] == ["printed in 0", "printed in 1"]
    assert not [line for line in lines if line.startswith(("Validation", "Sanity"))]


@pytest.mark.parametrize(("given", "epochs"), [({}, [0, 1, 2]), ({"leave": True}, [0, 1, 2]), ({"leave": False}, [2])])
def test_lines_of_epochs_can_be_switched_off(kind, monkeypatch, given, epochs):
    made = []

    class Bar(kind):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)

        def _open_bar(self, name):
            made.append(name)
            super()._open_bar(name)

    lines = fit(monkeypatch, Bar(**given), 200, Regression(), max_epochs=3, limit_val_batches=0)
    assert [int(line[6]) for line in lines if line.startswith("Epoch")] == epochs
    assert made.count("train") == (3 if given.get("leave") else 1)


def test_a_short_line_stays_one_line(kind, monkeypatch):
    class Terse(Wordy):
        names = ("loss",)

    lines = fit(monkeypatch, kind(), 80, Terse(), limit_val_batches=0)
    epochs = [line for line in lines if line.startswith("Epoch")]
    assert len(epochs) == 2 and all("loss" in line and "5/5" in line for line in epochs)


def test_numbers_of_any_kind_are_readable(kind, monkeypatch):
    class Bar(kind):
        def get_metrics(self, trainer, pl_module):
            return {
                "a": torch.tensor(0.125), "b": torch.tensor([3]), "c": float("nan"), "d": float("-inf"),
                "e": 123456789, "f": 1e-5, "g": "text", "h": 1.5e12,
            }  # fmt: skip

    (line,) = (ln for ln in fit(monkeypatch, Bar(), 250, max_epochs=1, limit_val_batches=0) if ln.startswith("Epoch"))
    line = line.replace("=", ": ")
    for text in (r"a: 0\.125", r"b: 3\b", "c: nan", "d: -inf", r"e: 123456789\b", r"f: 1(\.00)?e-0?5", "g: text"):
        assert re.search(text, line), (text, line)
    assert re.search(r"h: 1\.50?e\+12", line)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(4), torch.ones(1)


@pytest.mark.parametrize(
    ("given", "total"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": 4, "accumulate_grad_batches": 3}, 12),
        ({"max_steps": 7, "limit_train_batches": 5}, 5),  # of the first epoch
        ({"max_steps": 50, "limit_train_batches": 5, "max_epochs": 1}, 5),
    ],
)
def test_where_max_steps_ends_a_run_it_is_the_total(kind, given, total):
    totals = set()

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 0:
                totals.add((bar.total_train_batches, bar.train_progress_bar.total))

    bar = kind()
    trainer = make_trainer(callbacks=[bar, Watch()], enable_progress_bar=True, **{"max_epochs": -1, **given})
    trainer.fit(Regression(), torch.utils.data.DataLoader(Endless(), batch_size=2))
    assert totals == {(total, total)}


def test_bars_tell_the_state_of_the_run_also_where_nothing_is_drawn(kind):
    seen = []

    class Bar(kind):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            seen.append(state(self.train_progress_bar))

        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
            seen.append(state(self.val_progress_bar))

    def state(bar):
        return (bar.n if kind is TQDMProgressBar else bar.completed), bar.total

    bar = Bar()
    trainer = make_trainer(callbacks=[bar], enable_progress_bar=True)
    trainer.fit(Wordy(), make_loader(12), [make_loader(4), make_loader(8)])
    assert seen == [(1, 3), (2, 3), (3, 3), (1, 1), (1, 2), (2, 2)]
    assert state(bar.train_progress_bar) == (3, 3) and state(bar.val_progress_bar) == (2, 2)
    assert bar.total_train_batches == 3 and bar.total_val_batches == 3 and bar.is_enabled
    trainer.test(Wordy(), make_loader(20))
    assert state(bar.test_progress_bar) == (5, 5)


def test_a_bar_of_tqdm_that_was_not_made_says_so():
    with pytest.raises(TypeError, match="_train_progress_bar` reference has not been set"):
        _ = TQDMProgressBar().train_progress_bar


def test_the_columns_of_rich_can_be_read_without_a_terminal():
    pytest.importorskip("rich")
    from rich.progress import TextColumn

    column = TextColumn("{task.completed}")

    class Bar(RichProgressBar):
        def configure_columns(self, trainer):
            return [column]

    bar = Bar()
    make_trainer(callbacks=[bar], enable_progress_bar=True).fit(Regression(), make_loader(8))
    assert bar.progress.columns[0] is column and len(bar.progress.columns) == 2


def test_names_that_the_output_cannot_encode_end_no_run(kind, monkeypatch):
    class Greek(Wordy):
        names = ("précision_λ",)

    for terminal in (True, False):
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
        stream.isatty = lambda terminal=terminal: terminal
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        if "rich" in sys.modules:
            sys.modules["rich"]._console = None
        with contextlib.redirect_stdout(stream):
            trainer = make_trainer(callbacks=[kind()], enable_progress_bar=True)
            trainer.fit(Greek(), make_loader(8), make_loader(8))
            trainer.validate(Greek(), make_loader(8))
        assert rb"pr\xe9cision_\u03bb" in raw.getvalue()


def test_a_trainer_inside_another_leaves_the_outer_one_its_screen(kind, monkeypatch):
    class Outer(Wordy):
        names = ("loss",)

        def on_validation_epoch_end(self):
            inner = make_trainer(callbacks=[kind()], enable_progress_bar=True, limit_val_batches=0)
            inner.fit(Regression(), make_loader(8))

    lines = fit(monkeypatch, kind(), 120, Outer(), max_epochs=3)
    assert [line for line in lines if line.startswith("printed")] == [f"printed in {epoch}" for epoch in range(3)]
    assert len([line for line in lines if line.startswith("Epoch") and "5/5" in line]) == 3
    assert not [line for line in lines if "printed" in line and "Epoch" in line]


def test_a_bar_may_be_enabled_while_a_run_is_on_its_way(kind, capsys):
    class Enable(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.progress_bar_callback.enable()

    bar = kind()
    bar.disable()
    make_trainer(callbacks=[bar, Enable()], enable_progress_bar=True, max_epochs=2).fit(Regression(), make_loader(8))
    assert [line[:7] for line in capsys.readouterr().out.splitlines()] == ["Epoch 0", "Epoch 1"]
