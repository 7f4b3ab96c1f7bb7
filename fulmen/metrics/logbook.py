"""`LogBook`: what `self.log` wrote in this run, kept where it was made until somebody reads it."""

from __future__ import annotations

import sys
from numbers import Complex, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fulmen.hooks import LOG_RULES, LogRule
from fulmen.utilities.collections import extract_batch_size
from fulmen.utilities.errors import MisconfigurationException, describe_received, suggestion
from fulmen.utilities.rank_zero import warn_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# What identifies the way a name is logged, compared as one tuple on every later write: prog_bar, logger, on_step,
# on_epoch, reduce_fx, enable_graph, sync_dist, sync_dist_group, add_dataloader_idx, metric_attribute, rank_zero_only.
Options = tuple[Any, ...]


class Entry:
    """One logged name in one hook: the newest value, and the value over the epoch.

    Subclasses say how values are combined over the epoch. Sums live on the device of the value in float64 (float32 on
    MPS, which has no float64), weights are Python numbers.
    """

    syncs = False  # is the value of a step reduced over processes?
    restored = False  # does it come from a checkpoint, and waits for the first write of this run?

    def __init__(self, name: str, options: Options, on_step: bool, on_epoch: bool, dataloader_idx: int | None) -> None:
        self.options = options
        self.bar, self.logger, self.graph = bool(options[0]), options[1] is not False, bool(options[5])
        self.on_step, self.on_epoch, self.dataloader_idx = on_step, on_epoch, dataloader_idx
        suffix = f"/dataloader_idx_{dataloader_idx}" if dataloader_idx is not None and options[8] else ""
        forked = on_step and on_epoch
        self.callback_name = name + suffix
        self.step_name = f"{name}_step{suffix}" if forked else self.callback_name
        self.epoch_name = f"{name}_epoch{suffix}" if forked else self.callback_name
        self.dtype: torch.dtype | None = None
        self.reset()

    def means(self, options: Options, name: str, hook: str | None) -> bool:
        """Whether other arguments come to the same, as defaults do that were written out."""
        same = self.bar == bool(options[0]) and self.logger == (options[1] is not False)
        kind = type(self) in (MetricEntry, _kind_of(name, options[4]))
        when = _when(name, hook, options[2], options[3]) == (self.on_step, self.on_epoch)
        return same and kind and when and self.options[5:] == options[5:]

    def reset(self) -> None:
        self.empty = True
        self.newest: Any = None
        self.total: Any = None
        self.weight: float = 0
        self.final: Any = None

    def adopt(self, other: Entry) -> None:
        """Goes on with the values of another."""
        if type(other) is type(self):
            for name in ("empty", "newest", "total", "weight", "final", "dtype"):
                setattr(self, name, getattr(other, name))

    def freeze(self) -> None:
        """The epoch of this entry is over: its value is computed once and kept until `reset`."""
        if self.on_epoch and self.final is None:
            self.final = self.epoch_value()

    def park(self) -> None:
        """The loader of this entry is done, and its value waits for what other processes have."""

    def add(self, value: Any, book: LogBook, batch_size: int | None) -> None:
        """Keeps the value. Waits for no device: nothing here asks what the value is."""
        if isinstance(value, Tensor):
            if value.dim():
                _check_value(self.callback_name, value)
                value = value.reshape(())
            if not self.graph:
                value = value.detach()
            if self.on_step:
                # cloned: the caller may go on changing this tensor in place before anybody reads the value
                self.newest = value.clone()
        else:
            self.newest = value
        if self.on_epoch:
            self.combine(value, book, batch_size)
        self.empty = False

    def combine(self, value: Any, book: LogBook, batch_size: int | None) -> None:
        raise NotImplementedError

    def epoch_value(self) -> Any:
        """The value over the epoch so far."""
        return self.total

    def widened(self, value: Any) -> Any:
        """A fresh accumulator holding `value`."""
        if not isinstance(value, Tensor):
            return value
        if self.dtype is None:
            self.dtype = _result_dtype(self.callback_name, value)
        return value.to(torch.float32 if value.device.type == "mps" else torch.float64, copy=True)

    def narrowed(self, value: Any) -> Any:
        """`value` in the precision it was logged in, at least float32."""
        return value.to(self.dtype) if isinstance(value, Tensor) and self.dtype is not None else value


class Mean(Entry):
    """Average weighted by batch size."""

    def combine(self, value: Any, book: LogBook, batch_size: int | None) -> None:
        weight = batch_size if batch_size is not None else book.current_batch_size()
        if self.total is None:
            self.total = self.widened(value) * weight
        elif isinstance(value, Tensor) and isinstance(self.total, Tensor) and not self.graph:
            self.total.add_(value, alpha=weight)
        else:
            self.total = self.total + self.widened(value) * weight
        self.weight += weight

    def epoch_value(self) -> Any:
        return self.narrowed(self.total / self.weight) if self.weight else None


class Sum(Entry):
    """Sum over the epoch."""

    def combine(self, value: Any, book: LogBook, batch_size: int | None) -> None:
        if not isinstance(self.total, Tensor):
            value = self.widened(value)
        self.total = value if self.total is None else self.merge(self.total, value)

    @staticmethod
    def merge(total: Any, value: Any) -> Any:
        return total + value

    def epoch_value(self) -> Any:
        return self.narrowed(self.total)


def _extreme(of_tensors: Callable[..., Tensor], of_numbers: Callable[..., Any]) -> Any:
    def merge(total: Any, value: Any) -> Any:
        if isinstance(total, Tensor) and isinstance(value, Tensor):
            return of_tensors(total, value.to(total))
        return of_numbers(total, value)  # sync, if one is a tensor: a name logged as a tensor and as a number

    return staticmethod(merge)


class Maximum(Sum):
    """Largest value of the epoch."""

    merge = _extreme(torch.maximum, max)


class Minimum(Sum):
    """Smallest value of the epoch."""

    merge = _extreme(torch.minimum, min)


class MetricEntry(Entry):
    """A torchmetrics object: it accumulates by itself, and is reset by us at the end of the epoch."""

    def reset(self) -> None:
        metric = getattr(self, "metric", None)
        if metric is not None and not self.empty:
            metric.reset()
        super().reset()
        self.metric: Any = metric
        self.parked: Any = None

    def park(self) -> None:
        self.parked = metric_states(self.metric)
        self.metric.reset()

    def add(self, value: Any, book: LogBook, batch_size: int | None) -> None:
        if value is not self.metric:
            # A new object in the place of the old one will do, two that are both there will not.
            if not is_metric(value) or any(child is self.metric for child in book.module.modules()):
                raise _twice(self.callback_name, book.hook)
            self.metric = value
        if self.on_step:
            self.newest = value._forward_cache
            if type(self.newest) is not Tensor or self.newest.dim():
                self._check("forward", self.newest)
        self.empty = False

    def freeze(self) -> None:
        if self.on_epoch and self.final is None:
            super().freeze()
            # Reset now: the same object may be logged for the next loader, which must start from zero.
            self.metric.reset()

    def epoch_value(self) -> Any:
        never = not any(metric._update_count for metric in metrics_in(self.metric))
        what = f"The metric logged as `{self.callback_name}`, a {type(self.metric).__name__}, was never updated"
        fix = "Call `update(...)`, or the metric itself, on each batch."
        if never:
            warn_once(f"{what} since its last reset, so its value means nothing. {fix}")
        try:
            value = self.metric.compute()
        except Exception as error:
            if never:
                raise ValueError(f"{what}, and its `compute()` fails without data: {error} {fix}") from error
            raise
        self._check(".compute()", value)
        return value

    def _check(self, source: str, value: Any) -> None:
        """Refuses what a metric gives if it is not one number."""
        name, kind = self.callback_name, type(self.metric).__name__
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


KINDS: dict[Any, type[Entry]] = {
    "mean": Mean, "avg": Mean, torch.mean: Mean,
    "sum": Sum, torch.sum: Sum, sum: Sum,
    "max": Maximum, torch.max: Maximum, max: Maximum,
    "min": Minimum, torch.min: Minimum, min: Minimum,
}  # fmt: skip


class Page:
    """The entries of one loop: training, validation inside fit, validate or test."""

    def __init__(self, training: bool) -> None:
        self.entries: dict[tuple[str | None, str, int | None], Entry] = {}
        self.training = training
        self.epoch_over = False
        self.has_steps = False  # whether any entry shows a value per step
        self.synced: dict[str, list[Entry]] = {}  # what was reduced over processes last, by place in the batch

    def reset(self) -> None:
        """Forgets the values, keeps the checked entries."""
        self.epoch_over = False
        for entry in self.entries.values():
            entry.reset()

    def values(self, dataloader_idx: int | None = None) -> list[tuple[Entry, str, Any]]:
        """(entry, name, value) of everything readable now: step values inside the epoch, epoch values at its end."""
        found: list[tuple[Entry, str, Any]] = []
        for entry in self.entries.values():
            if entry.empty or (dataloader_idx is not None and entry.dataloader_idx not in (None, dataloader_idx)):
                continue
            if self.epoch_over and entry.on_epoch:
                value = entry.epoch_value() if entry.final is None else entry.final
                found.append((entry, entry.epoch_name, value))
            elif not self.epoch_over and entry.on_step and entry.newest is not None:
                found.append((entry, entry.step_name, entry.newest))
        return [(entry, name, value) for entry, name, value in found if value is not None]


class Jotting:
    """What `self.log` got in compiled code and is not in the book yet, and the one before it.

    The compiler guards an object of a class by its class only. Of a list or a tuple it guards what is inside, and
    would compile again whenever that changed.
    """

    def __init__(self, before: Jotting | None, *line: Any) -> None:
        self.before, self.line = before, line


NOTHING = Jotting(None)


class LogBook:
    """What the current run has logged.

    `hook` names the hook that is running (kept by the `HookPlan` and the loops). `write` is called by `self.log`; the
    three dictionaries behind `trainer.callback_metrics`, `logged_metrics` and `progress_bar_metrics` are brought up to
    date when they are asked for.
    """

    def __init__(self) -> None:
        self.hook: str | None = None
        self.page: Page | None = None
        self.entries: dict[tuple[str | None, str, int | None], Entry] = {}
        self._pages: dict[str, Page] = {}
        self.batch: Any = None
        self.batch_size: int | None = None
        self._dataloader_idx: int | None = None
        self.jotted = NOTHING
        self.logging_due = False
        self.has_loggers = False
        self.shared = False  # do several processes log?
        self.muted = False  # is what is logged not to count?
        self.due: list[Entry] = []  # to be reduced over processes when the step is over
        self.size_required = False  # a step that pulls its own batches: their size cannot be looked up
        self.module: Any = None
        self._callback: dict[str, Tensor] = {}
        self._logged: dict[str, Tensor] = {}
        self._bar: dict[str, float] = {}
        self._copies: dict[str, tuple[Tensor, Any]] = {}

    # ------------------------------------------------------------------ writing

    def turn_to(self, name: str | None) -> Page | None:
        """Opens the page of a loop ("train", "validate", "test", "sanity_check"; None closes the book). Returns the one before."""
        previous = self.page
        self.turn_back(None if name is None else self._pages.setdefault(name, Page(training=name == "train")))
        return previous

    def turn_back(self, page: Page | None) -> None:
        """Opens a page again that `turn_to` returned."""
        self.copy_jottings()
        self.page = page
        self.entries = page.entries if page is not None else {}

    def open_batch(self, batch: Any) -> None:
        """The batch that is being worked on; its size is looked up only if a mean over the epoch needs it."""
        if self.jotted is not NOTHING:
            self.copy_jottings()
        self.batch = batch
        self.batch_size = None

    def close_batch(self) -> None:
        if self.jotted is not NOTHING:
            self.copy_jottings()
        self.batch = self.batch_size = self.hook = None

    def write(self, name: str, value: Any, options: Options, batch_size: int | None = None) -> None:
        """Keeps one value. The first write of a name checks everything; later ones compare one tuple and add."""
        if self.jotted is not NOTHING:
            self.copy_jottings()
        if self.muted:
            return
        entry = self.entries.get((self.hook, name, self._dataloader_idx))
        if entry is None or entry.options != options or type(value) not in _PLAIN:
            entry = self._checked_entry(name, value, options, batch_size)
        entry.add(value, self, batch_size)
        if entry.syncs:
            self.due.append(entry)

    def jot(self, name: str, value: Any, options: Options, batch_size: int | None) -> None:
        """`write` for code that is being compiled: touches nothing whose change would make the compiler start again."""
        if self.hook is None:
            return  # called by hand after a run: nobody would ever read it
        if isinstance(value, Tensor):  # cloned: it may be changed in place before it is copied into the book
            value = (value if options[5] else value.detach()).clone()
        self.jotted = Jotting(self.jotted, self.hook, name, value, options, batch_size)

    def copy_jottings(self) -> None:
        """Writes what compiled code has jotted down. Called before the batch or the loader changes, or a value is read."""
        last, self.jotted, lines, hook = self.jotted, NOTHING, [], self.hook
        while last.before is not None:
            lines.append(last.line)
            last = last.before
        for self.hook, *line in reversed(lines):
            self.write(*line)
        self.hook = hook

    @property
    def dataloader_idx(self) -> int | None:
        """Which loader the batches come from, if there are several."""
        return self._dataloader_idx

    @dataloader_idx.setter
    def dataloader_idx(self, dataloader_idx: int | None) -> None:
        self.copy_jottings()
        self._dataloader_idx = dataloader_idx

    def current_batch_size(self) -> int:
        """Size of the current batch, looked up at most once per batch; 1 outside a batch."""
        if self.batch_size is None:
            if self.size_required and self.hook == "training_step":
                raise MisconfigurationException(
                    "`self.log` cannot know the batch size of a `training_step(dataloader_iter)`. "
                    "The step pulls the batches itself, and the mean over the epoch is weighted by their size. "
                    "Pass it: `self.log(..., batch_size=batch.size(0))`."
                )
            if self.batch is None:
                return 1
            self.batch_size = extract_batch_size(self.batch)
        return self.batch_size

    def _checked_entry(self, name: str, value: Any, options: Options, batch_size: int | None) -> Entry:
        if not isinstance(name, str):
            raise TypeError(f"`self.log` received the name {name!r}. Pass a string.")
        metric = is_metric(value)
        if not metric:
            _check_value(name, value)
        if self.size_required and batch_size is None and self.hook == "training_step" and not metric:
            self.current_batch_size()
        key = (self.hook, name, self._dataloader_idx)
        before = self.entries.get(key)
        entry = None if before is not None and before.restored else before
        if entry is not None:
            same_kind = metric == isinstance(entry, MetricEntry)
            if not same_kind or (entry.options != options and not entry.means(options, name, self.hook)):
                raise _twice(name, self.hook)
            return entry
        on_step, on_epoch = _when(name, self.hook, options[2], options[3])
        if options[8] and "/dataloader_idx_" in name:
            raise MisconfigurationException(
                f"`self.log('{name}', ...)`: the name contains '/dataloader_idx_'. That suffix is added to names when "
                "there are several loaders. Choose another name, or pass `add_dataloader_idx=False`."
            )
        if not options[8] and any(known[:2] == key[:2] and known != key for known in self.entries):
            raise MisconfigurationException(
                f"`self.log('{name}', ..., add_dataloader_idx=False)` was called for several loaders. One value would "
                "hide the other. Put the loader into the name, or leave `add_dataloader_idx` out."
            )
        kind = MetricEntry if metric else _kind_of(name, options[4])
        if options[1] is True and not self.has_loggers:
            warn_once(f"`self.log('{name}', ..., logger=True)`: no logger is configured, the value goes nowhere.")
        if metric:
            _check_attribute(name, value, options[9], self.module)
        entry = self.entries[key] = kind(name, options, on_step, on_epoch, self._dataloader_idx)
        if before is not None:
            entry.adopt(before)
            if metric:
                entry.metric = value  # type: ignore[attr-defined]
        entry.syncs = self.shared and on_step and bool(options[6]) and not options[10] and not metric
        if self.page is not None:
            self.page.has_steps = self.page.has_steps or on_step
        return entry

    # ------------------------------------------------------------------ reading

    def _readable(self, dataloader_idx: int | None = None) -> list[tuple[Entry, str, Any]]:
        self.copy_jottings()
        return self.page.values(dataloader_idx) if self.page is not None else []

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """Newest value per name, as tensors; evaluation shows its values once the epoch is over."""
        self.copy_jottings()
        page = self.page
        if page is not None and (page.training or page.epoch_over):
            for entry, name, value in page.values():
                self._callback[name] = self._callback[entry.callback_name] = _as_tensor(value)
        return self._callback

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """Newest value per name that goes to loggers."""
        self._logged.update((name, _as_tensor(value)) for entry, name, value in self._readable() if entry.logger)
        return self._logged

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """Newest value per name that goes to the progress bar, exactly: this waits for the device (sync)."""
        self._bar.update(to_host({name: value for entry, name, value in self._readable() if entry.bar}))
        return self._bar

    def peek(self) -> dict[str, float]:
        """Progress-bar values that have already arrived on the host; never waits for a device.

        A copy of what is newest is started here and shown by the next call.
        """
        for entry, name, value in self._readable():
            if entry.bar and isinstance(value, Tensor) and value.device.type != "cpu":
                self._peek_device(name, value)
            elif entry.bar:
                self._bar[name] = to_number(value)
        return self._bar

    def _peek_device(self, name: str, value: Tensor) -> None:
        copy = self._copies.get(name)
        if copy is not None:
            host, event = copy
            if event is not None and not event.query():
                return
            self._bar[name] = host.item()
        if value.device.type == "cuda":
            host = torch.empty((), dtype=value.dtype, pin_memory=True)
            host.copy_(value.reshape(()), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._copies[name] = host, event
        else:
            # sync: other devices offer no event to ask; at most ten redraws a second come here
            self._copies[name] = value.detach().cpu().reshape(()), None

    def take(self, dataloader_idx: int | None = None) -> dict[str, Any]:
        """Values that are due for the loggers, still where they were made; also kept in `logged_metrics`."""
        due = {name: value for entry, name, value in self._readable(dataloader_idx) if entry.logger}
        self._logged.update((name, _as_tensor(value)) for name, value in due.items())
        return due

    def remember(self) -> None:
        """Keeps the newest step values in all three views, before another page is opened or the epoch closes (sync)."""
        _ = self.callback_metrics, self.logged_metrics, self.progress_bar_metrics

    def freeze(self, dataloader_idx: int | None) -> None:
        """The epoch of one loader is over, those of others are not."""
        for entry in self.entries.values():
            if not entry.empty and entry.dataloader_idx == dataloader_idx:
                (entry.park if self.shared else entry.freeze)()

    def finish_epoch(self) -> dict[str, Any]:
        """Reduces the epoch of the open page and remembers it in all views. Returns what goes to the loggers."""
        page = self.page
        if page is None:
            return {}
        page.epoch_over = True
        for entry in page.entries.values():
            if not entry.empty:
                entry.freeze()
        self.remember()
        return {name: value for entry, name, value in page.values() if entry.logger}

    def clear(self) -> None:
        """Empties all views and pages: a new run begins."""
        for page in self._pages.values():
            page.reset()
        self._pages.clear()
        self.jotted, self.muted = NOTHING, False
        self.due.clear()
        self.hook = self._dataloader_idx = None
        self.close_batch()
        self._callback, self._logged, self._bar = {}, {}, {}
        self._copies.clear()
        self.turn_to(None)

    def views(self, values: Any = None) -> Any:
        """What the three dictionaries hold; or lets them hold what this returned in another process."""
        if values is not None:
            self._callback, self._logged, self._bar = values
        return self._callback, self._logged, self._bar

    def move_to_cpu(self) -> None:
        """At the end of a run, so that keeping the results keeps no device memory (sync)."""
        self._callback = {name: value.cpu() for name, value in self._callback.items()}
        self._logged = {name: value.cpu() for name, value in self._logged.items()}


# ---------------------------------------------------------------------- plain functions

_PLAIN = frozenset((Tensor, float, int, bool))


def _as_tensor(value: Any) -> Tensor:
    """What users read: of integers and short floats, the numbers that a reduction would give."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.get_default_dtype())
    if value.dtype not in (torch.float32, torch.float64) and not value.is_complex():
        value = value.to(torch.get_default_dtype())
    return value.reshape(()) if value.dim() else value


def to_number(value: Any) -> float:
    """One value as a Python number; waits for its device (sync)."""
    return value.item() if isinstance(value, Tensor) else value


def to_host(values: dict[str, Any]) -> dict[str, float]:
    """All values as Python numbers, with one transfer per device and dtype (sync)."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    numbers: dict[str, float] = dict.fromkeys(values, 0.0)  # keeps the order of the names
    for name, value in values.items():
        if isinstance(value, Tensor) and value.device.type != "cpu":
            groups.setdefault((value.device, value.dtype), []).append(name)
        else:
            numbers[name] = to_number(value)
    for names in groups.values():
        fetched = torch.stack([values[name].detach().reshape(()) for name in names]).tolist()
        numbers.update(zip(names, fetched, strict=True))
    return numbers


def missing_metric(book: LogBook, asked_by: str, name: str, known: Iterable[str]) -> str:
    """What is said by those who need a value over the epoch that is not there: why it is not, and what to do."""
    entries = [(hook, e) for page in book._pages.values() for (hook, *_), e in page.entries.items() if e.on_step]
    for hook, entry in entries:
        if name == entry.callback_name and not entry.on_epoch:
            what = f"{asked_by}: `{name}` is not available, because `{hook}` logs it for single steps only"
            fix = f"`self.log({name!r}, ..., on_epoch=True)` makes a value of the epoch of them."
            return f"{what} (`on_step=True, on_epoch=False`). {fix}"
        if name == entry.step_name != entry.epoch_name:
            what = f"{asked_by}: `{name}` is not available: it has the values of single steps in `{hook}`."
            return f"{what} Over the epoch there is {entry.epoch_name!r}. Monitor that."
    there = list(known)
    what = f"{asked_by}: `{name}` is not available, as no such name was logged.{suggestion(name, there)} There are {there}."
    fix = f"Call `self.log({name!r}, value)` in the LightningModule, in every epoch in which it is looked at,"
    return f"{what} {fix} or monitor one of these names."


def is_metric(value: Any) -> bool:
    """Is it a torchmetrics object? Asks only if somebody has imported torchmetrics."""
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, torchmetrics.Metric)


def metrics_in(metric: Any) -> list[Any]:
    """A metric and those inside of it, in an order that all processes have."""
    return [child for child in metric.modules() if is_metric(child)]


def metric_state(metric: Any) -> dict[str, Any]:
    """What a metric has seen, on the host (sync); not those inside of it."""

    def host(value: Any) -> Any:
        return [item.detach().cpu() for item in value] if isinstance(value, list) else value.detach().cpu()

    return {"values": {name: host(getattr(metric, name)) for name in metric._defaults}, "updates": metric._update_count}


def load_metric_state(metric: Any, state: dict[str, Any]) -> None:
    """Lets a metric go on from what `metric_state` gave."""
    for name, value in state["values"].items():
        own = [item.to(metric.device) for item in value] if isinstance(value, list) else value.to(metric.device)
        setattr(metric, name, own)
    metric._update_count, metric._computed = state["updates"], None


def metric_states(metric: Any) -> list[dict[str, Any]]:
    """What a metric and those inside of it have seen, on the host (sync)."""
    return [metric_state(member) for member in metrics_in(metric)]


def capture_metrics(module: Any) -> Callable[[], None]:
    """Remember what all metrics in a module have seen; the returned function lets them forget the rest."""
    metrics = metrics_in(module)
    names = [[*metric._defaults, "_update_count", "_computed", "_forward_cache"] for metric in metrics]
    kept = [{name: _copied(getattr(m, name)) for name in of_metric} for m, of_metric in zip(metrics, names)]

    def restore() -> None:
        for metric, states in zip(metrics, kept):
            for name, value in states.items():
                setattr(metric, name, _copied(value))

    return restore


def capture_sums(book: LogBook) -> Callable[[], None]:
    """Remember what the open page has added up; the returned function takes out the rest. Newest values stay."""
    book.copy_jottings()
    page = book.page
    entries = {} if page is None else page.entries
    kept = {key: (entry.empty, _copied(entry.total), entry.weight) for key, entry in entries.items()}

    def restore() -> None:
        book.copy_jottings()
        for key, entry in entries.items():
            entry.empty, total, entry.weight = kept.get(key, (True, None, 0))
            entry.total = _copied(total)

    return restore


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value


def book_state(book: LogBook) -> dict[str, Any]:
    """What the training epoch has logged, and the three dictionaries, in plain types; it waits for devices (sync)."""
    book.copy_jottings()
    page = book._pages.get("train")
    entries = [] if page is None else [(k, e) for k, e in page.entries.items() if not e.empty]
    return {
        "entries": [{"key": list(key), **_entry_state(entry, book.module)} for key, entry in entries],
        "views": [{name: _on_host(value) for name, value in view.items()} for view in book.views()],
    }


def load_book(book: LogBook, state: dict[str, Any], device: Any) -> None:
    """Goes on from what `book_state` gave, on the open page."""
    book.views(tuple(dict(view) for view in state["views"]))
    for kept in state["entries"]:
        options = tuple(kept["options"])
        kind: Any = KINDS.get(options[4], MetricEntry)
        entry = book.entries[tuple(kept["key"])] = kind(kept["key"][1], options, *options[2:4], kept["key"][2])
        for name in ("newest", "total", "final"):
            value, on_device = kept[name]
            setattr(entry, name, value.to(device) if on_device else value)
        entry.empty, entry.weight, entry.restored = False, kept["weight"], True
        entry.syncs = book.shared and entry.on_step and options[6] and not options[10] and kind is not MetricEntry
        entry.dtype = kept["dtype"] and getattr(torch, kept["dtype"])
        if isinstance(entry, MetricEntry):
            entry.metric = dict(book.module.named_modules()).get(kept["path"])
        if book.page is not None:
            book.page.has_steps = book.page.has_steps or entry.on_step


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return value if value is None or isinstance(value, (bool, int, float)) else float(value)


def _entry_state(entry: Entry, module: Any) -> dict[str, Any]:
    bar, logger, graph, sync, suffix, rank_zero = (entry.options[i] for i in (0, 1, 5, 6, 8, 10))
    metric, path = getattr(entry, "metric", None), None
    kind = next((name for name, known in KINDS.items() if known is type(entry)), "metric")
    if metric is not None:
        path = next((name for name, part in module.named_modules() if part is metric), None)
    parts = {name: getattr(entry, name) for name in ("newest", "total", "final")}
    return {
        "options": [bar, logger, entry.on_step, entry.on_epoch, kind, graph, sync, None, suffix, None, rank_zero],
        **{n: (_on_host(part), isinstance(part, Tensor) and part.device.type != "cpu") for n, part in parts.items()},
        "weight": entry.weight, "path": path, "dtype": entry.dtype and str(entry.dtype).removeprefix("torch."),
    }  # fmt: skip


def _check_value(name: str, value: Any) -> None:
    is_tensor = isinstance(value, Tensor)
    if is_tensor and value.numel() != 1:
        raise ValueError(
            f"`self.log('{name}', ...)` received a tensor of shape {tuple(value.shape)}. Only one number can be "
            f"logged under one name. Reduce it first, for example `self.log('{name}', value.mean())`."
        )
    if value.is_complex() if is_tensor else isinstance(value, Complex) and not isinstance(value, Real):
        raise ValueError(
            f"`self.log('{name}', ...)` received the complex number {value}. Only real ones can be reduced and logged. "
            "Log `value.abs()`, or `value.real` and `value.imag` under two names."
        )
    number = isinstance(value, (int, float)) or hasattr(value, "__float__")
    if isinstance(value, type) or not (is_tensor or (number and getattr(value, "shape", ()) == ())):  # an array has one
        raise ValueError(
            f"`self.log('{name}', ...)` received {describe_received(value)}; {type(value).__name__} values cannot be "
            "logged. A number, a tensor with one element or a torchmetrics `Metric` is expected. Log the parts one by "
            "one with `self.log_dict`, or text with `self.logger.experiment`."
        )


def _twice(name: str, hook: str | None) -> MisconfigurationException:
    return MisconfigurationException(
        f"`self.log('{name}', ...)` was called twice in `{hook}` with different arguments. One name in one hook has one "
        "way of being reduced and sent. Use the same arguments in both calls, or another name."
    )


def _when(name: str, hook: str | None, on_step: bool | None, on_epoch: bool | None) -> tuple[bool, bool]:
    """Checked `on_step` and `on_epoch`, from what was passed and the rule of the hook."""
    rule: LogRule | None = LOG_RULES.get(hook or "")
    if rule is None:
        place = f"inside `{hook}`" if hook else "outside of the trainer's hooks"
        raise MisconfigurationException(
            f"You can't `self.log('{name}', ...)` {place}. There is no step and no epoch there to which the value "
            "could belong. Log it in `training_step`, `validation_step`, `test_step` or one of the epoch hooks, or "
            "send it to `self.logger.log_metrics` yourself."
        )
    step = rule.on_step if on_step is None else on_step
    epoch = rule.on_epoch if on_epoch is None else on_epoch
    if step and not rule.step_allowed:
        raise MisconfigurationException(
            f"You can't `self.log('{name}', ..., on_step=True)` inside `{hook}`. That hook runs once per epoch, there "
            "is no step. Leave `on_step` out."
        )
    if not step and not epoch:
        raise MisconfigurationException(
            f"`self.log('{name}', ..., on_step=False, on_epoch=False)` is not useful: nobody would see the value. "
            "Set at least one of the two to True."
        )
    return step, epoch


def _kind_of(name: str, reduce_fx: str | Callable[..., Any]) -> type[Entry]:
    key = reduce_fx.lower() if isinstance(reduce_fx, str) else reduce_fx
    kind = KINDS.get(key) if isinstance(key, str) or callable(key) else None
    if kind is None:
        hint = suggestion(key, [k for k in KINDS if isinstance(k, str)]) if isinstance(key, str) else ""
        raise MisconfigurationException(
            f"`self.log('{name}', ..., reduce_fx={reduce_fx!r})`: this reduction is not known.{hint} "
            "Use 'mean', 'sum', 'min' or 'max'; for anything else log a torchmetrics `Metric`."
        )
    return kind


def _check_attribute(name: str, metric: Any, attribute: str | None, module: Any) -> None:
    """A metric that is no attribute of the module would not move between devices with it."""
    if attribute is not None or module is None:
        return
    if not any(child is metric for child in module.modules()):
        raise MisconfigurationException(
            f"Could not find the `LightningModule` attribute of `self.log('{name}', {type(metric).__name__}(...))`: "
            f"this metric is not an attribute of `{type(module).__name__}`. It would be left behind when the module "
            "moves to another device, and could not be saved. Create it in `__init__` (`self.metric = ...`), or pass `metric_attribute='name.of.it'`."
        )


def _result_dtype(name: str, value: Tensor) -> torch.dtype:
    if not value.is_floating_point():
        warn_once(
            f"`self.log('{name}', ...)` received an integer tensor ({value.dtype}); it is converted to "
            f"{torch.get_default_dtype()} to be reduced. Log `value.float()` to silence this."
        )
        return torch.get_default_dtype()
    return torch.float64 if value.dtype is torch.float64 else torch.float32
