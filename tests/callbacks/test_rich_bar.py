"""What is particular to `RichProgressBar`."""

from __future__ import annotations

import importlib.util
import io
import re
import sys

import pytest
from support import Regression, make_loader, make_trainer

from fulmen.callbacks import RichModelSummary, RichProgressBar, RichProgressBarTheme
from fulmen.utilities import optional

rich = pytest.importorskip("rich")


@pytest.fixture
def screen(monkeypatch):
    """A terminal of 200 columns, and what was written to it."""
    monkeypatch.setattr(rich, "_console", None)
    return {"file": io.StringIO(), "force_terminal": True, "width": 200, "color_system": "truecolor"}


class Logged(Regression):
    def training_step(self, batch, batch_idx):
        self.log("loss", loss := self.loss(batch), prog_bar=True)
        self.log("half", 0.5, prog_bar=True)
        return loss


def fit(bar, **given):
    trainer = make_trainer(callbacks=[bar], enable_progress_bar=True, **given)
    trainer.fit(Logged(), make_loader(20), make_loader(8))
    return trainer


def test_styles_and_formats_come_from_the_theme(screen):
    theme = RichProgressBarTheme(
        description="#010203", progress_bar_finished="#040506", metrics_format=".1e", metrics_text_delimiter=" | "
    )
    fit(RichProgressBar(theme=theme, console_kwargs=screen))
    text = screen["file"].getvalue()
    assert "38;2;1;2;3m" in text and "38;2;4;5;6m" in text
    assert re.search(r"loss: \d\.\de[+-]\d\d \| half: 5\.0e-01", text)


def test_epochs_are_counted_to_the_last_if_there_is_one(screen):
    fit(RichProgressBar(console_kwargs=screen), max_epochs=2)
    assert "Epoch 1/1" in screen["file"].getvalue()
    screen["file"].truncate(0)
    fit(RichProgressBar(console_kwargs=screen), max_epochs=-1, max_steps=5)
    assert re.search(r"Epoch 0\b(?!/)", screen["file"].getvalue())


def test_columns_can_be_chosen(screen):
    from rich.progress import TextColumn

    class Bar(RichProgressBar):
        def configure_columns(self, trainer):
            return [TextColumn("{task.completed} so far")]

    fit(Bar(console_kwargs=screen))
    text = screen["file"].getvalue()
    assert "5 so far" in text and "half: 0.500" in text and "━" not in text


def test_tasks_can_be_read_and_the_display_refreshed_in_hooks(screen):
    seen = []

    class Bar(RichProgressBar):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            seen.append((self.train_progress_bar.completed, self.train_progress_bar.total))
            seen.append(self.val_progress_bar.visible)
            self.progress.update(self.train_progress_bar_id, description="changed")
            self.refresh(hard=True)

    bar = Bar(console_kwargs=screen)
    assert bar.train_progress_bar is None
    fit(bar)
    assert seen == [(5, 5), False]
    assert "changed" in screen["file"].getvalue()


@pytest.mark.parametrize("leave", [False, True])
def test_finished_epochs_stay_if_asked_to(screen, leave):
    fit(RichProgressBar(leave=leave, console_kwargs=screen), max_epochs=3)
    lines = screen["file"].getvalue().split("\n")
    kept = [line for line in lines if "5/5" in line.rpartition("\r")[2]]
    assert len(kept) == (3 if leave else 1)


@pytest.mark.parametrize("width", [70, 80, 100, 120, 200])
def test_every_metric_is_readable_at_any_width(screen, width):
    names = ["one_metric", "another_metric", "a_third_metric"]

    class Wordy(Logged):
        def training_step(self, batch, batch_idx):
            self.log_dict(dict.fromkeys(names, 0.5), prog_bar=True)
            return super().training_step(batch, batch_idx)

    bar = RichProgressBar(console_kwargs={**screen, "width": width, "color_system": None})
    trainer = make_trainer(callbacks=[bar], enable_progress_bar=True)
    trainer.fit(Wordy(), make_loader(20), make_loader(8))
    *_, last = screen["file"].getvalue().split("Epoch 0")
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last).strip().splitlines()
    assert "5/5" in lines[0] and 8 <= lines[0].count("━") <= 40
    assert "…" not in last and all(len(line) <= width for line in lines)
    for name in names:
        assert any(f"{name}: 0.500" in line for line in lines)
    assert len(lines) == {200: 1, 120: 2, 100: 2, 80: 3, 70: 3}[width]


def test_the_terminal_is_given_back_when_the_sanity_check_fails(screen):
    class Failing(Logged):
        def validation_step(self, batch, batch_idx):
            raise RuntimeError("no")

    bar = RichProgressBar(console_kwargs=screen)
    before = sys.stderr
    with pytest.raises(RuntimeError, match="no"):
        trainer = make_trainer(callbacks=[bar], enable_progress_bar=True, num_sanity_val_steps=1)
        trainer.fit(Failing(), make_loader(20), make_loader(8))
    assert sys.stderr is before


@pytest.mark.parametrize("kind", [RichProgressBar, RichModelSummary])
def test_without_rich_it_says_how_to_install_it(monkeypatch, kind):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "rich" else find(name, *a))
    optional.is_installed.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r'pip install "rich>=10.2.2"'):
        kind()
    optional.is_installed.cache_clear()
