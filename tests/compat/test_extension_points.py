"""What third parties subclass does here what it does in Lightning 2.6.6; `third_party.py` and `third_party_parts.py` hold their programs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import third_party
import third_party_parts  # noqa: F401  (its cases are among those of `third_party`)
import torch
from torch.utils.data import DataLoader, Sampler

# Printed by Lightning 2.6.6: `EXTENSIONS_OF=lightning.pytorch python tests/compat/third_party.py`, and `third_party_parts.py`.
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
    "a_fit_loop_with_parts_of_its_own": [
        "s data start before data [ advance t0 t1 v ] after before data [ advance t0 t1 v ] after end",
        2,
        5,
        True,
        [0.603396, 0.494117, 0.635285, 1.189802, -0.312043],
    ],
    "a_fit_loop_that_runs_by_itself": [
        "s start [ t0 t1 v ] [ t0 t1 v ] end",
        1,
        4,
        [0.603396, 0.494117, 0.635285, 1.189802, -0.312043],
    ],
    "an_epoch_loop_that_chooses_when_to_validate": [
        "start [ t0 done 1 t1 done v 2 t2 done v 3 ] [ t0 done v 1 t1 done 2 t2 done v 3 ] end",
        6,
        True,
        True,
    ],
    "evaluation_loops_of_a_trainer_of_its_own": [
        ["test test_loss 3.1410", "validate val_loss 3.1410"],
        ["more", "test_loss"],
        ["more", "val_loss"],
        True,
    ],
    "a_prediction_loop": "mine",
    "a_logger": [
        [
            "hyper-parameters {'size': 1}",
            "graph",
            "['epoch', 'train_loss'] 0",
            "['epoch', 'train_loss'] 1",
            "['epoch', 'train_loss'] 2",
            "['epoch', 'val_loss'] 2",
            "saved epoch=0-step=3.ckpt",
            "success",
        ],
        ["own/0.1/checkpoints/epoch=0-step=3.ckpt"],
        "the experiment",
        [None, None, None, "/"],
    ],
    "several_loggers_and_one_that_does_nothing": [
        [["epoch", "train_loss"], ["epoch", "train_loss"], ["epoch", "train_loss"]],
        "RememberingLogger",
        [None, None, "", ""],
        False,
    ],
    "a_logger_of_fabric": [["{'a': 1.0} 3", "{'b': 2} None", "{'size': 1}"], 5, None, "/"],
    "a_profiler": [
        [
            "[LightningModule]Profiled.on_train_epoch_end",
            "[LightningModule]Profiled.optimizer_step",
            "[Strategy]SingleDeviceStrategy.training_step",
            "mine",
            "run_training_batch",
            "run_training_epoch",
        ],
        "fit-times.txt",
        "0 open",
    ],
    "a_bar_from_nothing": [
        ["2 batches, mine: True", "0 ['both_step', 'shown']", "1 ['both_step', 'shown']", "loader 0: 2", "loader 1: 1"],
        ["Sanity Checking", "Training", "Validation", "Testing"],
        "Predicting",
    ],
    "a_tqdm_bar": [["sanity", "train", 3, "validation", "test", "predict"], True, 1, True],
    "callbacks_with_states": [
        ["Counter{'what': 'a'}", "Counter{'what': 'b'}"],
        6,
        [
            "setup a TrainerFn.FITTING",
            "setup b TrainerFn.FITTING",
            "teardown a TrainerFn.FITTING",
            "teardown b TrainerFn.FITTING",
            "setup b TrainerFn.FITTING",
            "loaded 3",
            "teardown b TrainerFn.FITTING",
        ],
    ],
    "callbacks_of_installed_packages": [["A", "A", "B"], ["B"]],
    "callbacks_of_a_module": ["LambdaCallback", "EarlyStopping", "Stopping", "ModelCheckpoint"],
    "a_datamodule_from_datasets": [["Own", "RandomSampler"], True, 0, 3.141, 3, {"size": 5, "other": 2}],
    "a_scheduler_that_is_not_torchs": [[0, 1, 2], "MisconfigurationException"],
    "gradients_clipped_by_the_module": [["SGD None None", "SGD None None"], [0.157809, -0.1, 0.4, 0.5, -0.1]],
    "optimizers_in_manual_optimization": [
        [
            "True True LightningSGD",
            "[True, True, False, False]",
            "Adam Adam",
            "True True LightningSGD",
            "[True, True, False, False]",
            "Adam Adam",
        ],
        [0.408654, 0.197816, 0.604531, 0.965382, -0.247905, 0.010533, 0.010866, 0.010982, 0.01088, -0.010945],
        4,
        [0.001, 0.0001],
    ],
    "metrics_that_are_not_torchmetrics_own": {
        "average": -0.64147,
        "average_epoch": -0.64147,
        "average_step": 0.84334,
        "p/a": -0.64147,
        "p/b": -0.64147,
    },
    "a_strategy_of_fabric": [
        ["to device", "module", "optimizer", "in", "forward", "out", "clip 1.0", "step"],
        [0.95, 0.95, 0.95, 0.95],
        4.0,
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


@pytest.fixture(autouse=True)
def own_processes() -> Iterator[None]:
    """A strategy for several processes that runs on one leaves its group, and where it meets, to the program's end."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def test_each_program_has_its_answer() -> None:
    assert set(third_party.CASES) == set(LIGHTNING)


@pytest.mark.parametrize("name", LIGHTNING)
def test_an_extension_sees_what_it_sees_in_lightning(name: str) -> None:
    assert_same(json.loads(json.dumps(third_party.CASES[name]())), LIGHTNING[name])


class Reversing(Sampler[list[int]]):
    """Batches of two, in turn from the front and from the back."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return iter([[0, 1], [2, 3]] if self.epoch % 2 == 0 else [[2, 3], [0, 1]])

    def __len__(self) -> int:
        return 2


def test_a_batch_sampler_is_told_the_epoch() -> None:
    class Seeing(third_party.Net):
        seen: list[float] = []

        def training_step(self, batch, batch_idx):
            self.seen.append(float(batch[0][0, 0]))
            return super().training_step(batch, batch_idx)

    x = torch.arange(4.0).repeat(4, 1).T
    dataset = torch.utils.data.TensorDataset(x, x[:, :1])
    third_party.make_trainer(max_epochs=2).fit(Seeing(), DataLoader(dataset, batch_sampler=Reversing()))
    assert Seeing.seen == [0.0, 2.0, 2.0, 0.0]
