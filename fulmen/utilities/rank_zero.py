"""Messages and actions that only the first process should produce."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
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


def rank_zero_only(fn: Callable[..., T], default: Any = None) -> Callable[..., T]:
    """A function that runs where ``rank_zero_only.rank`` is 0 at the time of the call, and else returns ``default``."""

    @functools.wraps(fn)
    def on_rank_zero(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs) if is_rank_zero() else default

    return on_rank_zero


# What the launcher said; the strategy corrects it once the processes know each other.
_announced = (os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"))
rank_zero_only.rank = next((int(text) for text in _announced if text.isdigit()), 0)  # type: ignore[attr-defined]


def is_rank_zero() -> bool:
    """Is this the first process?"""
    rank = getattr(rank_zero_only, "rank", None)
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
    """Warn from the first process; ``category`` and the like go to `warnings.warn`."""
    if is_rank_zero():
        warnings.warn(message, stacklevel=max(stacklevel - _EXTRA_FRAMES, 1), **kwargs)


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
