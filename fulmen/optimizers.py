"""Reading what `configure_optimizers` returned, `LightningOptimizer`, and stepping learning-rate schedulers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from fulmen.engine.precision import step_with_closure
from fulmen.metrics.logbook import explain_missing_metric
from fulmen.utilities.errors import MisconfigurationException, suggest_name
from fulmen.utilities.introspection import alias_property, is_overridden
from fulmen.utilities.rank_zero import rank_zero_warn
from fulmen.utilities.types import LRSchedulerConfig

if TYPE_CHECKING:
    from collections import defaultdict
    from collections.abc import Generator

    from fulmen.engine.strategy import Strategy
    from fulmen.metrics.logbook import LogBook
    from fulmen.module import LightningModule

if TYPE_CHECKING:
    OptimizerBase = Optimizer
else:
    OptimizerBase = object  # the class of an instance gets its optimizer's class as a base

_OPTIMIZER_PARTS = ("step", "state_dict", "load_state_dict", "param_groups", "defaults", "state")
_OUTER_KEYS = ("optimizer", "lr_scheduler", "monitor")
_SCHEDULER_KEYS = tuple(f.name for f in fields(LRSchedulerConfig))

# The optimizers, and each scheduler with the metric that it may watch.
Unpacked: TypeAlias = tuple[list[Any], list[tuple[Any, str | None]]]


class OptimizerWrapper(OptimizerBase):
    """Has the state and the attributes of the optimizer that it wraps, and methods of its own beside them.

    The class of an instance is made on the fly, from the wrapper's and the wrapped optimizer's, so `isinstance` agrees.
    """

    _own_names: tuple[str, ...] = ("_optimizer",)  # attributes that are the wrapper's

    optimizer: Optimizer = alias_property("_optimizer", "The optimizer that is wrapped.")
    # These three may be replaced on the wrapped optimizer (`load_state_dict` does it): it is always asked.
    param_groups: list[dict[str, Any]] = alias_property(
        "_optimizer.param_groups", "The groups of parameters with their settings."
    )
    state: defaultdict[Tensor, Any] = alias_property("_optimizer.state", "The state of each parameter.")
    defaults: dict[str, Any] = alias_property(
        "_optimizer.defaults", "The settings of groups that have none of their own."
    )

    def __getattr__(self, name: str) -> Any:
        if name == "_optimizer":  # not there yet: unpickling
            raise AttributeError(name)
        return getattr(self._optimizer, name)

    def __setattr__(self, name: str, value: object) -> None:
        # Methods of the wrapped optimizer's class run on the wrapper, too, and what they write belongs to the optimizer.
        own = name in self._own_names or hasattr(type(self).__bases__[0], name)
        object.__setattr__(self if own else self._optimizer, name, value)


class LightningOptimizer(OptimizerWrapper):
    """An optimizer of this run: behaves like the one it wraps, and its `step` knows about hooks, precision and counting.

    The class of an instance is made on the fly and is also a subclass of the wrapped optimizer's, so `isinstance`
    agrees. State and attributes are those of the wrapped optimizer.
    """

    _own_names = ("_optimizer", "_run_step", "_module", "_run_strategy")

    def __init__(self, optimizer: Optimizer) -> None:
        self.__class__ = type("Lightning" + type(optimizer).__name__, (self.__class__, type(optimizer)), {})
        self._optimizer = optimizer
        self._run_step: Callable[..., Any] | None = None
        self._module: LightningModule | None = None
        self._run_strategy: Strategy | None = None

    def enter_run(self, run_step: Callable[..., Any], module: LightningModule, strategy: Strategy) -> None:
        """From now on steps go through `run_step(optimizer, closure, **kwargs)`, for this module."""
        self._run_step = run_step
        self._module = module
        self._run_strategy = strategy

    def leave_run(self) -> None:
        """Steps are ordinary ones again."""
        self._run_step = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of the wrapped optimizer."""
        self._optimizer.load_state_dict(state_dict)

    def __reduce__(self) -> tuple[Any, ...]:
        return LightningOptimizer, (self._optimizer,)  # a copy wraps a copy, and belongs to no run

    def __repr__(self) -> str:
        return f"Lightning{self._optimizer!r}"

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """One optimizer step, with the hooks, the precision and the counters of the trainer.

        Arguments:
            closure: recomputes the loss and its gradients; optional.
            kwargs: handed to the wrapped optimizer's `step`.
        """
        if closure is not None and not callable(closure):
            raise MisconfigurationException(
                f"`optimizer.step(closure=...)` received a {type(closure).__name__}. "
                "Pass a function without arguments, or nothing."
            )
        if self._run_step is None:  # outside of a run: an ordinary step
            if closure is None:
                return self._optimizer.step(**kwargs)
            return step_with_closure(self._optimizer, closure, **kwargs)
        return self._run_step(self._optimizer, closure, **kwargs)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Generator[None]:
        """Inside, only this optimizer's parameters require gradients.

        Arguments:
            sync_grad: False skips the exchange of gradients between processes, to accumulate.
        """
        module = self._module
        strategy = self._run_strategy
        if module is None or strategy is None:
            raise RuntimeError("`toggle_model` was called outside of `Trainer.fit`. Only there is a module to toggle.")
        module.toggle_optimizer(self)
        try:
            with nullcontext() if sync_grad else strategy.no_backward_sync(strategy.model):
                yield
        finally:
            module.untoggle_optimizer(self)


class NoOptimizer(Optimizer):
    """Stands in when `configure_optimizers` returned None: a step runs the closure and changes nothing."""

    def __init__(self) -> None:
        from torch import zeros

        super().__init__([zeros(1)], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return closure() if closure is not None else None

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def __repr__(self) -> str:
        return "no optimizer"


# ---------------------------------------------------------------------- configure_optimizers


def read_optimizers(module: LightningModule, answer: object) -> tuple[list[Any], list[LRSchedulerConfig]]:
    """The optimizers and schedulers in what `configure_optimizers` returned.

    Raises:
        MisconfigurationException: for a shape that is not understood, or a scheduler that cannot be stepped.
    """
    if answer is None:
        rank_zero_warn(
            f"`{type(module).__name__}.configure_optimizers` returned None: this fit will run with no optimizer, "
            "so the weights stay as they are. Return one to train them."
        )
        return [NoOptimizer()], []
    optimizers, schedulers = _unpack_answer(answer)
    _check_optimizers(optimizers, answer, module)
    configs = [_scheduler_config(given, monitor, module.automatic_optimization) for given, monitor in schedulers]
    _check_schedulers(configs, optimizers, module)
    return optimizers, configs


def _check_optimizers(optimizers: list[Any], answer: object, module: LightningModule) -> None:
    """Raises for what is no optimizer or has no parameters, and warns if none of them are the module's."""
    for optimizer in optimizers:
        if not _is_optimizer(optimizer):
            raise _unknown_shape(answer, f"{type(optimizer).__name__} is no optimizer")
        if not any(group["params"] for group in optimizer.param_groups):
            raise MisconfigurationException(
                f"The optimizer {type(optimizer).__name__} of `configure_optimizers` has no parameters. Its steps "
                "would change nothing. Create layers in `__init__` (or `configure_model`) and pass `self.parameters()`."
            )
    known = {id(parameter) for parameter in module.parameters()}
    if known and not any(id(p) in known for o in optimizers for group in o.param_groups for p in group["params"]):
        rank_zero_warn(
            f"None of the parameters in the optimizers of `configure_optimizers` belongs to `{type(module).__name__}`. "
            "Its weights will not change. Pass `self.parameters()`."
        )


def _unpack_answer(answer: object) -> Unpacked:
    """The optimizers, and each scheduler with the metric it may watch, in any accepted shape."""
    if _is_optimizer(answer):
        return [answer], []
    rows = [answer] if isinstance(answer, Mapping) else answer
    if isinstance(rows, Sequence) and not isinstance(rows, str) and len(rows) > 0:
        if _are_two_lists(rows):
            schedulers = rows[1] if isinstance(rows[1], (list, tuple)) else [rows[1]]
            return list(rows[0]), [(scheduler, None) for scheduler in schedulers]
        if all(isinstance(row, Mapping) for row in rows):
            return _unpack_dicts(rows)
        if all(map(_is_optimizer, rows)):
            return list(rows), []
    raise _unknown_shape(answer, f"a {type(answer).__name__} of this kind is not understood")


def _are_two_lists(rows: Sequence[Any]) -> bool:
    """Is it a list of optimizers, and one of schedulers?"""
    return len(rows) == 2 and isinstance(rows[0], (list, tuple)) and all(map(_is_optimizer, rows[0]))


def _unpack_dicts(rows: Sequence[Mapping[str, Any]]) -> Unpacked:
    """Of dictionaries with an "optimizer" and perhaps an "lr_scheduler"."""
    for row in rows:
        if "optimizer" not in row:
            raise _unknown_shape(row, "the key 'optimizer' is missing")
        _warn_of_unknown_keys(row, _OUTER_KEYS)
    found = [(row["lr_scheduler"], row.get("monitor")) for row in rows if row.get("lr_scheduler") is not None]
    return [row["optimizer"] for row in rows], found


def _warn_of_unknown_keys(given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        hint = "".join(suggest_name(str(key), known) for key in unknown)
        where = "optimizer configuration" if known is _OUTER_KEYS else "lr scheduler dict"
        message = f"Found unsupported keys in the {where}: {unknown} are ignored. Known: {list(known)}.{hint}"
        rank_zero_warn(message, category=RuntimeWarning)


def _scheduler_config(scheduler: Any, monitor: str | None, automatic: bool) -> LRSchedulerConfig:
    if isinstance(scheduler, LRSchedulerConfig):
        return scheduler
    if not isinstance(scheduler, Mapping):
        plateau = isinstance(scheduler, ReduceLROnPlateau)
        if plateau and monitor is None and automatic:
            raise _plateau_needs_monitor()
        return LRSchedulerConfig(scheduler, monitor=monitor if plateau else None, reduce_on_plateau=plateau)
    _warn_of_unknown_keys(scheduler, _SCHEDULER_KEYS)
    given = {key: value for key, value in scheduler.items() if key in _SCHEDULER_KEYS}
    if "scheduler" not in given:
        raise MisconfigurationException(
            f"A scheduler of `configure_optimizers` is a dict without the key 'scheduler' (keys: {list(scheduler)}). "
            'Return {"scheduler": your_scheduler, "interval": "epoch", ...}.'
        )
    if not automatic:
        return _manual_config(given)
    given.setdefault("reduce_on_plateau", isinstance(given["scheduler"], ReduceLROnPlateau))
    config = LRSchedulerConfig(**given)
    _check_config(config)
    return config


def _manual_config(given: dict[str, Any]) -> LRSchedulerConfig:
    """With manual optimization nobody watches a metric for the scheduler."""
    ignored = [key for key in ("monitor", "strict", "reduce_on_plateau") if key in given]
    if ignored:
        rank_zero_warn(
            f"The scheduler keys {ignored} have no effect with manual optimization: you step schedulers yourself.",
            category=RuntimeWarning,
        )
    return LRSchedulerConfig(**{key: value for key, value in given.items() if key not in ignored})


def _check_config(config: LRSchedulerConfig) -> None:
    """Raises for settings of a scheduler that cannot be followed."""
    if config.interval not in ("step", "epoch"):
        raise MisconfigurationException(
            f"A scheduler's interval is {config.interval!r}.{suggest_name(str(config.interval), ('step', 'epoch'))} "
            'Use "interval": "step" or "interval": "epoch".'
        )
    if not isinstance(config.frequency, Real) or config.frequency < 1 or config.frequency % 1:
        what = f'A scheduler\'s "frequency" is {config.frequency!r}: it must be a whole number of 1 or more,'
        raise MisconfigurationException(f'{what} and counts epochs, or optimizer steps with "interval": "step".')
    if config.reduce_on_plateau and config.monitor is None:
        raise _plateau_needs_monitor()
    if isinstance(config.scheduler, OneCycleLR) and config.interval == "epoch":
        rank_zero_warn(
            "`OneCycleLR` with interval 'epoch' makes one step per epoch; it is usually stepped per batch: "
            'pass "interval": "step".',
            category=RuntimeWarning,
        )


def _check_schedulers(configs: Iterable[LRSchedulerConfig], optimizers: list[Any], module: LightningModule) -> None:
    for config in configs:
        scheduler = config.scheduler
        name = type(scheduler).__name__
        if not (hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict")):
            raise TypeError(
                f"The scheduler {name} has no `state_dict` and `load_state_dict`. Its position could not be saved in "
                "checkpoints. Define both methods."
            )
        known = isinstance(scheduler, (LRScheduler, ReduceLROnPlateau))
        if not known and module.automatic_optimization and not is_overridden("lr_scheduler_step", module):
            raise MisconfigurationException(
                f"The scheduler {name} does not follow PyTorch's LRScheduler. How to step it is not known. Override "
                "`lr_scheduler_step(self, scheduler, metric)` in your module."
            )
        owner = optimizer_of(scheduler)
        if owner is not None and not any(owner is unwrap_optimizer(o) for o in optimizers):
            raise MisconfigurationException(
                f"The scheduler {name} belongs to an optimizer that `configure_optimizers` did not return. "
                "It would change the learning rate of an optimizer that never steps. "
                "Return that optimizer too, or build the scheduler on the one you return."
            )


def _is_optimizer(obj: object) -> bool:
    return isinstance(obj, Optimizer) or all(hasattr(obj, part) for part in _OPTIMIZER_PARTS)


def _plateau_needs_monitor() -> MisconfigurationException:
    return MisconfigurationException(
        "`configure_optimizers` returned a `ReduceLROnPlateau` without a `monitor`. "
        "It needs a metric to step on. "
        'Return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}.'
    )


def _unknown_shape(answer: object, why: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"Unknown configuration: `configure_optimizers` returned {answer!r} ({why}). "
        "Return an optimizer; a list of optimizers; ([optimizers], [schedulers]); "
        '{"optimizer": ..., "lr_scheduler": ...}; a list of such dicts; or None.'
    )


# ---------------------------------------------------------------------- schedulers


# What schedulers keep for each parameter group, in a list or in the group: what follows the learning rate, and the rest.
_RATES = ("base_lrs", "max_lrs", "initial_lr", "max_lr", "min_lr")
_COPIED = ("lr_lambdas", "min_lrs", "base_momentums", "max_momentums", "base_momentum", "max_momentum")


def optimizer_of(scheduler: Any) -> Optimizer | None:
    """The optimizer whose learning rate a scheduler sets; None for one of another kind than torch's that names none."""
    return getattr(scheduler, "optimizer", None)


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer inside of a `LightningOptimizer`, or of another that holds one as its `optimizer`; else itself."""
    return getattr(optimizer, "optimizer", optimizer)


def _schedulers_inside(scheduler: object) -> Sequence[LRScheduler]:
    """Those that a composition of schedulers is made of, under the name that torch gives them."""
    return scheduler._schedulers if hasattr(scheduler, "_schedulers") else ()


def schedule_new_groups(scheduler: Any) -> None:
    """Lets groups that were added to the optimizer after the scheduler was made follow the first one, in proportion."""
    for inner in _schedulers_inside(scheduler):
        schedule_new_groups(inner)
    owner = optimizer_of(scheduler)
    if owner is None or not owner.param_groups:
        return
    groups = owner.param_groups
    first = groups[0]
    whole = first["lr"] or first.get("initial_lr")  # a warm-up may begin with 0

    def value_for(group: dict[str, Any], name: str, of_first: Any) -> Any:
        return of_first * group["lr"] / whole if name in _RATES and whole else of_first

    for name in (*_RATES, *_COPIED):
        kept = vars(scheduler).get(name)
        if isinstance(kept, list) and kept:
            kept += [value_for(group, name, kept[0]) for group in groups[len(kept) :]]
        for group in groups[1:] if name in first else ():
            if name not in group:
                group[name] = value_for(group, name, first[name])


def set_learning_rate(optimizer: Any, configs: Iterable[LRSchedulerConfig], rate: float) -> None:
    """Lets all groups of an optimizer have this rate, and its schedulers start from it."""
    for group in optimizer.param_groups:
        for name in ("lr", "initial_lr") if configs else ("lr",):
            if isinstance(value := group.get(name, rate), Tensor):  # may be read on the device, by a compiled step
                value.fill_(rate)
            elif name in group:
                group[name] = rate
    for config in configs:
        _start_from(config.scheduler, rate)


def _start_from(scheduler: Any, rate: float) -> None:
    for inner in _schedulers_inside(scheduler):
        _start_from(inner, rate)
    if hasattr(scheduler, "base_lrs"):
        vars(scheduler).update(base_lrs=[rate] * len(scheduler.base_lrs))


class Schedulers:
    """The schedulers of a run. A learning rate moves only when its optimizer did; without schedulers nothing costs.

    Arguments:
        step: the bound `lr_scheduler_step(scheduler, metric)` of the module.
    """

    def __init__(self, configs: list[LRSchedulerConfig], step: Callable[[Any, Any], None]) -> None:
        self._configs = configs
        self._step = step
        self.any = bool(configs)
        owners = [optimizer_of(config.scheduler) for config in configs]
        self._steps = dict.fromkeys(map(id, owners), 0)  # of the whole run, by the id of an optimizer
        self._groups = dict.fromkeys(map(id, configs), 0)  # parameter groups that each scheduler knows of
        self.open_epoch()

    def open_epoch(self) -> None:
        """Of this epoch no step was made or left out."""
        self._missed: set[int] = set()  # optimizers that left out a step, by id
        self._moved: set[int] = set()  # of those, the ones that made a step as well
        self._idle: frozenset[int] = frozenset()  # those that left out the last one
        self._made = False  # was a step made at all?

    def refresh(self) -> None:
        """The list of configurations has others in it than before."""
        self.any = bool(self._configs)

    def state(self, optimizers: list[Any]) -> dict[str, Any]:
        """In plain types, what is not in the schedulers themselves."""
        index = {id(unwrap_optimizer(o)): i for i, o in enumerate(optimizers)}
        found = {"missed": self._missed, "moved": self._moved, "idle": self._idle}
        state: dict[str, Any] = {name: [index[o] for o in owners if o in index] for name, owners in found.items()}
        # Schedulers without an optimizer have the index -1.
        return {**state, "made": self._made, "steps": {index.get(o, -1): count for o, count in self._steps.items()}}

    def load_state(self, state: dict[str, Any] | None, optimizers: list[Any], steps: int = 0) -> None:
        """Continues from what `state` gave; a file that does not count by optimizer has all `steps` of the run."""
        owners = [id(unwrap_optimizer(o)) for o in optimizers]
        counted = (state or {}).get("steps", {})
        for owner in self._steps:
            position = owners.index(owner) if owner in owners else -1
            self._steps[owner] = counted.get(position, steps // max(len(owners), 1))
        if state is not None:
            self._missed, self._moved, idle = ({owners[i] for i in state[name]} for name in ("missed", "moved", "idle"))
            self._idle = frozenset(idle)
            self._made = bool(state.get("made", state.get("window_start", 1)))

    def _due(self, interval: str, epoch: int, watching: bool) -> list[LRSchedulerConfig]:
        """Those whose turn it is: the steps of their optimizer over the whole run are counted, or epochs with one."""
        due = []
        for config in self._configs:
            if config.interval != interval or config.reduce_on_plateau != watching:
                continue
            owner = id(optimizer_of(config.scheduler))
            if interval == "step":
                stood_still = owner in self._idle
                count = self._steps.get(owner, 0)
            else:
                stood_still = owner in self._missed and owner not in self._moved
                count = epoch
            if not stood_still and count % config.frequency == 0:
                due.append(config)
        return due

    def _advance(self, config: LRSchedulerConfig, value: Any) -> None:
        owner = optimizer_of(config.scheduler)
        groups = 0 if owner is None else len(owner.param_groups)
        if self._groups.get(id(config)) != groups:
            self._groups[id(config)] = groups
            schedule_new_groups(config.scheduler)
        self._step(config.scheduler, value)

    def after_batch(self, epoch: int, stepped: bool, is_last_batch: bool, idle: Iterable[Any] = ()) -> None:
        """Those per step after an optimizer step; those per epoch after the last batch, before validation.

        Arguments:
            epoch: counted from 1; a frequency per epoch divides it.
            idle: optimizers that left this step out: a loss scaler skipped it, or there was no loss for them.
        """
        if stepped:
            self._idle = frozenset(map(id, idle))
            if self._made:
                self._moved |= self._idle - self._missed
            self._missed |= self._idle
            self._moved |= self._missed - self._idle
            self._made = True
            for owner in self._steps.keys() - self._idle:
                self._steps[owner] += 1
            for config in self._due("step", epoch, watching=False):
                self._advance(config, None)
        for config in self._due("epoch", epoch, watching=False) if is_last_batch else ():
            self._advance(config, None)

    def watch(self, interval: str, epoch: int, book: LogBook) -> None:
        """Steps those that watch a metric; a frequency per epoch divides `epoch`, which is counted from 1.

        Raises:
            MisconfigurationException: if the metric was not logged and the scheduler is strict about it.
        """
        for config in self._due(interval, epoch, watching=True):
            metrics = book.callback_metrics
            value = metrics.get(config.monitor) if config.monitor is not None else None
            if value is not None:
                self._advance(config, value)
                continue
            asked_by = f"`ReduceLROnPlateau` with `monitor={config.monitor!r}`"
            message = explain_missing_metric(book, asked_by, str(config.monitor), metrics)
            if config.strict:
                raise MisconfigurationException(message)
            rank_zero_warn(message, category=RuntimeWarning)
