"""`LogBook`: what `self.log` wrote in this run, kept where it was made until somebody reads it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fulmen.metrics.entries import (
    Entry,
    EntryKey,
    EpochSums,
    LogOptions,
    MetricEntry,
    entry_type,
    logged_twice,
    resolve_options,
)
from fulmen.metrics.torchmetrics_state import is_metric, metric_path
from fulmen.metrics.values import (
    PLAIN_TYPES,
    Value,
    check_value,
    copy_to_host,
    fetch_number,
    fetch_numbers,
    scalar_tensor,
)
from fulmen.utilities.collections import extract_batch_size
from fulmen.utilities.errors import MisconfigurationException, suggest_name
from fulmen.utilities.rank_zero import warn_once

# A value that can be read now, under the name it has now; a plain tuple, as many are made.
LoggedValue = tuple[Entry, str, Value]


class MetricScope:
    """The entries of one loop: training, validation inside fit, validate or test."""

    def __init__(self, training: bool = False) -> None:
        self.entries: dict[EntryKey, Entry] = {}
        self.training = training
        self.epoch_over = False
        self.has_steps = False  # whether any entry shows a value per step
        self.reduced_steps: dict[str, list[Entry]] = {}  # reduced over ranks last, by the place in the batch

    def reset(self) -> None:
        """Forgets the values, keeps the checked entries."""
        self.epoch_over = False
        for entry in self.entries.values():
            entry.reset()

    def close_epoch(self) -> None:
        """From now on, until `reset`, values over the epoch are read."""
        self.epoch_over = True

    def add_entry(self, key: EntryKey, entry: Entry) -> None:
        self.entries[key] = entry
        self.has_steps = self.has_steps or entry.on_step

    def readable_values(self, dataloader_idx: int | None = None) -> list[LoggedValue]:
        """Everything readable now: step values inside the epoch, epoch values at its end."""
        found: list[LoggedValue] = []
        for entry in self.entries.values():
            if entry.empty or (dataloader_idx is not None and entry.dataloader_idx not in (None, dataloader_idx)):
                continue
            if self.epoch_over and entry.on_epoch:
                value = entry.epoch_value() if entry.final is None else entry.final
                if value is not None:
                    found.append((entry, entry.epoch_name, value))
            elif not self.epoch_over and entry.on_step and entry.newest is not None:
                found.append((entry, entry.step_name, entry.newest))
        return found


class HostCopy(NamedTuple):
    """A value on its way to the host; the event tells when it has arrived."""

    value: Tensor
    arrived: torch.cuda.Event | None


class MetricDicts:
    """What users read: `trainer.callback_metrics`, `logged_metrics` and `progress_bar_metrics`."""

    def __init__(self) -> None:
        self.callback: dict[str, Tensor] = {}
        self.logged: dict[str, Tensor] = {}
        self.progress_bar: dict[str, float] = {}
        self._copies: dict[str, HostCopy] = {}

    def show_arrived(self, name: str, value: Tensor) -> None:
        """Lets the progress bar have the copy of the value that was begun last, and begins one of this value."""
        copy = self._copies.get(name)
        if copy is not None:
            if copy.arrived is not None and not copy.arrived.query():
                return
            self.progress_bar[name] = copy.value.item()
        if value.device.type == "cuda":
            on_host = torch.empty((), dtype=value.dtype, pin_memory=True)
            on_host.copy_(value.reshape(()), non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._copies[name] = HostCopy(on_host, arrived)
        else:
            # sync: other devices offer no event to ask; at most ten redraws a second come here
            self._copies[name] = HostCopy(value.detach().cpu().reshape(()), None)

    def move_to_cpu(self) -> None:
        """At the end of a run, so that keeping the results keeps no device memory (sync)."""
        self.callback = {name: value.cpu() for name, value in self.callback.items()}
        self.logged = {name: value.cpu() for name, value in self.logged.items()}

    def state_dict(self) -> list[dict[str, Any]]:
        """The three in plain types (sync)."""
        views: list[Mapping[str, Value]] = [self.callback, self.logged, self.progress_bar]
        return [{name: copy_to_host(value) for name, value in view.items()} for view in views]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        callback, logged, progress_bar = state
        self.callback = dict(callback)
        self.logged = dict(logged)
        self.progress_bar = dict(progress_bar)


class DeferredWrite:
    """What `self.log` got in compiled code and is not in the book yet, and the one before it.

    The compiler guards an object of a class by its class only. Of a list or a tuple it guards what is inside, and
    would compile again whenever that changed.
    """

    def __init__(self, before: DeferredWrite | None, hook: str | None, *arguments: Any) -> None:
        self.before = before
        self.hook = hook
        self.arguments = arguments  # of `LogBook.write`


EMPTY = DeferredWrite(None, None)


class LogBook:
    """What the current run has logged.

    `hook` names the hook that is running (kept by the `HookPlan` and the loops). `write` is called by `self.log`; the
    three dictionaries behind `trainer.callback_metrics`, `logged_metrics` and `progress_bar_metrics` are brought up to
    date when they are asked for.
    """

    def __init__(self) -> None:
        self.hook: str | None = None
        self.scope = MetricScope()
        self.scopes: dict[str, MetricScope] = {}
        self.metric_dicts = MetricDicts()
        self.sent_to_loggers: dict[str, float] = {}  # at the last time
        self.batch: Any = None
        self.batch_size: int | None = None
        self._dataloader_idx: int | None = None
        self.deferred = EMPTY
        self.logging_due = False
        self.has_loggers = False
        self.distributed = False  # do several ranks log?
        self.metrics_suppressed = False  # set while a step runs only because other ranks run theirs
        self.to_reduce: list[Entry] = []  # over the ranks, when the step is over
        self.size_required = False  # a step that pulls its own batches: their size cannot be looked up
        self.module: nn.Module | None = None

    def connect(self, module: nn.Module, has_loggers: bool, distributed: bool) -> None:
        """Who logs in this run, and to whom."""
        self.module = module
        self.has_loggers = has_loggers
        self.distributed = distributed

    # ------------------------------------------------------------------ scopes

    @contextmanager
    def inside(self, hook: str | None) -> Generator[None]:
        """While a hook runs that is called at one place only, outside of the steps; there, setting `hook` is cheaper."""
        previous = self.hook
        self.hook = hook
        try:
            yield
        finally:
            self.hook = previous

    def enter_scope(self, name: str) -> MetricScope:
        """Opens the scope of a loop ("train", "validate", "test", "sanity_check"). Returns the one before."""
        previous = self.scope
        self.restore_scope(self.scopes.setdefault(name, MetricScope(training=name == "train")))
        return previous

    def restore_scope(self, scope: MetricScope) -> None:
        """Opens a scope again that `enter_scope` returned."""
        if self.deferred is not EMPTY:
            self.flush_deferred()
        self.scope = scope

    def close_scope(self) -> None:
        """No loop runs: nothing that could be read is logged."""
        self.restore_scope(MetricScope())

    def open_batch(self, batch: Any, logging_due: bool) -> None:
        """The batch that is being worked on; its size is looked up only if a mean over the epoch needs it.

        Arguments:
            logging_due: do loggers read what is logged in this batch of training?
        """
        if self.deferred is not EMPTY:
            self.flush_deferred()
        self.batch = batch
        self.batch_size = None
        self.logging_due = logging_due

    def close_batch(self) -> None:
        if self.deferred is not EMPTY:
            self.flush_deferred()
        self.batch = self.batch_size = self.hook = None

    @property
    def dataloader_idx(self) -> int | None:
        """Which loader the batches come from, if there are several."""
        return self._dataloader_idx

    @dataloader_idx.setter
    def dataloader_idx(self, dataloader_idx: int | None) -> None:
        if self.deferred is not EMPTY:
            self.flush_deferred()
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

    # ------------------------------------------------------------------ writing

    def write(self, name: str, value: Any, arguments: tuple[Any, ...], batch_size: int | None = None) -> None:
        """Keeps one value. The first write of a name checks everything; later ones compare one tuple and add.

        Arguments:
            arguments: those of `self.log` in the order of `LogOptions`.
        """
        if self.deferred is not EMPTY:
            self.flush_deferred()
        if self.metrics_suppressed:
            return
        entry = self.scope.entries.get((self.hook, name, self._dataloader_idx))
        if entry is None or entry.arguments != arguments or type(value) not in PLAIN_TYPES:
            entry = self._checked_entry(name, value, arguments, batch_size)
        entry.add_value(value, self, batch_size)
        if entry.reduces_steps and self.distributed:
            self.to_reduce.append(entry)

    def defer(
        self, name: str, value: Any, arguments: tuple[Any, ...], batch_size: int | None, enable_graph: bool
    ) -> None:
        """`write` for code that is being compiled: touches nothing whose change would make the compiler start again."""
        if self.hook is None:
            return  # called by hand after a run: nobody would ever read it
        if isinstance(value, Tensor):  # cloned: it may be changed in place before it is copied into the book
            value = (value if enable_graph else value.detach()).clone()
        self.deferred = DeferredWrite(self.deferred, self.hook, name, value, arguments, batch_size)

    def flush_deferred(self) -> None:
        """Writes what compiled code has logged. Called before the batch or the loader changes, or a value is read."""
        if self.deferred is EMPTY:
            return
        last = self.deferred
        self.deferred = EMPTY
        waiting = []
        while last.before is not None:
            waiting.append(last)
            last = last.before
        hook = self.hook
        for deferred in reversed(waiting):
            self.hook = deferred.hook
            self.write(*deferred.arguments)
        self.hook = hook

    def _checked_entry(self, name: str, value: object, arguments: tuple[Any, ...], batch_size: int | None) -> Entry:
        """The entry for a value of which something is new: the name, the arguments or the type."""
        if not isinstance(name, str):
            raise TypeError(f"`self.log` received the name {name!r}. Pass a string.")
        metric = is_metric(value)
        if not metric:
            check_value(name, value)
            if self.size_required and batch_size is None and self.hook == "training_step":
                self.current_batch_size()
        key = (self.hook, name, self._dataloader_idx)
        known = self.scope.entries.get(key)
        if known is not None and not known.provisional:
            # other arguments may come to the same, as defaults do that were written out
            same = known.arguments == arguments and metric == isinstance(known, MetricEntry)
            if not same and not known.agrees_with(
                resolve_options(name, self.hook, LogOptions._make(arguments), metric)
            ):
                raise logged_twice(name, self.hook)
            return known
        entry = _new_entry(self, key, value, arguments)
        if known is not None:
            entry.copy_values(known)
        return entry

    # ------------------------------------------------------------------ reading

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """Newest value per name, as tensors; evaluation shows its values once the epoch is over."""
        self.flush_deferred()
        metrics = self.metric_dicts.callback
        if self.scope.training or self.scope.epoch_over:
            for entry, name, value in self.scope.readable_values():
                metrics[name] = metrics[entry.callback_name] = scalar_tensor(value)
        return metrics

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """Newest value per name that goes to loggers."""
        self.step_metrics()
        return self.metric_dicts.logged

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """Newest value per name that goes to the progress bar, exactly: this waits for the device (sync)."""
        self.flush_deferred()
        shown = {name: value for entry, name, value in self.scope.readable_values() if entry.options.prog_bar}
        self.metric_dicts.progress_bar.update(fetch_numbers(shown))
        return self.metric_dicts.progress_bar

    def arrived_bar_metrics(self) -> dict[str, float]:
        """Progress-bar values that have already arrived on the host; never waits for a device.

        A copy of what is newest is started here and shown by the next call.
        """
        self.flush_deferred()
        for entry, name, value in self.scope.readable_values():
            if entry.options.prog_bar and isinstance(value, Tensor) and value.device.type != "cpu":
                self.metric_dicts.show_arrived(name, value)
            elif entry.options.prog_bar:
                self.metric_dicts.progress_bar[name] = fetch_number(value)
        return self.metric_dicts.progress_bar

    def step_metrics(self, dataloader_idx: int | None = None) -> dict[str, Value]:
        """Values that are due for the loggers, still where they were made; also kept in `logged_metrics`."""
        self.flush_deferred()
        readable = self.scope.readable_values(dataloader_idx)
        due = {name: value for entry, name, value in readable if entry.to_logger}
        self.metric_dicts.logged.update((name, scalar_tensor(value)) for name, value in due.items())
        return due

    def update_metric_dicts(self) -> None:
        """Keeps the newest step values in all three, before another scope is entered or the epoch closes (sync)."""
        if not self.scope.entries and self.deferred is EMPTY:
            return
        _ = self.callback_metrics, self.logged_metrics, self.progress_bar_metrics

    def finalize_loader(self, dataloader_idx: int | None) -> None:
        """The epoch of one loader is over, those of others are not."""
        for entry in self.scope.entries.values():
            if not entry.empty and entry.dataloader_idx == dataloader_idx:
                if self.distributed:
                    entry.stash()
                else:
                    entry.finalize()

    def finish_epoch(self) -> dict[str, Value]:
        """Reduces the epoch of the open scope and keeps it in all three dictionaries. Returns what goes to the loggers."""
        self.scope.close_epoch()
        for entry in self.scope.entries.values():
            if not entry.empty:
                entry.finalize()
        self.update_metric_dicts()
        return {name: value for entry, name, value in self.scope.readable_values() if entry.to_logger}

    def clear(self) -> None:
        """Forgets everything: a new run begins."""
        for scope in self.scopes.values():
            scope.reset()
        self.scopes.clear()
        self.deferred = EMPTY
        self.metrics_suppressed = False
        self.to_reduce.clear()
        self._dataloader_idx = None
        self.close_batch()
        self.metric_dicts = MetricDicts()
        self.sent_to_loggers = {}
        self.close_scope()

    # ------------------------------------------------------------------ keeping

    def state_dict(self) -> dict[str, Any]:
        """What the training epoch has logged, and the three dictionaries, in plain types; it waits for devices (sync)."""
        self.flush_deferred()
        entries = self.scopes["train"].entries if "train" in self.scopes else {}
        return {
            "entries": [{"key": list(k), **e.state_dict(self.module)} for k, e in entries.items() if not e.empty],
            "views": self.metric_dicts.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continues with what `state_dict` gave, in the open scope."""
        self.metric_dicts.load_state_dict(state["views"])
        for kept in state["entries"]:
            hook, name, dataloader_idx = kept["key"]
            options = LogOptions._make(kept["options"])
            entry = entry_type(options)(name, options, dataloader_idx, provisional=True)
            entry.load_state_dict(kept, self.module, device)
            self.scope.add_entry((hook, name, dataloader_idx), entry)


def _new_entry(book: LogBook, key: EntryKey, value: object, arguments: tuple[Any, ...]) -> Entry:
    hook, name, dataloader_idx = key
    options = LogOptions._make(arguments)
    resolved = resolve_options(name, hook, options, is_metric(value))
    _check_loader_suffix(key, options, book.scope.entries)
    if options.logger is True and not book.has_loggers:
        warn_once(f"`book.log('{name}', ..., logger=True)`: no logger is configured, the value goes nowhere.")
    if is_metric(value) and options.metric_attribute is None and book.module is not None:
        _check_attribute(name, value, book.module)
    entry = entry_type(resolved)(name, resolved, dataloader_idx, arguments)
    book.scope.add_entry(key, entry)
    return entry


def _check_loader_suffix(key: EntryKey, options: LogOptions, known: Iterable[EntryKey]) -> None:
    """Names of several loaders must differ, by the suffix or without it."""
    hook, name, dataloader_idx = key
    if options.add_dataloader_idx and "/dataloader_idx_" in name:
        raise MisconfigurationException(
            f"`self.log('{name}', ...)`: the name contains '/dataloader_idx_'. That suffix is added to names when "
            "there are several loaders. Choose another name, or pass `add_dataloader_idx=False`."
        )
    others = [index for other_hook, other, index in known if (other_hook, other) == (hook, name)]
    if not options.add_dataloader_idx and any(index != dataloader_idx for index in others):
        raise MisconfigurationException(
            f"`self.log('{name}', ..., add_dataloader_idx=False)` was called for several loaders. One value would "
            "hide the other. Put the loader into the name, or leave `add_dataloader_idx` out."
        )


def _check_attribute(name: str, metric: nn.Module, module: nn.Module) -> None:
    """A metric that is no attribute of the module would not move between devices with it."""
    if metric_path(metric, module) is None:
        raise MisconfigurationException(
            f"Could not find the `LightningModule` attribute of `self.log('{name}', {type(metric).__name__}(...))`: "
            f"this metric is not an attribute of `{type(module).__name__}`. It would be left behind when the module "
            "moves to another device, and could not be saved. Create it in `__init__` (`self.metric = ...`), or pass `metric_attribute='name.of.it'`."
        )


def capture_sums(book: LogBook) -> Callable[[], None]:
    """Remembers what the open scope has accumulated; the returned function takes out the rest. Newest values stay."""
    book.flush_deferred()
    entries = book.scope.entries
    kept = {key: entry.sums() for key, entry in entries.items()}

    def restore() -> None:
        book.flush_deferred()
        for key, entry in entries.items():
            entry.restore_sums(kept.get(key, EpochSums()))

    return restore


def explain_missing_metric(book: LogBook, asked_by: str, name: str, known: Iterable[str]) -> str:
    """The message for those who need a value over the epoch that is not there: why it is not, and what to do."""
    entries = [(key[0], e) for scope in book.scopes.values() for key, e in scope.entries.items() if e.on_step]
    for hook, entry in entries:
        if name == entry.callback_name and not entry.on_epoch:
            what = f"{asked_by}: `{name}` is not available, because `{hook}` logs it for single steps only"
            fix = f"`self.log({name!r}, ..., on_epoch=True)` makes a value of the epoch of them."
            return f"{what} (`on_step=True, on_epoch=False`). {fix}"
        if name == entry.step_name != entry.epoch_name:
            what = f"{asked_by}: `{name}` is not available: it has the values of single steps in `{hook}`."
            return f"{what} Over the epoch there is {entry.epoch_name!r}. Monitor that."
    there = list(known)
    what = f"{asked_by}: `{name}` is not available, as no such name was logged.{suggest_name(name, there)} There are {there}."
    fix = f"Call `self.log({name!r}, value)` in the LightningModule, in every epoch in which it is looked at,"
    return f"{what} {fix} or monitor one of these names."
