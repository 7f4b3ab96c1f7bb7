"""What the Trainer's arguments mean: `check` applies a rule per topic; `engine.resolve` and `defaults` make the parts."""

from __future__ import annotations

import ast
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from fulmen.callbacks.timer import parse_duration
from fulmen.utilities.errors import MisconfigurationException, describe_received, suggest_name
from fulmen.utilities.keywords import unexpected_keyword
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.types import GradClipAlgorithmType

if TYPE_CHECKING:
    from fulmen.loggers.logger import Logger

Init = TypeVar("Init", bound=Callable[..., None])

LIMITS = tuple(f"limit_{verb}_batches" for verb in ("train", "val", "test", "predict"))
SWITCHES = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
# What None stands for.
NUMBERS = {"fast_dev_run": False, "log_every_n_steps": 50, "num_sanity_val_steps": 2, "val_check_interval": 1.0}
DEFAULTS: dict[str, Any] = {**dict.fromkeys(SWITCHES, True), **NUMBERS}
# On or off.
FLAGS = (*SWITCHES[1:], "inference_mode", "use_distributed_sampler", "detect_anomaly", "barebones", "sync_batchnorm",
         "enable_autolog_hparams", "strict_resume", "deterministic", "benchmark")  # fmt: skip
# What `barebones=True` switches off, and what else it cannot be combined with.
BAREBONES = {**dict.fromkeys(SWITCHES, False), "log_every_n_steps": 0, "num_sanity_val_steps": 0}
NOT_IN_BAREBONES = (*BAREBONES, "fast_dev_run", "detect_anomaly", "profiler")
# Whole numbers, and the smallest allowed.
INTEGERS = {
    **dict.fromkeys(("min_epochs", "min_steps", "num_sanity_val_steps", "log_every_n_steps"), -inf),
    **dict.fromkeys(("max_epochs", "max_steps"), -1),
    **dict.fromkeys(("fast_dev_run", "reload_dataloaders_every_n_epochs"), 0),
    **dict.fromkeys(("check_val_every_n_epoch", "accumulate_grad_batches"), 1),
}
MAY_BE_NONE = ("max_epochs", "min_epochs", "min_steps", "check_val_every_n_epoch")
# Not even 2.0 counts as a whole number for these.
STRICT = ("check_val_every_n_epoch", "reload_dataloaders_every_n_epochs")

# Arguments of earlier versions, and what to write today.
REMOVED = {
    "amp_backend": 'precision="16-mixed"',
    "auto_lr_find": "Tuner(trainer).lr_find(model)",
    "auto_scale_batch_size": "Tuner(trainer).scale_batch_size(model)",
    "checkpoint_callback": "enable_checkpointing=..., or a ModelCheckpoint in callbacks=[...]",
    "gpus": 'accelerator="gpu", devices=...',
    "num_processes": 'accelerator="cpu", devices=...',
    "progress_bar_refresh_rate": "callbacks=[TQDMProgressBar(refresh_rate=...)]",
    "replace_sampler_ddp": "use_distributed_sampler=...",
    "resume_from_checkpoint": "trainer.fit(model, ckpt_path=...)",
    "tpu_cores": 'accelerator="tpu", devices=...',
    "track_grad_norm": "self.log_dict(grad_norm(self, norm_type=2)) in on_before_optimizer_step",
    "weights_save_path": "default_root_dir=..., or ModelCheckpoint(dirpath=...)",
}


@dataclass
class Settings:
    """The Trainer's arguments, checked, with defaults filled in; `val_check_time_s` is an interval given as a time."""

    accumulate_grad_batches: int
    barebones: bool
    benchmark: bool | None
    check_val_every_n_epoch: int | None
    default_root_dir: str
    detect_anomaly: bool
    deterministic: bool | str | None
    enable_autolog_hparams: bool
    enable_checkpointing: bool
    enable_model_summary: bool
    enable_progress_bar: bool
    fast_dev_run: int | bool
    gradient_clip_algorithm: GradClipAlgorithmType | None
    gradient_clip_val: int | float | None
    inference_mode: bool
    limit_predict_batches: int | float
    limit_test_batches: int | float
    limit_train_batches: int | float
    limit_val_batches: int | float
    log_every_n_steps: int
    logger: Logger | Iterable[Logger] | bool
    max_epochs: int | None
    max_steps: int
    max_time: timedelta | None
    min_epochs: int | None
    min_steps: int | None
    num_sanity_val_steps: int | float
    overfit_batches: int | float
    reload_dataloaders_every_n_epochs: int
    strict_resume: bool
    use_distributed_sampler: bool
    val_check_interval: int | float
    val_check_time_s: float | None


def check(**given: Any) -> Settings:
    """The settings for a full set of Trainer arguments; sets nothing global."""
    for name in FLAGS:
        check_flag(name, given[name])
    refuse_conflicts(given)
    values: dict[str, Any] = {name: DEFAULTS.get(name) if value is None else value for name, value in given.items()}
    for name in INTEGERS:
        if values[name] is not None or name not in MAY_BE_NONE:
            values[name] = check_integer(name, values[name])
    values |= read_limits(given)
    values |= validation_schedule(values)
    values["gradient_clip_algorithm"] = clip_algorithm(values["gradient_clip_val"], values["gradient_clip_algorithm"])
    values["benchmark"] = benchmark_flag(values["deterministic"], values["benchmark"])
    values["max_time"] = None if given["max_time"] is None else parse_duration(given["max_time"], "max_time")
    values["default_root_dir"] = check_root_dir(given["default_root_dir"])
    if values["fast_dev_run"]:
        values |= development_run(values["fast_dev_run"])
    if values["barebones"]:
        values |= BAREBONES
    return Settings(**{field.name: values[field.name] for field in fields(Settings)})


def check_root_dir(given: object) -> str:
    """Where files go: by default to where the run was started."""
    root = os.getcwd() if given is None else given
    if not isinstance(root, (str, os.PathLike)):
        raise TypeError(_wrong_type("default_root_dir", root, "Use a string or a path."))
    return os.fspath(root)


def read_environment(init: Init) -> Init:
    """A constructor whose arguments may also come by position, in the order of its signature, or from the environment.

    Each is as given, else from ``PL_TRAINER_<NAME>`` (a Python literal or a text), else its default.
    """
    names = tuple(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def init_with_presets(self: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) > len(names):
            raise TypeError(f"Trainer.__init__() takes at most {len(names)} arguments, but {len(args)} were given.")
        by_position = dict(zip(names, args, strict=False))
        for name in kwargs:
            if name not in names:
                removed = f" It has been removed. Write `{REMOVED[name]}` instead." if name in REMOVED else ""
                error = unexpected_keyword(init, name, () if removed else names)
                raise TypeError(f"{error}{removed}")
            if name in by_position:
                raise TypeError(f"Trainer.__init__() got multiple values for argument '{name}'. Pass it once, by name.")
        init(self, **{**_read_presets(names), **by_position, **kwargs})

    return cast("Init", init_with_presets)


def _read_presets(names: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        if text := os.environ.get(f"PL_TRAINER_{name.upper()}"):
            try:
                found[name] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                found[name] = text
    return found


def refuse_conflicts(given: Mapping[str, Any]) -> None:
    """Raises for what cannot be combined with `barebones=True`, and for a service that is not supported."""
    if given["model_registry"]:
        what = f"`Trainer(model_registry={given['model_registry']!r})` needs an external model registry service."
        raise MisconfigurationException(f"{what} Save to a path or URL with `ModelCheckpoint(dirpath=...)`.")
    if not given["barebones"]:
        return
    for name in NOT_IN_BAREBONES:
        if given[name]:
            why = f"`{name}` costs time, and `barebones` measures speed without it. Drop one of them."
            raise ValueError(f"`Trainer(barebones=True, {name}={given[name]!r})` was passed. {why}")
    off = "no checkpoints, loggers, progress bar, model summary, sanity check, and `self.log` does nothing."
    rank_zero_info(f"`Trainer(barebones=True)`: {off} This is for measuring overhead, not for training.")


def check_flag(name: str, value: object) -> None:
    """Raises for what is neither True nor False: a text such as "False" would switch on."""
    if value is None or isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):  # also those of numpy
        return
    if not (isinstance(value, int) and value in (0, 1)) and not (name == "deterministic" and isinstance(value, str)):
        fix = "Pass True or False" + (", or 'warn'." if name == "deterministic" else ".")
        raise TypeError(f"`Trainer({name}=...)` received {describe_received(value)}. {fix}")


def check_integer(name: str, value: object) -> int:
    """`value` as an int, by the rules of the argument `name`. Whole floats such as 1e5 count unless the API forbids it."""
    if value == inf and (INTEGERS[name] == -1 or name == "num_sanity_val_steps"):
        return -1
    number = _whole_number(name, value)
    _check_range(name, number)
    return number if isinstance(number, bool) and name == "fast_dev_run" else int(number)


def _whole_number(name: str, value: object) -> int | float:
    if isinstance(value, Mapping) and name == "accumulate_grad_batches":
        fix = f"Use `callbacks=[GradientAccumulationScheduler(scheduling={value!r})]`."
        raise TypeError(f"`{name}={value!r}` is a schedule, not a number. {fix}")
    is_whole = isinstance(value, float) and value.is_integer() and name not in STRICT
    if not isinstance(value, int) and not is_whole:
        wrong_type = MisconfigurationException if name in STRICT else TypeError
        raise wrong_type(_wrong_type(name, value, f"`{name}` should be an integer."))
    assert isinstance(value, (int, float))
    return value


def _check_range(name: str, value: int | float) -> None:
    smallest = INTEGERS[name]
    if value < smallest:
        too_small = ValueError if name == "accumulate_grad_batches" else MisconfigurationException
        must = "be a non-negative integer or -1 (no limit)" if smallest == -1 else f"be an int >= {smallest}"
        wrong = "is not a valid configuration" if name == "fast_dev_run" else "is too small"
        raise too_small(f"`{name}={value!r}` {wrong}. It must {must}.")


def read_limits(given: Mapping[str, Any]) -> dict[str, int | float]:
    """How much data each verb sees: an int is a number of batches, a float up to 1.0 a fraction."""
    values = {name: 1.0 if given[name] is None else check_batches(name, given[name]) for name in LIMITS}
    for name in LIMITS:
        if given[name] is not None and values[name] == 1:
            amount = "all batches" if isinstance(given[name], float) else "1 batch"
            rank_zero_info(f"`Trainer({name}={given[name]!r})` means {amount} of each epoch.")
    overfit = values["overfit_batches"] = check_batches("overfit_batches", given["overfit_batches"])
    if overfit > 0:
        values["limit_train_batches"] = values["limit_val_batches"] = overfit
    return values


def check_batches(name: str, value: object) -> int | float:
    """A number of batches (int) or a fraction of them (float)."""
    fix = f"Use an int, such as `{name}=10` for ten batches, or a float, such as `{name}=0.1` for a tenth of them."
    if not isinstance(value, (int, float)):
        raise TypeError(_wrong_type(name, value, fix))
    if value >= 0 and (isinstance(value, int) or (value > 1 and value.is_integer())):
        return int(value)
    if not 0 <= value <= 1:
        what = (
            f"`{name}={value!r}` is neither a number of batches nor a fraction: it has to be in [0.0, 1.0] or an int."
        )
        raise MisconfigurationException(f"{what} {fix}")
    return value


def development_run(fast_dev_run: int) -> dict[str, Any]:
    """The settings a development run of so many batches replaces."""
    count = int(fast_dev_run)
    rank_zero_info(f"Running in `fast_dev_run` mode: every loop sees {count} batch(es), nothing is logged or saved.")
    schedule = {"val_check_interval": 1.0, "val_check_time_s": None, "check_val_every_n_epoch": 1}
    duration = {"max_steps": count, "max_epochs": 1, "num_sanity_val_steps": 0}
    return {"fast_dev_run": True if count == 1 else count, **dict.fromkeys(LIMITS, count), **duration, **schedule}


def validation_schedule(given: Mapping[str, Any]) -> dict[str, int | float | None]:
    """When validation runs, in batches or seconds, and how much of it before training."""
    interval: Any = given["val_check_interval"]
    seconds = None
    if isinstance(interval, (str, timedelta, dict)):
        seconds = parse_duration(interval, "val_check_interval").total_seconds()
        interval = 1.0
    interval = check_batches("val_check_interval", interval)
    trains = given["max_steps"] != 0 and given["max_epochs"] != 0
    if interval == 0 and isinstance(interval, int) and trains and given["limit_val_batches"] != 0:
        fix = "Use `limit_val_batches=0` to switch validation off."
        raise MisconfigurationException(f"`val_check_interval=0` would validate every 0 batches. {fix}")
    if given["check_val_every_n_epoch"] is None and isinstance(interval, float) and interval < 1:
        what = f"`val_check_interval={interval!r}` is a fraction, but batches are counted across epochs with"
        fix = "Use an integer (a number of batches) or a duration such as '00:00:30:00'."
        raise MisconfigurationException(f"{what} `check_val_every_n_epoch=None`. {fix}")
    sanity = inf if given["num_sanity_val_steps"] == -1 else max(given["num_sanity_val_steps"], 0)
    return {"val_check_interval": interval, "val_check_time_s": seconds, "num_sanity_val_steps": sanity}


def clip_algorithm(value: object, algorithm: object) -> GradClipAlgorithmType | None:
    """How gradients are clipped; None when it was not said (by the norm then)."""
    if value is not None and not isinstance(value, (int, float)):
        raise TypeError(_wrong_type("gradient_clip_val", value, "It should be an int or a float."))
    if algorithm is None:
        return None
    name = algorithm.lower() if isinstance(algorithm, str) else str(algorithm)
    known = [kind.value for kind in GradClipAlgorithmType]
    if name not in known:
        what = f"`gradient_clip_algorithm={algorithm!r}` is invalid. It must be one of {known}."
        raise MisconfigurationException(what + suggest_name(name, known))
    return GradClipAlgorithmType(name)


def benchmark_flag(deterministic: object, benchmark: bool | None) -> bool | None:
    """What to set cuDNN's benchmark flag to: False in deterministic runs, None leaves it as it is."""
    if isinstance(deterministic, str) and deterministic != "warn":
        hint = suggest_name(deterministic, ["warn"])
        rank_zero_warn(f"`deterministic={deterministic!r}` is treated as True; the only word known is 'warn'.{hint}")
    if deterministic and benchmark:
        why = "cuDNN may pick another algorithm in each run, so results will not be reproducible."
        rank_zero_warn(f"`deterministic` and `benchmark=True` were both passed: {why} Drop one of them.")
    return False if deterministic and benchmark is None else benchmark


def apply_torch_flags(deterministic: bool | str | None, benchmark: bool | None) -> None:
    """Sets torch's global switches; None leaves one as it is."""
    if benchmark is not None:
        torch.backends.cudnn.benchmark = bool(benchmark)
    if deterministic is not None:
        torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")
    if deterministic:
        # cuBLAS is deterministic only with a fixed workspace, and reads this when its first handle is made.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


def _wrong_type(name: str, value: object, fix: str) -> str:
    if isinstance(value, type):
        return f"`{name}` received {describe_received(value)}. {fix}"
    return f"`{name}={value!r}` is a {type(value).__name__}. {fix}"
