"""Names that public code imports from deep and private places: each is really there, and does what it is used for."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import fulmen
from fulmen.compat import flags
from fulmen.compat.finder import PATHS, ViewModule
from fulmen.compat.internals import GRADES
from fulmen.compat.private_names import PLACES


def view_of(path: str):
    """The module that a foreign root shows for a path: a view, also where fulmen has a file of that name."""
    name = f"fulmen.{path}"
    return importlib.import_module(name) if path in PATHS else ViewModule(name, [name])


def test_every_name_of_the_table_is_where_it_says():
    for full, place in PLACES.items():
        path, _, name = full.rpartition(".")
        found = getattr(view_of(path), name)
        if place is not None:
            assert found is getattr(importlib.import_module(place.module), place.name), full


def test_grades_name_every_place_and_say_what_is_different():
    assert PLACES.keys() <= GRADES.keys()
    for name, (grade, note) in GRADES.items():
        assert grade in ("full", "read-only", "absent"), name
        assert note or grade == "full", name


def test_a_name_is_found_under_every_path_and_a_wrong_one_is_refused():
    from fulmen.fabric.strategies.fsdp import _METADATA_FILENAME, _TORCH_GREATER_EQUAL_2_2

    assert _METADATA_FILENAME == "meta.pt" and _TORCH_GREATER_EQUAL_2_2 is True
    with pytest.raises(ImportError, match="_lazy_loat"):
        from fulmen.fabric.utilities.load import _lazy_loat  # noqa: F401
    with pytest.raises(AttributeError, match="_lazy_loat"):
        view_of("fabric.utilities.load")._lazy_loat  # noqa: B018


def test_flags_say_what_is_installed():
    assert flags._TORCH_GREATER_EQUAL_1_11 and not flags._TORCH_GREATER_EQUAL_99_0
    release = ".".join(torch.__version__.split(".")[:2])
    assert getattr(flags, f"_TORCH_EQUAL_{release.replace('.', '_')}") and not flags._TORCH_EQUAL_1_0
    assert getattr(flags, f"_PYTHON_GREATER_EQUAL_3_{sys.version_info.minor}_0")
    assert not getattr(flags, f"_PYTHON_GREATER_EQUAL_3_{sys.version_info.minor + 1}_0")
    assert flags._TORCHMETRICS_GREATER_EQUAL_1_0_0 and not flags._XLA_GREATER_EQUAL_2_1
    assert not flags._XLA_AVAILABLE and not flags._TPU_AVAILABLE and not flags._DEEPSPEED_GREATER_EQUAL_0_16
    assert flags._NUMPY_AVAILABLE is True and flags._HOROVOD_AVAILABLE is False
    assert (os.name == "nt") == flags._IS_WINDOWS
    with pytest.raises(AttributeError, match="_NO_SUCH_AVAILABLE"):
        flags._NO_SUCH_AVAILABLE  # noqa: B018


def test_nothing_of_it_is_imported_before_it_is_asked_for():
    code = """
import sys, fulmen, fulmen.fabric.utilities.load, fulmen.trainer.connectors.logger_connector.result, fulmen.Trainer if 0 else fulmen
fulmen.Trainer
loaded = [n for n in sys.modules if n.startswith("fulmen.compat.")]
assert loaded == ["fulmen.compat.finder"], loaded
"""
    code = code.replace(", fulmen.Trainer if 0 else fulmen", "")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=1200)


# ---------------------------------------------------------------------- files


class Counter:
    def __init__(self):
        self.n = 0

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


def test_files_are_loaded_as_a_whole_or_when_they_are_used(tmp_path):
    from fulmen.fabric.utilities.cloud_io import _atomic_save, _is_dir, _is_local_file_protocol, _load, get_filesystem
    from fulmen.fabric.utilities.load import (
        _lazy_load,
        _load_distributed_checkpoint,
        _materialize_tensors,
        _NotYetLoadedTensor,
    )

    path = tmp_path / "a.ckpt"
    _atomic_save({"w": torch.arange(6.0), "n": 3}, path)
    assert _load(path, weights_only=True)["n"] == 3
    with open(path, "rb") as file:
        assert torch.equal(_load(file, map_location="cpu")["w"], torch.arange(6.0))
    lazy = _lazy_load(path)
    assert not isinstance(lazy["w"], _NotYetLoadedTensor) and lazy["w"].sum() == 15
    assert torch.equal(_materialize_tensors(lazy)["w"], torch.arange(6.0))
    with pytest.raises(FileNotFoundError, match="nothing.ckpt"):
        _lazy_load(tmp_path / "nothing.ckpt")
    files = get_filesystem(path)
    assert files.exists(str(path)) and _is_dir(files, tmp_path) and not _is_dir(files, path)
    assert _is_local_file_protocol(path) and not _is_local_file_protocol("s3://bucket/a")
    with pytest.raises(Exception, match="nowhere"):
        _load_distributed_checkpoint(tmp_path / "nowhere")


def test_states_are_moved_filtered_and_checked():
    from fulmen.fabric.strategies.strategy import _apply_filter, _validate_keys_for_strict_loading
    from fulmen.fabric.utilities.load import _move_state_into

    source = {"a": 1, "counter": {"n": 5}, "c": 2}
    destination = {"a": 0, "counter": (counter := Counter())}
    _move_state_into(source, destination, keys={"a", "counter", "unknown"})
    assert source == {"c": 2} and destination == {"a": 1, "counter": counter} and counter.n == 5
    target: dict = {}
    _apply_filter("k", {"k": lambda name, value: value > 1}, {"x": 1, "y": 2}, target)
    _apply_filter("z", {}, {"x": 1}, target)
    assert target == {"k": {"y": 2}, "z": {"x": 1}}
    _validate_keys_for_strict_loading(["a", "b"], ["a"], strict=False)
    with pytest.raises(KeyError, match="'b' that does not exist"):
        _validate_keys_for_strict_loading(["a", "b"], ["a"], strict=True)


# ---------------------------------------------------------------------- loggers


@dataclass
class Settings:
    x: int = 1
    y: str = "a"


def test_hyper_parameters_become_flat_and_plain():
    from fulmen.fabric.utilities.logger import (
        _add_prefix,
        _convert_json_serializable,
        _convert_params,
        _flatten_dict,
        _sanitize_callable_params,
        _sanitize_params,
    )

    nested = {"a": {"b": 1, "c": {"d": 2}}, "e": [1], "n": argparse.Namespace(z=3), "D": Settings(), 1: 2}
    flat = {"a/b": 1, "a/c/d": 2, "e": [1], "n/z": 3, "D/x": 1, "D/y": "a", "1": 2}
    assert _flatten_dict(nested) == flat
    assert _flatten_dict({"a": {"b": 1}}, ".", "p") == {"p.a.b": 1}
    assert _convert_params(argparse.Namespace(a=1)) == {"a": 1} and _convert_params(None) == {}

    def seven():
        return 7

    def one_of(x):
        return x

    named = _sanitize_callable_params({"seven": seven, "one_of": one_of, "class": nn.Linear, "i": 1})
    assert named == {"seven": 7, "one_of": "one_of", "class": "Linear", "i": 1}
    plain = _sanitize_params({"a": 1, "b": [1], "e": None, "f": True, "t": torch.tensor(1.0), "z": nn.ReLU()})
    assert plain == {"a": 1, "b": "[1]", "e": "None", "f": True, "t": torch.tensor(1.0), "z": "ReLU()"}
    assert json.dumps(_convert_json_serializable({"a": object, "b": [1]})) == """{"a": "<class 'object'>", "b": [1]}"""
    assert _add_prefix({"a": 1}, "p", "-") == {"p-a": 1} and _add_prefix({"a": 1}, "", "-") == {"a": 1}


def test_saved_files_are_scanned_the_oldest_first(tmp_path):
    from fulmen.loggers.utilities import _scan_checkpoints

    callback = fulmen.callbacks.ModelCheckpoint(monitor="x", dirpath=tmp_path)
    paths = {name: str(tmp_path / name) for name in "abl"}
    for seconds, path in enumerate(paths.values()):
        open(path, "w").close()
        os.utime(path, (100 + seconds, 100 + seconds))
    callback.best_k_models = {paths["a"]: torch.tensor(1.0), paths["b"]: torch.tensor(2.0)}
    callback.best_model_path = paths["a"]
    callback.last_model_path = paths["l"]
    callback.current_score = torch.tensor(3.0)
    found = _scan_checkpoints(callback, {})
    assert [(*file[:2], float(file[2]), file[3]) for file in found] == [
        (100.0, paths["a"], 1.0, "best_k"), (101.0, paths["b"], 2.0, "best_k"), (102.0, paths["l"], 3.0, "latest"),
    ]  # fmt: skip
    assert [tag for *_, tag in _scan_checkpoints(callback, {paths["a"]: 110.0, paths["b"]: 101.0})] == ["latest"]


# ---------------------------------------------------------------------- devices, loaders, modules


def test_devices_and_processes_are_found():
    from fulmen.accelerators.cuda import num_cuda_devices
    from fulmen.fabric.utilities.device_parser import (
        _determine_root_gpu_device,
        _parse_gpu_ids,
        _select_auto_accelerator,
    )
    from fulmen.fabric.utilities.distributed import _distributed_is_initialized, _sync_ddp_if_available
    from fulmen.overrides.distributed import UnrepeatedDistributedSampler

    count = torch.cuda.device_count()
    assert num_cuda_devices() == count and (count or _select_auto_accelerator() in ("cpu", "mps"))
    assert _determine_root_gpu_device([2, 1]) == 2 and _determine_root_gpu_device([]) is None
    assert _parse_gpu_ids(0, include_cuda=True) is None
    with pytest.raises(TypeError):
        _parse_gpu_ids(None, include_cuda=True)
    with pytest.raises(fulmen.utilities.MisconfigurationException):
        _parse_gpu_ids([count], include_cuda=True)
    assert not _distributed_is_initialized() and _sync_ddp_if_available(torch.tensor(2.0)) == 2
    parts = [list(UnrepeatedDistributedSampler(range(5), 2, rank, shuffle=False)) for rank in (0, 1)]
    assert parts == [[0, 2, 4], [1, 3]]


def test_loaders_are_looked_into_and_made_again():
    from fulmen.fabric.utilities.data import (
        _replace_dunder_methods,
        _set_sampler_epoch,
        _update_dataloader,
        has_iterable_dataset,
        has_len,
        sized_len,
    )
    from fulmen.utilities.data import _is_dataloader_shuffled

    loader = DataLoader(TensorDataset(torch.arange(6.0)), batch_size=4)
    assert sized_len(loader) == 2 and has_len(loader) and sized_len(iter(())) is None
    assert not has_iterable_dataset(loader) and not has_iterable_dataset([1])
    assert not _is_dataloader_shuffled(loader) and _is_dataloader_shuffled(DataLoader(loader.dataset, shuffle=True))
    again = _update_dataloader(loader, RandomSampler(loader.dataset))
    assert isinstance(again.sampler, RandomSampler) and again.batch_size == 4
    sampler = torch.utils.data.DistributedSampler(loader.dataset, 2, 0)
    _set_sampler_epoch(DataLoader(loader.dataset, batch_sampler=BatchSampler(sampler, 2, False)), 3)
    assert sampler.epoch == 3
    with _replace_dunder_methods(DataLoader, "dataset"):
        pass


def test_modules_are_made_without_values_and_filled():
    from fulmen.fabric.utilities.init import (
        _EmptyInit,
        _has_meta_device_parameters_or_buffers,
        _materialize_meta_tensors,
    )
    from fulmen.utilities.model_helpers import _ModuleMode

    torch.manual_seed(0)
    with _EmptyInit(enabled=False):
        usual = nn.Linear(3, 2)
    state = torch.get_rng_state()
    with _EmptyInit(enabled=True):
        nn.Linear(3, 2)
    assert torch.equal(torch.get_rng_state(), state) and usual.weight.abs().max() <= 3**-0.5
    with torch.device("meta"):
        late = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert _has_meta_device_parameters_or_buffers(late) and not _has_meta_device_parameters_or_buffers(usual)
    _materialize_meta_tensors(late, "cpu")
    assert not _has_meta_device_parameters_or_buffers(late) and 0 < late[0].weight.abs().max() <= 3**-0.5
    mode = _ModuleMode()
    late[1].eval()
    mode.capture(late)
    late.train()
    mode.restore(late)
    assert late.training and not late[1].training


# ---------------------------------------------------------------------- loops


def test_counters_count_and_travel():
    from fulmen.loops.optimization.automatic import Closure, ClosureResult

    progress_names = view_of("loops.progress")
    progress = progress_names._BatchProgress()
    progress.increment_ready()
    progress.increment_started()
    assert progress.state_dict() == {
        "total": {"ready": 1, "completed": 0, "started": 1, "processed": 0},
        "current": {"ready": 1, "completed": 0, "started": 1, "processed": 0}, "is_last_batch": False,
    }  # fmt: skip
    progress.reset_on_run()
    assert (progress.total.ready, progress.current.ready) == (1, 0)
    again = progress_names._BatchProgress.from_state_dict(progress.state_dict())
    assert again == progress
    again.total.reset_on_restart()
    assert again.total.ready == 0
    steps = progress_names._OptimizationProgress()
    steps.optimizer.step.increment_completed()
    assert steps.optimizer_steps == 1
    with pytest.raises(TypeError, match="'processed'"):
        steps.optimizer.step.increment_processed()
    assert progress_names._Progress.from_defaults(progress_names._StartedTracker, ready=2).current.ready == 2

    weight = torch.ones(1, requires_grad=True)
    told = []
    closure = Closure(
        lambda: ClosureResult.from_training_step_output({"loss": 4 * weight.sum(), "n": 1}, normalize=2),
        lambda loss: loss.backward(), lambda: told.append("zero_grad"),
    )  # fmt: skip
    assert closure() == 2 and told == ["zero_grad"] and weight.grad.item() == 2
    assert closure.consume_result().asdict() == {"loss": torch.tensor(2.0), "n": 1}
    with pytest.raises(RuntimeError, match="has not been executed"):
        closure.consume_result()


def test_protocols_and_markers_hold_what_fulmen_has():
    from fulmen.fabric.strategies import FSDPStrategy, SingleDeviceStrategy
    from fulmen.fabric.strategies.strategy import _Sharded
    from fulmen.fabric.utilities.types import Optimizable, Steppable
    from fulmen.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
    from fulmen.strategies.launchers.launcher import _Launcher

    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    assert isinstance(optimizer, Optimizable) and isinstance(optimizer, Steppable)
    assert not isinstance(object(), Optimizable)
    assert issubclass(FSDPStrategy, _Sharded) and not issubclass(SingleDeviceStrategy, _Sharded)
    assert issubclass(_MultiProcessingLauncher, _Launcher) and issubclass(_SubprocessScriptLauncher, _Launcher)
    assert view_of("accelerators").TPUAccelerator.is_available() is False


def test_hooks_are_called_by_name(tmp_path):
    from fulmen.trainer import call

    heard = []

    class Hears(fulmen.Callback):
        def on_train_start(self, trainer, pl_module):
            heard.append("callback")

    class Model(fulmen.LightningModule):
        def on_train_start(self):
            heard.append("module")

        def answer(self, x, y=0):
            return x + y

    trainer = fulmen.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[Hears()],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(TypeError, match="no module"):
        call._call_lightning_module_hook(trainer, "on_train_start")
    model = Model()
    trainer.strategy.connect(model)
    call._call_callback_hooks(trainer, "on_train_start")
    call._call_lightning_module_hook(trainer, "on_train_start")
    assert heard == ["callback", "module"]
    assert call._call_lightning_module_hook(trainer, "answer", 1, y=2) == 3
    assert call._call_lightning_module_hook(trainer, "no_such_hook") is None
    assert call._call_callbacks_state_dict(trainer) == {}
    with pytest.raises(ZeroDivisionError):
        call._call_and_handle_interrupt(trainer, lambda: 1 / 0)
    assert trainer.interrupted


def test_loggers_of_fabric_have_a_base_of_their_own():
    from fulmen.fabric.loggers.logger import Logger as OfFabric
    from fulmen.loggers.logger import Logger

    assert issubclass(Logger, OfFabric) and Logger is not OfFabric
    abstract = {"log_hyperparams", "log_metrics", "name", "version"}
    assert OfFabric.__abstractmethods__ == Logger.__abstractmethods__ == abstract
    assert abstract <= vars(OfFabric).keys() and not abstract & vars(Logger).keys()
