"""The table of module paths that exist in the API we follow but are other files here."""

from __future__ import annotations

# The API version that packages see when they ask for the version of "lightning".
API_VERSION = "2.6.6"

# Top-level names of the original packages, and the part of ours that answers for them.
ROOTS = {"lightning": "fulmen", "lightning.pytorch": "fulmen", "pytorch_lightning": "fulmen"}
ROOTS |= {"lightning.fabric": "fulmen.fabric", "lightning_fabric": "fulmen.fabric"}
DISTRIBUTIONS = ("lightning", "pytorch-lightning", "lightning-fabric")

# A module of ours, and the paths under which its names are known as well. A path that stands at several modules is
# looked up in their order.
_OURS = """
module: core core.module  datamodule: core core.datamodule  hooks: core.hooks  optimizers: core core.optimizer
hparams: core.mixins core.mixins.hparams_mixin core.saving utilities.parsing  checkpoint.load: core.saving
trainer: trainer.trainer  tuner: tuner.tuning  serve: serve.servable_module serve.servable_module_validator

callbacks.checkpointing: callbacks.checkpoint callbacks.model_checkpoint callbacks.on_exception_checkpoint
callbacks.monitors: callbacks.device_stats_monitor callbacks.lr_monitor callbacks.spike callbacks.throughput_monitor
    fabric.utilities.spike
callbacks.timing: callbacks.timer callbacks.gradient_accumulation_scheduler
callbacks.writing: callbacks.prediction_writer callbacks.lambda_function
callbacks.progress_bar: callbacks.progress callbacks.progress.progress_bar
callbacks.tqdm_bar: callbacks.progress callbacks.progress.tqdm_progress
callbacks.rich_bar: callbacks.progress callbacks.progress.rich_progress
callbacks.model_summary: callbacks.rich_model_summary
callbacks.averaging: callbacks.stochastic_weight_avg callbacks.weight_averaging
callbacks.lr_finder: tuner.lr_finder  callbacks.batch_size_finder: tuner.batch_size_scaling

demos.examples: demos.lstm demos.mnist_datamodule demos.transformer
loops.fit: loops.fit_loop loops.training_epoch_loop
loops.evaluate: loops.evaluation_loop  loops.predict: loops.prediction_loop
profilers.profiler: profilers.base  profilers.builtin: profilers.advanced profilers.simple profilers.base

data.combined: utilities.combined_loader  data.loaders: utilities.data
checkpoint.migrate: utilities.migration utilities.migration.utils utilities.upgrade_checkpoint
checkpoint.consolidate: utilities.consolidate_checkpoint fabric.utilities.consolidate_checkpoint
utilities.collections: utilities.data utilities.memory utilities.parsing fabric.utilities.apply_func
    fabric.utilities.data
utilities.errors: utilities.exceptions utilities.warnings fabric fabric.utilities.exceptions fabric.utilities.warnings
utilities.filesystem: fabric.utilities.cloud_io fabric.utilities.distributed
utilities.introspection: utilities.model_helpers utilities.signature_utils
utilities.modules: utilities.compile utilities.grads utilities.memory utilities.parameter_tying utilities.parsing
    fabric.utilities.data
utilities.model_summary: utilities.model_summary.model_summary  utilities.rank_zero: fabric.utilities.rank_zero
utilities.seed: fabric fabric.utilities.seed
utilities.throughput: fabric.utilities fabric.utilities.throughput  utilities: fabric.utilities
utilities.types: trainer.states utilities.enums fabric.utilities.types fabric.utilities.enums

fabric: fabric.fabric  engine.wrappers: fabric.wrappers  engine.deepspeed: utilities.deepspeed
plugins: plugins.precision fabric.plugins fabric.plugins.precision
strategies: fabric.strategies  accelerators: fabric.accelerators
"""

# Both faces use the same machine, so these paths exist once for the Trainer and once, below `fabric.`, for Fabric.
_MACHINE = """
engine.accelerators: accelerators.accelerator accelerators.cpu accelerators.cuda accelerators.mps
engine.checkpoint_io: plugins.io plugins.io.async_plugin plugins.io.checkpoint_plugin plugins.io.torch_plugin
    plugins.io.wrapper plugins.io.checkpoint_io plugins.io.torch_io
engine.cluster: plugins.environments plugins.environments.cluster_environment plugins.environments.kubeflow
    plugins.environments.lightning plugins.environments.lsf plugins.environments.mpi plugins.environments.slurm
    plugins.environments.torchelastic
engine.collectives: plugins.collectives plugins.collectives.collective plugins.collectives.single_device
    plugins.collectives.torch_collective
engine.precision: plugins.precision.amp plugins.precision.double plugins.precision.half plugins.precision.precision
engine.bitsandbytes: plugins.precision.bitsandbytes  engine.deepspeed: plugins.precision.deepspeed strategies.deepspeed
engine.transformer_engine: plugins.precision.transformer_engine  engine.sync_batchnorm: plugins.layer_sync
engine.ddp: strategies.ddp  engine.fsdp: strategies.fsdp plugins.precision.fsdp
engine.model_parallel: strategies.model_parallel  engine.resolve: strategies.registry
engine.strategy: strategies.strategy strategies.parallel strategies.single_device
engine.launch: strategies.launchers strategies.launchers.launcher strategies.launchers.multiprocessing
    strategies.launchers.subprocess_script
"""


def _by_path() -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    home = ""
    for text, prefixes in ((_OURS, [""]), (_MACHINE, ["", "fabric."])):
        for word in text.split():
            if word.endswith(":"):
                home = f"fulmen.{word[:-1]}"
            else:
                for prefix in prefixes:
                    table.setdefault(prefix + word, []).append(home)
    return table


PATHS = _by_path()

# Paths we do not have, and what to do instead. An entry covers everything below it.
ABSENT = {
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
    if "xla" in path.rpartition(".")[-1]:
        return "TPUs (XLA) are not supported. Use `accelerator='gpu'` or `'cpu'`."
    return next((advice for absent, advice in ABSENT.items() if f"{path}.".startswith(f"{absent}.")), None)
