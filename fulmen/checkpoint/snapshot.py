"""A checkpoint, as an opened file or as one being collected: what is saved, what is loaded, and when.

The layout is Lightning's, so that either framework reads the other's files. Our own chapter, "fulmen", holds the exact
position and the states of the random generators in plain types; for files without it, the position is read from
Lightning's counters.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parameter import is_lazy

from fulmen.checkpoint.hparams import read_objects, write_hparams
from fulmen.checkpoint.lightning_format import (
    API_VERSION,
    VERSION_KEY,
    from_loops,
    migrate_checkpoint,
    parse_version,
    refuse_foreign,
    to_loops,
)
from fulmen.checkpoint.pruned import fit_pruning, match_pruning
from fulmen.storage.integrity import DamagedCheckpointError
from fulmen.storage.sharded import is_sharded
from fulmen.utilities.errors import MisconfigurationException, find_nearest_name
from fulmen.utilities.introspection import is_overridden
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer


CHAPTER_VERSION = 1  # raised when a file could not be continued by the code of today


def collect_checkpoint(trainer: Trainer, weights_only: bool = False) -> dict[str, Any]:
    """The whole content of a checkpoint, as of now; or without callbacks, optimizers, schedulers and precision."""
    module = trainer.lightning_module
    datamodule = trainer.datamodule
    progress = trainer.resume_state.saved_progress()
    book = trainer.book
    previous = book.hook
    book.hook = "on_save_checkpoint"
    checkpoint: dict[str, Any] = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": API_VERSION,
        "state_dict": trainer.strategy.lightning_module_state_dict(),
        "loops": to_loops(progress),
    }
    if loader_states := trainer.resume_state.saved_loader_states():
        checkpoint["loops"]["fit_loop"]["state_dict"] = {"combined_loader": loader_states}
    if weights_only:
        _replace_weights(checkpoint, trainer)
    else:
        _add_training_state(checkpoint, trainer, progress)
    for owner in (module, datamodule):
        if owner is not None:
            write_hparams(checkpoint, owner)
    if datamodule is not None and (state := datamodule.state_dict()):
        checkpoint[type(datamodule).__qualname__] = state
    if not weights_only:
        for callback in trainer.callbacks:
            callback.on_save_checkpoint(trainer, module, checkpoint)
    module.on_save_checkpoint(checkpoint)
    book.hook = previous
    return checkpoint


def _replace_weights(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """An average takes the place of the weights; in a file for training, `on_save_checkpoint` keeps both."""
    for callback in trainer.callbacks:
        if hasattr(callback, "weights_to_save"):
            checkpoint["state_dict"] = callback.weights_to_save(checkpoint["state_dict"])


def _add_training_state(checkpoint: dict[str, Any], trainer: Trainer, progress: dict[str, Any]) -> None:
    """Callbacks, optimizers, schedulers, precision, and our own chapter."""
    strategy = trainer.strategy
    checkpoint["callbacks"] = collect_callback_states(trainer)
    checkpoint["optimizer_states"] = [strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers]
    checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    if state := strategy.precision_plugin.state_dict():
        checkpoint[type(strategy.precision_plugin).__qualname__] = state
    strategy.precision_plugin.on_save_checkpoint(checkpoint)
    chapter = {"progress": progress, **trainer.resume_state.state_dict()}
    checkpoint["fulmen"] = {"version": CHAPTER_VERSION, **chapter}


def collect_callback_states(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """The states of the callbacks that have one, by the keys under which a checkpoint holds them."""
    states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}
    return {key: state for key, state in states.items() if state}


class Snapshot:
    """An opened checkpoint, of a local path or URL. Without one, restoring does nothing."""

    def __init__(self, trainer: Trainer, path: Any = None, weights_only: bool | None = None) -> None:
        self.trainer = trainer
        self.path = path
        self.content: dict[str, Any] = {}
        self.left_out: set[str] = set()  # weights of another shape
        if path is not None:
            rank_zero_info(f"Restoring states from the checkpoint path at {path}")
            self.content = migrate_checkpoint(trainer.strategy.load_checkpoint(path, weights_only=weights_only), path)
            for owner in (trainer.lightning_module, trainer.datamodule):
                if owner is not None:  # `on_load_checkpoint` sees them; nothing is built from them
                    read_objects(self.content, owner.CHECKPOINT_HYPER_PARAMS_KEY, weights_only)
            version = (self.content.get("fulmen") or {}).get("version", 1)
            if version > CHAPTER_VERSION and trainer.state.fn == "fit":
                what = (
                    f"The checkpoint {path} has a chapter of version {version}, and this is written by a later fulmen:"
                )
                fix = "Install that one, or take only the weights: `load_from_checkpoint`."
                raise ValueError(f"{what} {CHAPTER_VERSION} is the latest that can be continued. {fix}")

    def restore_model(self) -> None:
        """Weights, datamodule and callbacks; before the model is set up, or after, if the strategy asks for that."""
        if self.path is None:
            return
        content = self.content
        trainer = self.trainer
        module = trainer.lightning_module
        datamodule = trainer.datamodule
        module.on_load_checkpoint(content)
        strict = module.strict_loading
        match_pruning(module, content)
        saved = set(content.get("state_dict", ()))
        load_weights(
            self.path, module, content, strict, lambda: trainer.strategy.load_model_state_dict(content, strict)
        )
        self.left_out = saved - set(content["state_dict"])
        if datamodule is not None and type(datamodule).__qualname__ in content:
            datamodule.load_state_dict(content[type(datamodule).__qualname__])
        if content.get("callbacks") is not None:
            self._restore_callbacks(content["callbacks"])

    def _restore_callbacks(self, states: dict[str, Any]) -> None:
        trainer = self.trainer
        for callback in trainer.callbacks:
            callback.on_load_checkpoint(trainer, trainer.lightning_module, self.content)
        keys = {callback.state_key: callback for callback in trainer.callbacks}
        unclaimed = [key for key in states if key not in keys]
        for key, callback in keys.items():
            alike = [other for other in unclaimed if callback._continues(other)]
            if key not in states and len(alike) == 1:
                states = {**states, key: states[alike[0]]}
                unclaimed.remove(alike[0])
        if missing := unclaimed:
            what = f"The checkpoint holds states of callbacks this Trainer does not have: {sorted(missing)}."
            rank_zero_warn(f"{what} Pass the same callbacks to continue them.")
        for callback in trainer.callbacks:
            if state := states.get(callback.state_key):
                callback.load_state_dict(deepcopy(state))

    def restore_training(self) -> None:
        """Precision, counters, optimizers and schedulers; after the optimizers were built."""
        if self.path is None:
            return
        content = self.content
        trainer = self.trainer
        precision = trainer.strategy.precision_plugin
        precision.on_load_checkpoint(content)
        if type(precision).__qualname__ in content:
            precision.load_state_dict(content[type(precision).__qualname__])
        if trainer.state.fn != "fit":
            rank_zero_info(f"Loaded model weights from the checkpoint at {self.path}")
            return
        self._restore_progress()
        trainer.resume_state.restore_flags()
        if missing := [key for key in ("optimizer_states", "lr_schedulers") if key not in content]:
            what = f"The checkpoint at {self.path} was saved with weights only: it contains only the model, and lacks {missing}."
            raise KeyError(f"{what} Use `MyModule.load_from_checkpoint(path)`, and fit without `ckpt_path`.")
        trainer.resume_state.restore_groups(content["optimizer_states"])
        if trainer.strategy.lightning_restore_optimizer:
            trainer.strategy.load_optimizer_state_dict(content)
            anew = [p for name, p in trainer.lightning_module.named_parameters() if name in self.left_out]
            for optimizer in trainer.strategy.optimizers if anew else ():
                for parameter in anew:  # its state has the shape that it had
                    optimizer.state.pop(parameter, None)
        for config, state in zip(trainer.lr_scheduler_configs, content["lr_schedulers"], strict=False):
            config.scheduler.load_state_dict(state)
        rank_zero_info(f"Restored all states from the checkpoint at {self.path}")

    def _restore_progress(self) -> None:
        trainer = self.trainer
        chapter = self.content.get("fulmen") or {}
        counters = self.content.get("loops", {})
        loader_states = counters.get("fit_loop", {}).get("state_dict", {}).get("combined_loader")
        progress = chapter.get("progress") or from_loops(counters)
        if "progress" not in chapter and progress["position"] == "VALIDATED" and progress["is_last_batch"]:
            # What the validation logged is not in files of others, and the end of the epoch asks for it: once more.
            progress["position"] = "BATCH_DONE"
        trainer.resume_state.load_state_dict(progress, chapter, loader_states)
        limit = trainer.max_epochs
        done = trainer.current_epoch
        if limit is not None and limit != -1 and done > limit:
            what = f"The checkpoint at {self.path} has current_epoch={done}: nothing is left for Trainer(max_epochs={limit})."
            raise MisconfigurationException(f"{what} Raise it above {done}.")


_KINDS = {
    "state_dict": dict, "optimizer_states": list, "lr_schedulers": list, "callbacks": dict, "loops": dict,
    "fulmen": dict,
}  # fmt: skip
_TRAINING = ("optimizer_states", "lr_schedulers")  # without these, a file has weights only
_COUNTERS = ("epochs", "batch", "batches", "steps", "log_step")


def check_content(content: Any, path: str, module: LightningModule, training: bool) -> None:
    """Raises if restoring the content of an intact file would surely fail; of its tensors, only shapes are looked at."""
    refuse_foreign(content, path)
    in_shards = is_sharded(path)
    needed = [*([] if in_shards else ["state_dict"]), *(_TRAINING if training else ())]
    problems = _problems_of_layout(content, needed)
    if training and not problems:
        problems = _problems_of_training(content)
    if not problems and not in_shards:
        problems = _problems_of_weights(content["state_dict"], module)
    if problems:
        what = f"The checkpoint {path!r} was read, but cannot be restored: {'; '.join(problems)}."
        raise DamagedCheckpointError(f"{what} Use one that this run has written.")


def _problems_of_layout(content: dict[str, Any], needed: list[str]) -> list[str]:
    problems = [f"`{key}` is missing" for key in needed if key not in content]
    for key, kind in _KINDS.items():
        value = content.get(key)
        may_be_none = key not in (*needed, "loops")
        if key in content and not isinstance(value, kind) and not (value is None and may_be_none):
            problems.append(f"`{key}` is a `{type(value).__name__}`, not a `{kind.__name__}`")
    return problems


def _problems_of_weights(saved: Mapping[str, Any], module: LightningModule) -> list[str]:
    own_loading = is_overridden("on_load_checkpoint", module) or is_overridden("load_state_dict", module, nn.Module)
    if own_loading or not module.strict_loading:
        return []
    own = module.state_dict()
    saved = fit_pruning(saved, own)
    unlike = [key for key in own if key not in saved or _shape_of(saved[key]) != _shape_of(own[key])]
    what = f"of the weights of {type(module).__name__}, {unlike[:5]} are missing or of another shape"
    return [what] if unlike else []


def _problems_of_training(content: dict[str, Any]) -> list[str]:
    problems = []
    if not all(isinstance(s, dict) and {"state", "param_groups"} <= set(s) for s in content["optimizer_states"]):
        problems.append("`optimizer_states` are not those of optimizers")
    if not all(isinstance(state, dict) for state in content["lr_schedulers"]):
        problems.append("`lr_schedulers` are not those of schedulers")
    current = (parse_version(content[VERSION_KEY]) or parse_version(API_VERSION)) >= (2, 0)
    if current and not _has_counters(content):  # older files are brought up to date first
        problems.append("the counters of epochs, batches and steps are not all there")
    return problems


def _has_counters(content: dict[str, Any]) -> bool:
    progress = (content.get("fulmen") or {}).get("progress")
    loops = content.get("loops")
    if not progress and not loops:
        return False
    progress = progress or from_loops(loops or {})
    return all(isinstance(progress.get(name), int) for name in _COUNTERS)


def load_weights(
    path: object, module: LightningModule, checkpoint: dict[str, Any], strict: bool, load: Callable[[], Any]
) -> Any:
    """What `load`, which loads the weights of a checkpoint, returns; without `strict`, what has another shape is left out.

    Raises:
        RuntimeError: they do not fit; it says which keys and shapes differ, with the nearest names.
    """
    if "state_dict" not in checkpoint:
        what = f"The checkpoint at {path} has no `state_dict`, only {sorted(map(str, checkpoint))}."
        raise KeyError(f"{what} Use a file written by `trainer.save_checkpoint` or `ModelCheckpoint`.")
    try:
        return load()
    except RuntimeError as error:
        saved = checkpoint["state_dict"]
        own = module.state_dict()
        both = [(key, _shape_of(saved[key]), _shape_of(own[key])) for key in own if key in saved]
        unlike = {key: f"{key} {a} in the file, {b} in the module" for key, a, b in both if a != b}
        if unlike and not strict:
            for key in unlike:
                del saved[key]
            shown = _list_briefly(list(unlike.values()))
            rank_zero_warn(f"Weights of another shape stay as they are in {type(module).__name__}: {shown}.")
            return load()
        found = _describe_key_differences(own, saved) | {"of another shape": list(unlike.values())}
        listed = "; ".join(f"{kind}: {_list_briefly(keys)}" for kind, keys in found.items() if keys)
        what = f"The checkpoint at {path} does not fit {type(module).__name__}. Keys {listed or 'differ'}."
        fix = "Build the module as it was" + ", or set `self.strict_loading = False` to load what fits." * strict
        raise RuntimeError(f"{what} {fix}") from error


def _describe_key_differences(own: dict[str, Any], saved: dict[str, Any]) -> dict[str, list[str]]:
    """Keys that only one of two state dicts has, with the names that are most like those that are missing."""
    unexpected = [key for key in saved if key not in own]
    missing = [key for key in own if key not in saved]
    near = {key: find_nearest_name(key, unexpected) for key in missing[:10]}
    shown = [f"{key} (saved as {near.get(key)}?)" if near.get(key) else key for key in missing]
    return {"missing": shown, "unexpected": unexpected}


def _list_briefly(keys: list[str]) -> str:
    return ", ".join(keys[:10]) + " ..." * (len(keys) > 10)


def _shape_of(value: Any) -> tuple[int, ...] | None:
    return None if is_lazy(value) else tuple(value.shape if hasattr(value, "shape") else ())
