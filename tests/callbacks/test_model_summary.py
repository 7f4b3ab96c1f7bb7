"""The table of layers at the start of fit."""

from __future__ import annotations

import pytest
import torch
from support import Regression, make_loader, make_trainer

from fulmen.callbacks import ModelSummary, RichModelSummary
from fulmen.utilities.optional import is_installed


class Deep(Regression):
    def __init__(self, example=False):
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(4, 1000), torch.nn.Sequential(torch.nn.Linear(1000, 1)))
        self.scale = torch.nn.Parameter(torch.ones(7))
        self.layer[0].requires_grad_(False)
        if example:
            self.example_input_array = torch.zeros(3, 4)


def fit(callback=None, model=None, **given):
    callbacks = [] if callback is None else [callback]
    trainer = make_trainer(callbacks=callbacks, enable_model_summary=True, **given)
    trainer.fit(model or Deep(), make_loader(4))
    return trainer


@pytest.fixture(params=[ModelSummary, RichModelSummary])
def kind(request):
    if request.param is RichModelSummary:
        pytest.importorskip("rich")
    return request.param


@pytest.fixture
def shown(capsys, caplog):
    """Everything that was printed or logged since the last call."""

    def text():
        logged, _ = caplog.text, caplog.clear()
        return capsys.readouterr().out + logged

    with caplog.at_level("INFO", logger="fulmen"):
        yield text


@pytest.mark.parametrize(("depth", "rows"), [(1, ["layer"]), (2, ["layer", "layer.0"]), (-1, ["layer.1.0"])])
def test_layers_are_shown_down_to_a_depth(kind, shown, depth, rows):
    fit(kind(max_depth=depth))
    text = shown()
    for row in rows:
        assert f" {row} " in text
    assert ("layer.1.0" in text) == (depth == -1)


def test_numbers_below_the_table_add_up(kind, shown):
    fit(kind())
    text = shown()
    for number, label in [("1.0 K", "Trainable params"), ("5.0 K", "Non-trainable params"), ("6.0 K", "Total params")]:
        assert any(number in line and label in line for line in text.splitlines())
    assert "other params" in text
    assert "0.024" in text


def test_an_example_input_adds_sizes(kind, shown):
    fit(kind(), Deep(example=True))
    text = shown()
    assert "In sizes" in text and "[3, 4]" in text and "[3, 1]" in text


def test_depth_zero_switches_it_off(kind, shown):
    fit(kind(max_depth=0))
    assert "Trainable params" not in shown()


def test_it_can_be_shown_differently(kind):
    seen = {}

    class Mine(kind):
        @staticmethod
        def summarize(summary_data, total_parameters, trainable_parameters, **rest):
            seen.update(rest, columns=dict(summary_data), numbers=(total_parameters, trainable_parameters))

    fit(Mine(header_style="bold", colour="blue"))
    assert seen["columns"]["Name"] == ["layer", "other params"]
    assert seen["numbers"] == (6008, 1008)
    assert seen["total_training_modes"] == {"train": 4, "eval": 0}
    assert seen["colour"] == "blue"


def test_the_trainer_adds_one_unless_told_otherwise(shown):
    def found(trainer):
        return [type(c) for c in trainer.callbacks if isinstance(c, ModelSummary)]

    assert found(fit()) == [RichModelSummary if is_installed("rich") else ModelSummary]
    assert found(fit(ModelSummary(2))) == [ModelSummary]
    assert found(make_trainer(enable_model_summary=False)) == []
