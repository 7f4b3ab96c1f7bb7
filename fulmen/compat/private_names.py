"""Names of modules that are no part of the public API and that public code imports all the same, and where they are here.

`fulmen.compat.grades.GRADES` has them all, together with the private attributes of live objects. A view module asks
here last, so that each name is found under every path from which it is imported.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from fulmen.compat import flags

# A line is the module path under which a name is best known, where its objects live here, and the names. `-` means that
# the path shows them by itself, `old=new` that a name is another one here.
TABLE = """
accelerators  engine.xla  TPUAccelerator=XLAAccelerator
fabric.accelerators.cuda  compat.tools  num_cuda_devices is_cuda_available
fabric.accelerators.cuda  utilities.memory  _clear_cuda_memory=garbage_collection_cuda
fabric.accelerators.registry  engine.accelerators  _AcceleratorRegistry=Registry
fabric.connector  utilities.types  _PRECISION_INPUT=PrecisionInput _PRECISION_INPUT_STR=PrecisionName
fabric.connector  engine.resolve  _convert_precision_to_unified_args=parse_precision
fabric.connector  fabric.arguments  _is_using_cli=is_using_cli
fabric.loggers.logger  -  Logger rank_zero_experiment
fabric.loggers.logger  loggers.logger  _DummyExperiment=DummyExperiment
fabric.plugins.environments.lightning  engine.cluster  find_free_network_port=free_port
fabric.strategies.launchers.launcher  compat.tools  _Launcher
fabric.strategies.launchers.multiprocessing  engine.process_launcher  _MultiProcessingLauncher=ProcessLauncher
fabric.strategies.launchers.subprocess_script  engine.script_launcher  _SubprocessScriptLauncher=ScriptLauncher
fabric.strategies.registry  engine.accelerators  _StrategyRegistry=Registry
fabric.strategies.strategy  compat.tools  _BackwardSyncControl _Sharded
fabric.strategies.strategy  compat.loading  _apply_filter _validate_keys_for_strict_loading
fabric.strategies.strategy  engine.strategy  TBroadcast=T TReduce=T
fabric.strategies.fsdp  compat.loading  _is_full_checkpoint _is_sharded_checkpoint
fabric.utilities.cloud_io  compat.loading  get_filesystem _atomic_save _is_dir _is_local_file_protocol _is_object_storage _load
fabric.utilities.data  compat.tools  has_iterable_dataset has_len sized_len _auto_add_worker_init_fn _replace_dunder_methods _update_dataloader
fabric.utilities.data  data.loaders  _set_sampler_epoch=set_epoch
fabric.utilities.device_parser  compat.tools  _determine_root_gpu_device _parse_gpu_ids _select_auto_accelerator
fabric.utilities.distributed  compat.tools  _all_gather_ddp_if_available _sync_ddp_if_available
fabric.utilities.distributed  engine.collectives  _distributed_is_initialized=is_initialized _destroy_dist_connection=destroy_group
fabric.utilities.distributed  engine.collectives  _get_default_process_group_backend_for_device=backend_for
fabric.utilities.distributed  engine.launch  _set_num_threads_if_needed=divide_cpu_threads
fabric.utilities.distributed  fabric.distributed  _DatasetSamplerWrapper=SamplerOutput
fabric.utilities.distributed  utilities.modules  _is_dtensor=is_dtensor
fabric.utilities.init  compat.tools  _EmptyInit _has_meta_device_parameters_or_buffers _materialize_meta_tensors
fabric.utilities.load  compat.loading  _lazy_load _load_distributed_checkpoint _materialize_tensors _METADATA_FILENAME
fabric.utilities.load  compat.loading  _move_state_into _NotYetLoadedTensor
fabric.utilities.logger  compat.logger_tools  _add_prefix _convert_json_serializable _convert_params _flatten_dict
fabric.utilities.logger  compat.logger_tools  _is_json_serializable _sanitize_callable_params _sanitize_params
fabric.utilities.optimizer  compat.tools  _optimizer_to_device _optimizers_to_device
fabric.utilities.rank_zero  utilities.rank_zero  _get_rank=current_rank
fabric.utilities.registry  fabric.arguments  _load_external_callbacks=load_callbacks
fabric.utilities.seed  compat.tools  reset_seed
fabric.utilities.seed  utilities.seed  _collect_rng_states=generator_states _set_rng_states=set_generator_states
fabric.utilities.throughput  fabric.throughput  _plugin_to_compute_dtype=compute_dtype
fabric.utilities.types  compat.tools  CollectibleGroup Optimizable RedOpType ReduceOp Steppable _DEVICE _MAP_LOCATION_TYPE _PARAMETERS
fabric.utilities.types  utilities.types  _PATH _Stateful=Stateful
fabric.wrappers  fabric.wrappers  _unwrap_objects=unwrap_objects
core.mixins.hparams_mixin  hparams  _given_hyperparameters_context=given_hyperparameters
core.optimizer  -  LightningOptimizer
core.optimizer  compat.tools  do_nothing_closure
core.optimizer  optimizers  _MockOptimizer=NoOptimizer _configure_optimizers=read_optimizers
core.saving  checkpoint.load  _default_map_location=keep_available_device _load_from_checkpoint=load_from_checkpoint
loggers.logger  -  DummyLogger Logger rank_zero_experiment
loggers.utilities  compat.logger_tools  _log_hyperparams _scan_checkpoints _version
loops  compat.loops  _FitLoop=_FitLoop
loops  compat.loops  _EvaluationLoop=_EvaluationLoop
loops  compat.loops  _PredictionLoop=_PredictionLoop
loops.fetchers  data.feed  _DataFetcher=Feed _PrefetchDataFetcher=Feed _DataLoaderIterDataFetcher=IteratorFeed
loops.loop  loops.progress  _Loop=Loop
loops.optimization.automatic  loops.optimize  _AutomaticOptimization=AutomaticOptimization
loops.optimization.automatic  compat.results  Closure ClosureResult
loops.optimization.closure  compat.results  AbstractClosure OutputResult
loops.optimization.manual  loops.optimization_kinds  _ManualOptimization=ManualOptimization
loops.optimization.manual  compat.results  ManualResult
loops.progress  compat.trackers  _BaseProgress _BatchProgress _OptimizationProgress _OptimizerProgress _ProcessedTracker
loops.progress  compat.trackers  _Progress _ReadyCompletedTracker _SchedulerProgress _StartedTracker
loops.training_epoch_loop  compat.loops  _TrainingEpochLoop=_TrainingEpochLoop
loops.utilities  compat.tools  _block_parallel_sync_behavior
overrides.base  compat.tools  _LightningModuleWrapperBase
overrides.distributed  compat.tools  UnrepeatedDistributedSampler UnrepeatedDistributedSamplerWrapper
overrides.distributed  data.loaders  _IndexBatchSamplerWrapper=IndexRecorder
strategies.launchers  compat.tools  _Launcher
strategies.launchers  engine.process_launcher  _MultiProcessingLauncher=ProcessLauncher
strategies.launchers  engine.script_launcher  _SubprocessScriptLauncher=ScriptLauncher
trainer.call  compat.calls  _call_and_handle_interrupt _call_callback_hooks _call_callbacks_load_state_dict
trainer.call  compat.calls  _call_callbacks_on_load_checkpoint _call_callbacks_on_save_checkpoint _call_callbacks_state_dict
trainer.call  compat.calls  _call_configure_model _call_lightning_datamodule_hook _call_lightning_module_hook _call_setup_hook
trainer.call  compat.calls  _call_strategy_hook _call_teardown_hook _interrupt
trainer.configuration_validator  loops.checks  _verify_loop_configurations=check_configuration
trainer.connectors.accelerator_connector  compat.internals_trainer  _AcceleratorConnector=AcceleratorView
trainer.connectors.callback_connector  compat.internals_trainer  _CallbackConnector=CallbackView
trainer.connectors.checkpoint_connector  compat.internals_trainer  _CheckpointConnector=CheckpointView
trainer.connectors.data_connector  compat.internals_trainer  _DataConnector=DataView
trainer.connectors.logger_connector  compat.internals_trainer  _LoggerConnector=LoggerView
trainer.connectors.data_connector  data.sources  _DataLoaderSource=Source
trainer.connectors.logger_connector.result  compat.results  _METRICS _OUT_DICT _PBAR_DICT _ResultCollection _ResultMetric
trainer.connectors.signal_connector  compat.internals_trainer  _SignalConnector=SignalView
tuner.lr_finder  -  _LRFinder
utilities  utilities.console  cli_lightning_logo
utilities.argparse  settings  _defaults_from_env_vars=read_environment
utilities.compile  compat.tools  _maybe_unwrap_optimized
utilities.data  compat.tools  _is_dataloader_shuffled
utilities.migration.utils  checkpoint.lightning_format  _pl_migrate_checkpoint=migrate_checkpoint
utilities.model_helpers  compat.loading  get_torchvision_model
utilities.model_helpers  compat.tools  _ModuleMode
utilities.parameter_tying  utilities.modules  find_shared_parameters set_shared_parameters
utilities.parsing  utilities.arguments  get_init_args collect_init_args
utilities.types  torch.nn.parallel  DistributedDataParallel
utilities.types  utilities.types  _PATH
"""


class Place(NamedTuple):
    """Where an object is: a module, and its name there."""

    module: str
    name: str


def _read_table() -> dict[str, Place | None]:
    """The place of each name by its full path, None where the path shows it by itself."""
    found: dict[str, Place | None] = {}
    for path, home, *names in map(str.split, TABLE.strip().splitlines()):
        module = home if home.startswith("torch") else f"fulmen.{home}"
        for name in names:
            known, _, here = name.partition("=")
            found[f"{path}.{known}"] = None if home == "-" else Place(module, here or known)
    for name in flags.NAMES:
        found[f"utilities.imports.{name}"] = Place(flags.__name__, name)
    return found


PLACES = _read_table()
_BY_NAME = {path.rpartition(".")[2]: place for path, place in PLACES.items() if place is not None}


def __getattr__(name: str) -> Any:
    place = _BY_NAME.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    return getattr(importlib.import_module(place.module), place.name)


def __dir__() -> list[str]:
    return sorted(_BY_NAME)
