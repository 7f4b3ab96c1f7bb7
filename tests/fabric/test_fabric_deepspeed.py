"""What Fabric's `DeepSpeedStrategy` asks of the package `deepspeed`, and refuses, without a GPU to run it on."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from fulmen.engine import deepspeed as engine_deepspeed
from fulmen.fabric import deepspeed
from fulmen.fabric.plugins import DeepSpeedPrecision
from fulmen.fabric.strategies import STRATEGY_REGISTRY, DeepSpeedStrategy, ParallelStrategy
from fulmen.utilities.errors import MisconfigurationException


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_the_missing_package_is_named():
    with pytest.raises(ModuleNotFoundError, match="Run `pip install deepspeed`, or use `strategy='fsdp'`"):
        STRATEGY_REGISTRY.get("deepspeed")


@pytest.fixture
def installed(monkeypatch):
    """As far as the constructor can tell."""
    for module in (deepspeed, engine_deepspeed):
        monkeypatch.setattr(module, "is_installed", lambda name: True)


def test_names_choose_stage_and_offloading(installed):
    stages = {"deepspeed": 2, "deepspeed_stage_1_offload": 1, "deepspeed_stage_3_offload_nvme": 3}
    found = {name: STRATEGY_REGISTRY.get(name) for name in stages}
    assert {name: strategy.config["zero_optimization"]["stage"] for name, strategy in found.items()} == stages
    assert found["deepspeed_stage_1_offload"].config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    nvme = found["deepspeed_stage_3_offload_nvme"]
    assert nvme.config["zero_optimization"]["offload_param"]["device"] == "nvme"
    assert nvme.zero_stage_3 and nvme.remote_device == "nvme" and isinstance(nvme, ParallelStrategy)


def test_the_configuration_is_completed(installed, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    precision = DeepSpeedPrecision("16-mixed")
    strategy = DeepSpeedStrategy(config=path, precision=precision, logging_batch_size_per_gpu=4, loss_scale=8)
    assert strategy.precision is precision and strategy.setup_is_joint and strategy.has_own_backward
    strategy.complete_loop_config()
    assert strategy.config["train_micro_batch_size_per_gpu"] == 4
    assert strategy.config["fp16"]["enabled"] and strategy.config["fp16"]["loss_scale"] == 8


def test_what_the_engine_cannot_do_is_refused(installed, tmp_path):
    strategy = DeepSpeedStrategy(accelerator=None, precision=DeepSpeedPrecision("32-true"))
    net = torch.nn.Linear(2, 1)
    one, other = (torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2))
    with pytest.raises(NotImplementedError, match="Set them up together"):
        strategy.setup_optimizer(one)
    with pytest.raises(ValueError, match="one optimizer, not 2"):
        strategy.setup_module_and_optimizers(net, [one, other])
    with pytest.raises(NotImplementedError, match="clips gradients in its step"):
        strategy.clip_gradients_norm(net, one, max_norm=1.0)
    with pytest.raises(ValueError, match="has to hold the module that was set up"):
        strategy.save_checkpoint(tmp_path / "x", {"net": net})
    with pytest.raises(TypeError, match="Leave them out"):
        strategy.save_checkpoint(tmp_path / "x", {"net": net}, storage_options={})
    with pytest.raises(ValueError, match="needs the module"):
        strategy.load_checkpoint(tmp_path / "x", {})
    counting = DeepSpeedStrategy(config={"gradient_accumulation_steps": 4})
    with pytest.raises(MisconfigurationException, match="steps are yours to make"):
        counting.setup_module_and_optimizers(net, [one])
