"""Questions about code: is it overridden, what does it accept, whose is it?"""

from __future__ import annotations

import dis
import functools
import inspect
import math
import os
import sysconfig
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch


def _plain_function(attribute: object) -> object:
    """What stands behind bound methods, class methods and partials."""
    while isinstance(attribute, functools.partial):
        attribute = attribute.func
    return attribute.__func__ if isinstance(attribute, MethodType) else attribute


def _code_of(function: Callable[..., Any]) -> CodeType | None:
    """The code that runs behind wrappers, bound methods and partials; None where it is not Python's."""
    found = _plain_function(function)
    found = _plain_function(inspect.unwrap(found)) if callable(found) else found
    return found.__code__ if isinstance(found, FunctionType) else None


def overrides_method(obj: object, name: str, base: type) -> bool:
    """Does ``obj`` (None does not) answer to ``name``, on class or instance, with another function than ``base``'s?"""
    attribute = getattr(obj, name, None) if obj is not None else None
    declared = getattr(base, name, None)
    if type(declared) is not FunctionType:
        declared = _plain_function(declared)
    if type(attribute) is MethodType:  # nearly always, and this is asked in every epoch
        return attribute.__func__ is not declared
    return callable(attribute) and _plain_function(attribute) is not declared


def is_overridden(method_name: str, instance: object | None = None, parent: type | None = None) -> bool:
    """Did the user's class give this method a body of its own?

    Without ``parent``, the comparison is with the class of this library that first declares the method.
    """
    if instance is None:
        return False
    if parent is None:
        ours = [cls for cls in reversed(type(instance).__mro__) if cls.__module__.startswith("fulmen.")]
        if not ours:
            raise ValueError(f"`{type(instance).__name__}` is of no fulmen class. Give a `parent` to compare with.")
        parent = next((cls for cls in ours if method_name in vars(cls)), ours[0])
    return hasattr(parent, method_name) and overrides_method(instance, method_name, parent)


def is_written_outside(obj: object, name: str) -> bool:
    """Is a method of an object one that no class of this library has?"""
    module = getattr(_plain_function(getattr(obj, name)), "__module__", None)
    return not str(module).startswith("fulmen.")


def is_generator(fn: Callable[..., Any]) -> bool:
    """Does calling ``fn`` give a generator?"""
    return inspect.isgeneratorfunction(inspect.unwrap(fn))


def returns_nothing(fn: Callable[..., Any]) -> bool:
    """Is None all that ``fn`` can return, as its code says? False where there is no code to read."""
    code = _code_of(fn)
    if code is None or code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE):
        return False
    steps = list(dis.get_instructions(code))
    # A return that is jumped to may give what was computed elsewhere.
    values = [(before, step) for before, step in pairwise(steps) if step.opname == "RETURN_VALUE"]
    plain = all(b.opname == "LOAD_CONST" and b.argval is None and not step.is_jump_target for b, step in values)
    return plain and all(step.argval is None for step in steps if step.opname == "RETURN_CONST")


def parameters_of(fn: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters a caller may pass (without ``self`` for bound methods), or [] for what cannot be inspected."""
    try:
        return list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        return []


def takes_argument(fn: Callable[..., Any], name: str, *, explicit: bool = False) -> bool:
    """May ``fn`` be called with the keyword ``name``? With ``explicit``, ``**kwargs`` does not count."""
    found = parameters_of(fn)
    by_name = any(p.name == name and p.kind is not p.POSITIONAL_ONLY for p in found)
    return by_name or (not explicit and any(p.kind is p.VAR_KEYWORD for p in found))


def num_positional(fn: Callable[..., Any]) -> float:
    """How many arguments ``fn`` accepts by position; infinite with ``*args``."""
    found = parameters_of(fn)
    if any(p.kind is p.VAR_POSITIONAL for p in found):
        return math.inf
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in found)


def match_parameters(fn: Callable[..., Any], names: Sequence[str]) -> tuple[list[int], dict[str, int]]:
    """How ``fn`` takes arguments of these names: the places of those by position, and of those by name only.

    What it does not take at all is in neither. Positions count; names matter to keyword-only parameters and ``**kwargs``.
    """
    found = parameters_of(fn)
    by_name = {p.name for p in found if p.kind is p.KEYWORD_ONLY}
    others = [index for index, name in enumerate(names) if name not in by_name]
    capacity = int(min(num_positional(fn), len(others)))
    left = others[capacity:] if any(p.kind is p.VAR_KEYWORD for p in found) else []
    return others[:capacity], {name: i for i, name in enumerate(names) if name in by_name or i in left}


def adapt_to_signature(call: Callable[..., Any], fn: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """``call`` for arguments of these names by position, which gets them as the signature of ``fn`` takes them.

    What ``fn`` does not take is left out; that of a function which cannot be inspected gets everything.
    """
    positions, named = match_parameters(fn, names)
    if len(positions) == len(names) or not parameters_of(fn):
        return call
    if not named and positions == [0]:
        return lambda first, *_: call(first)
    return lambda *given: call(
        *[given[i] for i in positions if i < len(given)],
        **{name: given[i] for name, i in named.items() if i < len(given)},
    )


def alias_property(path: str, doc: str) -> Any:
    """A property that forwards to an attribute of a part (`"strategy.world_size"`), for reading and writing."""
    *parts, name = path.split(".")

    def find_part(obj: Any) -> Any:
        return functools.reduce(getattr, parts, obj)  # not `attrgetter`, which torch cannot compile

    def write(obj: Any, value: object) -> None:
        setattr(find_part(obj), name, value)

    # Without a second call for the short paths, which are read all the time.
    if not parts:
        return property(lambda obj: getattr(obj, name), write, doc=doc)
    if len(parts) == 1:
        part = parts[0]
        return property(lambda obj: getattr(getattr(obj, part), name), write, doc=doc)
    if len(parts) == 2:
        outer, inner = parts
        return property(lambda obj: getattr(getattr(getattr(obj, outer), inner), name), write, doc=doc)
    return property(lambda obj: getattr(find_part(obj), name), write, doc=doc)


# Where frames of this package say that they are: of a tree without sources, where it was compiled.
PACKAGE_FOLDER = os.path.dirname(os.path.dirname(_plain_function.__code__.co_filename))
_INSTALLED = tuple(
    os.path.join(path, "")
    for path in (
        PACKAGE_FOLDER,
        os.path.dirname(os.path.dirname(__file__)),
        os.path.dirname(torch.__file__),
        *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    )
)


def in_library(file: str) -> bool:
    """Is a source file one of Python, of an installed package or of this one, and so not the user's own?"""
    return file.startswith((*_INSTALLED, "<frozen", "<string>"))


def texts_compared_with(function: Callable[..., Any], parameter: str) -> list[set[str]]:
    """The constant texts that a function compares its parameter with: per comparison one, or those of an `in (...)`.

    Read from the compiled code, because a function typed into an interpreter has no source.
    """
    code = _code_of(function)
    if code is None:
        return []
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "NOP")]
    if any(step.argval == parameter and step.opname.startswith("STORE") for step in steps):
        return []  # it has another meaning from there on
    compared = zip(steps, steps[1:], steps[2:], strict=False)
    pairs = [(left, right) for left, right, last in compared if last.opname in ("COMPARE_OP", "CONTAINS_OP")]
    constants = [_constant_beside(parameter, left, right) for left, right in pairs]
    return [{value for value in values if isinstance(value, str)} for values in constants if values is not None]


def _constant_beside(
    parameter: str, left: dis.Instruction, right: dis.Instruction
) -> Sequence[object] | frozenset[object] | None:
    """What a comparison of the parameter compares it with; None if that is no constant, or the parameter is not there."""
    constants = [step.argval for step in (left, right) if step.opname == "LOAD_CONST"]
    if parameter not in (left.argval, right.argval) or not constants:
        return None
    return constants[0] if isinstance(constants[0], (tuple, frozenset)) else constants
