"""Messages and actions that only the first process should produce."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from fulmen.utilities.errors import LightningDeprecationWarning

T = TypeVar("T")


class _ConsoleHandler(logging.Handler):
    """Writes to stderr as long as the application has not configured logging itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            print(self.format(record), file=sys.stderr)


log = logging.getLogger("fulmen")
if not log.handlers:
    log.addHandler(_ConsoleHandler())
    log.setLevel(log.level or logging.INFO)


def rank_zero_only(fn: Callable[..., T], default: T | None = None) -> Callable[..., T]:
    """A decorator for functions that only the first process runs, by ``rank_zero_only.rank`` at the time of the call.

    Args:
        fn: the function.
        default: what it returns on the other ranks.

    Returns:
        The decorated function; it raises a RuntimeError while ``rank_zero_only.rank`` is None.

    Examples:
        >>> @rank_zero_only
        ... def count_files():
        ...     return 3
        >>> count_files()
        3
    """

    @functools.wraps(fn)
    def on_rank_zero(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs) if is_rank_zero() else default

    return on_rank_zero


def set_rank(rank: int) -> None:
    """Which process this is, for everything that only the first one does: ``rank_zero_only.rank``."""
    rank_zero_only.rank = rank  # type: ignore[attr-defined]


# What the launcher said; the strategy corrects it once the processes know each other.
_announced = (os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"))
set_rank(next((int(text) for text in _announced if text.isdigit()), 0))


def current_rank() -> int | None:
    """``rank_zero_only.rank``, which users may set too."""
    rank: int | None = rank_zero_only.rank  # type: ignore[attr-defined]
    return rank


def is_rank_zero() -> bool:
    """Is this the first process?"""
    rank = current_rank()
    if rank is None:
        raise RuntimeError("`rank_zero_only.rank` is None, so nobody knows which process this is. Set it to the rank.")
    return rank == 0


# `stacklevel` is counted as in the API we follow, where two more frames lie between these functions and their caller.
_EXTRA_FRAMES = 2


def rank_zero_debug(*args: Any, stacklevel: int = 4, **kwargs: Any) -> None:
    """Log at level DEBUG from the first process."""
    if is_rank_zero():
        log.debug(*args, stacklevel=max(stacklevel - _EXTRA_FRAMES, 1), **kwargs)


def rank_zero_info(*args: Any, stacklevel: int = 4, **kwargs: Any) -> None:
    """Log at level INFO from the first process."""
    if is_rank_zero():
        log.info(*args, stacklevel=max(stacklevel - _EXTRA_FRAMES, 1), **kwargs)


def rank_zero_warn(message: str | Warning, stacklevel: int = 4, **kwargs: Any) -> None:
    """Warn from the first process, as `warn_user` does; ``category`` and the like go there."""
    if is_rank_zero():
        warn_user(message, stacklevel=stacklevel - _EXTRA_FRAMES, **kwargs)


def warn_user(
    message: str | Warning, category: type[Warning] | None = None, stacklevel: int = 1, source: object = None
) -> None:
    """`warnings.warn`, which shows the line of the user's code that led here, also from deep inside of this package.

    Filters that name a module are asked about the one that warns.
    """
    warns = sys._getframe(1)
    for _ in range(stacklevel - 1):
        warns = warns.f_back or warns
    shown: FrameType | None = warns
    while shown is not None and not _is_users(shown):
        shown = shown.f_back
    shown = shown or warns
    warnings.warn_explicit(
        message,
        category or (type(message) if isinstance(message, Warning) else UserWarning),
        shown.f_code.co_filename,
        shown.f_lineno,
        module=warns.f_globals.get("__name__", "<unknown>"),
        registry=shown.f_globals.setdefault("__warningregistry__", {}),
        source=source,
    )


_STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep
_INSTALLED = tuple(_STANDARD_LIBRARY + name + os.sep for name in ("site-packages", "dist-packages"))
_NOT_USERS = ("torch", __name__.partition(".")[0])


def _is_users(frame: FrameType) -> bool:
    """Is it code of neither this package, nor torch, nor Python itself?"""
    file = frame.f_code.co_filename
    if frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_USERS or file.startswith("<frozen"):
        return False
    return not file.startswith(_STANDARD_LIBRARY) or file.startswith(_INSTALLED)


def rank_zero_deprecation(message: str | Warning, stacklevel: int = 5, **kwargs: Any) -> None:
    """Warn from the first process that a use will be removed."""
    rank_zero_warn(message, stacklevel=stacklevel, **{"category": LightningDeprecationWarning, **kwargs})


def rank_prefixed_message(message: str, rank: int | None) -> str:
    """The message with the rank in front, when there is one."""
    return message if rank is None else f"[rank: {rank}] {message}"


class WarningCache(set[str]):
    """Gives each warning once."""

    def warn(self, message: str | Warning, stacklevel: int = 5, **kwargs: Any) -> None:
        if str(message) not in self:
            self.add(str(message))
            rank_zero_warn(message, stacklevel=stacklevel, **kwargs)


warn_once = WarningCache().warn  # once per process
