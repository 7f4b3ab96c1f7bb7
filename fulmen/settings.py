"""What the Trainer's arguments mean: every rule checks and normalises one topic, without needing a Trainer.

`check` calls them all. Choosing the machine (accelerator, strategy, devices, precision, plugins) is done by
`engine.resolve`; callbacks, loggers and the profiler are made by the Trainer.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from math import inf
from typing import Any

import torch

from fulmen.utilities.durations import parse_duration
from fulmen.utilities.errors import MisconfigurationException, explain, suggestion
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.types import GradClipAlgorithmType

LIMITS = tuple(f"limit_{verb}_batches" for verb in ("train", "val", "test", "predict"))

# What None stands for.
DEFAULTS = {
    "fast_dev_run": False,
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), True),
    "log_every_n_steps": 50,
    "num_sanity_val_steps": 2,
    "val_check_interval": 1.0,
}

# What `barebones=True` switches off, and what else it cannot be combined with.
BAREBONES = {
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    "log_every_n_steps": 0,
    "num_sanity_val_steps": 0,
}
NOT_IN_BAREBONES = (*BAREBONES, "fast_dev_run", "detect_anomaly", "profiler")

# Whole numbers: the smallest allowed, and what is raised for another type and for a smaller number.
INTEGERS: dict[str, tuple[float, type[Exception], type[Exception]]] = {
    "max_epochs": (-1, TypeError, MisconfigurationException),
    "min_epochs": (-inf, TypeError, MisconfigurationException),
    "max_steps": (-1, TypeError, MisconfigurationException),
    "min_steps": (-inf, TypeError, MisconfigurationException),
    "fast_dev_run": (0, TypeError, MisconfigurationException),
    "check_val_every_n_epoch": (1, MisconfigurationException, MisconfigurationException),
    "num_sanity_val_steps": (-inf, TypeError, MisconfigurationException),
    "reload_dataloaders_every_n_epochs": (0, MisconfigurationException, MisconfigurationException),
    "log_every_n_steps": (-inf, TypeError, MisconfigurationException),
    "accumulate_grad_batches": (1, TypeError, ValueError),  # smaller ones could only fail later
}
MAY_BE_NONE = ("max_epochs", "min_epochs", "min_steps", "check_val_every_n_epoch")

# Arguments of earlier versions, and what to write today.
REMOVED = {
    "amp_backend": 'precision="16-mixed"',
    "auto_lr_find": "Tuner(trainer).lr_find(model)",
    "auto_scale_batch_size": "Tuner(trainer).scale_batch_size(model)",
    "auto_select_gpus": 'devices="auto"',
    "checkpoint_callback": "enable_checkpointing=..., or a ModelCheckpoint in callbacks=[...]",
    "gpus": 'accelerator="gpu", devices=...',
    "ipus": 'accelerator="auto", devices=...',
    "num_processes": 'accelerator="cpu", devices=...',
    "progress_bar_refresh_rate": "callbacks=[TQDMProgressBar(refresh_rate=...)]",
    "replace_sampler_ddp": "use_distributed_sampler=...",
    "resume_from_checkpoint": "trainer.fit(model, ckpt_path=...)",
    "tpu_cores": 'accelerator="tpu", devices=...',
    "track_grad_norm": "self.log_dict(grad_norm(self, norm_type=2)) in on_before_optimizer_step",
    "weights_save_path": "default_root_dir=..., or ModelCheckpoint(dirpath=...)",
    "weights_summary": "callbacks=[ModelSummary(max_depth=...)]",
}


@dataclass
class Settings:
    """The Trainer's arguments, checked, with every default filled in. The Trainer keeps them as plain attributes."""

    max_epochs: int | None  # None: decided at each fit, depends on the callbacks
    min_epochs: int | None
    max_steps: int
    min_steps: int | None
    max_time: timedelta | None
    limit_train_batches: int | float
    limit_val_batches: int | float
    limit_test_batches: int | float
    limit_predict_batches: int | float
    overfit_batches: int | float
    fast_dev_run: bool | int
    val_check_interval: int | float
    val_check_time_s: float | None  # set when the interval was given as a time
    check_val_every_n_epoch: int | None
    num_sanity_val_steps: int | float
    reload_dataloaders_every_n_epochs: int
    accumulate_grad_batches: int
    gradient_clip_val: int | float | None
    gradient_clip_algorithm: GradClipAlgorithmType | None
    log_every_n_steps: int
    deterministic: bool | str | None
    benchmark: bool | None
    inference_mode: bool
    detect_anomaly: bool
    use_distributed_sampler: bool
    barebones: bool
    logger: Any  # True, False, a logger or several
    enable_checkpointing: bool
    enable_progress_bar: bool
    enable_model_summary: bool
    enable_autolog_hparams: bool
    default_root_dir: str


def check(**given: Any) -> Settings:
    """The settings for a full set of Trainer arguments. Sets nothing global; see `apply_torch_flags`."""
    refuse_conflicts(given)
    values: dict[str, Any] = {name: DEFAULTS.get(name) if value is None else value for name, value in given.items()}
    for name in INTEGERS:
        if values[name] is not None or name not in MAY_BE_NONE:
            values[name] = integer(name, values[name])
    values |= limits(given)
    values |= validation_schedule(values)
    values |= clipping(values["gradient_clip_val"], values["gradient_clip_algorithm"])
    values |= flags(values["deterministic"], values["benchmark"])
    values["max_time"] = None if given["max_time"] is None else parse_duration(given["max_time"], "max_time")
    values["default_root_dir"] = root_dir(given["default_root_dir"])
    if values["fast_dev_run"]:
        values |= development_run(values["fast_dev_run"])
    if values["barebones"]:
        values |= BAREBONES
    return Settings(**{field.name: values[field.name] for field in fields(Settings)})


def environment_defaults(
    signature_defaults: Mapping[str, Any], given: Mapping[str, Any], environ: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """Every argument: as given, else from the variable ``PL_TRAINER_<NAME>``, else as in the signature.

    Values from the environment are read as Python literals (``"2"`` is an int) where they are one.
    """
    for name in given:
        if name not in signature_defaults:
            raise unknown_argument(name, signature_defaults)
    preset = {}
    for name in signature_defaults:
        text = environ.get(f"PL_TRAINER_{name.upper()}", "")
        if text:
            try:
                preset[name] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                preset[name] = text
    return {**signature_defaults, **preset, **given}


def unknown_argument(name: str, known: Collection[str]) -> TypeError:
    """The error for a keyword the Trainer does not have."""
    what = f"Trainer.__init__() got an unexpected keyword argument '{name}'."
    if name in REMOVED:
        return TypeError(explain(what, "It has been removed.", f"Write `{REMOVED[name]}` instead."))
    return TypeError(what + suggestion(name, known))


def refuse_conflicts(given: Mapping[str, Any]) -> None:
    """Raises for arguments that cannot be combined with `barebones=True`, and for a service that is not supported."""
    if given["model_registry"]:
        what = f"`Trainer(model_registry={given['model_registry']!r})` was passed."
        why = "The external model registry service behind this argument is not supported."
        fix = "Remove the argument and save to a path or URL with `ModelCheckpoint(dirpath=...)`."
        raise MisconfigurationException(explain(what, why, fix))
    if not given["barebones"]:
        return
    for name in NOT_IN_BAREBONES:
        if given[name]:
            what = f"`Trainer(barebones=True, {name}={given[name]!r})` was passed."
            why = f"`{name}` costs time, and `barebones` is there to measure raw speed without it."
            raise ValueError(explain(what, why, f"Drop `{name}` or `barebones`."))
    rank_zero_info(
        "`Trainer(barebones=True)`: no checkpoints, loggers, progress bar, model summary, sanity check, and `self.log`"
        " does nothing. This is for measuring overhead, not for training."
    )


def integer(name: str, value: Any) -> int:
    """`value` as an int, by the rules of the argument `name`. Whole floats such as 1e5 count unless the API forbids it."""
    smallest, wrong_type, too_small = INTEGERS[name]
    if value == inf and smallest == -1:
        return -1
    if isinstance(value, Mapping) and name == "accumulate_grad_batches":
        fix = f"Use `callbacks=[GradientAccumulationScheduler(scheduling={value!r})]`."
        raise TypeError(explain(f"`{name}={value!r}` is a schedule, not a number.", fix=fix))
    if not isinstance(value, int) and not (isinstance(value, float) and value.is_integer() and wrong_type is TypeError):
        raise wrong_type(explain(_typed(name, value), fix=f"`{name}` should be an integer."))
    if value < smallest:
        allowed = f"{smallest} or more" + (" (-1 is no limit)" if smallest == -1 else "")
        raise too_small(explain(f"`{name}={value!r}` is too small.", fix=f"`{name}` must be {allowed}."))
    return value if isinstance(value, bool) and name == "fast_dev_run" else int(value)


def limits(given: Mapping[str, Any]) -> dict[str, int | float]:
    """How much data each verb sees: an int is a number of batches, a float up to 1.0 a fraction."""
    values = {name: 1.0 if given[name] is None else batches(name, given[name]) for name in LIMITS}
    for name in LIMITS:
        if given[name] is not None and values[name] == 1:
            amount = "all batches" if isinstance(given[name], float) else "1 batch"
            rank_zero_info(f"`Trainer({name}={given[name]!r})` was configured so {amount} per epoch will be used.")
    overfit = values["overfit_batches"] = batches("overfit_batches", given["overfit_batches"])
    if overfit > 0:
        values["limit_train_batches"] = values["limit_val_batches"] = overfit
    return values


def batches(name: str, value: Any) -> int | float:
    """A number of batches (int) or a fraction of them (float)."""
    if not isinstance(value, (int, float)):
        fix = "Use an int for a number of batches, or a float from 0.0 to 1.0 for a fraction."
        raise TypeError(explain(_typed(name, value), fix=fix))
    if isinstance(value, int) and value >= 0:
        return int(value)
    if 0 <= value <= 1:
        return value
    if value > 1 and float(value).is_integer():
        return int(value)
    what = f"`{name}={value!r}` is neither a number of batches nor a fraction."
    why = "It has to be in [0.0, 1.0] or an int that is not negative."
    fix = f"Write for example `{name}=10` for ten batches, or `{name}=0.1` for a tenth of them."
    raise MisconfigurationException(explain(what, why, fix))


def development_run(fast_dev_run: int) -> dict[str, Any]:
    """The settings a development run of so many batches replaces."""
    count = int(fast_dev_run)
    rank_zero_info(
        f"Running in `fast_dev_run` mode: will run the requested loop using {count} batch(es). "
        "Logging and checkpointing is suppressed."
    )
    schedule = {"val_check_interval": 1.0, "val_check_time_s": None, "check_val_every_n_epoch": 1}
    duration = {"max_steps": count, "max_epochs": 1, "num_sanity_val_steps": 0}
    limited = dict.fromkeys(LIMITS, count)
    return {"fast_dev_run": True if count == 1 else count, **limited, **duration, **schedule}


def validation_schedule(given: Mapping[str, Any]) -> dict[str, int | float | None]:
    """When validation runs, in batches or seconds, and how much of it before training."""
    interval: Any = given["val_check_interval"]
    seconds = None
    if isinstance(interval, (str, timedelta, dict)):
        interval, seconds = 1.0, parse_duration(interval, "val_check_interval").total_seconds()
    interval = batches("val_check_interval", interval)
    if interval == 0 and isinstance(interval, int):
        fix = "Use `limit_val_batches=0` to switch validation off."
        raise MisconfigurationException(explain("`val_check_interval=0` would validate every 0 batches.", fix=fix))
    if given["check_val_every_n_epoch"] is None and isinstance(interval, float) and interval < 1:
        what = f"`val_check_interval={interval!r}` was passed with `check_val_every_n_epoch=None`."
        why = "Batches are then counted across epochs, so there is no epoch to take a fraction of."
        fix = "Use an integer (a number of batches) or a duration such as '00:00:30:00'."
        raise MisconfigurationException(explain(what, why, fix))
    sanity = given["num_sanity_val_steps"]
    return {
        "val_check_interval": interval,
        "val_check_time_s": seconds,
        "num_sanity_val_steps": inf if sanity == -1 else max(sanity, 0),
    }


def clipping(gradient_clip_val: Any, gradient_clip_algorithm: Any) -> dict[str, Any]:
    """Gradient clipping; the algorithm stays None when it was not given (the norm is clipped then)."""
    if gradient_clip_val is not None and not isinstance(gradient_clip_val, (int, float)):
        raise TypeError(explain(_typed("gradient_clip_val", gradient_clip_val), fix="It should be an int or a float."))
    chosen = None
    if gradient_clip_algorithm is not None:
        name = str(gradient_clip_algorithm)
        chosen = GradClipAlgorithmType.try_from_str(name, source="value")
        if chosen is None:
            known = GradClipAlgorithmType.supported_types()
            what = f"`gradient_clip_algorithm={gradient_clip_algorithm!r}` is not one of {known}."
            raise MisconfigurationException(what + suggestion(name, known))
    return {"gradient_clip_val": gradient_clip_val, "gradient_clip_algorithm": chosen}


def flags(deterministic: Any, benchmark: Any) -> dict[str, Any]:
    """Torch's switches; nothing is set here."""
    if isinstance(deterministic, str) and deterministic != "warn":
        hint = suggestion(deterministic, ["warn"])
        rank_zero_warn(f"`deterministic={deterministic!r}` is treated as True; the only word known is 'warn'.{hint}")
    if deterministic and benchmark:
        rank_zero_warn(
            "`deterministic` and `benchmark=True` were both passed: cuDNN may pick another algorithm in each run, "
            "so results will not be reproducible. Drop one of them."
        )
    return {"deterministic": deterministic, "benchmark": False if deterministic and benchmark is None else benchmark}


def apply_torch_flags(deterministic: bool | str | None, benchmark: bool | None) -> None:
    """Sets torch's global switches; None leaves one as it is."""
    if benchmark is not None:
        torch.backends.cudnn.benchmark = benchmark
    if deterministic is not None:
        torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")
    if deterministic:
        # cuBLAS is deterministic only with a fixed workspace, and reads this when its first handle is made.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"


def root_dir(default_root_dir: Any) -> str:
    """Where files go unless something says otherwise: the working directory by default."""
    if default_root_dir is None:
        return os.getcwd()
    if not isinstance(default_root_dir, (str, os.PathLike)):
        raise TypeError(explain(_typed("default_root_dir", default_root_dir), fix="Use a string or a path."))
    return os.fspath(default_root_dir)


def _typed(name: str, value: Any) -> str:
    return f"`{name}={value!r}` is a {type(value).__name__}."
