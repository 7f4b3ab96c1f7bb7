"""Errors of a command line: which file and line, which key, and the nearest name that exists."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

import yaml
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fulmen.callbacks.callback import Callback
from fulmen.datamodule import LightningDataModule
from fulmen.engine.strategy import Strategy
from fulmen.loggers.logger import Logger
from fulmen.module import LightningModule
from fulmen.profilers.profiler import Profiler
from fulmen.utilities.errors import find_nearest_name

CLASSES = (LightningModule, LightningDataModule, Callback, Logger, Profiler, Strategy, Optimizer, LRScheduler)
# How jsonargparse writes that a key is wrong, and that nobody knows it.
WRONG = (r"Parser key \"(?P<key>[^\"]+)\"", r"key \"(?P<key>[^\"]+)\"")
UNKNOWN = (
    r"unrecognized arguments: --(?P<key>[\w.]+)",
    r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'",
    r"Subcommand '[^']+' does not accept option '(?P<key>[^']+)'",
    r"^Option '(?P<key>[^']+)' is not accepted",
    r"does not accept (?:nested )?(?:key|option) '(?P<key>[^']+)'",
    r"No action for key \"(?P<key>[^\"]+)\"",
    r"Key '(?P<key>[^']+)' is not expected",
)
CLASS = r"Expected a dot import path string: (?P<name>[\w.]+)"


def explain(message: str, files: Iterable[str], keys: Iterable[str]) -> str:
    """The message of jsonargparse, with the place in a configuration file and the nearest right name.

    Arguments:
        message: What jsonargparse says.
        files: Paths of the configuration files that were read, in their order.
        keys: All arguments of the program.
    """
    existing = [path for path in files if os.path.isfile(path)]
    unknown = _find_key(message, UNKNOWN)
    key = unknown or _find_key(message, WRONG)
    added = []
    if place := _locate_syntax_error(message, existing) or (key and _locate_key(key, existing)):
        added.append(f"In {place}.")
    nearest = _nearest_key(unknown, keys) if unknown else _nearest_class(message)
    if nearest:
        added.append(f"Did you mean `{nearest}`?")
    return "\n".join([message.rstrip(), *added])


def _find_key(message: str, patterns: Iterable[str]) -> str | None:
    for pattern in patterns:
        if found := re.search(pattern, message):
            parts = found.groupdict()
            return f"{parts['group']}.{parts['key']}" if parts.get("group") else parts["key"]
    return None


def _nearest_key(key: str, keys: Iterable[str]) -> str | None:
    """The key most like it; only the last part, if there are others beside it in its group."""
    known = set(keys)
    group, _, last = key.rpartition(".")
    beside = {name.removeprefix(f"{group}."): name for name in known if group and name.startswith(f"{group}.")}
    found = find_nearest_name(last, beside)
    return beside[found] if found else find_nearest_name(key, known)


def _nearest_class(message: str) -> str | None:
    """The class most like one that could not be imported."""
    given = re.search(CLASS, message)
    if given is None:
        return None
    name = given["name"]
    names = {cls.__name__ for cls in _subclasses(CLASSES)}
    return None if name in names else find_nearest_name(name.rpartition(".")[2], names)


def _subclasses(classes: Iterable[type]) -> Iterator[type]:
    for cls in classes:
        yield cls
        yield from _subclasses(type.__subclasses__(cls))


def _locate_syntax_error(message: str, files: Iterable[str]) -> str | None:
    """Where the file ends to be YAML; the newest file was the one being read."""
    if "parsing" not in message:
        return None
    for path in reversed(list(files)):
        try:
            _read_nodes(path)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            return f"{path!r}, line {mark.line + 1}" if mark else repr(path)
    return None


def _locate_key(key: str, files: Iterable[str]) -> str | None:
    """The file and line where the key stands; later files win."""
    for path in reversed(list(files)):
        try:
            root = _read_nodes(path)
        except yaml.YAMLError:
            continue
        if line := _line_of(root, key.split(".")):
            return f"{path!r}, line {line}"
    return None


def _read_nodes(path: str) -> yaml.Node | None:
    with open(path, encoding="utf-8") as file:
        return yaml.compose(file, Loader=yaml.SafeLoader)


def _line_of(node: yaml.Node | None, parts: list[str]) -> int | None:
    """Line of a key below a node; a file for one verb may leave out the verb, or the other way round."""
    if not isinstance(node, yaml.MappingNode):
        return None
    for name, value in node.value:
        if name.value == parts[0]:
            below = _line_of(value, parts[1:]) if parts[1:] else None
            return below or (name.start_mark.line + 1 if not parts[1:] or _skips_level(value) else None)
    return _line_of(node, parts[1:]) if len(parts) > 1 else None


def _skips_level(node: yaml.Node) -> bool:
    """A value that is no mapping is itself what is wrong below this key."""
    return not isinstance(node, yaml.MappingNode)
