"""The table of module paths that exist in the API we follow but are other files here."""

from __future__ import annotations

# The API version that packages see when they ask for the version of "lightning".
API_VERSION = "2.6.6"

# Top-level names of the original packages, and the part of ours that answers for them.
ROOTS = {
    "lightning": "fulmen",
    "lightning.pytorch": "fulmen",
    "lightning.fabric": "fulmen.fabric",
    "pytorch_lightning": "fulmen",
    "lightning_fabric": "fulmen.fabric",
}
DISTRIBUTIONS = ("lightning", "pytorch-lightning", "lightning-fabric")

# Our module: the paths below `fulmen.` under which its names are known as well. A path that stands in several rows is
# looked up in their order.
_ENGINE = {
    "accelerators": "accelerators.accelerator accelerators.cpu accelerators.cuda accelerators.mps",
    "checkpoint_io": "plugins.io plugins.io.async_plugin plugins.io.checkpoint_plugin plugins.io.torch_plugin "
    "plugins.io.wrapper plugins.io.checkpoint_io plugins.io.torch_io",
    "cluster": "plugins.environments plugins.environments.cluster_environment plugins.environments.kubeflow "
    "plugins.environments.lightning plugins.environments.lsf plugins.environments.mpi plugins.environments.slurm "
    "plugins.environments.torchelastic",
    "collectives": "plugins.collectives plugins.collectives.collective plugins.collectives.single_device "
    "plugins.collectives.torch_collective",
    "precision": "plugins.precision.amp plugins.precision.double plugins.precision.half plugins.precision.precision",
    "bitsandbytes": "plugins.precision.bitsandbytes",
    "deepspeed": "plugins.precision.deepspeed strategies.deepspeed",
    "transformer_engine": "plugins.precision.transformer_engine",
    "sync_batchnorm": "plugins.layer_sync",
    "ddp": "strategies.ddp",
    "fsdp": "strategies.fsdp plugins.precision.fsdp",
    "model_parallel": "strategies.model_parallel",
    "strategy": "strategies.strategy strategies.parallel strategies.single_device",
    "resolve": "strategies.registry",
    "launch": "strategies.launchers strategies.launchers.launcher strategies.launchers.multiprocessing "
    "strategies.launchers.subprocess_script",
}
_FULMEN = {
    "fulmen.module": "core core.module",
    "fulmen.datamodule": "core core.datamodule",
    "fulmen.hooks": "core.hooks",
    "fulmen.hparams": "core.mixins core.mixins.hparams_mixin core.saving utilities.parsing",
    "fulmen.optimizers": "core core.optimizer",
    "fulmen.checkpoint.load": "core.saving",
    "fulmen.trainer": "trainer.trainer",
    "fulmen.utilities.types": "trainer.states utilities.enums fabric.utilities.types fabric.utilities.enums",
    "fulmen.callbacks.checkpointing": "callbacks.checkpoint callbacks.model_checkpoint "
    "callbacks.on_exception_checkpoint",
    "fulmen.callbacks.monitors": "callbacks.device_stats_monitor callbacks.lr_monitor callbacks.spike "
    "callbacks.throughput_monitor",
    "fulmen.callbacks.timing": "callbacks.timer callbacks.gradient_accumulation_scheduler",
    "fulmen.callbacks.writing": "callbacks.prediction_writer callbacks.lambda_function",
    "fulmen.callbacks.progress_bar": "callbacks.progress callbacks.progress.progress_bar",
    "fulmen.callbacks.tqdm_bar": "callbacks.progress callbacks.progress.tqdm_progress",
    "fulmen.callbacks.rich_bar": "callbacks.progress callbacks.progress.rich_progress",
    "fulmen.callbacks.model_summary": "callbacks.rich_model_summary",
    "fulmen.callbacks.averaging": "callbacks.stochastic_weight_avg callbacks.weight_averaging",
    "fulmen.callbacks.lr_finder": "tuner.lr_finder",
    "fulmen.callbacks.batch_size_finder": "tuner.batch_size_scaling",
    "fulmen.tuner": "tuner.tuning",
    "fulmen.demos.examples": "demos.lstm demos.mnist_datamodule demos.transformer",
    "fulmen.loops.fit": "loops.fit_loop loops.training_epoch_loop",
    "fulmen.loops.evaluate": "loops.evaluation_loop",
    "fulmen.loops.predict": "loops.prediction_loop",
    "fulmen.profilers.profiler": "profilers.base",
    "fulmen.profilers.builtin": "profilers.advanced profilers.simple profilers.base",
    "fulmen.serve": "serve.servable_module serve.servable_module_validator",
    "fulmen.data.combined": "utilities.combined_loader",
    "fulmen.data.loaders": "utilities.data",
    "fulmen.checkpoint.migrate": "utilities.migration utilities.migration.utils utilities.upgrade_checkpoint",
    "fulmen.checkpoint.consolidate": "utilities.consolidate_checkpoint fabric.utilities.consolidate_checkpoint",
    "fulmen.engine.deepspeed": "utilities.deepspeed",
    "fulmen.utilities.collections": "utilities.data utilities.memory utilities.parsing fabric.utilities.apply_func "
    "fabric.utilities.data",
    "fulmen.utilities.errors": "utilities.exceptions utilities.warnings fabric fabric.utilities.exceptions "
    "fabric.utilities.warnings",
    "fulmen.utilities.filesystem": "fabric.utilities.cloud_io fabric.utilities.distributed",
    "fulmen.utilities.introspection": "utilities.model_helpers utilities.signature_utils",
    "fulmen.utilities.modules": "utilities.compile utilities.grads utilities.memory utilities.parameter_tying "
    "utilities.parsing fabric.utilities.data",
    "fulmen.utilities.model_summary": "utilities.model_summary.model_summary",
    "fulmen.utilities.rank_zero": "fabric.utilities.rank_zero",
    "fulmen.utilities.seed": "fabric fabric.utilities.seed",
    "fulmen.utilities.throughput": "fabric.utilities fabric.utilities.throughput",
    "fulmen.utilities": "fabric.utilities",
    "fulmen.fabric": "fabric.fabric",
    "fulmen.engine.wrappers": "fabric.wrappers",
    "fulmen.engine.collectives": "fabric.plugins.collectives",
    "fulmen.plugins": "plugins.precision fabric.plugins fabric.plugins.precision",
    "fulmen.strategies": "fabric.strategies",
    "fulmen.accelerators": "fabric.accelerators",
}


def _by_path() -> dict[str, tuple[str, ...]]:
    table: dict[str, tuple[str, ...]] = {}
    rows = [(home, path) for home, paths in _FULMEN.items() for path in paths.split()]
    for name, paths in _ENGINE.items():
        # Both faces use the same machine, so its paths exist once for the Trainer and once for Fabric.
        rows += [(f"fulmen.engine.{name}", prefix + path) for path in paths.split() for prefix in ("", "fabric.")]
    for home, path in rows:
        table[path] = (*table.get(path, ()), home)
    return table


PATHS = _by_path()

# Paths we do not have, and what to do instead. An entry covers everything below it.
_NO_XLA = "TPUs (XLA) are not supported. Use `accelerator='gpu'` or `'cpu'`."
ABSENT = {
    **{
        path: _NO_XLA
        for base in ("", "fabric.")
        for path in (f"{base}accelerators.xla", f"{base}strategies.xla", f"{base}strategies.single_xla")
    },
    **{f"plugins.{path}": _NO_XLA for path in ("environments.xla", "io.xla_plugin", "precision.xla")},
    **{f"fabric.plugins.{path}": _NO_XLA for path in ("environments.xla", "io.xla", "precision.xla")},
    "fabric.strategies.xla_fsdp": _NO_XLA,
    "profilers.xla": _NO_XLA,
    "strategies.launchers.xla": _NO_XLA,
    "fabric.strategies.launchers.xla": _NO_XLA,
    "fabric.strategies.dp": "Use `strategy='ddp'`, which is faster than one process with threads.",
    "loggers.litlogger": "Loggers of hosted services of its vendor are left out. Use any other logger.",
    "loggers.neptune": "Neptune left this API. Use any other logger.",
    "utilities.model_registry": "Download the checkpoint and give its path as `ckpt_path`.",
    "trainer.connectors": "Read the public properties of `Trainer` instead.",
    "trainer.call": "Hooks are called by the loops. Call the method itself.",
    "overrides": "The wrapped model is `trainer.strategy.model`.",
    "utilities.imports": "Use `importlib.metadata.version`.",
    "utilities.testing": "Use `pytest.mark.skipif`.",
    "_graveyard": "These names were removed long ago.",
}


def absent_advice(path: str) -> str | None:
    """What to do without the module ``path``, if it is one that was left out on purpose."""
    parts = path.split(".")
    return next((ABSENT[key] for n in range(len(parts), 0, -1) if (key := ".".join(parts[:n])) in ABSENT), None)
