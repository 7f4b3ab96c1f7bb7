"""What can be known to be wrong before anything runs: checked once per call, refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import nn

from fulmen.callbacks.callback import Callback
from fulmen.callbacks.timer import Timer
from fulmen.data.combined import CombinedLoader
from fulmen.data.loaders import check_iterable
from fulmen.datamodule import LightningDataModule
from fulmen.hooks import REMOVED_HOOKS
from fulmen.loops.signatures import check_signatures
from fulmen.module import LightningModule
from fulmen.utilities.errors import (
    MisconfigurationException,
    PossibleUserWarning,
    find_nearest_name,
    is_one_letter_apart,
)
from fulmen.utilities.introspection import overrides_method, parameters_of, texts_compared_with
from fulmen.utilities.rank_zero import rank_zero_deprecation, rank_zero_warn
from fulmen.utilities.types import TrainerFn

if TYPE_CHECKING:
    from fulmen.trainer import Trainer

# By verb: whose loader it needs, and the methods that must be written.
NEEDED = {
    "fit": ("train", "training_step(self, batch, batch_idx)", "configure_optimizers(self)"),
    "validate": ("val", "validation_step(self, batch, batch_idx)"),
    "test": ("test", "test_step(self, batch, batch_idx)"),
    "predict": ("predict",),
}


def check_configuration(trainer: Trainer) -> None:
    """Raises for a module, datamodule or combination of arguments that cannot run."""
    module = trainer.lightning_module
    verb = trainer.state.fn
    assert verb is not None
    owners = [(module, LightningModule), (trainer.datamodule, LightningDataModule)]
    for owner, base in (*owners, *((callback, Callback) for callback in trainer.callbacks)):
        check_hook_names(owner, base)
        check_stage_names(owner, base)
    _check_configure_model(module)
    kind, *signatures = NEEDED[verb.value]
    for signature in signatures:
        if not overrides_method(module, signature.partition("(")[0], LightningModule):
            what = f"No `{signature.partition('(')[0]}()` method defined in {type(module).__name__}"
            raise MisconfigurationException(f"{what} to run `Trainer.{verb.value}`. Define `def {signature}`.")
    if verb == TrainerFn.PREDICTING:
        _check_predict_step(module)
    _check_loaders(trainer, kind)
    if verb == TrainerFn.FITTING:
        hint_at_layers(module)
        hint_at_modes(trainer.callbacks)
        _check_fit(trainer, module)
    check_signatures(trainer)
    for kind in ("train", "val", "test", "predict"):
        source = trainer.sources.source_of(kind)
        for loader in CombinedLoader(source.argument).flattened if source.argument is not None else ():
            check_iterable(loader, source.display_name)
    if verb == TrainerFn.FITTING:
        _resolve_durations(trainer)


def _check_configure_model(module: LightningModule) -> None:
    """Warns of the older of two hooks that make layers; raises if there are both, as only one is called."""
    name = type(module).__name__
    if overrides_method(module, "configure_sharded_model", LightningModule):
        if overrides_method(module, "configure_model", LightningModule):
            what = f"`{name}` has `configure_model` and `configure_sharded_model`, of which only one can be called."
            raise RuntimeError(f"{what} Remove the second, which is deprecated.")
        what = f"`{name}.configure_sharded_model` is deprecated."
        rank_zero_deprecation(f"{what} Rename it to `configure_model`, whose layers are made on the device of the run.")


def _check_predict_step(module: LightningModule) -> None:
    if not callable(module.predict_step):
        raise MisconfigurationException("`predict_step` cannot be None to run `Trainer.predict`. Define it.")
    if not any(overrides_method(module, method, LightningModule) for method in ("predict_step", "forward", "__call__")):
        what = f"`Trainer.predict` calls `predict_step`, which calls `forward`: {type(module).__name__} has neither."
        raise MisconfigurationException(f"{what} Define `def predict_step(self, batch, batch_idx)`.")


def _check_loaders(trainer: Trainer, kind: str) -> None:
    """Raises if nobody gives the loaders that the verb needs."""
    source = trainer.sources.source_of(kind)
    if source.is_defined():
        return
    verb = str(trainer.state.fn.value)  # type: ignore[union-attr]
    owners = [type(owner).__name__ for owner in (trainer.lightning_module, trainer.datamodule) if owner is not None]
    what = f"`Trainer.{verb}` has no batches: no `{kind}_dataloader()` method defined in"
    fix = f"Pass a loader to `trainer.{verb}(...)`, or define that method."
    is_method = callable(getattr(source.owner, f"{kind}_dataloader", None))
    error = MisconfigurationException if is_method else TypeError
    raise error(f"{what} {' or '.join(owners)}. {fix}")


def _check_fit(trainer: Trainer, module: LightningModule) -> None:
    """Arguments that exclude each other, and validation of which one half is missing."""
    name = type(module).__name__
    if any(parameter.name == "optimizer_idx" for parameter in parameters_of(module.training_step)):
        what = f"`{name}.training_step` has a parameter `optimizer_idx`: several optimizers need manual optimization."
        raise RuntimeError(f"{what} Set `self.automatic_optimization = False`, and step the optimizers yourself.")
    if not module.automatic_optimization:
        value = trainer.gradient_clip_val
        batches = trainer.accumulate_grad_batches
        why = "is not supported for manual optimization. Remove"
        if value is not None and value > 0:
            fix = f"`Trainer(gradient_clip_val={value})`, and call `self.clip_gradients(...)` before each step."
            raise MisconfigurationException(f"Automatic gradient clipping {why} {fix}")
        if batches != 1:
            fix = f"`Trainer(accumulate_grad_batches={batches})`, and step every so many batches yourself."
            raise MisconfigurationException(f"Automatic gradient accumulation {why} {fix}")
    has_step = overrides_method(module, "validation_step", LightningModule)
    has_loader = trainer.sources.source_of("val").is_defined()
    if has_loader and not has_step:
        rank_zero_warn(f"There are validation batches, but {name} has no `validation_step`: nothing is validated.")
    if has_step and not has_loader:
        what = f"{name} has a `validation_step`, but there are no validation batches: nothing is validated."
        rank_zero_warn(what, category=PossibleUserWarning)


_OF_VALIDATION = re.compile(r"val(id|idation)?([_/.\-]|$)")  # names of what validation logs, as users write them


def hint_at_eval_mode(module: nn.Module) -> None:
    """Warns of modules that do not learn although training starts."""
    if in_eval := sum(not part.training for part in module.modules()):
        what = f"{in_eval} of the modules are in eval mode at the start of training, and stay so."
        rank_zero_warn(f"{what} Call `.train()` on those that should learn.", category=PossibleUserWarning)


def check_monitors(trainer: Trainer) -> None:
    """Before the first batch: raises if something monitors what only a validation could log that will not run."""
    module = trainer.lightning_module
    written = overrides_method(module, "validation_step", LightningModule)
    given = trainer.sources.source_of("val").is_defined()
    if written is given or trainer.fast_dev_run:  # without both, other hooks may validate in their own way
        return
    callbacks: list[Any] = [callback for callback in trainer.callbacks if _requires_monitor(callback)]
    watched = [(c.monitor, f"`{type(c).__name__}(monitor={c.monitor!r})`") for c in callbacks]
    watched += [
        (config.monitor, f"`{type(config.scheduler).__name__}` with `monitor={config.monitor!r}`")
        for config in trainer.lr_scheduler_configs
        if config.monitor is not None and config.strict
    ]
    for name, asked_by in watched:
        if _OF_VALIDATION.match(name) and name not in trainer.callback_metrics:
            lacking = "no `val_dataloader`" if written else "no `validation_step`"
            fix = "Pass `val_dataloaders` to `trainer.fit`" if written else f"Define it in {type(module).__name__}"
            what = f"{asked_by}: `{name}` will not be available, as there is {lacking}, so no validation in this call."
            raise MisconfigurationException(f"{what} {fix}, or monitor a value that training logs.")


def _requires_monitor(callback: Any) -> bool:
    """Does it need the value it monitors?"""
    return isinstance(getattr(callback, "monitor", None), str) and getattr(callback, "strict", True)


def _resolve_durations(trainer: Trainer) -> None:
    """`max_epochs` and `min_epochs` that were left open, now that the callbacks are known."""
    loop = trainer.fit_loop
    if loop.max_epochs is None:
        timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)
        loop.max_epochs = 1000 if loop.max_steps == -1 and not timed else -1
        if loop.max_epochs == 1000:
            what = "`max_epochs` was not set, nor `max_steps` or `max_time`: training ends after 1000 epochs."
            rank_zero_warn(f"{what} `max_epochs=-1` means none.", category=PossibleUserWarning)
    if loop.min_epochs is None:
        loop.min_epochs = 1 if loop.min_steps is not None else 0


def check_hook_names(owner: object, base: type) -> None:
    """Refuses, or warns of, a method that would never be called because its name is only nearly that of a hook."""
    hooks = {name for name in dir(base) if _HOOK_NAME.fullmatch(name)}

    def is_missing(hook: str) -> bool:
        return not overrides_method(owner, hook, base)

    for cls in type(owner).__mro__:
        if cls.__module__.startswith(("fulmen.", "torch")) or cls is object:
            continue
        for name, member in vars(cls).items():
            if not name.startswith("_") and name not in hooks and callable(member) and not isinstance(member, type):
                _check_hook_name(cls, name, hooks, is_missing)


def _check_hook_name(cls: type, name: str, hooks: set[str], is_missing: Callable[[str], bool]) -> None:
    """The same for one method; `is_missing` tells whether the owner does not define a hook."""
    what = f"`{cls.__name__}.{name}` would never be called:"
    successor = REMOVED_HOOKS.get(name)
    if successor in hooks and (name in _ENDINGS or is_missing(str(successor))):
        what = f"Support for `{name}` has been removed. {what} it is a hook of an older version."
        raise NotImplementedError(f"{what} Use `{successor}`, and collect in the step what it needs.")
    near = next((hook for hook in hooks if is_one_letter_apart(name, hook)), None)
    if near is not None and is_missing(near):
        fix = f"Did you mean `{near}`? If it is a method of your own, give it a less similar name."
        raise MisconfigurationException(f"{what} it looks like a misspelt hook. {fix}")
    by_usual_words = {_in_usual_words(hook): hook for hook in hooks}
    near = by_usual_words.get(_in_usual_words(name)) or next(iter(get_close_matches(name, hooks, 1, 0.9)), None)
    if near is not None and successor is None and is_missing(near):
        what = f"{what[:-1]} by the Trainer. Did you mean the hook `{near}`?"
        rank_zero_warn(
            f"{what} If you call it yourself, ignore this, or give it a less similar name.",
            category=PossibleUserWarning,
        )


# Hooks of older versions that are refused even if their successor is there.
_ENDINGS = frozenset(name for name in REMOVED_HOOKS if name.endswith("_epoch_end") and not name.startswith("on_"))
# What users may write in a module, datamodule or callback and the Trainer calls.
_HOOK_NAME = re.compile(
    r"(on|configure)_\w+|\w+_step|\w+_dataloader|setup|teardown|prepare_data|forward|backward|optimizer_zero_grad"
    r"|transfer_batch_to_device|(load_)?state_dict"
)
_USUAL_WORDS = {"training": "train", "testing": "test", "begin": "start"}
_USUAL_WORDS |= dict.fromkeys(("val", "valid", "validate", "validating"), "validation")


def _in_usual_words(name: str) -> str:
    words = [_USUAL_WORDS.get(word, word) for word in name.split("_")]
    return "_".join("batch" if word == "step" and words[0] == "on" else word for word in words)


def hint_at_layers(module: LightningModule) -> None:
    """Warns of layers in plain lists and dicts: they are not trained, moved or saved with the module."""
    known = {*module.modules(), *module.parameters()}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            if name.startswith("_") or not any(
                _requires_grad(item) and item not in known for item in islice(held, 100)
            ):
                continue
            place = ".".join(word for word in (type(module).__name__, path, name) if word)
            rank_zero_warn(
                f"`{place}` is a {type(value).__name__} with layers or parameters that the module does not know: they "
                "are not in `self.parameters()`, not moved to the device and not saved. Use `nn.ModuleList`, "
                "`nn.ModuleDict` or `nn.ParameterList`.",
                category=PossibleUserWarning,
            )


def _requires_grad(item: Any) -> bool:
    parameters = [item] if isinstance(item, nn.Parameter) else item.parameters() if isinstance(item, nn.Module) else ()
    return any(parameter.requires_grad for parameter in parameters)


# Words in the names of metrics that are better when they are larger, and when they are smaller.
_LARGER = frozenset([
    "acc", "accuracy", "auc", "auroc", "bleu", "dice", "f1", "iou", "jaccard", "map", "precision", "psnr", "recall",
    "rouge", "ssim",
])  # fmt: skip
_SMALLER = frozenset(["cer", "error", "loss", "mae", "mse", "nll", "perplexity", "ppl", "rmse", "wer"])


def hint_at_modes(callbacks: Iterable[Callback]) -> None:
    """Warns of a callback that waits for an accuracy to fall, or for a loss to rise."""
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        mode = getattr(callback, "mode", None)
        words = set(re.split(r"[^a-z0-9]+", monitor.lower())) if isinstance(monitor, str) else set()
        better = {"max": words & _LARGER and not words & _SMALLER, "min": words & _SMALLER and not words & _LARGER}
        meant = next((meant for meant, fits in better.items() if fits), mode)
        if mode in ("min", "max") and meant != mode:
            what = f"`{type(callback).__name__}(monitor={monitor!r}, mode={mode!r})` treats"
            what = f"{what} {'smaller' if mode == 'min' else 'larger'} values as better."
            rank_zero_warn(f"{what} Did you mean `mode={meant!r}`?", category=PossibleUserWarning)


def check_stage_names(owner: Any, base: type) -> None:
    """Warns of a `setup` or `teardown` that asks for a stage which there is not: it would silently do nothing."""
    for hook in ("setup", "teardown"):
        if not overrides_method(owner, hook, base):
            continue
        method = getattr(owner, hook)
        names = [parameter.name for parameter in parameters_of(method)]
        compared = texts_compared_with(method, names[-1] if names else "stage")
        served = set().union(*compared)
        for text in sorted(text for texts in compared if not texts & set(STAGES) for text in texts):
            meant = _USUAL_STAGES.get(text.lower()) or find_nearest_name(text, STAGES)
            if meant in served:  # both spellings are
                continue
            what = f"`{type(owner).__name__}.{hook}` compares `stage` with {text!r}, which it never is."
            hint = f" Did you mean {meant!r}?" if meant else ""
            rank_zero_warn(f"{what} It is one of {', '.join(map(repr, STAGES))}.{hint}", category=PossibleUserWarning)


STAGES = tuple(NEEDED)
_USUAL_STAGES = {
    **dict.fromkeys(("train", "training", "trainer"), "fit"),
    **dict.fromkeys(("val", "valid", "validation", "eval", "evaluate", "dev"), "validate"),
    **dict.fromkeys(("testing", "evaluation"), "test"),
    **dict.fromkeys(("prediction", "inference", "infer"), "predict"),
}
