import pytest
import torch
from torch import nn

from fulmen.utilities.model_summary import (
    DeepSpeedSummary,
    LayerSummary,
    ModelSummary,
    get_human_readable_count,
    summarize,
)


class Model(nn.Module):
    example_input_array = torch.zeros(4, 32)

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(32, 2).requires_grad_(False).eval()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 2))
        self.own = nn.Parameter(torch.zeros(5))
        self.modes_seen = []

    def forward(self, x):
        self.modes_seen.append((self.training, torch.is_grad_enabled()))
        return self.net(x)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0  "),
        (999, "999  "),
        (1000, "1.0 K"),
        (12_345, "12.3 K"),
        (123_456, "123 K"),
        (1_234_567, "1.2 M"),
        (2 * 10**9, "2.0 B"),
        (3 * 10**14, "300 T"),
        (5 * 10**18, "5,000,000 T"),
    ],
)
def test_counts_have_a_unit(number, text):
    assert get_human_readable_count(number) == text


def test_the_table():
    expected = """\
  | Name         | Type       | Params | Mode  | FLOPs  | In sizes | Out sizes
------------------------------------------------------------------------------
0 | unused       | Linear     | 66     | eval  | 0      | ?        | ?
1 | net          | Sequential | 2.4 K  | train | 17.4 K | [4, 32]  | [4, 2]
  | other params | n/a        | 5      | n/a   | n/a    | n/a      | n/a
------------------------------------------------------------------------------
2.4 K     Trainable params
66        Non-trainable params
2.4 K     Total params
0.010     Total estimated model params size (MB)
4         Modules in train mode
1         Modules in eval mode
17.4 K    Total Flops"""
    lines = [line.rstrip() for line in str(summarize(Model())).splitlines()]
    assert "\n".join(lines) == expected


def test_the_numbers_behind_the_table():
    summary = ModelSummary(Model(), max_depth=-1)
    assert summary.layer_names == ["unused", "net", "net.0", "net.1", "net.2"]
    assert summary.layer_types == ["Linear", "Sequential", "Linear", "BatchNorm1d", "Linear"]
    assert summary.param_nums == [66, 2370, 2112, 128, 130]
    assert summary.in_sizes == ["?", [4, 32], [4, 32], [4, 64], [4, 64]]
    assert summary.out_sizes == ["?", [4, 2], [4, 64], [4, 64], [4, 2]]
    assert summary.training_modes == [False, True, True, True, True]
    assert summary.total_training_modes == {"train": 4, "eval": 1}
    assert summary.total_parameters == 2441 and summary.trainable_parameters == 2375
    assert summary.total_flops == 17408 and sum(summary.flop_counts["net.0"].values()) == 16384
    assert summary.model_size == pytest.approx(2441 * 4e-6)


def test_depth_limits_the_rows():
    assert ModelSummary(Model(), max_depth=0).layer_names == []
    assert ModelSummary(Model(), max_depth=1).layer_names == ["unused", "net"]
    for bad in (-2, "a"):
        with pytest.raises(ValueError, match="max_depth"):
            ModelSummary(Model(), max_depth=bad)


def test_the_example_runs_in_eval_mode_without_gradients_and_leaves_no_trace():
    model = Model()
    ModelSummary(model)
    assert model.modes_seen == [(False, False)]
    assert model.training and not model.unused.training
    assert all(not part._forward_hooks for part in model.modules())


def test_without_an_example_there_are_no_sizes():
    model = Model()
    model.example_input_array = None
    assert "In sizes" not in str(ModelSummary(model))


def test_examples_may_be_arguments_or_keywords():
    class Two(nn.Module):
        def __init__(self, example):
            super().__init__()
            self.layer = nn.Linear(2, 1)
            self.example_input_array = example

        def forward(self, x, y):
            return self.layer(x + y)

    x = torch.ones(3, 2)
    assert ModelSummary(Two((x, x))).out_sizes == [[3, 1]]
    assert ModelSummary(Two({"x": x, "y": x})).out_sizes == [[3, 1]]


def test_tied_scripted_and_unfinished_layers():
    model = nn.Module()
    model.a = nn.Linear(32, 2)
    model.b = nn.Linear(32, 2)
    model.b.weight = model.a.weight
    model.lazy = nn.LazyLinear(3)
    with pytest.warns(UserWarning, match="example_input_array"):
        assert ModelSummary(model).total_parameters == 68
    assert "0         Total params" in str(ModelSummary(nn.Module()))


def test_a_layer_remembers_the_sizes_of_one_forward():
    lstm = nn.LSTM(32, 3)
    layer = LayerSummary(lstm)
    assert (layer.in_size, layer.out_size, layer.layer_type, layer.num_parameters) == ("?", "?", "LSTM", 444)
    lstm(torch.zeros(2, 32))
    lstm(torch.zeros(7, 32))
    assert layer.in_size == [2, 32] and layer.out_size == [[2, 3], [[1, 3], [1, 3]]]


def test_a_lazy_layer_has_the_type_that_the_example_made_it():
    model = nn.Sequential(nn.LazyLinear(3))
    model.example_input_array = torch.ones(4, 2)
    assert ModelSummary(model).layer_types == ["Linear"]


def test_a_failing_example_leaves_no_hooks():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(9, 1))
    model.example_input_array = torch.ones(4, 2)
    with pytest.raises(RuntimeError, match="shape"):
        ModelSummary(model)
    assert not any(layer._forward_hooks for layer in model.modules())


def test_of_what_deepspeed_spreads_whole_sizes_and_the_share_of_this_process_are_shown():
    class Spread(torch.nn.Parameter):
        """A parameter as stage 3 of DeepSpeed leaves it: empty, with its size and share beside it."""

        ds_numel = 64

        def partition_numel(self):
            return 32

    model = torch.nn.Sequential(torch.nn.Linear(32, 2), torch.nn.Linear(2, 3))
    model[0].weight = Spread(torch.empty(0))
    summary = DeepSpeedSummary(model)
    assert isinstance(summary, ModelSummary)
    assert summary.param_nums == [66, 9] and summary.parameters_per_layer == [34, 9]
    assert summary.total_parameters == summary.trainable_parameters == 75
    headers = [header for header, _ in summary.columns()]
    assert headers[3:5] == ["Params", "Params per Device"]
    model.register_parameter("own", torch.nn.Parameter(torch.ones(5)))
    columns = dict(DeepSpeedSummary(model).columns())
    assert columns["Params"] == ["66", "9", "5"] and columns["Params per Device"] == ["34", "9", "n/a"]
