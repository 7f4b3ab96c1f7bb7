"""Entries of the logbook: one logged name in one hook, its newest value and its value over the epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fulmen.hooks import LOG_RULES
from fulmen.metrics.torchmetrics_state import (
    MetricState,
    is_metric,
    load_merged_states,
    metric_path,
    metric_states,
    was_updated,
    without_sync,
)
from fulmen.metrics.values import Value, check_value, copy_to_host, reduced_dtype
from fulmen.utilities.errors import MisconfigurationException, suggest_name
from fulmen.utilities.rank_zero import warn_once
from fulmen.utilities.types import DTYPES

if TYPE_CHECKING:
    from torchmetrics import Metric

# Hook, name, and the index of the dataloader if there are several.
EntryKey = tuple[str | None, str, int | None]


class LogOptions(NamedTuple):
    """How a name is logged: arguments of `self.log`, in its order.

    What users pass stays a plain tuple, which is compared at every write; of an entry all are resolved, see
    `resolve_options`.
    """

    prog_bar: bool
    logger: bool | None
    on_step: bool | None
    on_epoch: bool | None
    reduce_fx: str | Callable[..., Any]
    enable_graph: bool
    sync_dist: bool
    sync_dist_group: Any
    add_dataloader_idx: bool
    metric_attribute: str | None
    rank_zero_only: bool

    def portable(self) -> LogOptions:
        """Without what means nothing to other processes and in files."""
        return self._replace(sync_dist_group=None, metric_attribute=None)


class EntryPart(NamedTuple):
    """What one rank contributes to an entry when its epoch is reduced, and what another needs to make one like it."""

    options: LogOptions
    ranks: list[int] | None  # who takes part; None if all do
    total: float | None = None
    weight: float = 0
    dtype: torch.dtype | None = None
    states: list[MetricState] | None = None
    metric_path: str | None = None


class EpochSums(NamedTuple):
    """What an entry has accumulated over the epoch so far."""

    empty: bool = True
    total: Value | None = None
    weight: float = 0


class WriteContext(Protocol):
    """What an entry asks about the place a value is logged in."""

    hook: str | None
    module: nn.Module | None

    def current_batch_size(self) -> int: ...


class Entry:
    """One logged name in one hook: the newest value, and the value over the epoch.

    Subclasses say how values are combined over the epoch. Sums live on the device of the value in float64 (float32 on
    MPS, which has no float64), weights are Python numbers.

    Arguments:
        options: resolved, see `resolve_options`.
        arguments: what was passed to `self.log`; a write with the same is known to be right.
        provisional: made from a checkpoint or from what another rank logged; the first write here checks everything.
    """

    def __init__(
        self,
        name: str,
        options: LogOptions,
        dataloader_idx: int | None,
        arguments: tuple[Any, ...] = (),
        provisional: bool = False,
    ) -> None:
        self.name = name
        self.options = options
        self.arguments = arguments
        self.provisional = provisional
        self.dataloader_idx = dataloader_idx
        self.on_step = bool(options.on_step)
        self.on_epoch = bool(options.on_epoch)
        self.keeps_graph = bool(options.enable_graph)
        self.to_logger = options.logger is not False
        self.reduces_steps = self.on_step and bool(options.sync_dist) and not options.rank_zero_only
        suffix = (
            f"/dataloader_idx_{dataloader_idx}" if dataloader_idx is not None and options.add_dataloader_idx else ""
        )
        forked = self.on_step and self.on_epoch
        self.callback_name = name + suffix
        self.step_name = f"{name}_step{suffix}" if forked else self.callback_name
        self.epoch_name = f"{name}_epoch{suffix}" if forked else self.callback_name
        self.dtype: torch.dtype | None = None
        self.reset()

    def agrees_with(self, options: LogOptions) -> bool:
        """Whether resolved options come to those of this entry."""
        same_logger = (options.logger is not False) == self.to_logger
        return same_logger and options._replace(logger=self.options.logger) == self.options

    def reset(self) -> None:
        """Forgets all values: a new epoch begins."""
        self.empty = True
        self.newest: Value | None = None
        self.total: Value | None = None
        self.weight: float = 0
        self.final: Value | None = None

    # ------------------------------------------------------------------ writing

    def add_value(self, value: Value, context: WriteContext, batch_size: int | None) -> None:
        """Keeps the value. Waits for no device: nothing here asks what the value is."""
        if isinstance(value, Tensor):
            if value.dim():
                check_value(self.callback_name, value)
                value = value.reshape(())
            if not self.keeps_graph:
                value = value.detach()
            if self.on_step:
                # cloned: the caller may go on changing this tensor in place before anybody reads the value
                self.newest = value.clone()
        else:
            self.newest = value
        if self.on_epoch:
            self.accumulate(value, context, batch_size)
        self.empty = False

    def accumulate(self, value: Value, context: WriteContext, batch_size: int | None) -> None:
        """Combines the value with those of the epoch so far."""
        if not isinstance(self.total, Tensor):
            value = self.new_accumulator(value)
        self.total = value if self.total is None else self.merge_totals(self.total, value)

    @classmethod
    def merge_totals(cls, total: Value, value: Value) -> Value:
        """What two parts of the epoch come to."""
        return total + value

    def new_accumulator(self, value: Value) -> Value:
        """A copy of `value` that others can be added to without losing digits."""
        if not isinstance(value, Tensor):
            return value
        if self.dtype is None:
            self.dtype = reduced_dtype(self.callback_name, value)
        return value.to(torch.float32 if value.device.type == "mps" else torch.float64, copy=True)

    def set_reduced_step(self, value: Tensor) -> None:
        """The newest value becomes the one over all ranks."""
        floating = isinstance(self.newest, Tensor) and self.newest.is_floating_point()
        self.newest = value.to(self.newest.dtype if floating else torch.get_default_dtype())  # type: ignore[union-attr]

    # ------------------------------------------------------------------ the epoch

    @property
    def is_pending(self) -> bool:
        """Whether it has a value over the epoch that is not computed yet."""
        return not self.empty and self.on_epoch and self.final is None

    def epoch_value(self) -> Value | None:
        """The value over the epoch so far, in the precision it was logged in, at least float32."""
        return self.to_logged_dtype(self.total)

    def to_logged_dtype(self, value: Value | None) -> Value | None:
        return value.to(self.dtype) if isinstance(value, Tensor) and self.dtype is not None else value

    def finalize(self) -> None:
        """The epoch of this entry is over: its value is computed once and kept until `reset`."""
        if self.on_epoch and self.final is None:
            self.final = self.epoch_value()

    def stash(self) -> None:
        """The loader of this entry is done, and its value waits for what other ranks have."""

    def group_ranks(self) -> list[int] | None:
        """The ranks that `sync_dist_group` restricts the reduction to; None if it does not."""
        options = self.options
        grouped = options.sync_dist and options.sync_dist_group is not None
        return dist.get_process_group_ranks(options.sync_dist_group) if grouped else None

    def local_part(self, total: float | None, module: nn.Module) -> EntryPart:
        """What this rank contributes; `total` is that of the entry, on the host."""
        options = self.options.portable()._replace(rank_zero_only=False)
        return EntryPart(options, self.group_ranks(), total, self.weight, self.dtype)

    def finalize_merged(self, parts: Sequence[EntryPart]) -> None:
        """`finalize` with what all ranks have."""
        value = self.merge_ranks([part.total for part in parts if part.total is not None], sum(p.weight for p in parts))
        dtype = next((part.dtype for part in parts if part.dtype is not None), None)
        device = self.total.device if isinstance(self.total, Tensor) else None
        self.final = value if value is None or dtype is None else torch.tensor(value, dtype=dtype, device=device)
        self.empty = False

    def merge_ranks(self, totals: list[float], weight: float) -> float | None:
        """The value over the epoch, from the totals of all ranks and the sum of their weights."""
        return sum(totals)

    # ------------------------------------------------------------------ keeping

    def sums(self) -> EpochSums:
        """A copy of what was accumulated, for `restore_sums`."""
        return EpochSums(self.empty, self.total.clone() if isinstance(self.total, Tensor) else self.total, self.weight)

    def restore_sums(self, sums: EpochSums) -> None:
        self.empty = sums.empty
        self.total = sums.total.clone() if isinstance(sums.total, Tensor) else sums.total
        self.weight = sums.weight

    def copy_values(self, other: Entry) -> None:
        """Continues with the values of an entry that this one replaces."""
        if type(other) is type(self):
            self.empty = other.empty
            self.newest = other.newest
            self.total = other.total
            self.weight = other.weight
            self.final = other.final
            self.dtype = other.dtype

    def state_dict(self, module: nn.Module | None) -> dict[str, Any]:
        """In plain types; tensors on the CPU, beside whether they are from another device (sync)."""
        parts = {"newest": self.newest, "total": self.total, "final": self.final}
        return {
            "options": list(self.options.portable()),
            **{n: (copy_to_host(v), isinstance(v, Tensor) and v.device.type != "cpu") for n, v in parts.items()},
            "weight": self.weight,
            "path": None,
            "dtype": self.dtype and str(self.dtype).removeprefix("torch."),
        }

    def load_state_dict(self, state: dict[str, Any], module: nn.Module | None, device: torch.device) -> None:
        for name in ("newest", "total", "final"):
            value, on_device = state[name]
            setattr(self, name, value.to(device) if on_device else value)
        self.empty = False
        self.weight = state["weight"]
        self.dtype = state["dtype"] and DTYPES[state["dtype"]]


class Sum(Entry):
    """Sum over the epoch."""


class Mean(Entry):
    """Average weighted by batch size."""

    def accumulate(self, value: Value, context: WriteContext, batch_size: int | None) -> None:
        weight = batch_size if batch_size is not None else context.current_batch_size()
        if self.total is None:
            self.total = self.new_accumulator(value) * weight
        elif isinstance(value, Tensor) and isinstance(self.total, Tensor) and not self.keeps_graph:
            self.total.add_(value, alpha=weight)
        else:
            self.total = self.total + self.new_accumulator(value) * weight
        self.weight += weight

    def epoch_value(self) -> Value | None:
        return self.to_logged_dtype(self.total / self.weight) if self.weight and self.total is not None else None

    def merge_ranks(self, totals: list[float], weight: float) -> float | None:
        return sum(totals) / weight if weight else None


class Extreme(Entry):
    """Largest or smallest value of the epoch; not a number if one was."""

    of_tensors: ClassVar[Callable[..., Tensor]]
    of_numbers: ClassVar[Callable[..., Any]]

    @classmethod
    def merge_totals(cls, total: Value, value: Value) -> Value:
        if isinstance(total, Tensor) and isinstance(value, Tensor):
            return cls.of_tensors(total, value.to(total))
        extreme: Value = cls.of_numbers(total, value)
        return extreme  # sync, if one is a tensor: a name logged as a tensor and as a number

    def merge_ranks(self, totals: list[float], weight: float) -> float | None:
        return next((total for total in totals if total != total), type(self).of_numbers(totals))


class Maximum(Extreme):
    of_tensors = torch.maximum
    of_numbers = max


class Minimum(Extreme):
    of_tensors = torch.minimum
    of_numbers = min


class MetricEntry(Entry):
    """A torchmetrics object: it accumulates by itself, and is reset by us at the end of the epoch."""

    metric: Metric | None = None
    stashed: list[MetricState] | None = None  # of a loader that is done, until all ranks exchange them

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reduces_steps = False

    def reset(self) -> None:
        if self.metric is not None and not self.empty:
            self.metric.reset()
        super().reset()
        self.stashed = None

    def add_value(self, value: object, context: WriteContext, batch_size: int | None) -> None:
        if value is not self.metric:
            # A new object in the place of the old one will do, two that are both there will not.
            known = context.module.modules() if context.module is not None else ()
            if not is_metric(value) or any(child is self.metric for child in known):
                raise logged_twice(self.callback_name, context.hook)
            self.metric = value
        if self.on_step:
            self.newest = self.metric._forward_cache  # type: ignore[union-attr]
            if type(self.newest) is not Tensor or self.newest.dim():
                self._check_result("forward", self.newest)
        self.empty = False

    def finalize(self) -> None:
        if self.on_epoch and self.final is None:
            super().finalize()
            # Reset now: the same object may be logged for the next loader, which must start from zero.
            self.metric.reset()  # type: ignore[union-attr]

    def stash(self) -> None:
        if self.metric is not None:
            self.stashed = metric_states(self.metric)
            self.metric.reset()

    def epoch_value(self) -> Value | None:
        metric = self.metric
        if metric is None:
            return None
        never = not was_updated(metric)
        what = f"The metric logged as `{self.callback_name}`, a {type(metric).__name__}, was never updated"
        fix = "Call `update(...)`, or the metric itself, on each batch."
        if never:
            warn_once(f"{what} since its last reset, so its value means nothing. {fix}")
        try:
            value: Value | None = metric.compute()
        except Exception as error:
            if never:
                raise ValueError(f"{what}, and its `compute()` fails without data: {error} {fix}") from error
            raise
        self._check_result(".compute()", value)
        return value

    def local_part(self, total: float | None, module: nn.Module) -> EntryPart:
        states = self.stashed
        if states is None and self.metric is not None:
            states = metric_states(self.metric)
        return super().local_part(None, module)._replace(states=states, metric_path=metric_path(self.metric, module))

    def attach_metric(self, path: str | None, module: nn.Module) -> None:
        """Takes the metric of that name in the module; without one there are only the values of other ranks."""
        self.metric = dict(module.named_modules()).get(path) if path is not None else None

    def finalize_merged(self, parts: Sequence[EntryPart]) -> None:
        self.empty = False
        if self.metric is None:
            return
        load_merged_states(self.metric, [part.states for part in parts if part.states is not None])
        self.stashed = None
        try:
            with without_sync(self.metric):
                self.final = self.epoch_value()
        finally:
            self.metric.reset()

    def state_dict(self, module: nn.Module | None) -> dict[str, Any]:
        path = metric_path(self.metric, module) if self.metric is not None and module is not None else None
        return {**super().state_dict(module), "path": path}

    def load_state_dict(self, state: dict[str, Any], module: nn.Module | None, device: torch.device) -> None:
        super().load_state_dict(state, module, device)
        if module is not None:
            self.attach_metric(state["path"], module)

    def _check_result(self, source: str, value: object) -> None:
        """Refuses what a metric gives if it is not one number."""
        name = self.callback_name
        kind = type(self.metric).__name__
        if value is None:
            what = f"`self.log('{name}', ...)` with `on_step=True`: the {kind} has no value of this step, because only"
            warn_once(
                f"{what} `update` was called. Call the metric itself, or log with `on_step=False, on_epoch=True`."
            )
        elif not isinstance(value, Tensor) or value.numel() != 1:
            shape = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"The `{source}` return of the metric logged as `{name}`, a {kind}, must be one number for `self.log`, "
                f"but it is a {shape}. In an epoch hook, log the parts of `metric.compute()` by `self.log_dict`, or show "
                "the whole by `self.logger.experiment`, and call `metric.reset()`."
            )


# What `reduce_fx` may be, and the name of the reduction in resolved options and in files.
REDUCTIONS: dict[Any, str] = {
    "mean": "mean", "avg": "mean", torch.mean: "mean",
    "sum": "sum", torch.sum: "sum", sum: "sum",
    "max": "max", torch.max: "max", max: "max",
    "min": "min", torch.min: "min", min: "min",
}  # fmt: skip
ENTRY_TYPES: dict[str, type[Entry]] = {
    "mean": Mean, "sum": Sum, "max": Maximum, "min": Minimum, "metric": MetricEntry
}  # fmt: skip


# ---------------------------------------------------------------------- options


def entry_type(options: LogOptions) -> type[Entry]:
    """The class of an entry with these resolved options."""
    return ENTRY_TYPES[options.reduce_fx]  # type: ignore[index]


def resolve_options(name: str, hook: str | None, options: LogOptions, metric: bool) -> LogOptions:
    """The same with all defaults filled in, as they are for this hook, and the name of the reduction.

    Raises:
        MisconfigurationException: if the hook allows no such logging, or the reduction is unknown.
    """
    on_step, on_epoch = _resolve_timing(name, hook, options)
    return options._replace(
        prog_bar=bool(options.prog_bar),
        on_step=on_step,
        on_epoch=on_epoch,
        reduce_fx="metric" if metric else _reduction_name(name, options.reduce_fx),
    )


def logged_twice(name: str, hook: str | None) -> MisconfigurationException:
    """The error about a name that is logged in two ways."""
    return MisconfigurationException(
        f"`self.log('{name}', ...)` was called twice in `{hook}` with different arguments. One name in one hook has one "
        "way of being reduced and sent. Use the same arguments in both calls, or another name."
    )


def _resolve_timing(name: str, hook: str | None, options: LogOptions) -> tuple[bool, bool]:
    """`on_step` and `on_epoch`, from what was passed and the rule of the hook."""
    rule = LOG_RULES.get(hook or "")
    if rule is None:
        place = f"inside `{hook}`" if hook else "outside of the trainer's hooks"
        raise MisconfigurationException(
            f"You can't `self.log('{name}', ...)` {place}. There is no step and no epoch there to which the value "
            "could belong. Log it in `training_step`, `validation_step`, `test_step` or one of the epoch hooks, or "
            "send it to `self.logger.log_metrics` yourself."
        )
    on_step = rule.on_step if options.on_step is None else options.on_step
    on_epoch = rule.on_epoch if options.on_epoch is None else options.on_epoch
    if on_step and not rule.step_allowed:
        raise MisconfigurationException(
            f"You can't `self.log('{name}', ..., on_step=True)` inside `{hook}`. That hook runs once per epoch, there "
            "is no step. Leave `on_step` out."
        )
    if not on_step and not on_epoch:
        raise MisconfigurationException(
            f"`self.log('{name}', ..., on_step=False, on_epoch=False)` is not useful: nobody would see the value. "
            "Set at least one of the two to True."
        )
    return on_step, on_epoch


def _reduction_name(name: str, reduce_fx: str | Callable[..., Any]) -> str:
    key = reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx
    reduction = REDUCTIONS.get(key) if isinstance(key, str) or callable(key) else None
    if reduction is None:
        hint = (
            suggest_name(key, [known for known in REDUCTIONS if isinstance(known, str)]) if isinstance(key, str) else ""
        )
        raise MisconfigurationException(
            f"`self.log('{name}', ..., reduce_fx={reduce_fx!r})`: this reduction is not known.{hint} "
            "Use 'mean', 'sum', 'min' or 'max'; for anything else log a torchmetrics `Metric`."
        )
    return reduction
