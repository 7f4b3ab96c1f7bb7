import os

import pytest
import torch
from torch import nn

from fulmen.utilities.modules import capture_modes, from_compiled, grad_norm, is_picklable, suggested_max_num_workers


def test_gradient_norms_have_the_names_of_their_parameters():
    layer = nn.Linear(2, 1)
    assert grad_norm(layer, 2) == {}
    layer(torch.tensor([[3.0, 4.0]])).sum().backward()
    norms = grad_norm(layer, 2)
    assert norms["grad_2.0_norm/weight"] == 5 and norms["grad_2.0_norm/bias"] == 1
    assert norms["grad_2.0_norm_total"] == pytest.approx(26**0.5)
    assert grad_norm(layer, "inf", group_separator=".")["grad_inf_norm.weight"] == 4
    for bad in (0, -1, "a"):
        with pytest.raises(ValueError):
            grad_norm(layer, bad)


def test_modes_are_put_back_one_by_one():
    module = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    module[1].eval()
    restore = capture_modes(module)
    module.eval()
    restore()
    assert [part.training for part in module.modules()] == [True, True, False]


def test_there_is_always_work_for_one_worker():
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert suggested_max_num_workers(1) == max(1, cpus - 1)
    assert suggested_max_num_workers(10_000) == 1
    with pytest.raises(ValueError, match="local_world_size"):
        suggested_max_num_workers(0)


def test_what_can_be_pickled():
    assert is_picklable([1]) and not is_picklable(lambda: 0)


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        return self.layer(x)

    training_step = validation_step = test_step = predict_step = forward


def test_a_compiled_module_keeps_its_steps():
    module = Steps()
    compiled = torch.compile(module, backend="eager")
    assert from_compiled(compiled) is module
    x = torch.ones(1, 1)
    assert torch.equal(module.training_step(x), module.layer(x))
    assert "training_step" in vars(module)
    for bad in (module, nn.Linear(1, 1)):
        with pytest.raises(ValueError):
            from_compiled(bad)
