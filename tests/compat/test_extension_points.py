"""What third parties subclass does here what it does in Lightning 2.6.6; `third_party.py` holds their programs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import third_party

# Printed by Lightning 2.6.6: `python tests/compat/third_party.py lightning.pytorch`.
LIGHTNING: dict[str, Any] = {
    "verbs_of_a_strategy": {
        "fit": "connect setup_environment setup model_to_device setup_optimizers setup_precision_plugin process_dataloader process_dataloader on_train_start batch_to_device on_train_batch_start optimizer_step training_step post_training_step backward pre_backward post_backward on_validation_start batch_to_device validation_step on_validation_end on_train_end teardown",
        "save": "lightning_module_state_dict optimizer_state save_checkpoint",
        "test": "connect setup_environment setup model_to_device setup_precision_plugin process_dataloader on_test_start batch_to_device test_step on_test_end teardown",
        "predict": "connect setup_environment setup model_to_device setup_precision_plugin process_dataloader on_predict_start batch_to_device predict_step on_predict_end teardown",
        "resume": "connect setup_environment load_checkpoint load_model_state_dict setup model_to_device setup_optimizers setup_precision_plugin load_optimizer_state_dict process_dataloader on_train_start batch_to_device on_train_batch_start optimizer_step training_step post_training_step backward pre_backward post_backward on_train_end teardown",
    },
    "a_strategy_changes_steps_backward_and_update": [
        [19.389923, 51.615028, 50.663338],
        [-2.596078, 1.265643, -4.724216, 2.916602, -2.339904],
    ],
    "a_strategy_of_nothing_but_the_base_class": [5, True, True, [0.750777, 0.192053, 0.720186, 0.890368, -0.10291]],
    "private_attributes_of_a_strategy": [
        "CPUAccelerator",
        "Net",
        "Net",
        "Precision",
        "SGD",
        "True",
        "True",
        "True",
        "True",
        "True",
        "True",
        "[]",
        "made storage",
    ],
    "a_strategy_that_wraps_the_model": [4, "Net", [0.750777, 0.192053, 0.720186, 0.890368, -0.10291]],
    "methods_of_ddp": [
        [
            "_configure_launcher",
            "setup_environment",
            "setup_distributed",
            "_get_process_group_backend",
            "setup",
            "configure_ddp",
            "_setup_model",
            "determine_ddp_device_ids",
            "_register_ddp_hooks",
            "pre_backward",
            "teardown",
        ],
        True,
        [1, 1, None, "gloo"],
        [0.403793, 0.190293, 0.60563, 0.961592, -0.243788],
    ],
    "ddp_with_a_wrapper_of_its_own": [
        ["Net", "DistributedDataParallel"],
        [[0.750777, 0.192053, 0.720186, 0.890368, -0.10291], [0.750777, 0.192053, 0.720186, 0.890368, -0.10291]],
    ],
    "layers_synchronised_by_a_plugin": [["apply Net", "revert Net"], "Own"],
    "a_launcher": [
        ["fit", "test", "fabric"],
        [0.750777, 0.192053, 0.720186, 0.890368, -0.10291],
        0.5409,
        "Launcher",
        5,
    ],
    "names_of_strategies": [
        "Own",
        ["ValueError", "KeyError"],
        ["description", "init_params", "strategy", "strategy_name"],
    ],
    "verbs_of_a_precision": [
        {
            "fit": "convert_module connect convert_input optimizer_step _wrap_closure train_step_context forward_context pre_backward backward post_backward _after_closure clip_gradients clip_grad_by_norm main_params convert_input val_step_context forward_context teardown",
            "test": "convert_module connect convert_input test_step_context forward_context teardown",
            "predict": "convert_module connect convert_input predict_step_context forward_context teardown",
            "save": "state_dict",
        },
        [0.117991, -0.176887, 0.3181, 0.433258, -0.014437],
        "32-true",
    ],
    "the_state_of_a_precision": [3, 6, "custom-8"],
    "a_mixed_precision_that_steps_by_itself": [[8.085, 2.549, 3.671], [0.16, -0.16, 0.36, 0.45, -0.02], 4.0],
    "a_mixed_precision_with_an_own_context": ["autocast", "clip 0.5", "torch.float64"],
    "a_checkpoint_io": [
        [
            "save epoch=0.ckpt None",
            "save epoch=1.ckpt None",
            "remove epoch=0.ckpt",
            "save epoch=2.ckpt None",
            "remove epoch=1.ckpt",
            "load epoch=2.ckpt",
            "save x.ckpt {'a': 1}",
        ],
        ["epoch=2.ckpt", "x.ckpt"],
    ],
    "a_checkpoint_io_around_another": [
        ["save", "load", "save", "load"],
        [["TorchCheckpointIO", True], ["TorchCheckpointIO", True], ["TorchCheckpointIO", True]],
    ],
    "a_cluster_environment": [
        ["elastic", "rank 0", "size 1", "teardown", "validate 1 1"],
        [0.750777, 0.192053, 0.720186, 0.890368, -0.10291],
        "Own",
    ],
    "an_accelerator": [
        ["device cpu", "setup", "teardown"],
        ["Own", "SingleDeviceStrategy"],
        1,
        [0.750777, 0.192053, 0.720186, 0.890368, -0.10291],
        [],
        [3, 3],
    ],
}


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, float):
        assert found == pytest.approx(expected, abs=2e-6)
    elif isinstance(expected, list):
        assert len(found) == len(expected), (found, expected)
        for one, other in zip(found, expected):
            assert_same(one, other)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_same(found[name], value)
    else:
        assert found == expected


def test_each_program_has_its_answer() -> None:
    assert set(third_party.CASES) == set(LIGHTNING)


@pytest.mark.parametrize("name", LIGHTNING)
def test_an_extension_sees_what_it_sees_in_lightning(name: str) -> None:
    assert_same(json.loads(json.dumps(third_party.CASES[name]())), LIGHTNING[name])
