"""Keyword arguments that a function does not have: Python's own TypeError, with the name that was meant."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from fulmen.utilities.errors import is_one_letter_apart, suggest_name

Function = TypeVar("Function", bound=Callable[..., Any])


def unexpected_keyword(function: Callable[..., Any], name: str, known: Iterable[str]) -> TypeError:
    """The error for a keyword that the function does not take."""
    what = f"{function.__qualname__}() got an unexpected keyword argument '{name}'."
    return TypeError(what + suggest_name(name, known))


class KeywordHints:
    """The constructors of this package's own subclasses name the nearest keyword when they are given an unknown one."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("fulmen.") and "__init__" in vars(cls):
            cls.__init__ = _check_keywords(cls.__init__)  # type: ignore[method-assign]


def _check_keywords(init: Function) -> Function:
    parameters = inspect.signature(init).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters)

    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs.keys() - named:
            # What is passed on to a library is for that to judge, unless it is clear what was meant.
            if not passes_on or any(is_one_letter_apart(name, known) for known in named):
                raise unexpected_keyword(init, name, named - {"self"})
        init(self, *args, **kwargs)

    return checked_init  # type: ignore[return-value]


def hide_unknown(function: Function) -> Function:
    """A method whose ``**unknown`` only serves to refuse it: help and tools see the signature without.

    A wrapper that checks would do too, but stand on the call stack for all of a run.
    """
    signature = inspect.signature(function)
    shown = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return function


def refuse_misuse(owner: object, cls: type, function: Callable[..., Any], unknown: Mapping[str, Any]) -> None:
    """Raises if a method was called on its class instead of an instance, or for what landed in its ``**unknown``."""
    if not isinstance(owner, cls):
        what = f"{function.__qualname__}() was called on the class `{cls.__name__}`, not on an instance."
        raise TypeError(f"{what} Make one first: `{cls.__name__.lower()} = {cls.__name__}(...)`.")
    for name in unknown:
        raise unexpected_keyword(function, name, inspect.signature(function).parameters)
