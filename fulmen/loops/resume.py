"""Going on inside an epoch: what a checkpoint holds for it beside weights, optimizers and counters, and putting it back.

Each process has a part of its own: random generators, the place of its loaders, what it has logged in this epoch, the
states of metrics, and the gradients of an accumulation window that is open. They are plain types and tensors.

What is written in a hook of a batch, before its step, repeats that batch: `Position.IN_BATCH`. If its backward has begun
inside a window, or gradients cannot be read because the strategy spreads them, the batches of the window are repeated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fulmen.logbook import is_metric, load_metric_state, metric_state
from fulmen.loops.exact import combine
from fulmen.loops.progress import Position
from fulmen.utilities.seed import generator_states, set_generator_states

if TYPE_CHECKING:
    from fulmen.loops.fit import FitLoop

_BETWEEN = (Position.EPOCH_START, Position.EPOCH_END)
_WINDOW = ("held", "divisor", "total", "expected", "batches", "partial", "weighted")


# ---------------------------------------------------------------------- saving


def chapter(loop: FitLoop) -> dict[str, Any]:
    """What a checkpoint holds of all processes, which call this together."""
    trainer, position = loop.trainer, loop.progress.position
    early = loop.before_validation if position == Position.VALIDATING else None
    early = early or before_validation(loop)
    train = loop.loaders
    back = batches_to_repeat(loop)
    mine: dict[str, Any] = {
        "generators": early["generators"],
        "val": early["val"],
        "metrics": _metrics(loop, early["updates"]),
        "book": trainer.book.state(),
        "window": None if back or train is None else _window(loop),
    }
    if train is not None and loop.feed is not None:
        mine["train"] = train.position(loop.batches_given() - back, loop.inside())
    ranks = trainer.strategy.exchange_objects(mine)
    schedulers = getattr(loop, "schedulers", None)
    return {
        "generators": ranks[0].pop("generators"),
        "ranks": ranks,
        "logging_due": trainer.book.batch is not None and (trainer.book.logging_due or trainer.should_stop),
        "validated": early["seen"],
        "schedulers": None if schedulers is None else schedulers.state(trainer.optimizers),
        "loggers": early["loggers"],
        "should_stop": trainer.should_stop,
    }


def before_validation(loop: FitLoop) -> dict[str, Any]:
    """What validation changes. A checkpoint written while validating has it as of before, and validates again."""
    trainer, val = loop.trainer, loop.val_loop.loaders
    return {
        "generators": generator_states(),
        "val": None if val is None else val.position(0, inside=False),
        "updates": {name: metric._update_count for name, metric in _all_metrics(loop)},
        "seen": dict(loop.val_loop.batches_seen),
        "loggers": [logger.position() if hasattr(logger, "position") else None for logger in trainer.loggers],
    }


def _all_metrics(loop: FitLoop) -> list[tuple[str, Any]]:
    return [(name, part) for name, part in loop.trainer.lightning_module.named_modules() if is_metric(part)]


def _metrics(loop: FitLoop, updates: dict[str, int]) -> dict[str, Any]:
    """The states of metrics that have seen something, but not of those that only a validation cut short has used."""
    return {
        name: metric_state(part) for name, part in _all_metrics(loop) if part._update_count and updates.get(name, 0)
    }


def _turns(loop: FitLoop) -> list[Any]:
    optimization = getattr(loop, "optimization", None)
    return [] if optimization is None else getattr(optimization, "turns", [optimization])


def _in_window(loop: FitLoop) -> int:
    """Batches of the open window, the one that runs not counted."""
    progress = loop.progress
    over = progress.position in _BETWEEN or (progress.is_last_batch and progress.position != Position.IN_BATCH)
    manual = not loop.trainer.lightning_module.automatic_optimization
    return 0 if over or manual else progress.batch % loop.trainer.accumulate_grad_batches


def batches_to_repeat(loop: FitLoop) -> int:
    """How many batches before this one have to be done again, because their gradients cannot be stored."""
    held, strategy = _in_window(loop), loop.trainer.strategy
    if not held:
        return 0
    begun = loop.progress.position == Position.IN_BATCH and any(
        turn.window.held and turn.window.expected == turn.batches_left(loop.progress.batch) for turn in _turns(loop)
    )
    hidden = strategy.gradients_arrive_late or strategy.handles_gradient_accumulation
    plain = all(p.grad is None or type(p.grad) is Tensor for p in loop.trainer.lightning_module.parameters())
    return held if begun or hidden or not plain else 0


def _window(loop: FitLoop) -> dict[str, Any] | None:
    """The gradients that wait for a step, and what their windows know; by optimizer."""
    module, turns = loop.trainer.lightning_module, _turns(loop)
    if module.automatic_optimization:
        turns = turns if _in_window(loop) else []
        found = [turn.optimizer for turn in turns if turn.window_open or turn.window.held]
    else:
        found = loop.optimization.waiting() if turns and loop.progress.position not in _BETWEEN else []
    wanted = {id(p) for optimizer in found for group in optimizer.param_groups for p in group["params"]}
    grads = {n: p.grad.detach().cpu() for n, p in module.named_parameters() if id(p) in wanted and p.grad is not None}
    if not grads:
        return None
    windows = [] if not module.automatic_optimization else [_of(turn) for turn in turns]
    return {"gradients": grads, "windows": windows}


def _of(turn: Any) -> dict[str, Any]:
    state = {name: getattr(turn.window, name) for name in _WINDOW if hasattr(turn.window, name)}
    return {"open": turn.window_open or bool(turn.window.held), **state}


# ---------------------------------------------------------------------- resuming


class Past:
    """What a checkpoint knows of the story so far; without one, nothing.

    Arguments:
        content: what `chapter` wrote, in this version or an older one.
        loader_states: of loaders that have a state of their own.
    """

    def __init__(self, content: dict[str, Any] | None = None, loader_states: Any = None) -> None:
        self.content, self.loader_states = content or {}, loader_states
        self.mine: dict[str, Any] = {}  # the part of this process
        self.generators: Any = self.content.get("generators")
        self.stepped = bool(self.content.get("progress", {}).get("stepped", True))
        self.epoch_ended: bool | None = None  # with its last batch? None if not in `on_train_epoch_end`
        self.placed = False  # do the training loaders go on inside the epoch?

    def begin(self, loop: FitLoop) -> None:
        """Finds the part of this process, and tells the loggers how much of what they have is from before."""
        trainer, ranks = loop.trainer, self.content.get("ranks", [])
        rank = trainer.global_rank
        if ranks and rank > 0:
            self.generators = ranks[rank]["generators"] if rank < len(ranks) else None
        if len(ranks) == trainer.world_size:
            self.mine = ranks[rank]
        for logger, position in zip(trainer.loggers, self.content.get("loggers", [])):
            if position is not None and hasattr(logger, "go_on"):
                logger.go_on(position)

    def rewind(self) -> None:
        """Every generator of the run as it was."""
        if self.generators is not None:
            set_generator_states(self.generators)

    def place_loaders(self, loop: FitLoop) -> bool:
        """Lets the training loaders go on at their place; is the iterator to be opened at once?"""
        assert loop.loaders is not None
        kept, progress = self.mine.get("train"), loop.progress
        if kept is not None:
            loop.loaders.go_on(kept)
        if self.loader_states and progress.position != Position.EPOCH_START:
            loop.loaders.load_state_dict(self.loader_states)
            self.placed = True
        self.placed = self.placed or (kept is not None and kept["inside"])
        return self.placed

    def given(self, loop: FitLoop) -> int:
        """How many batches the loaders gave in this epoch."""
        return (self.mine.get("train") or {}).get("done", loop.progress.batch)

    def restore(self, loop: FitLoop) -> None:
        """What was logged, metrics, gradients, and what schedulers wait for."""
        trainer, mine = loop.trainer, self.mine
        if not mine:
            return
        trainer.book.load_state(mine["book"], trainer.strategy.root_device)
        parts = dict(_all_metrics(loop))
        for name, state in mine["metrics"].items():
            if name in parts:
                load_metric_state(parts[name], state)
        if hasattr(loop, "schedulers") and self.content["schedulers"] is not None:
            loop.schedulers.load_state(self.content["schedulers"], trainer.optimizers)
        if mine["window"] is not None and hasattr(loop, "optimization"):
            _load_window(loop, mine["window"])
        stopped = any(callback.stopping_reason.value for callback in trainer.early_stopping_callbacks)
        trainer.should_stop = trainer.should_stop or (self.content["should_stop"] and stopped)

    def restore_validation(self, loop: FitLoop) -> None:
        """After the sanity check: the validation loaders, and how many batches were validated."""
        loop.val_loop.batches_seen.update(self.content.get("validated", {}))
        kept = self.mine.get("val")
        if kept is not None and loop.val_loop.loaders is not None:
            if loop.val_loop.feed is not None:
                loop.val_loop.feed.close()
            loop.val_loop.loaders.go_on(kept)

    def finish_epoch(self, loop: FitLoop) -> None:
        """What comes after `on_train_epoch_end`, inside of which the checkpoint was written."""
        whole, self.epoch_ended = self.epoch_ended, None
        if whole is None or not self.mine:
            return
        self.restore(loop)
        loop.trainer.book.page.epoch_over = True  # type: ignore[union-attr]
        if loop.trainer.book.shared:
            combine(loop.trainer)
        loop.schedulers.load_state(self.content["schedulers"], loop.trainer.optimizers)
        loop.progress.epochs -= 1
        loop.report_epoch(whole)
        loop.progress.epochs += 1


def _load_window(loop: FitLoop, kept: dict[str, Any]) -> None:
    for name, parameter in loop.trainer.lightning_module.named_parameters():
        if (grad := kept["gradients"].get(name)) is not None:
            parameter.grad = grad.to(parameter.device)
    for turn, state in zip(_turns(loop), kept["windows"]):
        turn.window_open = state["open"]
        for name in _WINDOW:
            if name in state:
                setattr(turn.window, name, state[name])
