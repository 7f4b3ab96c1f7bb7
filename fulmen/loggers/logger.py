"""What every logger offers: the base classes, hyper-parameters as plain values, and their YAML file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from fulmen.metrics.values import count_elements
from fulmen.storage.filesystem import atomic_write, get_filesystem, is_remote
from fulmen.utilities.keywords import KeywordHints
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_only, warn_once
from fulmen.utilities.seed import isolate_rng

if TYPE_CHECKING:
    from fulmen.callbacks.checkpointing import ModelCheckpoint

T = TypeVar("T")
Params = dict[str, Any] | argparse.Namespace
# Of hyper-parameters: arrays with more elements are abbreviated, what is nested deeper (in itself, say) is shown as text.
MAX_ELEMENTS = 100
MAX_DEPTH = 20
_NESTED = (Mapping, list, tuple, set, frozenset)


class FabricLogger(KeywordHints, ABC):
    """Takes the numbers of a program that uses Fabric somewhere; a logger of your own needs the four abstract members.

    Examples:
        >>> class Prints(FabricLogger):
        ...     name = version = "prints"
        ...     def log_metrics(self, metrics, step=None):
        ...         print(step, metrics)
        ...     def log_hyperparams(self, params):
        ...         print(params)
        >>> Prints().log_metrics({"loss": 0.5}, step=3)
        3 {'loss': 0.5}
    """

    @property
    @abstractmethod
    def name(self) -> str | None:
        """What the run belongs to: a project or experiment."""

    @property
    @abstractmethod
    def version(self) -> int | str | None:
        """Which run of `name` this is."""

    root_dir = property(lambda self: None, doc="The folder of all versions, for loggers that write files.")
    log_dir = property(lambda self: None, doc="The folder of this version, for loggers that write files.")
    group_separator = property(lambda self: "/", doc="What separates the parts of a metric's name.")

    @abstractmethod
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Record numbers at a position of the x axis. The Trainer has already fetched them from the device.

        Args:
            metrics: numbers by name.
            step: their position on the x axis.
        """

    @abstractmethod
    def log_hyperparams(self, params: Params, *args: Any, **kwargs: Any) -> None:
        """Record how the run was configured.

        Args:
            params: a mapping, a namespace or a dataclass, nested or not.
        """

    def log_graph(self, model: torch.nn.Module, input_array: torch.Tensor | None = None) -> None:
        """Record the structure of the model.

        Args:
            model: whose layers are shown.
            input_array: an example of its input.
        """

    def save(self) -> None:
        """Called after each group of calls of the Trainer, several times per second in fast runs: keep it cheap."""

    def finalize(self, status: str) -> None:
        """The run is over.

        Args:
            status: "success", "failed" or "finished" (interrupted, to be continued).
        """
        self.save()


class Logger(FabricLogger):
    """Takes the numbers of a run somewhere; a logger of your own needs the four abstract members of `FabricLogger`.

    `rank_zero_only` is for what must happen once per run, `rank_zero_experiment` for an ``experiment`` property.

    Examples:
        >>> class Prints(Logger):
        ...     name = version = "prints"
        ...     def log_metrics(self, metrics, step=None):
        ...         print(step, metrics)
        ...     def log_hyperparams(self, params):
        ...         print(params)
        >>> Prints().log_metrics({"loss": 0.5}, step=3)
        3 {'loss': 0.5}
    """

    save_dir = property(lambda self: None, doc="The folder under which checkpoints of this run are put.")
    opens_first: bool = False  # does its library have to see the writers that are made afterwards?
    log_dir_is_run_dir = False  # whether `trainer.log_dir` means `log_dir` rather than `save_dir`

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """A checkpoint was written.

        Args:
            checkpoint_callback: the `ModelCheckpoint` that wrote it, which knows where it is.
        """

    def state_dict(self) -> Any:
        """How much is written, in plain types, for a checkpoint; what waits in memory is written first."""

    def resume_from(self, state: Any, step: int) -> None:
        """A run resumes at this step: what was written after `state`, by that run only, is removed.

        Args:
            state: what `state_dict` returned.
            step: the first one that will be logged.
        """


class DummyExperiment:
    """Stands where another process has the real experiment: every attribute and index is itself, every call None."""

    def __call__(self, *args: Any, **kwargs: Any) -> None: ...

    __setitem__ = __call__

    def __getitem__(self, index: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for special methods and must be told that there are none
            raise AttributeError(name)
        return self


def rank_zero_experiment(fn: Callable[..., T]) -> Callable[..., T]:
    """For an ``experiment`` property: the real object in the first process, one that ignores everything elsewhere."""
    stand_in: Any = DummyExperiment()
    return rank_zero_only(fn, default=stand_in)


class DummyLogger(DummyExperiment, Logger):
    """Accepts any call and forgets it; stands in for the loggers of a ``fast_dev_run``."""

    name = version = ""
    log_metrics = log_hyperparams = DummyExperiment.__call__

    @property
    def experiment(self) -> DummyExperiment:
        """An object that accepts any call and forgets it."""
        return DummyExperiment()


def _take_mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def merge_dicts(
    dicts: Sequence[Mapping[str, Any]],
    agg_key_funcs: Mapping[str, Any] | None = None,
    default_func: Callable[[Sequence[float]], float] = _take_mean,
) -> dict[str, Any]:
    """One dictionary of several: of each key, one value is made of all that there are.

    Args:
        dicts: metrics by name, nested or not.
        agg_key_funcs: by name, the function that makes one value of several; nested as the metrics are.
        default_func: the function for all other names; by default the mean.

    Returns:
        A new dictionary with all the names.

    Examples:
        >>> merge_dicts([{"loss": 1.0, "best": 3}, {"loss": 2.0, "best": 1}], agg_key_funcs={"best": min})
        {'loss': 1.5, 'best': 1}
    """
    functions = agg_key_funcs or {}
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for metrics in dicts for key in metrics):
        values = [metrics[key] for metrics in dicts if key in metrics]
        if isinstance(values[0], Mapping):
            merged[key] = merge_dicts(values, functions.get(key), default_func)
        else:
            merged[key] = functions.get(key, default_func)(values)
    return merged


class ExperimentLogger(Logger):
    """A logger that works through one object of its library, made when it is first used (`_open_experiment`)."""

    LOGGER_JOIN_CHAR = "-"

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._experiment: Any = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The library's own object, for everything this logger has no method for."""
        if self._experiment is None:
            with isolate_rng():  # clients draw names and ids
                self._experiment = self._open_experiment()
        return self._experiment

    @abstractmethod
    def _open_experiment(self) -> Any:
        """Starts or continues the run."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_experiment": None}  # another process opens its own connection to the same run


class FolderLogger(ExperimentLogger):
    """A logger that owns the folder ``<save_dir>/<name>/version_<N>``; without a name, that level is left out."""

    NAME_HPARAMS_FILE = "hparams.yaml"
    # `save` is called after everything the Trainer logs; nobody sees it if files follow at most this much later.
    WRITE_EVERY_SECONDS = 5.0
    log_dir_is_run_dir = True
    _written_at = float("-inf")

    def __init__(
        self, save_dir: str | os.PathLike[str], name: str | None, version: int | str | None, prefix: str
    ) -> None:
        super().__init__(prefix)
        self._save_dir = os.fspath(save_dir)
        self._name = name or ""
        self._version = version
        self._sub_dir: str | None = None
        self.claimed = version is not None  # is the folder this run's own, or meant to be shared?

    def use_version(self, version: int | str, claimed: bool) -> None:
        """Writes into the folder of this version; `claimed` if it is made already, or other loggers share it."""
        self._version = version
        self.claimed = claimed

    @property
    def version_if_known(self) -> int | str | None:
        """The version, if it was given or looked for already."""
        return self._version

    @property
    def is_open(self) -> bool:
        """Does it write already?"""
        return self._experiment is not None

    # Not attributes: subclasses define them as properties.
    name = property(lambda self: self._name, doc="The level of folders below `save_dir`.")
    save_dir = property(lambda self: self._save_dir, doc="The folder under which all runs are.")
    sub_dir = property(lambda self: self._sub_dir, doc="One more level of `log_dir`.")

    @property
    def version(self) -> int | str:
        """The number or text given, else one more than the highest ``version_N`` there is."""
        if self._version is None:
            root = expand(self.versions_dir)
            files = get_filesystem(root)
            paths = "\n".join(files.ls(root, detail=False)) if files.isdir(root) else ""
            self._version = max(map(int, re.findall(r"version_(\d+)/?$", paths, re.MULTILINE)), default=-1) + 1
        return self._version

    root_dir = property(lambda self: os.path.join(self.save_dir, self.name), doc="The folder of all versions.")
    versions_dir = property(lambda self: self.root_dir, doc="Where the folders of versions are looked for and made.")

    @property
    def log_dir(self) -> str:
        """The folder of this version."""
        version = self.version if isinstance(self.version, str) else f"version_{self.version}"
        return expand(os.path.join(self.versions_dir, version, *([self.sub_dir] if self.sub_dir else [])))


class ServiceLogger(ExperimentLogger):
    """A logger that talks to a client library and can send checkpoints through it.

    Args:
        log_model: True sends those that exist when the run ends well, "all" each one when it is written.
    """

    _callback_key: str | None = None  # under which metadata has the callback's settings; None for the name of its class

    def __init__(self, prefix: str = "", log_model: Literal["all"] | bool = False) -> None:
        super().__init__(prefix)
        self._log_model = log_model
        self._sent: dict[str, float] = {}  # path -> time of the last change that was sent
        self._to_send_at_end: Any = None

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Sends it now, if all are sent or kept; else notes what is to be sent at the end.

        Args:
            checkpoint_callback: the `ModelCheckpoint` that wrote it.
        """
        if self._log_model == "all" or (self._log_model and checkpoint_callback.save_top_k == -1):  # all are kept
            self._send_new_checkpoints(checkpoint_callback)
        elif self._log_model:
            self._to_send_at_end = checkpoint_callback

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Sends the checkpoints that exist, if the run ended well.

        Args:
            status: "success", "failed" or "finished".
        """
        if status == "success":
            self._send_last_checkpoints()

    def _send_last_checkpoints(self) -> None:
        if self._to_send_at_end is not None and self._experiment is not None:
            self._send_new_checkpoints(self._to_send_at_end)

    @rank_zero_only
    def _send_new_checkpoints(self, callback: ModelCheckpoint) -> None:
        scores = {callback.last_model_path: callback.current_score, callback.best_model_path: callback.best_model_score}
        scores.update(callback.best_k_models)
        times = {path: os.path.getmtime(path) for path in scores if os.path.isfile(path)}
        of_callback = {
            "monitor": callback.monitor, "mode": callback.mode, "save_last": callback.save_last,
            "save_top_k": callback.save_top_k, "save_weights_only": callback.save_weights_only,
        }  # fmt: skip
        settings = {self._callback_key or type(callback).__name__: of_callback}
        for path in sorted(times, key=times.__getitem__):
            if self._sent.get(path, -1.0) < times[path]:
                about = {"score": plain_value(scores[path]), "original_filename": os.path.basename(path), **settings}
                aliases = ["latest", "best"] if path == callback.best_model_path else ["latest"]
                self._send_checkpoint(path, aliases, about)
                self._sent[path] = times[path]

    def _send_checkpoint(self, path: str, aliases: list[str], about: dict[str, Any]) -> None:
        raise NotImplementedError


def as_numbers(metrics: Mapping[str, Any], prefix: str = "", keep_arrays: bool = False) -> dict[str, Any]:
    """The metrics with numbers in place of one-element tensors, and the prefix in front of each name.

    Tensors and arrays of several elements become an entry each, ``name_0``, ``name_1``, ..., but for `keep_arrays`.
    """
    start = prefix and f"{prefix}-"
    numbers = {}
    for name, value in metrics.items():
        if type(value) is float or not (hasattr(value, "tolist") and hasattr(value, "shape")):
            numbers[start + name] = value
        elif math.prod(value.shape) == 1:
            numbers[start + name] = value.item()
        elif keep_arrays:
            numbers[start + name] = value
        else:
            elements = list(_flatten_items(value.tolist()))
            warn_once(
                f"The metric `{name}` has {len(elements)} elements: each is logged as a metric, `{name}_0` and so on."
            )
            numbers.update({f"{start}{name}_{i}": element for i, element in enumerate(elements)})
    return numbers


def _flatten_items(items: list[Any]) -> Iterator[Any]:
    for item in items:
        yield from _flatten_items(item) if isinstance(item, list) else (item,)


def as_dict(params: object) -> dict[str, Any]:
    """Hyper-parameters as a dictionary, whatever they came as: a mapping, a `Namespace`, a dataclass, a configuration."""
    return dict(_as_container(params) or {})


def flatten_params(params: object, depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Nested dictionaries as one level: ``{"a": {"b": 1}}`` becomes ``{"a/b": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in as_dict(params).items():
        value = _as_container(value)
        if isinstance(value, Mapping) and depth:
            flat.update({f"{name}/{key}": item for key, item in flatten_params(value, depth - 1).items()})
        else:
            flat[str(name)] = value
    return flat


def plain_params(params: object, leaf: Callable[[Any], Any] | None = None, depth: int = MAX_DEPTH) -> Any:
    """The same made of dictionaries with texts as keys, lists, tuples, and what `leaf` makes of the rest."""
    leaf = leaf or plain_value
    value = _as_container(params)
    if not isinstance(value, _NESTED) or not depth:
        return leaf(value)
    if isinstance(value, Mapping):
        return {str(name): plain_params(item, leaf, depth - 1) for name, item in value.items()}
    items = [plain_params(item, leaf, depth - 1) for item in value]
    return tuple(items) if isinstance(value, tuple) else items


def plain_value(value: Any) -> bool | int | float | str | None:
    """The value itself if it is a number or text, the number inside one-element arrays, else a readable name."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, str):  # with what no file could hold, such as the odd bytes of a path, shown as escapes
        return value.encode(errors="backslashreplace").decode()
    if value is None or isinstance(value, (bool, int, float)):
        return value
    try:
        if hasattr(value, "item") and callable(value.item) and count_elements(value) == 1:
            number = value.item()
            return number if isinstance(number, (bool, int, float)) else str(number)
        if callable(value) and hasattr(value, "__qualname__"):
            return f"{value.__module__}.{value.__qualname__}"
        return str(value)
    except Exception:  # what objects do when they are shown is up to them
        return f"<{type(value).__qualname__}>"


def _as_container(value: Any) -> Any:
    """A dict or list in place of what holds entries by name or number; anything else as it is."""
    if isinstance(value, argparse.Namespace):
        return vars(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    if type(value).__module__.startswith("omegaconf."):
        to_container = sys.modules["omegaconf"].OmegaConf.to_container
        try:
            return to_container(value, resolve=True)
        except Exception:  # of what cannot be resolved here, the reference is shown
            return to_container(value)
    if hasattr(value, "tolist") and 1 < count_elements(value) <= MAX_ELEMENTS:
        with contextlib.suppress(Exception):  # a tensor without memory
            return value.tolist()
    return value


def claim_versions(loggers: Iterable[Logger]) -> list[int | str | None]:
    """Makes the folders of loggers that count their versions, so that no run that starts meanwhile takes the same.

    Returns the versions of all loggers that have a folder. Where another run was faster, the next number is taken, which
    is said.
    """
    folders = [one for one in loggers if isinstance(one, FolderLogger)]
    plain = [one for one in folders if not one.claimed and _is_plain(one) and not is_remote(expand(one.root_dir))]
    for root in dict.fromkeys(expand(one.root_dir) for one in plain):
        _claim_version(root, [one for one in plain if expand(one.root_dir) == root])
    return [one.version_if_known for one in folders]


def _claim_version(root: str, alike: list[FolderLogger]) -> None:
    """Makes one folder for all loggers that count their versions in this one."""
    opened = any(one.is_open for one in alike)
    known = [one.version_if_known for one in alike if one.version_if_known is not None]
    first = number = known[0] if known else alike[0].version
    while isinstance(number, int) and not opened:
        if _claim_folder(os.path.join(root, f"version_{number}"), seen=bool(known)):
            break
        number += 1
    for one in alike:
        one.use_version(number, claimed=True)
    if number != first:
        rank_zero_info(f"Another run has taken version_{first} in {root}: this one logs to version_{number}.")


def _claim_folder(folder: str, seen: bool) -> bool:
    """Makes a folder that is not there. Whoever had `seen` its name may have made it before, and put something in it."""
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        os.mkdir(folder)
    except FileExistsError:
        of_loggers = ("metrics.csv", "hparams.yaml", "checkpoints")
        written = lambda name: name in of_loggers or name.startswith("events.out")  # noqa: E731
        return seen and os.path.isdir(folder) and not any(map(written, os.listdir(folder)))
    except OSError:  # whoever writes there says what is wrong
        return True
    return True


def _is_plain(logger: FolderLogger) -> bool:
    """Does it write where this class says?"""
    kind = type(logger)
    plain = FolderLogger
    return kind.version is plain.version and kind.root_dir is plain.root_dir and kind.log_dir is plain.log_dir


def expand(path: str) -> str:
    """The path with environment variables and ``~`` replaced."""
    return os.path.expanduser(os.path.expandvars(path))


def write_yaml(path: str, values: Mapping[str, Any]) -> None:
    """A YAML file that any reader loads safely: objects become text. The same with and without PyYAML installed."""
    atomic_write(path, ("".join(_yaml_lines(plain_params(values))) or "{}\n").encode())


def _yaml_lines(value: Any, indent: str = "") -> Iterator[str]:
    for entry in sorted(value) if isinstance(value, dict) else value:
        head, item = (f"{_yaml_scalar(entry)}:", value[entry]) if isinstance(value, dict) else ("-", entry)
        if item and isinstance(item, (dict, list, tuple)):
            yield f"{indent}{head}\n"
            yield from _yaml_lines(item, indent + "  ")
        else:
            yield f"{indent}{head} {_yaml_scalar(item)}\n"


def _yaml_scalar(value: Any) -> str:
    if isinstance(value, float):
        special = {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}
        text = special.get(str(float(value)), float.__repr__(value))
        return text if "." in text else text.replace("e", ".0e")  # YAML 1.1 takes "1e-05" for a text
    if not isinstance(value, str):
        return json.dumps(value)  # an empty dict or list, too
    reserved = value.lower() in ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
    if re.fullmatch(r"[A-Za-z_/][\w./\-]*", value, re.ASCII) and not reserved:
        return value
    escaped = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
    return f'"{"".join(escaped)}"'
