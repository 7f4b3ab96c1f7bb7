"""Bringing old checkpoints up to date, under the names and in the shape of the API."""

from __future__ import annotations

import sys
import threading
from types import ModuleType, TracebackType
from typing import Any

from fulmen.checkpoint import lightning_format
from fulmen.checkpoint.lightning_format import API_VERSION, VERSION_KEY, parse_version, refuse_foreign
from fulmen.utilities.lazy import has_module
from fulmen.utilities.types import LightningEnum

# What is done on the way to each version, in the words of `lightning_format`.
_STEPS = {
    "1.6.0": ["read_epochs_and_steps"],
    "1.9.0": ["rename_callback_states"],
    "2.0.0": ["rename_precision_state", "rename_loop_counters"],
}


def migrate_checkpoint(
    checkpoint: dict[str, Any], target_version: str | None = None
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Brings the content of a file up to date, in place.

    Args:
        checkpoint: what the file holds.
        target_version: a version that is older than today's leaves out what changed after it; a checkpoint that is
            at least as new stays as it is.

    Returns:
        The same dictionary, and by version what was done to reach it.

    Raises:
        KeyError: the content does not say which version wrote it.

    Examples:
        >>> checkpoint, done = migrate_checkpoint({"pytorch-lightning_version": "1.9.0", "loops": {}})
        >>> checkpoint["pytorch-lightning_version"], done
        ('2.6.6', {'2.0.0': ['rename_precision_state', 'rename_loop_counters']})
    """
    refuse_foreign(checkpoint)
    found = parse_version(checkpoint[VERSION_KEY])
    target = parse_version(target_version or API_VERSION)
    due = {version: steps for version, steps in _STEPS.items() if found < parse_version(version) <= target}
    if not due and target_version is not None:
        return checkpoint, {}
    lightning_format.migrate_checkpoint(checkpoint)
    return checkpoint, due


class _FaultTolerantMode(LightningEnum):
    """A switch of versions before 1.9, which their files name."""

    DISABLED = "disabled"
    AUTOMATIC = "automatic"
    MANUAL = "manual"


def _gpus_arg_default(x: object) -> object:
    """The default of an argument before version 1.3, which their files name."""
    return x


_GONE: dict[str, dict[str, object]] = {
    "pytorch_lightning": {},
    "pytorch_lightning.utilities": {},
    "pytorch_lightning.utilities.enums": {"_FaultTolerantMode": _FaultTolerantMode},
    "pytorch_lightning.utilities.argparse_utils": {"_gpus_arg_default": _gpus_arg_default},
    "fulmen.utilities.argparse_utils": {"_gpus_arg_default": _gpus_arg_default},
}


class pl_legacy_patch:
    """A context in which very old files can be unpickled: they name modules that are gone.

    Loading does without it. It is for `torch.load` of such a file by hand, which runs code of the file. What is really
    installed stays what it is.

    Examples:
        >>> with pl_legacy_patch():
        ...     from pytorch_lightning.utilities.argparse_utils import _gpus_arg_default
        >>> _gpus_arg_default(2)
        2
    """

    _lock = threading.RLock()  # of `sys.modules`, where threads would take away what others need

    def __init__(self) -> None:
        self._added: list[str] = []

    def __enter__(self) -> pl_legacy_patch:
        self._lock.acquire()
        for path, names in _GONE.items():
            if path not in sys.modules and not has_module(path):
                module = ModuleType(path)
                module.__dict__.update(names, __path__=[])
                sys.modules[path] = module
                self._added.append(path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for path in self._added:
            sys.modules.pop(path, None)
        self._added.clear()
        self._lock.release()
