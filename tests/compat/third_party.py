"""Extensions as third parties write them for Lightning 2.6, and what they see. Runs with either package:

    EXTENSIONS_OF=lightning.pytorch python tests/compat/third_party.py

prints what each case returns; `test_extension_points.py` holds what Lightning 2.6.6 printed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

ROOT = os.environ.get("EXTENSIONS_OF", "fulmen")
FABRIC = "lightning.fabric" if ROOT == "lightning.pytorch" else "fulmen.fabric"
pl = importlib.import_module(ROOT)


def find(path: str, name: str, root: str = ROOT) -> Any:
    """`from lightning.pytorch.<path> import <name>`."""
    return getattr(importlib.import_module(f"{root}.{path}"), name)


CASES: dict[str, Callable[[], Any]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__] = function
    return function


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[0.1, -0.2, 0.3, 0.4]]))
            self.layer.bias.zero_()

    def loss(self, batch):
        x, y = batch
        return nn.functional.mse_loss(self.layer(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self.layer(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_loader(samples: int = 12, batch_size: int = 4) -> DataLoader:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=batch_size)


def make_trainer(**kwargs: Any) -> Any:
    # The order of samples under DDP is another one in Lightning, unless the user's loader is left alone.
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "num_sanity_val_steps": 0, **quiet}
    defaults |= {"use_distributed_sampler": False, "default_root_dir": tempfile.mkdtemp()}
    return pl.Trainer(**{**defaults, **kwargs})


def find_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def new_path(name: str = "file.ckpt") -> str:
    return os.path.join(tempfile.mkdtemp(), name)


def weights_of(module: nn.Module) -> list[float]:
    return [round(value, 6) for p in module.parameters() for value in p.detach().flatten().tolist()]


def record_calls(base: type, names: str, calls: list[str]) -> type:
    """A subclass that overrides each of the methods, notes its name and calls the one it overrides."""

    def override(name: str) -> Callable[..., Any]:
        def method(self, *args, **kwargs):
            calls.append(name)
            return getattr(super(sub, self), name)(*args, **kwargs)

        return method

    sub = type("Recording", (base,), {name: override(name) for name in names.split()})
    return sub


class RememberingLogger(find("loggers.logger", "DummyLogger")):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, float]] = []

    def log_metrics(self, metrics, step=None):
        self.seen.append(dict(metrics))


# ---------------------------------------------------------------------- strategies

VERBS = """setup_environment setup connect model_to_device setup_optimizers setup_precision_plugin training_step
validation_step test_step predict_step pre_backward backward post_backward optimizer_step post_training_step batch_to_device
process_dataloader lightning_module_state_dict optimizer_state save_checkpoint load_checkpoint load_model_state_dict
load_optimizer_state_dict teardown on_train_start on_train_end on_validation_start on_validation_end on_test_start
on_test_end on_predict_start on_predict_end on_train_batch_start"""


@case
def verbs_of_a_strategy() -> Any:
    calls: list[str] = []
    kind = record_calls(find("strategies", "SingleDeviceStrategy"), VERBS, calls)
    seen = {}

    def note(what: str) -> None:
        seen[what] = " ".join(calls)
        calls.clear()

    module = Net()
    trainer = make_trainer(strategy=kind(device=torch.device("cpu")), limit_train_batches=1, limit_val_batches=1)
    trainer.fit(module, make_loader(), make_loader())
    note("fit")
    path = new_path()
    trainer.save_checkpoint(path)
    note("save")
    trainer.test(module, make_loader(4), verbose=False)
    note("test")
    trainer.predict(module, make_loader(4))
    note("predict")
    resumed = make_trainer(strategy=kind("cpu"), max_epochs=2, limit_train_batches=1)
    resumed.fit(Net(), make_loader(), ckpt_path=path)
    note("resume")
    return seen


@case
def a_strategy_changes_steps_backward_and_update() -> Any:
    class Own(find("strategies", "SingleDeviceStrategy")):
        def training_step(self, *args, **kwargs):
            return super().training_step(*args, **kwargs) * 3

        def backward(self, closure_loss, optimizer, *args, **kwargs):
            return super().backward(closure_loss * 2, optimizer, *args, **kwargs)

        def optimizer_step(self, optimizer, closure, model=None, **kwargs):
            loss = super().optimizer_step(optimizer, closure, model, **kwargs)
            return seen.append(round(float(loss), 6))

    seen: list[float] = []
    module = Net()
    make_trainer(strategy=Own("cpu")).fit(module, make_loader())
    return seen, weights_of(module)


@case
def a_strategy_of_nothing_but_the_base_class() -> Any:
    class Own(find("strategies", "Strategy")):
        strategy_name = "own"
        global_rank = local_rank = node_rank = 0
        world_size = 1

        def __init__(self, accelerator=None, checkpoint_io=None, precision_plugin=None, size=3):
            super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
            self.size = size

        root_device = property(lambda self: torch.device("cpu"))
        is_global_zero = property(lambda self: True)

        def model_to_device(self):
            self.model.to(self.root_device)

        def reduce(self, tensor, *args, **kwargs):
            return tensor

        def all_gather(self, tensor, group=None, sync_grads=False):
            return tensor

        def barrier(self, *args, **kwargs):
            calls.append("barrier")

        def broadcast(self, obj, src=0):
            return obj

        def setup(self, trainer):
            self.accelerator.setup(trainer)
            self.model_to_device()
            if trainer.state.fn == "fit":
                self.setup_optimizers(trainer)
            self.setup_precision_plugin()

        @classmethod
        def register_strategies(cls, strategy_registry):
            strategy_registry.register("own", cls, description="own", size=5)

    calls: list[str] = []
    registry = find("strategies", "StrategyRegistry")
    Own.register_strategies(registry)
    module = Net()
    trainer = make_trainer(strategy="own")
    trainer.fit(module, make_loader())
    named = "own" in registry.available_strategies() and "own" in registry
    registry.remove("own")
    return trainer.strategy.size, named, bool(calls), weights_of(module)


@case
def private_attributes_of_a_strategy() -> Any:
    class Own(find("strategies", "SingleDeviceStrategy")):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            parts = (self._accelerator, self._checkpoint_io, self._precision_plugin, self._launcher, self._model)
            self.seen = [part is None for part in (*parts, self._lightning_module)] + [self._optimizers]

        @property
        def checkpoint_io(self):
            if self._checkpoint_io is None:
                self._checkpoint_io = find("plugins.io", "TorchCheckpointIO")()
                self.seen.append("made storage")
            return self._checkpoint_io

        @checkpoint_io.setter
        def checkpoint_io(self, io):
            self._checkpoint_io = io

        @property
        def launcher(self):
            return self._launcher

        def setup(self, trainer):
            super().setup(trainer)
            parts = (self._lightning_module, self._model, self._precision_plugin, self._accelerator, *self._optimizers)
            self.seen += [type(part).__name__ for part in parts]

    strategy = Own("cpu")
    trainer = make_trainer(strategy=strategy)
    trainer.fit(Net(), make_loader(4))
    trainer.save_checkpoint(new_path())
    return sorted(map(str, strategy.seen))


@case
def a_strategy_that_wraps_the_model() -> Any:
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            calls.append("through the wrapper")
            return self.module(*args, **kwargs)

    class Own(find("strategies", "SingleDeviceStrategy")):
        def setup(self, trainer):
            super().setup(trainer)
            self.model = Wrapper(self.model)

        def validation_step(self, *args, **kwargs):
            return self._forward_redirection(self.model, self.lightning_module, "validation_step", *args, **kwargs)

    calls: list[str] = []
    module = Net()
    trainer = make_trainer(strategy=Own("cpu"))
    trainer.fit(module, make_loader(), make_loader(4))
    return len(calls), type(trainer.lightning_module).__name__, weights_of(module)


@case
def methods_of_ddp() -> Any:
    calls: list[str] = []
    names = "setup_environment setup_distributed set_world_ranks _get_process_group_backend setup configure_ddp _setup_model"
    names += " determine_ddp_device_ids _register_ddp_hooks _configure_launcher pre_backward teardown"
    kind = record_calls(find("strategies", "DDPStrategy"), names, calls)
    module = Net()
    trainer = make_trainer(strategy=kind(find_unused_parameters=False))
    trainer.fit(module, make_loader(4))
    in_order = [name for name in dict.fromkeys(calls) if name != "set_world_ranks"]
    strategy = trainer.strategy
    parts = (strategy.num_nodes, strategy.num_processes, strategy._layer_sync, strategy.process_group_backend)
    return in_order, "set_world_ranks" in calls, parts, weights_of(module)


@case
def ddp_with_a_wrapper_of_its_own() -> Any:
    class Own(find("strategies", "DDPStrategy")):
        def _setup_model(self, model):
            calls.append(type(model).__name__)
            return DistributedDataParallel(module=model, device_ids=None, **self._ddp_kwargs)

        def _register_ddp_hooks(self):
            calls.append(type(self.model).__name__)

    class Other(find("strategies", "DDPStrategy")):
        def configure_ddp(self):
            self.model = DistributedDataParallel(self.model)

    calls: list[str] = []
    ends = []
    for kind in (Own, Other):
        module = Net()
        make_trainer(strategy=kind()).fit(module, make_loader())
        ends.append(weights_of(module))
    return calls, ends


@case
def layers_synchronised_by_a_plugin() -> Any:
    class Own(find("plugins.layer_sync", "LayerSync")):
        def apply(self, model):
            calls.append(f"apply {type(model).__name__}")
            return model

        def revert(self, model):
            calls.append(f"revert {type(model).__name__}")
            return model

    calls: list[str] = []
    trainer = make_trainer(strategy="ddp", plugins=[Own()])
    trainer.fit(Net(), make_loader(4))
    trainer.validate(Net(), make_loader(4), verbose=False)
    return calls, type(trainer.strategy._layer_sync).__name__


@case
def a_launcher() -> Any:
    class Launcher:
        is_interactive_compatible = True

        def launch(self, function, *args, trainer=None, **kwargs):
            calls.append(trainer.state.fn.value)
            return function(*args, **kwargs)

        def kill(self, signum):
            pass

    class Own(find("strategies", "SingleDeviceStrategy")):
        def _configure_launcher(self):
            self._launcher = Launcher()

    class Fabrics(find("strategies", "SingleDeviceStrategy", FABRIC)):
        def _configure_launcher(self):
            self._launcher = FabricLauncher()

    class FabricLauncher:
        is_interactive_compatible = True

        def launch(self, function, *args, **kwargs):
            calls.append("fabric")
            return function(*args, **kwargs)

    calls: list[str] = []
    module = Net()
    trainer = make_trainer(strategy=Own("cpu"))
    trainer.fit(module, make_loader())
    (result,) = trainer.test(module, make_loader(), verbose=False)
    fabric = importlib.import_module(FABRIC).Fabric(accelerator="cpu", devices=1, strategy=Fabrics(torch.device("cpu")))
    answer = fabric.launch(lambda fabric, number: number + fabric.world_size, 4)
    return calls, weights_of(module), round(result["test_loss"], 4), type(trainer.strategy.launcher).__name__, answer


@case
def names_of_strategies() -> Any:
    registry = find("strategies", "StrategyRegistry")

    @registry.register("own", description="mine", device=torch.device("cpu"))
    class Own(find("strategies", "SingleDeviceStrategy")):
        strategy_name = "own"

    trainer = make_trainer(strategy="own")
    errors = []
    for act in (lambda: registry.register("own", Own), lambda: registry.get("nope")):
        try:
            act()
        except Exception as error:
            errors.append(type(error).__name__)
    registry.register("own", Own, override=True)
    registry.remove("own")
    return type(trainer.strategy).__name__, errors, sorted(registry["ddp"])


# ---------------------------------------------------------------------- precision


@case
def verbs_of_a_precision() -> Any:
    names = """convert_module convert_input forward_context train_step_context val_step_context test_step_context
    predict_step_context pre_backward backward post_backward optimizer_step clip_gradients clip_grad_by_norm main_params connect
    state_dict teardown _wrap_closure _after_closure"""
    calls: list[str] = []
    seen = {}
    module = Net()
    kind = record_calls(find("plugins.precision", "Precision"), names, calls)
    trainer = make_trainer(plugins=kind(), limit_train_batches=1, gradient_clip_val=0.5)
    for what in ("fit", "test", "predict", "save"):
        if what == "fit":
            trainer.fit(module, make_loader(), make_loader(4))
        elif what == "test":
            trainer.test(module, make_loader(4), verbose=False)
        elif what == "predict":
            trainer.predict(module, make_loader(4))
        else:
            trainer.save_checkpoint(new_path())
        seen[what] = " ".join(calls)
        calls.clear()
    return seen, weights_of(module), trainer.precision


@case
def the_state_of_a_precision() -> Any:
    class Counting(find("plugins.precision", "Precision")):
        precision = "custom-8"

        def __init__(self):
            self.steps = 0

        def optimizer_step(self, optimizer, model, closure, **kwargs):
            self.steps += 1
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)

        def state_dict(self):
            return {"steps": self.steps}

        def load_state_dict(self, state_dict):
            self.steps = state_dict["steps"]

        @contextlib.contextmanager
        def forward_context(self):
            yield

    path = new_path()
    first = Counting()
    trainer = make_trainer(plugins=[first])
    trainer.fit(Net(), make_loader())
    trainer.save_checkpoint(path)
    second = Counting()
    resumed = make_trainer(plugins=[second], max_epochs=2)
    resumed.fit(Net(), make_loader(), ckpt_path=path)
    return first.steps, second.steps, resumed.precision


class ClippedNet(Net):
    """Notes when it sees its gradients, and what they were."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def on_before_optimizer_step(self, optimizer):
        self.seen.append(round(float(self.layer.weight.grad.norm()), 3))


@case
def a_mixed_precision_that_steps_by_itself() -> Any:
    class Own(find("plugins.precision", "MixedPrecision")):
        """The usual way of having a word in the step: what Lightning does there, and something more."""

        def optimizer_step(self, optimizer, model, closure, **kwargs):
            outcome = closure()
            skips = outcome is None and model.automatic_optimization
            if not skips:
                self.scaler.unscale_(optimizer)
            self._after_closure(model, optimizer)
            if skips:
                return outcome
            stepped = self.scaler.step(optimizer, **kwargs)
            self.scaler.update()
            return stepped

        def autocast_context_manager(self):
            return torch.autocast("cpu", dtype=torch.bfloat16)

    module = ClippedNet()
    precision = Own("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    make_trainer(plugins=precision, gradient_clip_val=0.5).fit(module, make_loader())
    return module.seen, [round(value, 2) for value in weights_of(module)], precision.scaler.get_scale()


@case
def a_mixed_precision_with_an_own_context() -> Any:
    class Own(find("plugins.precision", "MixedPrecision")):
        def autocast_context_manager(self):
            calls.append("autocast")
            return torch.autocast(self.device, dtype=torch.bfloat16)

        def clip_gradients(self, optimizer, clip_val=0.0, gradient_clip_algorithm=None):
            calls.append(f"clip {clip_val}")
            super().clip_gradients(optimizer, clip_val / 2)

    class Double(find("plugins.precision", "DoublePrecision")):
        def convert_input(self, data):
            converted = super().convert_input(data)
            calls.append(str(converted[0].dtype))
            return converted

    calls: list[str] = []
    make_trainer(plugins=Own("bf16-mixed", "cpu"), limit_train_batches=1, gradient_clip_val=0.5).fit(
        Net(), make_loader()
    )
    make_trainer(plugins=Double(), limit_train_batches=1).fit(Net(), make_loader())
    return calls


# ---------------------------------------------------------------------- storage, clusters and devices


@case
def a_checkpoint_io() -> Any:
    class Own(find("plugins.io", "CheckpointIO")):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            calls.append(f"save {os.path.basename(path)} {storage_options}")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.save(checkpoint, path)

        def load_checkpoint(self, path, map_location=None, weights_only=None):
            calls.append(f"load {os.path.basename(path)}")
            return torch.load(path, map_location=map_location, weights_only=False)

        def remove_checkpoint(self, path):
            calls.append(f"remove {os.path.basename(path)}")
            os.remove(path)

    calls: list[str] = []
    folder = tempfile.mkdtemp()
    callback = pl.callbacks.ModelCheckpoint(folder, filename="{epoch}", monitor="train_loss")
    trainer = make_trainer(plugins=Own(), callbacks=[callback], max_epochs=3, enable_checkpointing=True)
    trainer.fit(Net(), make_loader())
    trainer.test(Net(), make_loader(4), ckpt_path="best", verbose=False)
    trainer.save_checkpoint(os.path.join(folder, "x.ckpt"), storage_options={"a": 1})
    return calls, sorted(os.listdir(folder))


@case
def a_checkpoint_io_around_another() -> Any:
    class Own(find("plugins.io.wrapper", "_WrappingCheckpointIO")):
        def save_checkpoint(self, *args, **kwargs):
            calls.append("save")
            self.checkpoint_io.save_checkpoint(*args, **kwargs)

        def load_checkpoint(self, *args, **kwargs):
            calls.append("load")
            return self.checkpoint_io.load_checkpoint(*args, **kwargs)

        def remove_checkpoint(self, *args, **kwargs):
            self.checkpoint_io.remove_checkpoint(*args, **kwargs)

    calls: list[str] = []
    kinds = []
    for io in (Own(), Own(find("plugins.io", "TorchCheckpointIO")()), find("plugins.io", "AsyncCheckpointIO")()):
        path = new_path()
        trainer = make_trainer(plugins=io)
        trainer.fit(Net(), make_loader(4))
        trainer.save_checkpoint(path)
        trainer.strategy.checkpoint_io.teardown()
        make_trainer(plugins=io).test(Net(), make_loader(4), ckpt_path=path, verbose=False)
        kinds.append(
            (type(io.checkpoint_io).__name__, isinstance(io, find("plugins.io.wrapper", "_WrappingCheckpointIO")))
        )
    return calls, kinds


@case
def a_cluster_environment() -> Any:
    class Own(find("plugins.environments", "ClusterEnvironment")):
        creates_processes_externally = True
        main_address = "127.0.0.1"
        main_port = find_free_port()

        @staticmethod
        def detect():
            return False

        def world_size(self):
            return 1

        def set_world_size(self, size):
            calls.append(f"size {size}")

        def global_rank(self):
            return 0

        def set_global_rank(self, rank):
            calls.append(f"rank {rank}")

        def local_rank(self):
            return 0

        def node_rank(self):
            return 0

        def validate_settings(self, num_devices, num_nodes):
            calls.append(f"validate {num_devices} {num_nodes}")

        def teardown(self):
            calls.append("teardown")

    class Elastic(find("plugins.environments", "LightningEnvironment")):
        creates_processes_externally = True

        def teardown(self):
            calls.append("elastic")
            super().teardown()

    calls: list[str] = []
    module = Net()
    trainer = make_trainer(strategy="ddp", plugins=[Own()])
    trainer.fit(module, make_loader())
    make_trainer(strategy="ddp", plugins=Elastic()).fit(Net(), make_loader(4))
    return sorted(set(calls)), weights_of(module), type(trainer.strategy.cluster_environment).__name__


@case
def an_accelerator() -> Any:
    class Own(find("accelerators", "Accelerator")):
        def setup_device(self, device):
            calls.append(f"device {device}")

        def setup(self, trainer):
            calls.append("setup")

        def get_device_stats(self, device):
            return {"load": 0.5}

        def teardown(self):
            calls.append("teardown")

        @staticmethod
        def parse_devices(devices):
            return devices

        @staticmethod
        def get_parallel_devices(devices):
            return [torch.device("cpu")] * devices

        @staticmethod
        def auto_device_count():
            return 1

        @staticmethod
        def is_available():
            return True

        @staticmethod
        def name():
            return "own"

        @classmethod
        def register_accelerators(cls, accelerator_registry):
            accelerator_registry.register(cls.name(), cls, description="mine")

    calls: list[str] = []
    registry = find("accelerators", "AcceleratorRegistry")
    Own.register_accelerators(registry)
    module = Net()
    rows = RememberingLogger()
    watch = pl.callbacks.DeviceStatsMonitor(cpu_stats=False)
    trainer = make_trainer(accelerator="own", callbacks=[watch], logger=rows, log_every_n_steps=1)
    trainer.fit(module, make_loader())
    stats = [name for row in rows.seen for name in row if "load" in name]
    other = make_trainer(accelerator=Own(), devices="auto")
    registry.remove("own")

    @registry.register("given", description="x", size=3)
    class Given(find("accelerators", "CPUAccelerator")):
        def __init__(self, size):
            super().__init__()
            self.size = size

    sizes = registry.get("given").size, make_trainer(accelerator="given").accelerator.size
    registry.remove("given")
    kinds = [type(part).__name__ for part in (trainer.accelerator, trainer.strategy)]
    return calls, kinds, other.num_devices, weights_of(module), sorted(set(stats)), sizes


def print_cases(module: str) -> None:
    """What the cases of a module return, or those that are named on the command line."""
    for name, run in CASES.items():
        if run.__module__ == module and (name in sys.argv[1:] or len(sys.argv) < 2):
            try:
                print(f"RESULT {name} = {json.dumps(run())}")
            except Exception as error:
                print(f"RESULT {name} = {json.dumps(f'{type(error).__name__}: {error}')}")


if __name__ == "__main__":
    print_cases("__main__")
