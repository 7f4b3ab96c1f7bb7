"""Exception and warning classes, and suggestions for names that nobody knows."""

from __future__ import annotations

import difflib
import os
import reprlib
import signal
import warnings
from collections.abc import Iterable

INTERRUPTED = 128 + signal.SIGINT  # the exit status after Ctrl-C, by convention


class MisconfigurationException(Exception):
    """The user's code or arguments ask for something that cannot work."""


class InvalidChoiceError(MisconfigurationException, ValueError):
    """An argument that says which machine to use has a value that cannot be."""


class InvalidPluginError(MisconfigurationException, TypeError):
    """What was given as a part of the machine is none."""


class UnavailableError(MisconfigurationException, RuntimeError):
    """What was asked for exists, but not here."""


class SIGTERMException(SystemExit):
    """Raised inside the loops when the process was told to end; plug-ins may react in ``on_exception``."""


class _TunerExitException(Exception):
    """Ends a run that was only there to tune something; nothing has failed."""


class PossibleUserWarning(UserWarning):
    """Something that is probably, but not certainly, a mistake."""


class LightningDeprecationWarning(DeprecationWarning):
    """A use that still works today and will be removed."""


# Python hides deprecations outside of `__main__`; ours are meant for users. A filter added later by the user wins.
warnings.simplefilter("default", category=LightningDeprecationWarning)


def disable_possible_user_warnings(module: str = "") -> None:
    """Hide each `PossibleUserWarning` from modules that match; ``POSSIBLE_USER_WARNINGS=off`` hides it from all."""
    warnings.filterwarnings("ignore", module=module, category=PossibleUserWarning)


if os.environ.get("POSSIBLE_USER_WARNINGS", "").lower() in ("0", "off"):
    disable_possible_user_warnings()


class _ShortRepr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxother = 80
        self.maxstring = 80


_SHORT = _ShortRepr()


def explain(what: str, why: str = "", fix: str = "") -> str:
    """A message in the form of this package: what is wrong, why that matters, and how it is put right.

    Args:
        what: what was expected or received; a full stop is added where it ends without a mark.
        why: the reason, where it is not plain.
        fix: what to write instead.

    Returns:
        The parts that are not empty, as sentences.

    Examples:
        >>> explain("`max_epochs=-2` is negative", fix="Use -1 for no limit")
        '`max_epochs=-2` is negative. Use -1 for no limit.'
    """
    parts = [part.strip() for part in (what, why, fix)]
    return " ".join(part if part[-1] in ".:;,!?" else f"{part}." for part in parts if part)


def with_cause(error: BaseException, cause: BaseException | None) -> BaseException:
    """The error, as `raise error from cause` would raise it."""
    error.__cause__ = cause
    return error


def describe_received(value: object) -> str:
    """How an error names a value of the wrong type; for a class, how an instance of it is made."""
    if isinstance(value, type):
        name = value.__name__
        return f"the class `{name}` instead of an instance (pass `{name}(...)`, not `{name}`)"
    text = " ".join(_SHORT.repr(value).split())
    return f"{text}, {'an' if type(value).__name__[0] in 'aeiouAEIOU' else 'a'} {type(value).__name__}"


def find_nearest_name(name: str, choices: Iterable[str]) -> str | None:
    """The choice spelled most like ``name``, or None when nothing comes close."""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[found[0]] if found else None


def suggest_name(name: str, choices: Iterable[str]) -> str:
    """A sentence to append to an error about an unknown name (with its leading space), or an empty string."""
    found = find_nearest_name(name, choices)
    return f" Did you mean `{found}`?" if found else ""


def is_one_letter_apart(name: str, other: str) -> bool:
    """Is one of the two the other with a letter changed, added or left out, or with two neighbours swapped?"""
    start = _shared_start(name, other)
    name = name[start:]
    other = other[start:]
    end = _shared_start(name[::-1], other[::-1])
    name = name[: len(name) - end]
    other = other[: len(other) - end]
    return name != other and (max(len(name), len(other)) == 1 or (len(name) == 2 and name == other[::-1]))


def _shared_start(name: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(name, other, strict=False)) if a != b), min(len(name), len(other)))
