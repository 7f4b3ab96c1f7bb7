"""`HookPlan`: who listens to which hook, compiled once into one ready function per hook."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from fulmen.callbacks.callback import Callback
from fulmen.engine.strategy import Strategy
from fulmen.hooks import HOOKS, nothing
from fulmen.loops.signatures import names_of
from fulmen.module import LightningModule
from fulmen.profilers.profiler import Profiler, measured
from fulmen.utilities.introspection import adapt_to_signature, is_overridden, overrides_method
from fulmen.utilities.seed import isolate_rng

if TYPE_CHECKING:
    from fulmen.metrics.logbook import LogBook
    from fulmen.trainer import Trainer


# Reads all hooks of an object at once.
_READERS = {
    base: attrgetter(*(hook.name for hook in HOOKS if hasattr(base, hook.name)))
    for base in (Callback, LightningModule, Strategy)
}


class EvaluationHooks(NamedTuple):
    """The hooks around an evaluation, whichever it is."""

    start: Callable[..., Any]
    epoch_start: Callable[..., Any]
    batch_start: Callable[..., Any]
    batch_end: Callable[..., Any]
    epoch_end: Callable[..., Any]
    end: Callable[..., Any]


class HookPlan:
    """For each hook, one function that calls whoever implements it; `nothing` when nobody does.

    `plan.on_train_batch_end(outputs, batch, batch_idx)` calls two callbacks and then the module, if that is who
    listens. The return value is the module's. While a hook runs, `book.hook` holds its name: that is how `self.log`
    knows where it is. With a real profiler each listener is timed under the label users know
    (`[Callback]Name.hook`); with none, no timing code exists here.

    Arguments:
        trainer: passed to callbacks, not kept otherwise.
        profiler: a `Profiler`; the pass-through one leaves no trace in the plan.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, callbacks: Sequence[Callback], strategy: Strategy,
        book: LogBook, profiler: Profiler,
    ) -> None:  # fmt: skip
        self._book = book
        self._profiler = profiler
        self._methods = _methods_of(module, callbacks, strategy)

        def find_listeners(
            parties: Sequence[Any], base: type, kind: str, name: str, *given: Any
        ) -> list[Callable[..., Any]]:
            """Those of the parties that implement the hook, timed if somebody profiles."""
            return [
                measured(
                    profiler,
                    f"[{kind}]{_profile_label(party)}.{name}",
                    partial(_bind_listener(party, name, base), *given),
                )
                for party in parties
                if overrides_method(party, name, base)
            ]

        for hook in HOOKS:
            name = hook.name
            order = hook.order
            monitors = [c for c in callbacks if c.monitors] if "monitors" in order else []
            first = [c for c in callbacks if c not in monitors] if "callbacks" in order else []
            found = find_listeners(first, Callback, "Callback", name, trainer, module)
            module_at = len(found) if "module" in order and is_overridden(name, module) else None
            if module_at is not None:
                method = _by_name(getattr(module, name), names_of(LightningModule, name))
                found.append(measured(profiler, f"[LightningModule]{_profile_label(module)}.{name}", method))
            found += find_listeners(monitors, Callback, "Callback", name, trainer, module)
            if "strategy" in order:
                found += find_listeners([strategy], Strategy, "Strategy", name)
            setattr(self, name, _compile_hook(name, found, module_at, book))

    def is_current(
        self, module: LightningModule, callbacks: Sequence[Callback], strategy: Strategy, book: LogBook,
        profiler: Profiler,
    ) -> bool:  # fmt: skip
        """Would a plan for these objects be the same, since neither they nor their methods have changed?"""
        if book is not self._book or profiler is not self._profiler:
            return False
        return self._methods is not None and self._methods == _methods_of(module, callbacks, strategy)

    def evaluation_hooks(self, kind: str) -> EvaluationHooks:
        """Those of "validation", "test" or "predict"."""
        names = [f"on_{kind}_{name}" for name in EvaluationHooks._fields]
        return EvaluationHooks._make(attrgetter(*names)(self))

    def __getattr__(self, name: str) -> Any:  # only for type checkers: every hook of the table is an attribute
        raise AttributeError(name)


def update_plan(plan: HookPlan | None, trainer: Trainer) -> HookPlan:
    """The plan that is there, or a new one if an object that listens, or a method of one, has changed."""
    parties = (trainer.lightning_module, trainer.callbacks, trainer.strategy, trainer.book, trainer.profiler)
    return plan if plan is not None and plan.is_current(*parties) else HookPlan(trainer, *parties)


def _methods_of(
    module: LightningModule, callbacks: Sequence[Callback], strategy: Strategy
) -> tuple[object, ...] | None:
    """What a plan is compiled from; two are equal if all methods are the same functions of the same objects.

    None for an object that lacks a hook, as one that only looks like a callback may.
    """
    try:
        return (
            [id(party) for party in (module, strategy, *callbacks)],
            _READERS[LightningModule](module),
            _READERS[Strategy](strategy),
            [(_READERS[Callback](callback), callback.monitors) for callback in callbacks],
        )
    except AttributeError:
        return None


def _by_name(method: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """The method, for calls by position, if some of what it takes can only be passed by name."""
    function = inspect.unwrap(method.__func__ if inspect.ismethod(method) else method)
    code = function.__code__ if hasattr(function, "__code__") else None
    if code is None or not (code.co_kwonlyargcount or code.co_flags & inspect.CO_VARKEYWORDS):
        return method
    return adapt_to_signature(method, method, names)


def _bind_listener(party: object, name: str, base: type) -> Callable[..., Any]:
    """What is called: what only shows something leaves the random numbers of the run alone, also when it imports."""
    method = _by_name(getattr(party, name), names_of(base, name))
    once_per_batch = "batch" in name
    shows = isinstance(party, Callback) and party.only_shows
    return isolate_rng()(method) if shows and not once_per_batch else method


def _profile_label(party: object) -> str:
    return party.state_key if isinstance(party, Callback) else type(party).__name__


def _compile_hook(
    name: str, listeners: list[Callable[..., Any]], module_at: int | None, book: LogBook
) -> Callable[..., Any]:
    """One function for a list of listeners; the module's return value is the hook's."""
    if not listeners:
        return nothing
    if len(listeners) == 1:
        only = listeners[0]

        def fire_one(*args: Any) -> Any:
            previous = book.hook
            book.hook = name
            result = only(*args)
            book.hook = previous
            return result

        return fire_one

    def fire_all(*args: Any) -> Any:
        previous = book.hook
        book.hook = name
        answer = None
        for position, listener in enumerate(listeners):
            result = listener(*args)
            if position == module_at:
                answer = result
        book.hook = previous
        return answer

    return fire_all
