"""Module paths that exist in the API we follow but are other files here, such as `fulmen.trainer.states`.

Configuration files and scripts name classes by them. The table is served by an import finder that is asked last: each
path is a *view module* that holds the same objects, so a class is the same under all its paths.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

from fulmen.utilities.lazy import has_module, missing_module, missing_name

# A module of ours, and the paths under which its names are known as well. A path that stands at several modules is
# looked up in their order.
TABLE = """
module: core core.module  datamodule: core core.datamodule  hooks: core.hooks  optimizers: core core.optimizer
compat.saving: core.saving
hparams: core.mixins core.mixins.hparams_mixin core.saving utilities.parsing  checkpoint.load: core.saving
trainer: trainer.trainer

callbacks.checkpointing: callbacks.checkpoint callbacks.model_checkpoint callbacks.on_exception_checkpoint
callbacks.weight_averaging: callbacks.averaging
callbacks.stochastic_weight_averaging: callbacks.stochastic_weight_avg callbacks.averaging
callbacks.monitors: callbacks.device_stats_monitor callbacks.lr_monitor callbacks.spike callbacks.throughput_monitor
callbacks.timer: callbacks.timing callbacks.gradient_accumulation_scheduler
callbacks.prediction_writer: callbacks.writing callbacks.lambda_function
callbacks.non_finite_guard: callbacks.guard
callbacks.progress_bar: callbacks.progress callbacks.progress.progress_bar
callbacks.tqdm_bar: callbacks.progress callbacks.progress.tqdm_progress
callbacks.rich_bar: callbacks.progress callbacks.progress.rich_progress
callbacks.model_summary: callbacks.rich_model_summary

callbacks.lr_finder: tuner.lr_finder  callbacks.batch_size_finder: tuner.batch_size_scaling
utilities.memory: tuner.batch_size_scaling

compat.loops: loops.fit_loop loops.training_epoch_loop loops.evaluation_loop loops.prediction_loop
loops.fit: loops.fit_loop loops.training_epoch_loop
loops.evaluate: loops.evaluation_loop  loops.predict: loops.prediction_loop
profilers.profiler: profilers.advanced profilers.base profilers.simple

data.combined: utilities.combined_loader  data.loaders: utilities.data
checkpoint.consolidate: utilities.consolidate_checkpoint
checkpoint.upgrade: utilities.upgrade_checkpoint  compat.migration: utilities.migration utilities.migration.utils
utilities.collections: utilities.data utilities.parsing  utilities.arguments: utilities.parsing
utilities.errors: utilities.exceptions utilities.warnings
utilities.introspection: utilities.model_helpers utilities.signature_utils
utilities.modules: utilities.compile utilities.grads utilities.parameter_tying utilities.parsing
utilities.model_summary: utilities.model_summary.model_summary utilities.model_summary.model_summary_deepspeed
utilities.types: trainer.states utilities.enums

engine.accelerators: accelerators.accelerator accelerators.cpu accelerators.cuda accelerators.mps
storage.checkpoint_io: engine.checkpoint_io plugins.io plugins.io.checkpoint_plugin plugins.io.torch_plugin
storage.checkpoint_io: plugins.io.wrapper
storage.async_io: engine.async_checkpoint_io plugins.io plugins.io.async_plugin
engine.cluster: plugins.environments plugins.environments.cluster_environment plugins.environments.lightning
engine.cluster: plugins.environments.kubeflow plugins.environments.lsf plugins.environments.mpi
engine.cluster: plugins.environments.slurm plugins.environments.torchelastic
engine.precision: plugins.precision.amp plugins.precision.double plugins.precision.half plugins.precision.precision
engine.bitsandbytes: plugins.precision.bitsandbytes
engine.transformer_engine: plugins.precision.transformer_engine
engine.sync_batchnorm: plugins.layer_sync  plugins: plugins.precision
engine.strategy: strategies.strategy  engine.strategy_registry: strategies.registry strategies.single_device
engine.fsdp: strategies.fsdp  engine.model_parallel: strategies.model_parallel  engine.deepspeed: strategies.deepspeed
engine.dtensor: engine.dtensors plugins.precision.fsdp  engine.deepspeed: plugins.precision.deepspeed utilities.deepspeed
engine.parallel: strategies.parallel  engine.ddp: strategies.ddp  engine.launch: strategies.launchers
engine.script_launcher: strategies.launchers  engine.process_launcher: strategies.launchers
engine.xla: accelerators.xla plugins.environments plugins.environments.xla plugins.io plugins.io.xla plugins.precision.xla
engine.xla: strategies.single_xla strategies.xla

engine.accelerators: fabric.accelerators.accelerator fabric.accelerators.cpu fabric.accelerators.cuda
engine.accelerators: fabric.accelerators.mps fabric.accelerators.registry  engine.xla: fabric.accelerators.xla
loggers.fabric: fabric.loggers fabric.loggers.csv_logs fabric.loggers.logger fabric.loggers.tensorboard
fabric.plugins: fabric.plugins.precision
fabric.collectives: fabric.plugins.collectives fabric.plugins.collectives.collective
fabric.collectives: fabric.plugins.collectives.single_device fabric.plugins.collectives.torch_collective
engine.cluster: fabric.plugins.environments fabric.plugins.environments.cluster_environment
engine.cluster: fabric.plugins.environments.kubeflow fabric.plugins.environments.lightning
engine.cluster: fabric.plugins.environments.lsf fabric.plugins.environments.mpi fabric.plugins.environments.slurm
engine.cluster: fabric.plugins.environments.torchelastic
engine.xla: fabric.plugins.environments fabric.plugins.environments.xla
storage.checkpoint_io: fabric.plugins.io fabric.plugins.io.checkpoint_io fabric.plugins.io.torch_io
engine.xla: fabric.plugins.io fabric.plugins.io.xla fabric.plugins.precision.xla
engine.precision: fabric.plugins.precision.amp fabric.plugins.precision.double fabric.plugins.precision.half
engine.precision: fabric.plugins.precision.precision
engine.bitsandbytes: fabric.plugins.precision.bitsandbytes  engine.deepspeed: fabric.plugins.precision.deepspeed
engine.dtensor: fabric.plugins.precision.fsdp
engine.transformer_engine: fabric.plugins.precision.transformer_engine
fabric.strategy: fabric.strategies.registry fabric.strategies.parallel fabric.strategies.single_device
fabric.strategy: fabric.strategies.strategy
fabric.ddp: fabric.strategies.ddp fabric.strategies.dp  fabric.deepspeed: fabric.strategies.deepspeed
fabric.sharded: fabric.strategies.fsdp fabric.strategies.model_parallel
fabric.xla: fabric.strategies.single_xla fabric.strategies.xla fabric.strategies.xla_fsdp
engine.launch: fabric.strategies.launchers  engine.script_launcher: fabric.strategies.launchers
engine.process_launcher: fabric.strategies.launchers
utilities.collections: fabric.utilities.apply_func fabric.utilities.data
utilities.modules: fabric.utilities.data  data.loaders: fabric.utilities.data
checkpoint.consolidate: fabric.utilities.consolidate_checkpoint
compat.loading: fabric.utilities.cloud_io  storage.filesystem: fabric.utilities.cloud_io
fabric.distributed: fabric.utilities.distributed
utilities.types: fabric.utilities.enums fabric.utilities.types
utilities.errors: fabric.utilities.exceptions fabric.utilities.warnings fabric.utilities.rank_zero
utilities.rank_zero: fabric.utilities.rank_zero  utilities.seed: fabric.utilities.seed
callbacks.monitors: fabric.utilities.spike
utilities.throughput: fabric.utilities.throughput  fabric.throughput: fabric.utilities.throughput

compat.flags: fabric.utilities.imports utilities.imports
compat.loading: fabric.utilities.load utilities.model_helpers
compat.logger_tools: fabric.utilities.logger loggers.utilities
compat.tools: fabric.utilities.data fabric.utilities.device_parser fabric.utilities.init fabric.utilities.optimizer
compat.tools: fabric.utilities.types loops.utilities overrides overrides.base overrides.distributed utilities.testing
compat.calls: trainer.call  loops.checks: trainer.configuration_validator  settings: trainer.setup utilities.argparse
compat.results: loops.optimization loops.optimization.automatic loops.optimization.closure loops.optimization.manual
compat.results: trainer.connectors.logger_connector.result
compat.private_names: trainer.connectors trainer.connectors.accelerator_connector
compat.private_names: trainer.connectors.callback_connector trainer.connectors.checkpoint_connector
compat.private_names: trainer.connectors.data_connector trainer.connectors.logger_connector
compat.private_names: trainer.connectors.logger_connector.fx_validator trainer.connectors.signal_connector
compat.private_names: trainer.connectors.logger_connector.logger_connector
loops.optimize: loops.optimization.automatic  loops.optimization_kinds: loops.optimization.manual
loops.progress: loops.loop  data.feed: loops.fetchers
compat.private_names: fabric.connector fabric.utilities.registry
engine.launch: fabric.strategies.launchers.launcher strategies.launchers.launcher
engine.process_launcher: fabric.strategies.launchers.multiprocessing strategies.launchers.multiprocessing
engine.script_launcher: fabric.strategies.launchers.subprocess_script strategies.launchers.subprocess_script
engine.xla: fabric.strategies.launchers.xla strategies.launchers.xla plugins.io.xla_plugin
fabric.wrappers: fabric.utilities.device_dtype_mixin  storage.async_io: plugins.io.wrapper
compat.migration: utilities.migration.migration  profilers.profiler: profilers.xla
"""


def _by_path() -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    home = ""
    for word in TABLE.split():
        if word.endswith(":"):
            home = f"fulmen.{word[:-1]}"
        else:
            table.setdefault(word, []).append(home)
    return table


PATHS = _by_path()
PRIVATE_NAMES = "fulmen.compat.private_names"  # is asked where a path does not have a name


class ViewModule(ModuleType):
    """A module without content of its own: its names are read and written in the modules it shows."""

    def __init__(self, name: str, homes: Sequence[str]) -> None:
        super().__init__(name, f"The names of {', '.join(homes)}.")
        written: dict[str, ModuleType] = {}  # where a name was, which may be taken away and put back
        vars(self).update(_homes=homes, _written=written)

    def _modules_with(self, name: str) -> Iterator[ModuleType]:
        written: dict[str, ModuleType] = vars(self)["_written"]
        homes = [written[name]] if name in written else (*self._home_modules(), importlib.import_module(PRIVATE_NAMES))
        return (module for module in homes if hasattr(module, name))

    def _home_modules(self) -> Iterator[ModuleType]:
        return map(importlib.import_module, self._homes)

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            public = (module.__all__ if hasattr(module, "__all__") else vars(module) for module in self._home_modules())
            return sorted({name for names in public for name in names if not name.startswith("_")})
        if not name.startswith("__"):  # the import system asks for several of those before anything should be imported
            # A path of the table goes before a module that one of the homes happens to import.
            below = f"{self.__name__}.{name}"
            if has_module(below):
                return importlib.import_module(below)
            for module in self._modules_with(name):
                return getattr(module, name)
        known = [] if name.startswith("__") else [known for known in dir(self) if not known.startswith("_")]
        raise missing_name(self, name, known, sys._getframe(1), f"; fulmen looked in {', '.join(self._homes)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__") or value is sys.modules.get(f"{self.__name__}.{name}"):
            super().__setattr__(name, value)
        else:
            setattr(self._home_of(name), name, value)

    def __delattr__(self, name: str) -> None:
        if name in vars(self):
            super().__delattr__(name)
        else:
            delattr(self._home_of(name), name)

    def _home_of(self, name: str) -> ModuleType:
        written: dict[str, ModuleType] = vars(self)["_written"]
        if name not in written:
            written[name] = next(self._modules_with(name), None) or next(self._home_modules())
        return written[name]

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *(name for module in self._home_modules() for name in dir(module))})


class DeepPaths(MetaPathFinder, Loader):
    """Serves `fulmen.` paths that are no files here. It is asked last, so a file always wins."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if not fullname.startswith("fulmen."):
            return None
        served = fullname.removeprefix("fulmen.").removesuffix(".__main__")
        if any(has_module(home) for home in PATHS.get(served, ())):
            return ModuleSpec(fullname, self, is_package=not fullname.endswith(".__main__"))
        error = missing_module(fullname, sys._getframe(2))
        # Finders that others have added since, as `six` does, may still know the module.
        after = sys.meta_path[sys.meta_path.index(self) + 1 :] if error and self in sys.meta_path else []
        found = any(finder.find_spec(fullname, path, target) for finder in after if hasattr(finder, "find_spec"))
        if error is not None and not found:
            raise error
        return None

    def get_code(self, fullname: str) -> CodeType:
        """For ``python -m``: the first of the homes is run."""
        home = PATHS[fullname.removeprefix("fulmen.").removesuffix(".__main__")][0]
        return compile(
            f"import runpy; runpy.run_module({home!r}, run_name='__main__', alter_sys=True)", fullname, "exec"
        )

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        homes = PATHS[spec.name.removeprefix("fulmen.")]
        return ViewModule(spec.name, [home for home in homes if has_module(home)])

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: a view has no code."""


def serve_deep_paths() -> None:
    """Makes the paths of the table importable; called when `fulmen` is imported, or reloaded."""
    if not any(isinstance(finder, DeepPaths) for finder in sys.meta_path):
        sys.meta_path.append(DeepPaths())
