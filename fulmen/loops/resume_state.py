"""Going on inside an epoch: what a checkpoint holds for it beside weights, optimizers and counters, and putting it back.

Each process has a part of its own: random generators, the place of its loaders, what it has logged in this epoch, the
states of metrics, and the gradients of an accumulation window that is open. They are plain types and tensors.

What is written in a hook of a batch, before its step, repeats that batch: `Position.IN_BATCH`. If its backward has begun
inside a window, or gradients cannot be read because the strategy spreads them, the batches of the window are repeated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fulmen.checkpoint.elastic import locate_in_epoch, reshard_rank_states
from fulmen.checkpoint.lightning_format import LOG_STEP_PENDING
from fulmen.loggers.logger import Logger
from fulmen.loops.progress import Position
from fulmen.metrics.reduce import reduce_epoch_metrics, report_train_epoch
from fulmen.metrics.torchmetrics_state import is_metric, load_metric_state, merge_metric_states, metric_state
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.modules import group_names, module_flags, set_module_flags
from fulmen.utilities.rank_zero import rank_zero_warn
from fulmen.utilities.seed import generator_states, same_states, set_generator_states

if TYPE_CHECKING:
    from fulmen.loops.fit import FitLoop

_BETWEEN = (Position.EPOCH_START, Position.EPOCH_END)
_WINDOW = ("held", "divisor", "total", "expected", "batches", "partial", "weighted")


class Memory:
    """What the next checkpoint is told of the story, and what the one that the run came from knows of it.

    Arguments:
        content: what `chapter` wrote, in this version or an older one.
        loader_states: of loaders that have a state of their own.
    """

    def __init__(self, loop: FitLoop, content: dict[str, Any] | None = None, loader_states: Any = None) -> None:
        self.loop, self.content, self.loader_states = loop, content or {}, loader_states
        self.mine: dict[str, Any] = {}  # the part of this process
        self.generators: Any = self.content.get("generators")
        self.stepped = bool(self.content.get("progress", {}).get("stepped", True))
        self.epoch_ended: bool | None = None  # with its last batch? None if not in `on_train_epoch_end`
        self.restored = False  # is what was logged a thing of the past?
        self.rewound: Any = None  # the generators when the iterators of a new epoch were made, and after it
        self.opened: Any = None
        self.early: dict[str, Any] | None = None  # what validation changes, as of before
        self.starts: list[dict[str, Any]] = []  # of the run

    # ------------------------------------------------------------------ saving

    def chapter(self) -> dict[str, Any]:
        """What a checkpoint holds of all processes, which call this together."""
        loop, trainer, train = self.loop, self.loop.trainer, self.loop.loaders
        now = self._now()
        early = self.early if self.early and loop.progress.position == Position.VALIDATING else now
        back = self.batches_to_repeat()
        mine: dict[str, Any] = {
            "generators": early["generators"],
            "val": early["val"],
            "metrics": _metrics(loop, early["updates"]),
            "book": trainer.book.state_dict(),
            "window": None if back or train is None else _window(loop),
        }
        if trainer.strategy.buffers is not None and (own := trainer.strategy.buffers.own_state()) is not None:
            mine["buffers"] = own
        if train is not None and loop.feed is not None:
            running = loop.progress.position == Position.IN_BATCH and trainer.book.batch is not None
            mine["train"] = train.pass_state(
                self.batches_given() - back, _inside(loop), loop.feed.batches_prefetched + back + running
            )
        if loop.resumed and "train" in self.mine:  # nothing was read yet
            mine["train"] = self.mine["train"]
        ranks = trainer.strategy.exchange_objects(mine)
        schedulers, flags = getattr(loop, "schedulers", None), _flags(loop)
        return {
            "generators": ranks[0].pop("generators"),
            "ranks": ranks,
            "logging_due": self._logging_due(),
            "validated": early["seen"],
            "schedulers": None if schedulers is None else schedulers.state(trainer.optimizers),
            "loggers": early["loggers"],
            "should_stop": trainer.should_stop,
            "in_eval": sorted(path.rpartition(".")[0] for path, on in flags.items() if _is_mode(path) and not on),
            "flags": self._changed("flags", flags),
            "groups": self._changed("groups", _groups(loop)),
            "optimizers": [_name(optimizer) for optimizer in trainer.optimizers],
        }

    def note_start(self) -> None:
        """The run begins with what the script says now: what differs from it later is for checkpoints to keep."""
        self.starts.append({"flags": _flags(self.loop), "groups": _groups(self.loop)})

    def _changed(self, kind: str, now: dict[Any, Any]) -> dict[Any, Any]:
        """What the run has changed, or the one that it resumes; of all else a resumed run has what its script says."""
        before = self.content.get(kind, {})
        starts = [start[kind] for start in self.starts]
        return {k: v for k, v in now.items() if k in before or any(start.get(k, v) != v for start in starts)}

    def note_validation(self) -> None:
        """A checkpoint written while validating has what that changes as of before, and validates again."""
        self.early = self._now()

    def _now(self) -> dict[str, Any]:
        loop, val = self.loop, self.loop.val_loop.loaders
        return {
            "generators": generator_states(),
            "val": None if val is None else val.pass_state(0, inside=False),
            "updates": {name: metric._update_count for name, metric in _all_metrics(loop)},
            "seen": dict(loop.val_loop.batches_seen),
            "loggers": [log.state_dict() if isinstance(log, Logger) else None for log in loop.trainer.loggers],
        }

    def _logging_due(self) -> bool:
        """Is the row of the last batch still to be written?"""
        loop, book = self.loop, self.loop.trainer.book
        if loop.resumed:
            return bool(self.content.get("logging_due"))
        inside = loop.progress.position == Position.BATCH_DONE and book.batch is not None
        return inside and (book.logging_due or loop.trainer.should_stop)

    def batches_given(self) -> int:
        """How many batches the feed gave for the steps that are finished."""
        progress, feed = self.loop.progress, self.loop.feed
        return (
            progress.batch
            if feed is None
            else feed.batches_consumed(progress.batch, progress.position == Position.IN_BATCH)
        )

    def batches_to_repeat(self) -> int:
        """How many batches before this one have to be done again, because their gradients cannot be stored."""
        loop, held = self.loop, _in_window(self.loop)
        if not held:
            return 0
        begun = loop.progress.position == Position.IN_BATCH and any(
            turn.window.held and turn.window.expected == turn.batches_left(loop.progress.batch) for turn in _turns(loop)
        )
        strategy = loop.trainer.strategy
        hidden = strategy.defers_gradient_reduction or strategy.handles_gradient_accumulation
        plain = all(p.grad is None or type(p.grad) is Tensor for p in loop.trainer.lightning_module.parameters())
        return held if begun or hidden or not plain else 0

    # ------------------------------------------------------------------ resuming

    def put_back_flags(self) -> None:
        """What the run that is resumed had changed on the module beside its weights."""
        module = self.loop.trainer.lightning_module
        flags = self.content.get("flags")
        if flags is None and "in_eval" in self.content:  # a file of an earlier version
            modes, in_eval = filter(_is_mode, module_flags(module)), self.content["in_eval"]
            flags = {path: path.rpartition(".")[0] not in in_eval for path in modes}
        set_module_flags(module, flags or {})

    def put_back_groups(self, states: list[dict[str, Any]]) -> None:
        """Lets parameter groups have the members they had, if the run had changed that; their options come with `states`."""
        trainer = self.loop.trainer
        parameters = dict(trainer.lightning_module.named_parameters())
        for saved, now in zip(self.content.get("optimizers", []), map(_name, trainer.optimizers)):
            if saved != now:
                what = f"The checkpoint has the state of a `{saved}`, and `configure_optimizers` returned a `{now}`:"
                rank_zero_warn(f"{what} it takes over what both have. Fit without `ckpt_path` to begin anew.")
        for index, names in self.content.get("groups", {}).items():
            known = names is not None and all(name in parameters for group in names for name in group)
            if known and index < len(trainer.optimizers):
                options = states[index]["param_groups"]
                groups = [{**group, "params": [parameters[n] for n in own]} for group, own in zip(options, names)]
                trainer.optimizers[index].param_groups[:] = groups

    def begin(self) -> None:
        """Finds the part of this process, and tells the loggers how much of what they have is from before."""
        trainer, ranks = self.loop.trainer, self.content.get("ranks", [])
        rank = trainer.global_rank
        if ranks and rank > 0:
            self.generators = ranks[rank]["generators"] if rank < len(ranks) else None
        if ranks:
            alike = len(ranks) == trainer.world_size
            self.mine = ranks[rank] if alike else reshard_rank_states(ranks, rank, trainer.world_size)
        for logger, state in zip(trainer.loggers, self.content.get("loggers", [])):
            if state is not None and isinstance(logger, Logger):
                logger.resume_from(state, self.loop.progress.log_step)

    def rewind(self) -> None:
        """Every generator of the run as it was."""
        if self.generators is not None:
            set_generator_states(self.generators)

    def open_feed(self) -> None:
        """The training loaders go on at their place, if that is inside of an epoch."""
        loop, progress, kept = self.loop, self.loop.progress, self.mine.get("train")
        assert loop.loaders is not None and loop.feed is not None
        if loop.feed.opened_epoch is not None:
            loop.feed.close_loaders()
        if kept is not None and kept["inside"]:
            kept = self.mine["train"] = self._placed(kept)
        begun, inside = progress.position != Position.EPOCH_START, kept is not None and kept["inside"]
        over = begun and progress.is_last_batch and progress.position != Position.IN_BATCH
        if kept is not None:
            loop.loaders.load_pass_state(kept)
        elif begun and (self.loader_states or not over):
            self._go_on_without(loop.loaders)
        if over:
            loop.feed.mark_exhausted()
        elif inside or begun:
            loop.feed.first_batch_idx = progress.batch if kept is None else kept["done"]
            loop.feed.open_iterators(progress.epochs)
        else:
            self.rewind()
            self.rewound = generator_states()
            loop.feed.open_iterators(progress.epochs)
            self.opened = generator_states()

    def settle_feed(self) -> None:
        """After `on_train_epoch_start`: are the iterators those that would be made now?"""
        loop = self.loop
        assert loop.loaders is not None and loop.feed is not None
        if self.opened is None or self.generators is None:
            return
        if same_states(generator_states(), self.rewound):
            set_generator_states(self.opened)
            return
        loop.feed.close_loaders()
        if (kept := self.mine.get("train")) is not None:
            loop.loaders.load_pass_state(kept)
        loop.feed.open_iterators(loop.progress.epochs)

    def _placed(self, kept: dict[str, Any]) -> dict[str, Any]:
        """The place of the loaders if this run has one for it, else the end of the epoch.

        Raises:
            MisconfigurationException: with the numbers, unless `strict_resume=False` goes on with the next epoch.
        """
        loop, trainer, progress = self.loop, self.loop.trainer, self.loop.progress
        before, world = len(self.content["ranks"]), trainer.world_size
        place, misfit = locate_in_epoch(kept, loop.loaders, before, world, loop.num_batches)
        if misfit is None and place["done"] != kept["done"] and self.mine["window"] is not None:
            misfit = f"{before} processes have accumulated gradients that {world} would not step on at the same sample"
        if misfit is None:
            progress.batch += place["done"] - kept["done"]
            return place
        what = f"The checkpoint was written inside epoch {progress.epochs}, and cannot be continued there: {misfit}."
        if trainer.strict_resume:
            fix = "Resume with what it was saved with, or use `Trainer(strict_resume=False)` to begin the next epoch."
            raise MisconfigurationException(f"{what} {fix}")
        rank_zero_warn(f"{what} The rest of that epoch is left out (`strict_resume=False`).")
        progress.log_step += progress.position in LOG_STEP_PENDING and self.stepped
        progress.epochs += progress.position != Position.EPOCH_START
        progress.open_epoch()
        progress.position = Position.EPOCH_START
        self.mine = {**self.mine, "window": None, "book": {**self.mine["book"], "entries": []}, "metrics": {}}
        return {**kept, "inside": False, "readings": {}}

    def _go_on_without(self, loaders: Any) -> None:
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

    def restore(self) -> None:
        """What was logged, metrics, gradients, and what schedulers wait for."""
        loop, trainer, mine = self.loop, self.loop.trainer, self.mine
        if not mine:
            return
        self.put_back_flags()
        if hasattr(loop, "optimization"):
            loop.optimization.stepped = self.stepped
            if mine["window"] is not None:
                _load_window(loop, mine["window"])
        if self.restored:
            return
        if mine.get("buffers") is not None and trainer.strategy.buffers is not None:
            trainer.strategy.buffers.load_own_state(mine["buffers"])
        trainer.book.load_state_dict(mine["book"], trainer.strategy.root_device)
        parts = dict(_all_metrics(loop))
        for name, state in mine["metrics"].items():
            if name in parts:
                state = merge_metric_states(parts[name], state) if isinstance(state, list) else state
                load_metric_state(parts[name], state)
        loop.schedulers.load_state(self.content["schedulers"], trainer.optimizers, loop.progress.steps)

    def stop_if_told(self) -> None:
        """`EarlyStopping` had decided. Whoever else asked the run to stop wants it to go on now."""
        trainer = self.loop.trainer
        stopped = [callback.still_stops(trainer.callback_metrics) for callback in trainer.early_stopping_callbacks]
        trainer.should_stop = trainer.should_stop or bool(self.content.get("should_stop") and any(stopped))

    def restore_validation(self) -> None:
        """After the sanity check: the validation loaders, and how many batches were validated."""
        val = self.loop.val_loop
        val.batches_seen.update(self.content.get("validated", {}))
        kept = self.mine.get("val")
        if kept is not None and val.loaders is not None:
            if val.feed is not None:
                val.feed.close_loaders()
            val.loaders.load_pass_state(kept)

    def finish_epoch(self) -> None:
        """What comes after `on_train_epoch_end`, inside of which the checkpoint was written."""
        loop, whole, self.epoch_ended = self.loop, self.epoch_ended, None
        if whole is None or not self.mine:
            return
        self.restore()
        self.restored = True
        loop.trainer.book.scope.close_epoch()
        if loop.trainer.book.distributed:
            reduce_epoch_metrics(loop.trainer)
        loop.progress.epochs -= 1
        report_train_epoch(loop, whole)
        loop.progress.epochs += 1
        self.stop_if_told()


# ---------------------------------------------------------------------- plain functions


def _inside(loop: FitLoop) -> bool:
    """Is the iterator of an epoch open, with something left in it?"""
    progress, position = loop.progress, loop.progress.position
    if position in _BETWEEN:
        opened = loop.feed is not None and loop.feed.opened_epoch == 0
        return position == Position.EPOCH_START and progress.epochs == 0 and opened
    return not progress.is_last_batch or position == Position.IN_BATCH


def _is_mode(path: str) -> bool:
    return path == "training" or path.endswith(".training")


def _flags(loop: FitLoop) -> dict[str, Any]:
    """The flags of the module, without what is switched for a while only."""
    module = loop.trainer.lightning_module
    flags, frozen = module_flags(module), loop.val_loop.frozen
    if frozen is not None:  # all modules are in eval mode just now, these stay so
        flags |= {path: path.rpartition(".")[0] not in frozen for path in flags if _is_mode(path)}
    toggled = {id(parameter): on for parameter, on in module._requires_grad_before_toggle.items()}
    return flags | {
        f"{name}.requires_grad": toggled[id(p)] for name, p in module.named_parameters() if id(p) in toggled
    }


def _name(optimizer: Any) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def _groups(loop: FitLoop) -> dict[int, Any]:
    module = loop.trainer.lightning_module
    return {index: group_names(module, optimizer) for index, optimizer in enumerate(loop.trainer.optimizers)}


def _all_metrics(loop: FitLoop) -> list[tuple[str, Any]]:
    return [(name, part) for name, part in loop.trainer.lightning_module.named_modules() if is_metric(part)]


def _metrics(loop: FitLoop, updates: dict[str, int]) -> dict[str, Any]:
    """The states of metrics that have seen something, but not of those that only a validation cut short has used."""
    found = [(name, part) for name, part in _all_metrics(loop) if part._update_count and updates.get(name, 0)]
    return {name: metric_state(part) for name, part in found}


def _turns(loop: FitLoop) -> list[Any]:
    optimization = getattr(loop, "optimization", None)
    return [] if optimization is None else getattr(optimization, "turns", [optimization])


def _in_window(loop: FitLoop) -> int:
    """Batches of the open window, the one that runs not counted."""
    progress = loop.progress
    over = progress.position in _BETWEEN or (progress.is_last_batch and progress.position != Position.IN_BATCH)
    manual = not loop.trainer.lightning_module.automatic_optimization
    return 0 if over or manual else progress.batch % loop.trainer.accumulate_grad_batches


def _window(loop: FitLoop) -> dict[str, Any] | None:
    """The gradients that wait for a step, and what their windows know; by optimizer."""
    module, turns, optimization = loop.trainer.lightning_module, _turns(loop), getattr(loop, "optimization", None)
    if module.automatic_optimization:
        turns = turns if _in_window(loop) else []
        found = [turn.optimizer for turn in turns if turn.window_open or turn.window.held]
    else:  # the user's own windows
        found = optimization.waiting() if optimization else []
        turns = []
    wanted = {id(p) for optimizer in found for group in optimizer.param_groups for p in group["params"]}
    grads = {n: p.grad.detach().cpu() for n, p in module.named_parameters() if id(p) in wanted and p.grad is not None}
    return {"gradients": grads, "windows": [_of(turn) for turn in turns]} if grads else None


def _of(turn: Any) -> dict[str, Any]:
    state = {name: getattr(turn.window, name) for name in _WINDOW if hasattr(turn.window, name)}
    return {"open": turn.window_open or bool(turn.window.held), **state}


def _load_window(loop: FitLoop, kept: dict[str, Any]) -> None:
    for name, parameter in loop.trainer.lightning_module.named_parameters():
        if (grad := kept["gradients"].get(name)) is not None:
            parameter.grad = grad.to(parameter.device, copy=True)
    for turn, state in zip(_turns(loop), kept["windows"]):
        turn.window_open = state["open"]
        for name in _WINDOW:
            if name in state:
                setattr(turn.window, name, state[name])
