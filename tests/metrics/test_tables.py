"""The tables printed after validate and test."""

from __future__ import annotations

import pytest
from support import Regression, make_loader, make_trainer

from fulmen.metrics.tables import print_results, result_columns


@pytest.fixture(params=[True, False], ids=["rich", "plain"])
def with_rich(request, monkeypatch):
    if request.param:
        pytest.importorskip("rich")
    else:
        monkeypatch.setattr("fulmen.metrics.tables.is_installed", lambda *_: False)
    return request.param


class Several(Regression):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("loss", 0.5)
        self.log("count", 20.0)
        if dataloader_idx == 1:
            self.log("only_second", 1 / 3)


def test_a_column_per_loader_and_a_row_per_metric():
    trainer = make_trainer()
    results = trainer.validate(Several(), [make_loader(4), make_loader(4)], verbose=False)
    assert result_columns(results, "validate") == [
        ("Validate metric", ["loss", "count", "only_second"]),
        ("DataLoader 0", ["0.5", "20.0", ""]),
        ("DataLoader 1", ["0.5", "20.0", "0.3333333"]),
    ]


def test_the_table_is_printed_unless_it_is_not_wanted(with_rich, capsys):
    make_trainer().test(Regression(), make_loader(4), verbose=False)
    assert capsys.readouterr().out == ""
    make_trainer().test(Regression(), make_loader(4))
    text = capsys.readouterr().out
    assert "Test metric" in text and "DataLoader 0" in text and "test_loss" in text
    assert "\x1b" not in text


def test_validation_inside_fit_prints_nothing(with_rich, capsys):
    make_trainer().fit(Regression(), make_loader(4), make_loader(4))
    assert capsys.readouterr().out == ""


def test_many_loaders_stay_readable(with_rich, capsys):
    print_results([{f"a_metric_with_a_long_name/dataloader_idx_{i}": i + 0.123456789} for i in range(20)], "test")
    text = capsys.readouterr().out
    for index in range(20):
        assert f"DataLoader {index}" in text and f"{index + 0.123456789:.7g}" in text


@pytest.mark.parametrize("results", [[], [{}], [{}, {}]])
def test_nothing_is_printed_when_nothing_was_logged(with_rich, results, capsys):
    print_results(results, "test")
    assert capsys.readouterr().out == ""


def test_values_stay_where_a_name_is_longer_than_the_terminal(monkeypatch, capsys):
    pytest.importorskip("rich")
    from rich.console import Console

    monkeypatch.setattr("fulmen.metrics.tables.get_rich_console", lambda: Console(width=50))
    name = "a_metric_with_a_name/that_is_longer/than_a_line_of_this_terminal_is"
    print_results([{f"{name}/dataloader_idx_{i}": i + 0.125} for i in range(4)], "test")
    text = capsys.readouterr().out
    assert all(f"{i}.125" in text and f"DataLoader {i}" in text for i in range(4))
    first = "".join(line.split("│")[1].strip() for line in text.splitlines()[3:7] if "│" in line)
    assert first.startswith(name[:60])
