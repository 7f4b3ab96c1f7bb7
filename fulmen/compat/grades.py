"""What is private in the API and used by programs and libraries all the same: which of it there is here, and how far."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

from fulmen.compat.private_names import PLACES
from fulmen.utilities.errors import suggest_name


class Grade(NamedTuple):
    """How far a private name is served.

    Attributes:
        grade: "full", "read-only" (what is written to it, or made of it, does not reach fulmen) or "absent".
        note: what is different, or the public way.
    """

    grade: str
    note: str = ""


# Objects that are only compared with here. A line is a reason and the names, which are those of `private_names.TABLE`.
COMPARED = {
    "for `isinstance`; made by strategies, from arguments of their own": """
        fabric.strategies.launchers.multiprocessing._MultiProcessingLauncher strategies.launchers._MultiProcessingLauncher
        fabric.strategies.launchers.subprocess_script._SubprocessScriptLauncher
        strategies.launchers._SubprocessScriptLauncher""",
    "for `isinstance`; made by the Trainer, from arguments of their own": """
        loops.fetchers._DataFetcher loops.fetchers._DataLoaderIterDataFetcher loops.fetchers._PrefetchDataFetcher
        loops.optimization.automatic._AutomaticOptimization loops.optimization.manual._ManualOptimization
        trainer.connectors.data_connector._DataLoaderSource trainer.connectors.logger_connector.result._ResultCollection
        trainer.connectors.logger_connector.result._ResultMetric""",
    "no tensor is one: those of `_lazy_load` read their file when they are used": """
        fabric.utilities.load._NotYetLoadedTensor""",
}  # fmt: skip

# Attributes of live objects, by the object.
FULL = {
    "trainer._accelerator_connector": "accelerator checkpoint_io cluster_environment is_distributed precision_plugin "
    "strategy use_distributed_sampler",
    "trainer._callback_connector": "trainer _attach_model_callbacks _attach_model_logging_functions _reorder_callbacks",
    "trainer._checkpoint_connector": "trainer dump_checkpoint hpc_save_path restore restore_model restore_training_state "
    "resume_end resume_start save_checkpoint _ckpt_path _get_lightning_module_state_dict _get_loops_state_dict "
    "_hpc_resume_path _loaded_checkpoint _parse_ckpt_path _restore_modules_and_callbacks _select_ckpt_path",
    "trainer._data_connector": "trainer attach_data attach_dataloaders attach_datamodule prepare_data _datahook_selector "
    "_predict_dataloader_source _test_dataloader_source _train_dataloader_source _val_dataloader_source",
    "trainer._logger_connector": "trainer callback_metrics log_metrics logged_metrics metrics progress_bar_metrics "
    "reset_metrics reset_results should_update_logs _callback_metrics _logged_metrics _progress_bar_metrics",
    "trainer._signal_connector": "trainer received_sigterm register_signal_handlers teardown",
    "trainer._results": "batch batch_size cpu dataloader_idx metrics reset",
    "trainer": "_active_loop _evaluation_loop",
    "trainer.fit_loop": "batch_idx done epoch_loop epoch_progress load_state_dict max_batches setup_data skip state_dict "
    "total_batch_idx _can_stop_early _combined_loader _data_source _results _should_accumulate _skip_backward",
    "trainer.fit_loop.epoch_loop": "automatic_optimization batch_idx batch_progress global_step manual_optimization "
    "max_steps min_steps reset total_batch_idx trainer update_lr_schedulers val_loop _accumulated_batches_reached "
    "_batches_that_stepped _is_training_done _num_ready_batches_reached _results _should_accumulate "
    "_should_check_val_epoch _should_check_val_fx",
    "trainer.fit_loop.epoch_loop.val_loop": "num_dataloaders setup_data skip _combined_loader _data_source "
    "_is_sequential _max_batches _results",
    "trainer.validate_loop": "num_dataloaders setup_data skip _combined_loader _data_source _is_sequential _max_batches "
    "_results",
    "trainer.test_loop": "num_dataloaders setup_data skip _combined_loader _data_source _is_sequential _max_batches "
    "_results",
    "trainer.predict_loop": "current_batch_indices epoch_batch_indices num_dataloaders setup_data skip _combined_loader "
    "_data_source _predictions",
    "trainer.strategy": "broadcast _lightning_module _launcher",
    "ModelCheckpoint": "_every_n_epochs _every_n_train_steps _get_metric_interpolated_filepath_name "
    "_last_checkpoint_saved _last_global_step_saved _monitor_candidates _remove_checkpoint _save_checkpoint "
    "_save_last_checkpoint _save_topk_checkpoint _should_save_on_train_epoch_end _should_skip_saving_checkpoint "
    "_train_time_interval",
    "LightningOptimizer": "_optimizer",
}
FOLLOWS = "follows from the position in the run"
READ_ONLY = {
    "trainer._accelerator_connector": {
        "_accelerator_flag _devices_flag _num_nodes_flag _parallel_devices _precision_flag _strategy_flag": (
            "what was chosen; change the arguments of the Trainer"
        ),
        "parallel_devices sync_batchnorm": "chosen by the arguments of the Trainer",
    },
    "trainer._checkpoint_connector": {"_user_managed": "whether `trainer.ckpt_path` was set"},
    "trainer._results": {"result_metrics": "the entries of the logbook", "valid_items": "the entries of the logbook"},
    "trainer.fit_loop": {
        "restarting _iteration_based_training": FOLLOWS, "_data_fetcher": "the feed of batches",
    },
    "trainer.fit_loop.epoch_loop": {
        "done restarting scheduler_progress _is_validation_done": FOLLOWS, "state_dict": "`load_state_dict` of `fit_loop`",
    },
    "trainer.fit_loop.epoch_loop.val_loop": {"batch_progress restarting": "counts the batches of the whole run"},
    "trainer.validate_loop": {"batch_progress restarting": "counts the batches of the whole run"},
    "trainer.test_loop": {"batch_progress restarting": "counts the batches of the whole run"},
    "trainer.predict_loop": {"restarting": "a run of `predict` is never resumed"},
}  # fmt: skip

HOOKS_INSTEAD = "write a hook of the module or a callback for what is to happen there"
ABSENT = {
    "trainer._fit_impl": "`trainer.fit`", "trainer._predict_impl": "`trainer.predict`",
    "trainer._test_impl": "`trainer.test`", "trainer._validate_impl": "`trainer.validate`",
    "trainer._run_sanity_check": "`trainer.validate`", "trainer._run_stage": "`trainer.fit_loop.run`",
    "trainer._teardown": "it is a part of each run",
    "trainer._checkpoint_connector.restore_callbacks": "`restore_model` restores them",
    "trainer._checkpoint_connector.restore_datamodule": "`restore_model` restores it",
    "trainer._checkpoint_connector.restore_loops": "`restore_training_state` restores them",
    "trainer._checkpoint_connector.restore_lr_schedulers": "`restore_training_state` restores them",
    "trainer._checkpoint_connector.restore_optimizers": "`restore_training_state` restores them",
    "trainer._checkpoint_connector.restore_optimizers_and_schedulers": "`restore_training_state` restores them",
    "trainer._checkpoint_connector.restore_precision_plugin_state": "`restore_training_state` restores it",
    "trainer._data_connector._prepare_dataloader": "loaders are adapted when a run asks for them",
    "trainer._data_connector._resolve_sampler": "`Trainer(use_distributed_sampler=...)`",
    "trainer._logger_connector._first_loop_iter": "`batch_idx == 0`",
    "trainer.fit_loop.advance": HOOKS_INSTEAD, "trainer.fit_loop.on_advance_end": HOOKS_INSTEAD,
    "trainer.fit_loop.on_advance_start": HOOKS_INSTEAD, "trainer.fit_loop.on_run_end": HOOKS_INSTEAD,
    "trainer.fit_loop.on_run_start": HOOKS_INSTEAD,
    "trainer.fit_loop.epoch_loop.advance": HOOKS_INSTEAD, "trainer.fit_loop.epoch_loop.on_advance_end": HOOKS_INSTEAD,
    "trainer.fit_loop.epoch_loop.on_run_start": HOOKS_INSTEAD, "trainer.fit_loop.epoch_loop.run": HOOKS_INSTEAD,
    "trainer.validate_loop._evaluation_step": HOOKS_INSTEAD, "trainer.predict_loop._predict_step": HOOKS_INSTEAD,
}  # fmt: skip


def _collect_grades() -> dict[str, Grade]:
    grades = dict.fromkeys(PLACES, Grade("full"))
    for note, names in COMPARED.items():
        grades |= dict.fromkeys(names.split(), Grade("read-only", note))
    for owner, known in FULL.items():
        grades |= {f"{owner}.{name}": Grade("full") for name in known.split()}
    for owner, notes in READ_ONLY.items():
        grades |= {
            f"{owner}.{name}": Grade("read-only", note) for names, note in notes.items() for name in names.split()
        }
    connectors = [owner for owner in FULL if owner.startswith("trainer._")]
    grades |= dict.fromkeys(connectors, Grade("full", "another object put there is shown, and not asked by runs"))
    return {**grades, **{name: Grade("absent", note) for name, note in ABSENT.items()}}


GRADES: dict[str, Grade] = _collect_grades()


def refuse_private(owner: str, name: str) -> NoReturn:
    """Raises the AttributeError for a private attribute that is not served, with the public way where one is known."""
    known = GRADES.get(f"{owner}.{name}")
    if known is not None:
        raise AttributeError(f"`{owner}.{name}` is private, and not there in fulmen. Instead: {known.note}.", name=name)
    near = suggest_name(name, [path.rpartition(".")[2] for path in GRADES if path.startswith(f"{owner}.")])
    raise AttributeError(f"`{owner}` has no attribute {name!r} in fulmen.{near}", name=name)
