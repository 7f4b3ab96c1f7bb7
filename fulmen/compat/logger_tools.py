"""What loggers of others import to write theirs: hyper-parameters made flat and plain, and the files that were saved."""

from __future__ import annotations

import dataclasses
import json
import os
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fulmen.defaults import send_hparams
from fulmen.loggers.logger import as_dict

if TYPE_CHECKING:
    from fulmen.callbacks.checkpointing import ModelCheckpoint
    from fulmen.trainer import Trainer

_PLAIN = (bool, int, float, str, torch.Tensor)


def _convert_params(params: dict[str, Any] | Namespace | None) -> dict[str, Any]:
    """Hyper-parameters as a dictionary."""
    return {} if params is None else as_dict(params)


def _flatten_dict(params: Mapping[Any, Any], delimiter: str = "/", parent_key: str = "") -> dict[str, Any]:
    """Nested hyper-parameters as one level.

    >>> _flatten_dict({"a": {"b": 1}}, delimiter=".", parent_key="net")
    {'net.a.b': 1}
    """
    flat: dict[str, Any] = {}
    for name, value in as_dict(params).items():
        key = f"{parent_key}{delimiter}{name}" if parent_key else str(name)
        has_fields = dataclasses.is_dataclass(value) and not isinstance(value, type)
        nested = has_fields or isinstance(value, (Mapping, Namespace))
        flat.update(_flatten_dict(as_dict(value), delimiter, key) if nested else {key: value})
    return flat


def _sanitize_callable_params(params: dict[str, Any]) -> dict[str, Any]:
    """Functions are called if they take nothing; what is a function still is named."""
    return {name: _result_or_name(value) if callable(value) else value for name, value in params.items()}


def _result_or_name(function: Any) -> Any:
    name = function.__name__ if hasattr(function, "__name__") else type(function).__name__
    if isinstance(function, type):
        return name
    try:
        result = function()
    except Exception:  # it takes arguments, or does what it likes
        return name
    return name if callable(result) else result


def _sanitize_params(params: dict[str, Any]) -> dict[str, Any]:
    """Numbers, texts and tensors, and the text of anything else."""
    numbers = {name: v.item() if type(v).__module__ == "numpy" and not v.shape else v for name, v in params.items()}
    return {name: value if type(value) in _PLAIN else str(value) for name, value in numbers.items()}


def _convert_json_serializable(params: dict[str, Any]) -> dict[str, Any]:
    """What JSON holds, and the text of anything else."""
    return {name: value if _is_json_serializable(value) else str(value) for name, value in params.items()}


def _is_json_serializable(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, OverflowError, ValueError):
        return False
    return True


def _add_prefix(metrics: Mapping[str, Any], prefix: str, separator: str) -> Mapping[str, Any]:
    """The metrics with a prefix in front of their names."""
    return {f"{prefix}{separator}{name}": value for name, value in metrics.items()} if prefix else metrics


class SavedCheckpoint(NamedTuple):
    """A file that `ModelCheckpoint` wrote."""

    modified_s: float
    path: str
    score: Any
    tag: str


def _scan_checkpoints(checkpoint_callback: ModelCheckpoint, logged_model_time: dict[str, float]) -> list[Any]:
    """The files of a `ModelCheckpoint` that are new or newer than noted, the oldest first.

    Arguments:
        logged_model_time: paths and the times when those files were changed last, in seconds since 1970.

    Returns:
        Tuples of the time of the last change, the path, the score, and "best", "best_k" or "latest".
    """
    callback = checkpoint_callback
    found = {callback.last_model_path: (callback.current_score, "latest")}
    found[callback.best_model_path] = (callback.best_model_score, "best")
    if hasattr(callback, "best_k_models"):
        found.update({path: (score, "best_k") for path, score in callback.best_k_models.items()})
    files = [
        SavedCheckpoint(os.path.getmtime(path), path, score, tag)
        for path, (score, tag) in found.items()
        if os.path.isfile(path)
    ]
    return sorted(file for file in files if logged_model_time.get(file.path, -1.0) < file.modified_s)


def _log_hyperparams(trainer: Trainer) -> None:
    """Sends the hyper-parameters of module and datamodule to the loggers."""
    send_hparams(trainer)


def _version(loggers: list[Any], separator: str = "_") -> int | str:
    """The version of the logger, or those of several in one text."""
    if len(loggers) == 1:
        return loggers[0].version  # type: ignore[no-any-return]
    return separator.join(dict.fromkeys(str(logger.version) for logger in loggers))
