"""What can be said without the package `deepspeed`, and what is asked of it, without a GPU to run it on."""

from __future__ import annotations

import importlib.util
import json

import pytest
from support import make_trainer

from fulmen.engine import deepspeed
from fulmen.plugins import DeepSpeedPrecision
from fulmen.strategies import DeepSpeedStrategy, StrategyRegistry
from fulmen.utilities.errors import MisconfigurationException

NAMES = ("", "_stage_1", "_stage_2", "_stage_2_offload", "_stage_3", "_stage_3_offload", "_stage_3_offload_nvme")
missing = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")


@missing
@pytest.mark.parametrize("name", NAMES)
def test_the_missing_package_is_named(name):
    with pytest.raises(MisconfigurationException, match="Run `pip install deepspeed`, or use `strategy='fsdp'`"):
        make_trainer(strategy=f"deepspeed{name}", devices=2)


@pytest.fixture
def installed(monkeypatch):
    """As far as the constructor can tell."""
    monkeypatch.setattr(deepspeed, "is_installed", lambda name: True)


def test_names_choose_stage_and_offloading(installed):
    configs = {name: StrategyRegistry.get(f"deepspeed{name}").config["zero_optimization"] for name in NAMES}
    assert [config["stage"] for config in configs.values()] == [2, 1, 2, 2, 3, 3, 3]
    assert {name for name, config in configs.items() if "offload_optimizer" in config} == set(NAMES[3::2]) | {NAMES[6]}
    assert configs["_stage_3_offload_nvme"]["offload_param"]["device"] == "nvme"
    assert configs["_stage_3_offload"]["offload_param"]["device"] == "cpu"


def test_a_configuration_replaces_the_arguments(installed, tmp_path, monkeypatch):
    given = {"zero_optimization": {"stage": 3}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(given))
    monkeypatch.setenv(DeepSpeedStrategy.DEEPSPEED_ENV_VAR, str(path))
    for strategy in (DeepSpeedStrategy(config=given), DeepSpeedStrategy(config=str(path)), DeepSpeedStrategy()):
        assert strategy.config == given and strategy.zero_stage_3
    with pytest.raises(MisconfigurationException, match="no DeepSpeed configuration"):
        DeepSpeedStrategy(config=str(tmp_path / "other.json"))


def test_what_the_trainer_decides_goes_into_the_configuration(installed):
    trainer = make_trainer(strategy=DeepSpeedStrategy(), devices=2, precision="16-mixed", gradient_clip_val=0.5)
    trainer.strategy.complete_config(trainer)
    config = trainer.strategy.config
    assert config["gradient_clipping"] == 0.5 and config["fp16"]["enabled"]
    assert config["fp16"]["initial_scale_power"] == 16


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({"gradient_accumulation_steps": 4}, {}, "accumulate_grad_batches"),
        (None, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "by norm only"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(installed, config, settings, message):
    trainer = make_trainer(strategy=DeepSpeedStrategy(config=config), devices=2, **settings)
    with pytest.raises(MisconfigurationException, match=message):
        trainer.strategy.complete_config(trainer)


def test_other_devices_are_refused(installed):
    trainer = make_trainer(strategy=DeepSpeedStrategy(), devices=2)
    with pytest.raises(RuntimeError, match="CUDA devices"):
        trainer.strategy.setup_environment()


def test_precisions_that_it_has_not_are_refused():
    with pytest.raises(ValueError, match="32-true"):
        DeepSpeedPrecision("64-true")
    assert DeepSpeedPrecision("bf16-mixed").config_entries == {"bf16": {"enabled": True}}
    assert DeepSpeedPrecision("32-true").config_entries == {}


def test_the_folder_of_a_checkpoint_is_found_or_named(tmp_path):
    from fulmen.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict, ds_checkpoint_dir

    (tmp_path / "latest").write_text("checkpoint")
    with pytest.raises(FileNotFoundError, match="checkpoint"):
        ds_checkpoint_dir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    assert ds_checkpoint_dir(tmp_path) == str(tmp_path / "checkpoint")
    if importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(ModuleNotFoundError, match="pip install"):
            convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "out.ckpt")
