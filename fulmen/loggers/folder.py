"""Loggers that own a numbered folder, and the YAML file of hyper-parameters in it."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fulmen.loggers.logger import Logger, plain_value
from fulmen.utilities.filesystem import atomic_write, get_filesystem


class FolderLogger(Logger):
    """A logger that owns the folder ``<save_dir>/<name>/version_<N>``; without a name, that level is left out."""

    LOGGER_JOIN_CHAR = "-"
    NAME_HPARAMS_FILE = "hparams.yaml"
    log_dir_is_run_dir = True

    def __init__(self, save_dir: str | os.PathLike, name: str | None, version: int | str | None, prefix: str) -> None:
        self._save_dir = os.fspath(save_dir)
        self._name = name or ""
        self._version = version
        self._prefix = prefix

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> int | str:
        """The number or text given, else one more than the highest ``version_N`` there is."""
        if self._version is None:
            self._version = next_version(expand(self.root_dir))
        return self._version

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def root_dir(self) -> str:
        return os.path.join(self._save_dir, self._name)

    @property
    def log_dir(self) -> str:
        version = self.version if isinstance(self.version, str) else f"version_{self.version}"
        return expand(os.path.join(self.root_dir, version))


def expand(path: str) -> str:
    """The path with environment variables and ``~`` replaced."""
    return os.path.expanduser(os.path.expandvars(path))


def next_version(root_dir: str) -> int:
    """One more than the highest ``version_N`` folder, 0 if there is none."""
    files = get_filesystem(root_dir)
    names = [str(path).rstrip("/") for path in files.ls(root_dir, detail=False)] if files.isdir(root_dir) else []
    numbers = (re.search(r"version_(\d+)$", name) for name in names)
    return max((int(found[1]) + 1 for found in numbers if found), default=0)


def write_yaml(path: str, values: Mapping[str, Any]) -> None:
    """A YAML file that any reader loads safely: objects become text. The same with and without PyYAML installed."""
    atomic_write(path, ("".join(_yaml_lines(values, "")) or "{}\n").encode())


def _yaml_lines(value: Mapping | Iterable, indent: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        entries = [(f"{indent}{_yaml_scalar(str(key))}:", value[key]) for key in sorted(value, key=str)]
    else:
        entries = [(f"{indent}-", item) for item in value]
    for head, item in entries:
        item = vars(item) if isinstance(item, argparse.Namespace) else item
        if isinstance(item, (Mapping, list, tuple, set, frozenset)):
            yield f"{head}\n" if item else f"{head} {'{}' if isinstance(item, Mapping) else '[]'}\n"
            yield from _yaml_lines(item, indent + "  ")
        else:
            yield f"{head} {_yaml_scalar(plain_value(item))}\n"


def _yaml_scalar(value: bool | int | float | str | None) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
        text = float.__repr__(value)
        return text if "." in text else text.replace("e", ".0e")  # YAML 1.1 takes "1e-05" for a text
    reserved = value.lower() in ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
    if re.fullmatch(r"[A-Za-z_/][\w./\-]*", value, re.ASCII) and not reserved:
        return value
    escaped = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
    return f'"{"".join(escaped)}"'
