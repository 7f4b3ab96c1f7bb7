import logging
import os
import re

import pytest
import torch

from fulmen import Trainer
from fulmen.accelerators import Accelerator, AcceleratorRegistry, CPUAccelerator, CUDAAccelerator
from fulmen.engine.cluster import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from fulmen.engine.resolve import (
    DEVICE_ABILITIES,
    UNSUPPORTED_STRATEGIES,
    announce_accelerator,
    check_precision,
    resolve_strategy,
)
from fulmen.plugins import (
    DoublePrecision,
    HalfPrecision,
    LayerSync,
    MixedPrecision,
    Precision,
    TorchCheckpointIO,
    TorchSyncBatchNorm,
)
from fulmen.strategies import DDPStrategy, SingleDeviceStrategy, Strategy, StrategyRegistry
from fulmen.utilities.errors import MisconfigurationException, PossibleUserWarning

MCE = MisconfigurationException


class MySync(LayerSync):
    def apply(self, model):
        return model

    def revert(self, model):
        return model


class MyAccelerator(Accelerator):
    """Stands for third-party hardware: several devices, in truth the CPU."""

    def setup_device(self, device): ...

    def teardown(self): ...

    parse_devices = staticmethod(lambda devices: devices)
    get_parallel_devices = staticmethod(lambda devices: [torch.device("cpu")] * devices)
    auto_device_count = staticmethod(lambda: 4)
    is_available = staticmethod(lambda: True)
    name = staticmethod(lambda: "mine")


class MyStrategy(Strategy):
    """Stands for a third-party strategy over several devices."""

    parallel_devices = None

    @property
    def root_device(self):
        return self.parallel_devices[0]

    def nothing(self, *args, **kwargs): ...

    barrier = broadcast = reduce = all_gather = model_to_device = nothing


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("DISABLE_MPS", "1")


@pytest.fixture
def gpus(monkeypatch):
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def single(**own):
    return SingleDeviceStrategy("cpu", **own)


# what is chosen


def test_defaults_are_one_cpu_in_full_precision():
    strategy = resolve_strategy()
    assert type(strategy) is SingleDeviceStrategy and strategy.root_device == torch.device("cpu")
    assert type(strategy.accelerator) is CPUAccelerator
    assert type(strategy.precision_plugin) is Precision
    assert type(strategy.checkpoint_io) is TorchCheckpointIO
    assert type(strategy.cluster_environment) is LightningEnvironment


@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cuda"])
def test_a_gpu_is_taken_when_there_is_one(gpus, accelerator):
    gpus(1)
    strategy = resolve_strategy(accelerator=accelerator)
    assert strategy.root_device == torch.device("cuda", 0) and type(strategy.accelerator) is CUDAAccelerator


def test_one_gpu_is_chosen_by_its_index(gpus):
    gpus(4)
    assert resolve_strategy(accelerator="gpu", devices=[2]).root_device == torch.device("cuda", 2)
    assert resolve_strategy(accelerator="gpu", devices="3,").root_device == torch.device("cuda", 3)


def test_auto_takes_all_gpus(gpus):
    gpus(4)
    strategy = resolve_strategy(accelerator="gpu")
    assert type(strategy) is DDPStrategy and strategy.process_group_backend == "nccl"
    assert strategy.parallel_devices == [torch.device("cuda", index) for index in range(4)]


def test_one_gpu_is_enough_in_a_notebook(gpus, monkeypatch, caplog):
    gpus(4)
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
    with caplog.at_level(logging.INFO, "fulmen"):
        assert type(resolve_strategy(accelerator="gpu")) is SingleDeviceStrategy
    assert "say `devices=4`" in caplog.text


def test_a_strategy_for_one_device_takes_the_first_of_several_gpus(gpus, caplog):
    gpus(4)
    with caplog.at_level(logging.INFO, "fulmen"):
        assert resolve_strategy(accelerator="gpu", strategy="single_device").root_device == torch.device("cuda", 0)
    assert "4 cuda devices" in caplog.text


@pytest.mark.parametrize("strategy", ["single_device", "SINGLE_device", "auto"])
def test_names_of_strategies_have_any_case(strategy):
    assert type(resolve_strategy(strategy=strategy)) is SingleDeviceStrategy


@pytest.mark.parametrize("start", ["", "_spawn", "_fork", "_notebook"])
@pytest.mark.parametrize("unused", ["", "_find_unused_parameters_true", "_FIND_unused_parameters_false"])
def test_every_name_of_ddp(start, unused):
    strategy = resolve_strategy(strategy=f"ddp{start}{unused}", devices=2)
    assert type(strategy) is DDPStrategy and strategy.num_processes == strategy.world_size == 2
    assert strategy.start_method == {"": "popen", "_spawn": "spawn"}.get(start, "fork")
    assert strategy.find_unused_parameters is unused.endswith("true")
    assert strategy.process_group_backend == "gloo"


def test_several_devices_are_ddp(monkeypatch):
    assert resolve_strategy(devices=2).start_method == "popen"
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
    assert resolve_strategy(devices=2).start_method == "fork"
    with pytest.raises(MisconfigurationException, match="strategy='ddp_notebook'"):
        resolve_strategy(devices=2, strategy="ddp")


@pytest.mark.parametrize("plugin", [None, TorchSyncBatchNorm(), MySync()])
def test_layers_to_synchronise_go_to_the_strategy(plugin):
    strategy = resolve_strategy(devices=2, sync_batchnorm=type(plugin) is not MySync, plugins=plugin)
    assert type(strategy.layer_sync) is (type(plugin) if plugin is not None else TorchSyncBatchNorm)


def test_the_environment_recognises_itself(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert type(resolve_strategy().cluster_environment) is SLURMEnvironment
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert type(resolve_strategy().cluster_environment) is TorchElasticEnvironment


def test_the_launcher_and_the_trainer_must_mean_the_same_number_of_processes(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "job", "WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"`torchrun` started 4 processes, but the Trainer is made for 2"):
        resolve_strategy(devices=2)


@pytest.mark.parametrize(
    ("precision", "kind", "name"),
    [
        (None, Precision, "32-true"),
        (32, Precision, "32-true"),
        ("32", Precision, "32-true"),
        ("32-true", Precision, "32-true"),
        (64, DoublePrecision, "64-true"),
        ("64-true", DoublePrecision, "64-true"),
        ("16-true", HalfPrecision, "16-true"),
        ("bf16-true", HalfPrecision, "bf16-true"),
        ("16-mixed", MixedPrecision, "16-mixed"),
        ("bf16-mixed", MixedPrecision, "bf16-mixed"),
    ],
)
def test_precisions(precision, kind, name):
    plugin = resolve_strategy(precision=precision).precision_plugin
    assert type(plugin) is kind and plugin.precision == name


@pytest.mark.parametrize(("old", "new"), [(16, "16-mixed"), ("16", "16-mixed"), ("bf16", "bf16-mixed")])
def test_old_names_of_precisions_work_and_warn(old, new):
    with pytest.warns(UserWarning, match=f"Write `precision='{new}'`"):
        assert resolve_strategy(precision=old).precision_plugin.precision == new


def test_mixed_precision_is_made_for_the_chosen_device(gpus, caplog, monkeypatch):
    gpus(1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with caplog.at_level(logging.INFO, "fulmen"):
        assert resolve_strategy(precision="bf16-mixed").precision_plugin.device == "cuda"
        assert resolve_strategy(precision="16-mixed", accelerator="cpu").precision_plugin.device == "cpu"
    assert "Using bfloat16 Automatic Mixed Precision (AMP)" in caplog.text
    assert "Using 16bit Automatic Mixed Precision (AMP)" in caplog.text


def test_plugins_become_parts_of_the_strategy():
    precision, io, cluster = DoublePrecision(), TorchCheckpointIO(), LightningEnvironment()
    strategy = resolve_strategy(plugins=[precision, io, cluster, MySync()])
    assert strategy.precision_plugin is precision
    assert strategy.checkpoint_io is io
    assert strategy.cluster_environment is cluster
    assert resolve_strategy(plugins=precision).precision_plugin is precision


def test_several_processes_on_a_strategy_for_one_device_are_mentioned(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(PossibleUserWarning, match="2 processes were started"):
        resolve_strategy()


@pytest.mark.parametrize("sync_batchnorm", [True, False])
def test_synchronised_batch_norm_changes_nothing_on_one_device(sync_batchnorm):
    assert type(resolve_strategy(sync_batchnorm=sync_batchnorm)) is SingleDeviceStrategy


# strategies, accelerators of the user's own


def test_a_strategy_object_is_used_as_it_is_and_gets_what_it_lacks():
    class Mine(SingleDeviceStrategy): ...

    strategy = Mine("cpu")
    assert resolve_strategy(strategy=strategy, precision="64-true") is strategy
    assert type(strategy.accelerator) is CPUAccelerator and type(strategy.precision_plugin) is DoublePrecision


def test_a_strategy_object_keeps_what_it_brought():
    precision, io, accelerator = DoublePrecision(), TorchCheckpointIO(), CPUAccelerator()
    strategy = resolve_strategy(strategy=single(precision_plugin=precision, checkpoint_io=io, accelerator=accelerator))
    assert strategy.precision_plugin is precision and strategy.checkpoint_io is io
    assert strategy.accelerator is accelerator


def test_the_accelerator_follows_the_device_of_a_strategy_object(gpus):
    gpus(2)
    assert type(resolve_strategy(strategy=single()).accelerator) is CPUAccelerator
    assert type(resolve_strategy(strategy=SingleDeviceStrategy(torch.device("cuda:1"))).accelerator) is CUDAAccelerator


def test_a_registered_strategy_is_made_on_the_chosen_device(gpus):
    class Mine(SingleDeviceStrategy): ...

    gpus(2)
    StrategyRegistry.register("My_own", Mine, "for a test")
    try:
        strategy = resolve_strategy(strategy="my_own", accelerator="gpu", devices=[1])
    finally:
        StrategyRegistry.remove("My_own")
    assert type(strategy) is Mine and strategy.root_device == torch.device("cuda", 1)


def test_a_registered_accelerator_is_chosen_by_name():
    AcceleratorRegistry.register("mine", MyAccelerator)
    try:
        assert type(resolve_strategy(accelerator="mine").accelerator) is MyAccelerator
    finally:
        AcceleratorRegistry.remove("mine")


def test_a_strategy_of_ones_own_may_have_several_devices():
    strategy = resolve_strategy(strategy=MyStrategy(), accelerator=MyAccelerator())
    assert strategy.parallel_devices == [torch.device("cpu")] * 4
    assert type(strategy.accelerator) is MyAccelerator and type(strategy.precision_plugin) is Precision


# what is refused: the arguments, the class of the error, and words of its message

REFUSED = [
    ({"accelerator": "cpuu"}, ValueError, "Did you mean `cpu`"),
    ({"accelerator": "hpu"}, ValueError, "accelerator='hpu'"),
    ({"accelerator": None}, ValueError, "accelerator=None"),
    ({"accelerator": CPUAccelerator}, ValueError, "`accelerator` received the class `CPUAccelerator`"),
    ({"accelerator": "gpu"}, MCE, "Available are 'cpu'"),
    ({"accelerator": "cuda"}, MCE, "Available are 'cpu'"),
    ({"accelerator": CUDAAccelerator()}, MCE, "Available are 'cpu'"),
    ({"accelerator": "mps"}, MCE, "Available are 'cpu'"),
    ({"accelerator": "tpu"}, MCE, "fulmen does not support"),
    ({"devices": 0}, MCE, "no device"),
    ({"devices": "0"}, MCE, "no device"),
    ({"devices": []}, MCE, "no device"),
    ({"devices": False}, MCE, "no device"),
    ({"devices": None}, TypeError, "devices=None"),
    ({"devices": 1.5}, TypeError, "devices=1.5"),
    ({"devices": -1}, TypeError, "devices=-1"),
    ({"devices": "0,1"}, TypeError, "devices='0,1'"),
    ({"num_nodes": 0}, ValueError, "num_nodes=0"),
    ({"num_nodes": 1.5}, ValueError, "num_nodes=1.5"),
    ({"strategy": "fdsp"}, ValueError, "Did you mean `fsdp`"),
    ({"strategy": None}, ValueError, "strategy=None"),
    ({"strategy": SingleDeviceStrategy}, ValueError, "an instance of `Strategy`"),
    ({"strategy": "dpd", "devices": 2}, ValueError, "Did you mean `ddp`"),
    ({"strategy": "deepspeed_stage_2"}, MCE, "pip install deepspeed"),
    ({"strategy": "xla"}, MCE, "not part of this version"),
    ({"devices": 2, "strategy": single()}, MCE, "several devices"),
    ({"devices": 2, "strategy": "single_device"}, MCE, "Use 'ddp'"),
    ({"num_nodes": 2}, ValueError, "MASTER_ADDR and MASTER_PORT of rank 0 are not set"),
    ({"strategy": DDPStrategy(accelerator=CPUAccelerator()), "accelerator": "cpu"}, MCE, "own accelerator"),
    (
        {"strategy": DDPStrategy(cluster_environment=LightningEnvironment()), "plugins": LightningEnvironment()},
        MCE,
        "own",
    ),
    ({"precision": "32-true", "plugins": DoublePrecision()}, ValueError, "Choose one"),
    ({"precision": 64, "plugins": [TorchCheckpointIO(), MixedPrecision("16-mixed", "cpu")]}, ValueError, "Choose one"),
    ({"precision": "17", "plugins": DoublePrecision()}, ValueError, "precision='17'"),
    ({"precision": "17", "accelerator": "gpu"}, ValueError, "precision='17'"),
    ({"plugins": MixedPrecision("bf16-mixed", "cuda")}, MCE, r"on 'cuda'.*`MixedPrecision\('bf16-mixed', 'cpu'\)`"),
    ({"plugins": object()}, MCE, "Precision, CheckpointIO"),
    ({"plugins": "16-mixed"}, MCE, "'16-mixed' is not a plugin"),
    ({"plugins": [DoublePrecision]}, MCE, "Pass an object"),
    ({"plugins": [DoublePrecision(), HalfPrecision()]}, MCE, "two of the kind Precision"),
    ({"plugins": [TorchCheckpointIO()] * 2}, MCE, "two of the kind CheckpointIO"),
    ({"plugins": [LightningEnvironment()] * 2}, MCE, "two of the kind ClusterEnvironment"),
    ({"strategy": single(accelerator=CPUAccelerator()), "accelerator": "cpu"}, MCE, "own accelerator"),
    ({"strategy": single(precision_plugin=Precision()), "plugins": Precision()}, MCE, "own precision"),
    ({"strategy": single(precision_plugin=Precision()), "precision": "64"}, MCE, "own precision"),
    ({"strategy": single(checkpoint_io=TorchCheckpointIO()), "plugins": TorchCheckpointIO()}, MCE, "own ch"),
    ({"strategy": SingleDeviceStrategy("meta"), "accelerator": "cpuu"}, ValueError, "cpuu"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), REFUSED)
def test_what_cannot_be_had_is_refused(arguments, error, words):
    with pytest.raises(error, match=words) as raised:
        resolve_strategy(**arguments)
    assert error in type(raised.value).__mro__[:2]  # that class, or one made of it for Fabric


@pytest.mark.parametrize(
    ("precision", "meant"),
    [
        ("bf16-mix", "bf16-mixed"),
        ("16-mixd", "16-mixed"),
        ("bf16_mixed", "bf16-mixed"),
        ("BF16-Mixed", "bf16-mixed"),
        ("transformer_engine", "transformer-engine"),
        ("fp16", "16-mixed"),
        ("float16", "16-mixed"),
        ("half", "16-mixed"),
        (16.0, "16-mixed"),
        ("bfloat16", "bf16-mixed"),
        (torch.bfloat16, "bf16-mixed"),
        (torch.float32, "32-true"),
        (32.0, "32-true"),
        ("double", "64-true"),
        (8, "transformer-engine"),
        ("", None),
        ("17", None),
        (True, None),
        (["16-mixed"], None),
    ],
)
def test_an_unknown_precision_is_answered_with_the_list_and_the_nearest(precision, meant):
    with pytest.raises(
        ValueError, match=rf"`precision={re.escape(repr(precision))}` is invalid. It must be one of '32-true'"
    ) as raised:
        resolve_strategy(precision=precision, accelerator="gpu")  # found before anything is asked about the GPU
    assert "'transformer-engine-float16', '64', '32', '16', 'bf16'." in str(raised.value)
    assert str(raised.value).endswith(f"Did you mean `{meant}`?" if meant else "'bf16'.")


def test_a_strategy_object_and_the_accelerator_must_agree(gpus):
    gpus(1)
    with pytest.raises(MisconfigurationException, match=r"`cuda:0`.*'cpu'"):
        resolve_strategy(strategy=SingleDeviceStrategy("cuda:0"), accelerator="cpu")


def test_a_cluster_environment_cannot_come_twice():
    strategy = single()
    strategy.cluster_environment = LightningEnvironment()
    with pytest.raises(MisconfigurationException, match="own cluster_environment"):
        resolve_strategy(strategy=strategy, plugins=LightningEnvironment())


def test_layers_cannot_be_synchronised_twice():
    with pytest.raises(MisconfigurationException, match="sync_batchnorm=True"):
        resolve_strategy(sync_batchnorm=True, plugins=MySync())


def test_more_gpus_than_there_are(gpus):
    gpus(2)
    with pytest.raises(MisconfigurationException, match=r"\[2, 3\] do not exist. Choose from \[0, 1\]"):
        resolve_strategy(accelerator="gpu", devices=4)


def test_mps_is_taken_when_there_is_nothing_better(monkeypatch):
    monkeypatch.delenv("DISABLE_MPS")
    monkeypatch.setattr("platform.processor", lambda: "arm")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_strategy().root_device.type == "mps"
    with pytest.raises(ValueError, match="MPS has not"):
        resolve_strategy(strategy="ddp")


@pytest.mark.parametrize("name", UNSUPPORTED_STRATEGIES)
def test_every_strategy_of_the_api_is_either_built_or_refused_by_name(gpus, name):
    gpus(1)
    with pytest.raises(MisconfigurationException, match=name):
        resolve_strategy(strategy=name)


# what a device can compute in

BF16 = "bfloat16"
CUDA, MPS, CPU = torch.device("cuda", 1), torch.device("mps"), torch.device("cpu")


class Named(Precision):
    """A precision of the user's own, called like one of ours."""

    def __init__(self, name):
        self.precision = name


@pytest.mark.parametrize(
    ("name", "device", "lacks", "words"),
    [
        ("64-true", MPS, "float64", "`precision='64-true'` needs float64. `mps` does not have it, other devices do."),
        ("bf16-true", MPS, BF16, "macOS 14 and newer do. Use '16-true' or '32-true'"),
        ("bf16-mixed", MPS, BF16, "Use '16-mixed'"),
        ("16-mixed", MPS, "a loss scaler", "torch 2.8 and newer do. Use 'bf16-mixed'"),
        ("bf16-mixed", CUDA, BF16, "needs bfloat16. `cuda:1` does not have it"),
        ("transformer-engine", CUDA, "FP8", "compute capability 8.9 on do. Use 'bf16-mixed'"),
        ("transformer-engine", MPS, "FP8", "`mps` does not have it, NVIDIA GPUs from compute capability 8.9"),
        ("transformer-engine", CPU, "FP8", "`cpu` does not have it"),
    ],
)
def test_a_precision_that_the_device_cannot_do_is_refused(name, device, lacks, words):
    def all_but(*missing):
        known = DEVICE_ABILITIES.get(device.type, {}).items()
        return {device.type: {what: (lambda _, ok=what not in missing: ok, who) for what, (_, who) in known}}

    with pytest.raises(MisconfigurationException, match=re.escape(words)):
        check_precision(Named(name), device, all_but(lacks))
    if lacks in DEVICE_ABILITIES.get(device.type, {}):
        check_precision(Named(name), device, all_but())
    check_precision(Named("32-true"), device, all_but(lacks))


def test_what_is_asked_of_gpus(monkeypatch):
    asked = []

    def capability(device):
        asked.append(device)
        return able

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    able = (7, 5)
    with pytest.warns(PossibleUserWarning, match=r"`cuda:1` imitates bfloat16, which is slow; .* 8.0 .*'16-mixed'"):
        check_precision(Named("bf16-mixed"), CUDA)
    able = (8, 0)
    check_precision(Named("bf16-mixed"), CUDA)
    with pytest.raises(MisconfigurationException, match="needs FP8"):
        check_precision(Named("transformer-engine"), CUDA)
    able = (8, 9)
    check_precision(Named("transformer-engine"), CUDA)
    assert asked == [CUDA] * 4
    monkeypatch.setattr(torch.version, "hip", "6.0")
    able = (0, 0)
    check_precision(Named("bf16-true"), CUDA)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(MisconfigurationException, match="needs bfloat16"):
        check_precision(Named("bf16-true"), CUDA)
    for name in ("16-mixed", "16-true", "32-true", "64-true"):
        check_precision(Named(name), CUDA)
    assert len(asked) == 4


def test_what_is_asked_of_apple_gpus(monkeypatch):
    newer = []
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: bool(newer.append(version)))
    with pytest.raises(MisconfigurationException, match="macOS 14"):
        check_precision(HalfPrecision("bf16-true"), MPS)
    assert newer == [(14, 0)]
    with pytest.raises(MisconfigurationException, match="float64"):
        check_precision(DoublePrecision(), MPS)
    check_precision(HalfPrecision("16-true"), MPS)


def test_a_device_is_asked_when_the_trainer_is_made(monkeypatch):
    monkeypatch.delenv("DISABLE_MPS")
    monkeypatch.setattr("platform.processor", lambda: "arm")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for arguments in ({"precision": 64}, {"plugins": DoublePrecision()}):
        with pytest.raises(MisconfigurationException, match=r"'64-true'` needs float64.*`accelerator='cpu'`"):
            Trainer(accelerator="mps", **arguments)


@pytest.mark.parametrize("name", ["64-true", "32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"])
def test_the_cpu_computes_in_all_but_fp8_without_a_word(name, recwarn):
    assert resolve_strategy(precision=name, accelerator="cpu").precision_plugin.precision == name
    assert not recwarn.list


# under a Trainer


@pytest.mark.parametrize("base", [Precision, DoublePrecision, MixedPrecision])
def test_a_precision_of_ones_own_is_used_as_it_is(model, loader, base):
    class Mine(base):
        steps = 0

        def optimizer_step(self, *args, **kwargs):
            self.steps += 1
            return super().optimizer_step(*args, **kwargs)

    mine = Mine("bf16-mixed", "cpu") if base is MixedPrecision else Mine()
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing"), False)
    trainer = Trainer(plugins=[mine], max_steps=2, accelerator="cpu", **quiet)
    trainer.fit(model, loader)
    assert trainer.precision_plugin is mine and trainer.precision == mine.precision and mine.steps == 2


def test_a_storage_plugin_stores_what_the_trainer_saves(tmp_path, model, loader):
    class Remembering(TorchCheckpointIO):
        calls: list = []

        def save_checkpoint(self, checkpoint, path, storage_options=None):
            self.calls.append(("save", os.path.basename(path), storage_options))
            super().save_checkpoint(checkpoint, path)

        def load_checkpoint(self, path, map_location=None, weights_only=None):
            self.calls.append(("load", os.path.basename(path)))
            return super().load_checkpoint(path, map_location, weights_only)

        def teardown(self):
            self.calls.append("teardown")

    io = Remembering()
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(plugins=io, max_steps=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(model, loader)
    trainer.save_checkpoint(tmp_path / "x.ckpt", storage_options={"fast": True})
    trainer.fit(model, loader, ckpt_path=str(tmp_path / "x.ckpt"))
    saved, loaded = ("save", "x.ckpt", {"fast": True}), ("load", "x.ckpt")
    assert io.calls == ["teardown", saved, loaded, "teardown"]


# what is said


def test_the_trainer_says_which_gpu_is_used(gpus, caplog):
    with caplog.at_level(logging.INFO, "fulmen"):
        announce_accelerator(resolve_strategy())
        gpus(1)
        announce_accelerator(resolve_strategy())
    assert [r.message for r in caplog.records] == [
        "GPU available: False, used: False",
        "GPU available: True (cuda), used: True",
    ]


def test_an_idle_gpu_is_mentioned(gpus):
    gpus(1)
    with pytest.warns(PossibleUserWarning, match=r"GPU \(cuda\).*accelerator='gpu'"):
        announce_accelerator(resolve_strategy(accelerator="cpu"))
