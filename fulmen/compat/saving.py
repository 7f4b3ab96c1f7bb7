"""Hyper-parameters in files of their own, under the names of the API's `core.saving`."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from fulmen.checkpoint import load
from fulmen.loggers.logger import as_dict, write_yaml
from fulmen.storage.filesystem import atomic_write, get_filesystem
from fulmen.utilities.rank_zero import rank_zero_warn

Path = str | os.PathLike[str]


def save_hparams_to_yaml(config_yaml: Path, hparams: Mapping[str, Any] | Namespace, use_omegaconf: bool = True) -> None:
    """Writes hyper-parameters as a YAML file that any reader loads safely: objects become text.

    Args:
        config_yaml: path or URL of the file; its folder exists.
        hparams: a mapping, a namespace or a configuration of OmegaConf.
        use_omegaconf: accepted for compatibility; configurations are resolved in any case.

    Raises:
        RuntimeError: the folder does not exist.
        TypeError: the hyper-parameters have no names.

    Examples:
        >>> save_hparams_to_yaml("hparams.yaml", {"lr": 0.1, "layers": [8, 4]})
        >>> print(open("hparams.yaml").read())
        layers:
        - 8
        - 4
        lr: 0.1
        <BLANKLINE>
    """
    write_yaml(os.fspath(config_yaml), _named_values(config_yaml, hparams))


def save_hparams_to_tags_csv(tags_csv: Path, hparams: Mapping[str, Any] | Namespace) -> None:
    """Writes hyper-parameters as a CSV file with the columns "key" and "value".

    Args:
        tags_csv: path or URL of the file; its folder exists.
        hparams: a mapping or a namespace.

    Raises:
        RuntimeError: the folder does not exist.
        TypeError: the hyper-parameters have no names.

    Examples:
        >>> save_hparams_to_tags_csv("hparams.csv", {"lr": 0.1, "name": "net"})
        >>> load_hparams_from_tags_csv("hparams.csv")
        {'lr': 0.1, 'name': 'net'}
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    values = _named_values(tags_csv, hparams)
    writer.writerows([("key", "value"), *((name, str(value)) for name, value in values.items())])
    atomic_write(os.fspath(tags_csv), text.getvalue().encode())


def load_hparams_from_tags_csv(tags_csv: Path) -> dict[str, Any]:
    """Hyper-parameters from a CSV file with the columns "key" and "value".

    Args:
        tags_csv: path or URL of the file.

    Returns:
        The values, read as Python literals where possible; nothing, with a warning, if there is no such file.
    """
    return load.load_hparams(tags_csv) if _is_there(tags_csv) else {}


def load_hparams_from_yaml(config_yaml: Path, use_omegaconf: bool = True) -> dict[str, Any]:
    """Hyper-parameters from a YAML file; names of functions and classes in it are refused.

    Args:
        config_yaml: path or URL of the file.
        use_omegaconf: accepted for compatibility; the result is always a dictionary.

    Returns:
        The mapping in the file; nothing, with a warning, if there is no such file.

    Raises:
        ValueError: the file names an object of Python, which could run any code.
    """
    return load.load_hparams_from_yaml(config_yaml, use_omegaconf) if _is_there(config_yaml) else {}


def _is_there(path: Path) -> bool:
    found = bool(get_filesystem(path).exists(os.fspath(path)))
    if not found:
        rank_zero_warn(f"There are no hyper-parameters at {os.fspath(path)!r}: the file does not exist.")
    return found


def _named_values(path: Path, hparams: object) -> dict[str, Any]:
    """The values by name, once it is known that they can be written."""
    folder = os.path.dirname(os.fspath(path))
    if folder and not get_filesystem(path).isdir(folder):
        raise RuntimeError(f"Missing folder: {folder}. Make it before hyper-parameters are written into it.")
    try:
        return as_dict(hparams)
    except (TypeError, ValueError) as error:
        what = f"Hyper-parameters must be a dictionary or a namespace, not a `{type(hparams).__name__}`."
        raise TypeError(f"{what} Give each of them a name.") from error
