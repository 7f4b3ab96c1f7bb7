"""`HookPlan`: who listens to which hook, compiled once into one ready function per hook."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from fulmen.hooks import HOOKS, DataHooks, ModelHooks
from fulmen.profilers.profiler import measured
from fulmen.utilities.introspection import overridden

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fulmen.logbook import LogBook


def nothing(*_: Any) -> None:
    """The hook nobody implements."""


class HookPlan:
    """For each hook, one function that calls whoever implements it; `nothing` when nobody does.

    `plan.on_train_batch_end(outputs, batch, batch_idx)` calls two callbacks and then the module, if that is who
    listens. The return value is the module's. While a hook runs, `book.hook` holds its name: that is how `self.log`
    knows where it is. With a real profiler each listener is timed under the label users know
    (`[Callback]Name.hook`); with none, no timing code exists here.

    Arguments:
        trainer: passed to callbacks, not kept otherwise.
        base_callback: the class whose own methods count as "not implemented" (`Callback`).
        profiler: a `Profiler`; the pass-through one leaves no trace in the plan.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        callbacks: Sequence[Any],
        strategy: Any,
        book: LogBook,
        base_callback: type,
        base_strategy: type,
        profiler: Any,
    ) -> None:
        for hook in HOOKS:
            listeners = []
            if "monitors" in hook.order:
                first = [c for c in callbacks if not c.monitors]
                last = [c for c in callbacks if c.monitors]
            else:
                first, last = list(callbacks) if "callbacks" in hook.order else [], []
            module_at = None
            for callback in first:
                if overridden(callback, hook.name, base_callback):
                    listeners.append(_for_callback(callback, hook.name, trainer, module, profiler))
            if "module" in hook.order and _module_implements(module, hook.name):
                module_at = len(listeners)
                label = f"[LightningModule]{type(module).__name__}.{hook.name}"
                listeners.append(measured(profiler, label, getattr(module, hook.name)))
            for callback in last:
                if overridden(callback, hook.name, base_callback):
                    listeners.append(_for_callback(callback, hook.name, trainer, module, profiler))
            if "strategy" in hook.order and overridden(strategy, hook.name, base_strategy):
                listeners.append(_strategy_listener(strategy, hook.name, profiler))
            setattr(self, hook.name, _fired(hook.name, listeners, module_at, book))

    def __getattr__(self, name: str) -> Any:  # only for type checkers: every hook of the table is an attribute
        raise AttributeError(name)


def _module_implements(module: Any, name: str) -> bool:
    if module is None:
        return False
    base = ModelHooks if hasattr(ModelHooks, name) else DataHooks
    if hasattr(base, name):
        return overridden(module, name, base)
    return callable(getattr(module, name, None)) and overridden(module, name, _base_of(module, name))


def _base_of(module: Any, name: str) -> type:
    """The class nearest to the root that defines the hook: its version is the empty one."""
    return next(cls for cls in reversed(type(module).__mro__) if name in vars(cls))


def _for_callback(callback: Any, name: str, trainer: Any, module: Any, profiler: Any) -> Callable[..., Any]:
    bound = partial(getattr(callback, name), trainer, module)
    return measured(profiler, f"[Callback]{callback.state_key}.{name}", bound)


def _strategy_listener(strategy: Any, name: str, profiler: Any) -> Callable[..., Any]:
    return measured(profiler, f"[Strategy]{type(strategy).__name__}.{name}", getattr(strategy, name))


def _fired(name: str, listeners: list[Callable[..., Any]], module_at: int | None, book: LogBook) -> Callable[..., Any]:
    """One function for a list of listeners; the module's return value is the hook's."""
    if not listeners:
        return nothing
    if len(listeners) == 1:
        only = listeners[0]

        def fire_one(*args: Any) -> Any:
            previous, book.hook = book.hook, name
            result = only(*args)
            book.hook = previous
            return result

        return fire_one

    def fire(*args: Any) -> Any:
        previous, book.hook = book.hook, name
        answer = None
        for position, listener in enumerate(listeners):
            result = listener(*args)
            if position == module_at:
                answer = result
        book.hook = previous
        return answer

    return fire
