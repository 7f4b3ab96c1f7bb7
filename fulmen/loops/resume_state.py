"""Mid-epoch resume state of the fit loop: what is saved beside weights, optimizers and counters, and how it is restored.

Each process has a state of its own: random generators, the position of its loaders, what it has logged in this epoch, the
states of metrics, and the gradients of an open accumulation window. All of it is plain types and tensors.

A checkpoint written in a hook of a batch, before its step, repeats that batch: `Position.IN_BATCH`. If its backward has
begun inside a window, or gradients cannot be read because the strategy shards them, the window's batches are repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fulmen.checkpoint.elastic import locate_in_epoch, reshard_rank_states
from fulmen.checkpoint.lightning_format import LOG_STEP_PENDING, api_counters
from fulmen.loggers.logger import Logger
from fulmen.loops.progress import Position
from fulmen.metrics.reduce import reduce_epoch_metrics, report_train_epoch
from fulmen.metrics.torchmetrics_state import is_metric, load_metric_state, merge_metric_states, metric_state
from fulmen.optimizers import unwrap_optimizer
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.modules import group_names, module_flags, set_module_flags
from fulmen.utilities.rank_zero import rank_zero_warn
from fulmen.utilities.seed import generator_states, same_states, set_generator_states

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from fulmen.data.combined import CombinedLoader
    from fulmen.data.feed import Feed
    from fulmen.loops.fit import FitLoop

_BETWEEN_EPOCHS = (Position.EPOCH_START, Position.EPOCH_END)


class ResumeStateCollector:
    """What the next checkpoint needs to continue inside an epoch; `state_dict` collects it."""

    def __init__(self, loop: FitLoop) -> None:
        self.loop = loop
        self.trainer = loop.trainer
        self._starts: list[dict[str, Any]] = []  # flags and parameter groups when the run started, by the script
        self._forget_checkpoint()

    def _forget_checkpoint(self) -> None:
        """As without a checkpoint."""
        self.pending = False  # is there a checkpoint whose epoch was not entered yet?
        self.loaded: dict[str, Any] = {}  # what it holds, written by `state_dict` of this version or an older one
        self.rank_state: dict[str, Any] = {}  # the part of `loaded` for this process
        self.before_validation: dict[str, Any] | None = None  # what validation changes, as of before

    def saved_progress(self) -> dict[str, Any]:
        """The counters as a file holds them: a batch that was finished counts in full."""
        loop = self.loop
        progress = loop.progress.state_dict()
        stepped = loop.optimization.stepped
        if progress["position"] in LOG_STEP_PENDING and stepped:
            progress["log_step"] += 1
        if repeated := self._batches_to_repeat():
            progress["position"] = Position.IN_BATCH.value
            progress["batch"] -= repeated
            progress["batches"] -= repeated
        return {
            **progress,
            "stepped": stepped,
            "automatic": self.trainer.lightning_module.automatic_optimization,
            "val_batches": sum(loop.val_loop.batches_seen.values()),
        }

    def api_counters(self) -> Any:
        """What the API's loops count, made from the counters of the loop when it is asked for."""
        loop = self.loop
        loaded = self.trainer.lightning_module is not None
        saved = self.saved_progress() if loaded else loop.progress.state_dict()
        return api_counters(saved, loop.progress.steps, loop.val_loop)

    def saved_loader_states(self) -> list[dict[str, Any]]:
        """The states of training loaders that have one of their own."""
        loaders = self.loop.loaders
        return [] if loaders is None else loaders.state_dict(self._batches_given())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of all processes, which call this together."""
        loop = self.loop
        trainer = self.trainer
        now = self._values_of_validation()
        validating = loop.progress.position == Position.VALIDATING
        early = self.before_validation if self.before_validation and validating else now
        ranks = trainer.strategy.exchange_objects(self._own_state(early))
        flags = self._module_flags()
        return {
            "generators": ranks[0].pop("generators"),
            "ranks": ranks,
            "logging_due": self._logging_due(),
            "validated": early["seen"],
            "schedulers": loop.schedulers.state(trainer.optimizers),
            "loggers": early["loggers"],
            "should_stop": trainer.should_stop,
            "in_eval": sorted(path.rpartition(".")[0] for path, on in flags.items() if _is_mode(path) and not on),
            "flags": self._values_to_keep("flags", flags),
            "groups": self._values_to_keep("groups", self._parameter_groups()),
            "optimizers": [_class_name(optimizer) for optimizer in trainer.optimizers],
        }

    def _own_state(self, early: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds of this process; `early` is what may be older than now."""
        loop = self.loop
        book = self.trainer.book
        repeated = self._batches_to_repeat()
        state: dict[str, Any] = {
            "generators": early["generators"],
            "val": early["val"],
            "metrics": self._metric_states(early["updates"]),
            "book": book.state_dict(),
            "window": None if repeated or loop.loaders is None else self._open_window(),
        }
        buffers = self.trainer.strategy.buffers
        if buffers is not None and (own := buffers.own_state()) is not None:
            state["buffers"] = own
        if loop.loaders is not None and loop.feed is not None:
            running = loop.progress.position == Position.IN_BATCH and book.batch is not None
            ahead = loop.feed.batches_prefetched + repeated + running
            state["train"] = loop.loaders.pass_state(self._batches_given() - repeated, self._is_inside_epoch(), ahead)
        if self.pending and "train" in self.rank_state:  # nothing was read yet
            state["train"] = self.rank_state["train"]
        return state

    def begin_run(self) -> None:
        """Training begins with what the script says now: what differs from it later is for checkpoints to keep."""
        self._starts.clear()
        self._note_start()

    def _note_start(self) -> None:
        self._starts.append({"flags": self._module_flags(), "groups": self._parameter_groups()})

    def _values_to_keep(self, kind: str, now: dict[Any, Any]) -> dict[Any, Any]:
        """What the run has changed, or the one that it resumes; of all else a resumed run has what its script says."""
        before = self.loaded.get(kind, {})
        starts = [start[kind] for start in self._starts]
        return {k: v for k, v in now.items() if k in before or any(start.get(k, v) != v for start in starts)}

    def note_validation(self) -> None:
        """A checkpoint written while validating has what that changes as of before, and validates again."""
        self.before_validation = self._values_of_validation()

    def _values_of_validation(self) -> dict[str, Any]:
        """What validation changes, as of now."""
        val_loop = self.loop.val_loop
        return {
            "generators": generator_states(),
            "val": val_loop.loader_position(),
            "updates": {name: metric._update_count for name, metric in self._all_metrics()},
            "seen": dict(val_loop.batches_seen),
            "loggers": [log.state_dict() if isinstance(log, Logger) else None for log in self.trainer.loggers],
        }

    def _logging_due(self) -> bool:
        """Is the row of the last batch still to be written?"""
        book = self.trainer.book
        if self.pending:
            return bool(self.loaded.get("logging_due"))
        inside = self.loop.progress.position == Position.BATCH_DONE and book.batch is not None
        return inside and (book.logging_due or self.trainer.should_stop)

    def _batches_given(self) -> int:
        """How many batches the feed gave for the steps that are finished."""
        progress = self.loop.progress
        feed = self.loop.feed
        return (
            progress.batch
            if feed is None
            else feed.batches_consumed(progress.batch, progress.position == Position.IN_BATCH)
        )

    def _batches_to_repeat(self) -> int:
        """How many batches before this one have to be done again, because their gradients cannot be stored."""
        held = self._batches_in_window()
        if not held:
            return 0
        strategy = self.trainer.strategy
        progress = self.loop.progress
        begun = progress.position == Position.IN_BATCH and self.loop.optimization.has_begun_backward(progress.batch)
        hidden = strategy.defers_gradient_reduction or strategy.handles_gradient_accumulation
        plain = all(p.grad is None or type(p.grad) is Tensor for p in self.trainer.lightning_module.parameters())
        return held if begun or hidden or not plain else 0

    def _batches_in_window(self) -> int:
        """Batches of the open accumulation window, the one that runs not counted."""
        progress = self.loop.progress
        over = self._is_last_batch_done() or progress.position in _BETWEEN_EPOCHS
        if over or not self.trainer.lightning_module.automatic_optimization:
            return 0
        return progress.batch % self.trainer.accumulate_grad_batches

    def _is_inside_epoch(self) -> bool:
        """Is the iterator of an epoch open, with something left in it?"""
        progress = self.loop.progress
        feed = self.loop.feed
        if progress.position in _BETWEEN_EPOCHS:
            opened = feed is not None and feed.opened_epoch == 0
            return progress.position == Position.EPOCH_START and progress.epochs == 0 and opened
        return not self._is_last_batch_done()

    def _is_last_batch_done(self) -> bool:
        """Was the last batch of the epoch finished?"""
        progress = self.loop.progress
        return progress.is_last_batch and progress.position != Position.IN_BATCH

    def _open_window(self) -> dict[str, Any] | None:
        """The gradients that wait for a step, by parameter, and what their windows know, by optimizer."""
        module = self.trainer.lightning_module
        optimization = self.loop.optimization
        if module.automatic_optimization and not self._batches_in_window():
            return None
        groups = (group for optimizer in optimization.waiting_optimizers() for group in optimizer.param_groups)
        waiting = {id(parameter) for group in groups for parameter in group["params"]}
        found = {name: p.grad for name, p in module.named_parameters() if id(p) in waiting}
        gradients = {name: gradient.detach().cpu() for name, gradient in found.items() if gradient is not None}
        return {"gradients": gradients, "windows": optimization.window_states()} if gradients else None

    def _module_flags(self) -> dict[str, Any]:
        """The flags of the module, without what is switched for a while only."""
        module = self.trainer.lightning_module
        in_eval = self.loop.val_loop.frozen
        flags = module_flags(module)
        if in_eval is not None:  # all modules are in eval mode just now, these stay so
            flags |= {path: path.rpartition(".")[0] not in in_eval for path in flags if _is_mode(path)}
        toggled = {id(parameter): on for parameter, on in module._requires_grad_before_toggle.items()}
        return flags | {
            f"{name}.requires_grad": toggled[id(p)] for name, p in module.named_parameters() if id(p) in toggled
        }

    def _parameter_groups(self) -> dict[int, Any]:
        """The names of the parameters in each group of each optimizer."""
        trainer = self.trainer
        return {i: group_names(trainer.lightning_module, each) for i, each in enumerate(trainer.optimizers)}

    def _all_metrics(self) -> list[tuple[str, Any]]:
        return [(name, part) for name, part in self.trainer.lightning_module.named_modules() if is_metric(part)]

    def _metric_states(self, updates: Mapping[str, int]) -> dict[str, Any]:
        """The states of metrics that have seen something, but not of those only used by a validation that is running."""
        found = [(name, part) for name, part in self._all_metrics() if part._update_count and updates.get(name, 0)]
        return {name: metric_state(part) for name, part in found}


class ResumeState(ResumeStateCollector):
    """Takes over what `state_dict` collected, and restores it in three moments of the fit loop, once each per run.

    They are `open_loaders`, `before_train_start` and `enter_epoch`. In a run that starts anew they do nothing.
    """

    def _forget_checkpoint(self) -> None:
        super()._forget_checkpoint()
        self.loader_states: list[dict[str, Any]] | None = None  # of loaders that have a state of their own
        self.generators: dict[str, Any] | None = None
        self.stepped = True  # did the last batch end with an optimizer step?
        self.ended_epoch: bool | None = None  # with its last batch? None if not written in `on_train_epoch_end`
        self._epoch_was_reported = False
        self._rewound: dict[str, Any] = {}  # generators before the iterators of a new epoch were made ...
        self._opened: dict[str, Any] = {}  # ... and after it

    # ------------------------------------------------------------------ loading, before training

    def load_state_dict(
        self, progress: dict[str, Any], state: dict[str, Any], loader_states: list[dict[str, Any]] | None = None
    ) -> None:
        """Takes over a checkpoint. Counters are restored at once, the rest in three moments of the fit loop.

        Arguments:
            progress: what `saved_progress` gave, or the same read from the counters of the API.
            state: what `state_dict` gave; empty in files of other frameworks.
            loader_states: what `saved_loader_states` gave.
        """
        counters = self.loop.progress
        counters.load_state_dict(progress)
        self._forget_checkpoint()
        self.pending = True
        self.loaded = {**state, "progress": progress}
        self.loader_states = loader_states
        self.generators = state.get("generators")
        self.stepped = bool(progress.get("stepped", True))
        self._take_rank_state()
        for logger, logged in zip(self.trainer.loggers, state.get("loggers", [])):
            if logged is not None and isinstance(logger, Logger):
                logger.resume_from(logged, counters.log_step)
        if counters.position in LOG_STEP_PENDING and self.stepped:
            counters.log_step -= 1  # the file counts it, `finish_batch` will again
        if counters.position == Position.EPOCH_END:  # that epoch counts
            self.ended_epoch = counters.is_last_batch
            counters.finish_epoch()
            counters.open_epoch()

    def _take_rank_state(self) -> None:
        """Finds the part of this process; with another number of processes, what it takes over from them."""
        ranks = self.loaded.get("ranks", [])
        if not ranks:
            return
        rank = self.trainer.global_rank
        world_size = self.trainer.world_size
        if rank > 0:
            self.generators = ranks[rank]["generators"] if rank < len(ranks) else None
        self.rank_state = ranks[rank] if len(ranks) == world_size else reshard_rank_states(ranks, rank, world_size)

    def restore_flags(self) -> None:
        """What the run that is resumed had changed on the module beside its weights."""
        module = self.trainer.lightning_module
        flags = self.loaded.get("flags")
        if flags is None and "in_eval" in self.loaded:  # a file of an earlier version
            in_eval = self.loaded["in_eval"]
            modes = filter(_is_mode, module_flags(module))
            flags = {path: path.rpartition(".")[0] not in in_eval for path in modes}
        set_module_flags(module, flags or {})

    def restore_groups(self, states: list[dict[str, Any]]) -> None:
        """Lets parameter groups have the members they had, if the run had changed that; their options come with `states`."""
        trainer = self.trainer
        parameters = dict(trainer.lightning_module.named_parameters())
        for index, (saved, optimizer) in enumerate(zip(self.loaded.get("optimizers", []), trainer.optimizers)):
            now = _class_name(optimizer)
            if saved != now:
                what = f"The checkpoint has the state of a `{saved}`, and `configure_optimizers` returned a `{now}`:"
                states[index], taken_over = _convert_optimizer_state(states[index], optimizer)
                rank_zero_warn(f"{what} {taken_over}. Fit without `ckpt_path` to begin anew.")
        for index, names in self.loaded.get("groups", {}).items():
            known = names is not None and all(name in parameters for group in names for name in group)
            if known and index < len(trainer.optimizers):
                options = states[index]["param_groups"]
                groups = [{**group, "params": [parameters[n] for n in own]} for group, own in zip(options, names)]
                trainer.optimizers[index].param_groups[:] = groups

    # ------------------------------------------------------------------ the first moment

    def is_mid_epoch(self) -> bool:
        """Will the run continue inside an epoch?"""
        return self.pending and self.loop.progress.position not in _BETWEEN_EPOCHS

    def open_loaders(self) -> None:
        """The loaders and schedulers exist: opens the feed at its place, restores what was logged, ends a finished epoch."""
        if not self.pending:
            return
        loop = self.loop
        if loop.loaders is not None:
            assert loop.feed is not None
            self._open_feed(loop.feed, loop.loaders)
            loop.note_loading()
        self._restore_schedulers()
        self._finish_epoch()
        # What was logged shall be there to read if nothing is left to do.
        self._restore_logged()
        self._rewind_generators()
        if loop.progress.position == Position.EPOCH_START:
            self._restore_should_stop()

    def _open_feed(self, feed: Feed, loaders: CombinedLoader) -> None:
        """The training loaders continue at their place, if that is inside of an epoch."""
        progress = self.loop.progress
        if feed.opened_epoch is not None:
            feed.close_loaders()
        saved = self._saved_position()
        begun = progress.position != Position.EPOCH_START
        over = begun and self._is_last_batch_done()
        if saved is not None:
            loaders.load_pass_state(saved)
        elif begun and (self.loader_states or not over):
            self._open_without_position(loaders)
        if over:
            feed.mark_exhausted()
        elif begun or (saved is not None and saved["inside"]):
            feed.first_batch_idx = progress.batch if saved is None else saved["done"]
            feed.open_iterators(progress.epochs)
        else:
            self._rewind_generators()
            self._rewound = generator_states()
            feed.open_iterators(progress.epochs)
            self._opened = generator_states()

    def _saved_position(self) -> dict[str, Any] | None:
        """Where the checkpoint has the training loaders, for the processes and the data of this run."""
        saved = self.rank_state.get("train")
        if saved is not None and saved["inside"]:
            saved = self.rank_state["train"] = self._locate_position(saved)
        return saved

    def _locate_position(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The position of the loaders if this run has one for it, else the end of the epoch.

        Raises:
            MisconfigurationException: with the numbers, unless `strict_resume=False` continues with the next epoch.
        """
        trainer = self.trainer
        progress = self.loop.progress
        before = len(self.loaded["ranks"])
        place, misfit = locate_in_epoch(saved, self.loop.loaders, before, trainer.world_size, self.loop.num_batches)
        if misfit is None and place["done"] != saved["done"] and self.rank_state["window"] is not None:
            misfit = f"{before} processes have accumulated gradients that {trainer.world_size} would not step on at the same sample"
        if misfit is None:
            progress.batch += place["done"] - saved["done"]
            return place
        what = f"The checkpoint was written inside epoch {progress.epochs}, and cannot be continued there: {misfit}."
        if trainer.strict_resume:
            fix = "Resume with what it was saved with, or use `Trainer(strict_resume=False)` to begin the next epoch."
            raise MisconfigurationException(f"{what} {fix}")
        rank_zero_warn(f"{what} The rest of that epoch is left out (`strict_resume=False`).")
        progress.log_step += progress.position in LOG_STEP_PENDING and self.stepped
        if progress.position != Position.EPOCH_START:
            progress.finish_epoch()
        progress.open_epoch()
        book = {**self.rank_state["book"], "entries": []}
        self.rank_state = {**self.rank_state, "window": None, "book": book, "metrics": {}}
        return {**saved, "inside": False, "readings": {}}

    def _open_without_position(self, loaders: CombinedLoader) -> None:
        """The file is from elsewhere: it says how many batches were done, and not in which order."""
        progress = self.loop.progress
        if self.loader_states:
            loaders.load_state_dict(self.loader_states)
            return
        unknown = {"at": 0, "opened": None, "first": None}
        loaders.load_pass_state(
            {"done": progress.batch, "readings": dict.fromkeys(range(len(loaders.flattened)), unknown)}
        )
        what = f"Resuming in the middle of epoch {progress.epochs}, after batch {progress.batch}, from a file that does"
        why = "not say how the order of samples was drawn: it continues exactly only where nothing is shuffled."
        rank_zero_warn(f"{what} {why}")

    def _restore_schedulers(self) -> None:
        """Which optimizers the schedulers wait for."""
        loop = self.loop
        loop.schedulers.load_state(self.loaded.get("schedulers"), self.trainer.optimizers, loop.progress.steps)

    def _finish_epoch(self) -> None:
        """What comes after `on_train_epoch_end`, inside of which the checkpoint was written."""
        if self.ended_epoch is None or not self.rank_state:
            return
        book = self.trainer.book
        self._restore_logged()
        self._epoch_was_reported = True
        book.scope.close_epoch()
        if book.distributed:
            reduce_epoch_metrics(self.trainer)
        with self.loop.progress.as_of_last_epoch():
            report_train_epoch(self.loop, self.ended_epoch)
        self._restore_should_stop()

    def _restore_logged(self) -> None:
        """The flags of the module, what was logged, the states of metrics, and what schedulers wait for."""
        trainer = self.trainer
        state = self.rank_state
        if not state:
            return
        self.restore_flags()
        if self._epoch_was_reported:
            return
        if state.get("buffers") is not None and trainer.strategy.buffers is not None:
            trainer.strategy.buffers.load_own_state(state["buffers"])
        trainer.book.load_state_dict(state["book"], trainer.strategy.root_device)
        metrics = dict(self._all_metrics())
        for name, saved in state["metrics"].items():
            if name in metrics:
                saved = merge_metric_states(metrics[name], saved) if isinstance(saved, list) else saved
                load_metric_state(metrics[name], saved)
        self._restore_schedulers()

    def _restore_should_stop(self) -> None:
        """`EarlyStopping` had decided. Whoever else asked the run to stop wants it to continue now."""
        trainer = self.trainer
        stopped = [callback.still_stops(trainer.callback_metrics) for callback in trainer.early_stopping_callbacks]
        trainer.should_stop = trainer.should_stop or bool(self.loaded.get("should_stop") and any(stopped))

    def _rewind_generators(self) -> None:
        """Every generator of the run as it was."""
        if self.generators is not None:
            set_generator_states(self.generators)

    # ------------------------------------------------------------------ the second and the third moment

    def before_train_start(self) -> None:
        """After the sanity check and all that is bound once: validation loaders, and again what these may have changed."""
        if self.pending:
            self.loop.val_loop.load_state(self.loaded.get("validated", {}), self.rank_state.get("val"))
            self._restore_all()

    def _restore_all(self) -> None:
        self._restore_window()
        self._restore_logged()
        self._rewind_generators()

    def _restore_window(self) -> None:
        """The gradients that wait for a step."""
        window = self.rank_state.get("window") or {"gradients": {}, "windows": []}
        self.loop.optimization.load_window_states(self.stepped, window["windows"])
        parameters = dict(self.trainer.lightning_module.named_parameters())
        for name, gradient in window["gradients"].items():
            if name in parameters:
                parameters[name].grad = gradient.to(parameters[name].device, copy=True)

    def enter_epoch(self) -> bool:
        """An epoch opens: continues it where the checkpoint was written. False if there is nothing to continue."""
        if len(self._starts) == 1:  # what `on_train_start` changed counts as the script's
            self._note_start()
        if not self.pending:
            return False
        self._restore_all()  # `on_train_start` is no part of a run that was not stopped
        if self.loop.progress.position == Position.EPOCH_START:
            self.loop.start_epoch()
            self._reopen_feed()
            self.pending = False
        else:
            self.pending = False
            self._continue_epoch()
        return True

    def _reopen_feed(self) -> None:
        """After `on_train_epoch_start`: are the iterators those that would be made now?"""
        loaders = self.loop.loaders
        feed = self.loop.feed
        assert loaders is not None and feed is not None
        if not self._opened or self.generators is None:
            return
        if same_states(generator_states(), self._rewound):
            set_generator_states(self._opened)
            return
        feed.close_loaders()
        if (saved := self.rank_state.get("train")) is not None:
            loaders.load_pass_state(saved)
        feed.open_iterators(self.loop.progress.epochs)

    def _continue_epoch(self) -> None:
        """Does what was left of the last batch, by the position the checkpoint was written at."""
        loop = self.loop
        progress = loop.progress
        position = progress.position
        self._restore_schedulers()
        self._restore_should_stop()
        if position != Position.IN_BATCH:
            progress.position = Position.BATCH_DONE
            if self.stepped and self.loaded.get("logging_due"):
                self.trainer.report(self.trainer.book.step_metrics(), step=progress.log_step, with_epoch=True)
            if position == Position.VALIDATED:
                loop.validation.note_done()
            elif position == Position.VALIDATING or loop.validation.is_due():
                loop.validate()
            loop.finish_batch()
        if loop.stopping.ends_epoch():
            assert loop.feed is not None
            loop.feed.mark_exhausted()


# ---------------------------------------------------------------------- plain functions


def _is_mode(path: str) -> bool:
    """Is a flag of a module its `training`?"""
    return path == "training" or path.endswith(".training")


def _convert_optimizer_state(state: dict[str, Any], optimizer: Optimizer) -> tuple[dict[str, Any], str]:
    """The state of an optimizer of another class as `optimizer` can use it, and what is said of that.

    Torch puts the options of the file in the place of the optimizer's own, whole: an option that only one class has would
    be missing in the first step, and so would its averages.
    """
    own = optimizer.defaults
    groups = state["param_groups"]
    if all(own.keys() <= group.keys() for group in groups):
        return state, "it takes over options and averages"
    kept = {*own, "params", "initial_lr", "name"}
    shared = [{**own, **{name: value for name, value in group.items() if name in kept}} for group in groups]
    return {
        "state": {},
        "param_groups": shared,
    }, "it takes over the options that both have, and its averages start anew"


def _class_name(optimizer: Optimizer) -> str:
    return type(unwrap_optimizer(optimizer)).__name__
