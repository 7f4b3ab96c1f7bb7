"""A checkpoint, as an opened file or as one being collected: what is saved, what is loaded, and when.

The layout is Lightning's, so that either framework reads the other's files. Our own chapter, "fulmen", holds the exact
position and the states of the random generators in plain types; files without it are placed by `loop_counters`.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from fulmen.checkpoint.loop_counters import from_loops, to_loops
from fulmen.checkpoint.migrate import API_VERSION, migrate_checkpoint
from fulmen.utilities.errors import MisconfigurationException, nearest
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn
from fulmen.utilities.seed import generator_states

if TYPE_CHECKING:
    from fulmen.trainer import Trainer

# The batch is finished, but the loggers' x axis moves on only after its validation.
_LOG_STEP_PENDING = ("BATCH_DONE", "VALIDATING", "VALIDATED")


def collect(trainer: Trainer, weights_only: bool = False) -> dict[str, Any]:
    """The whole content of a checkpoint, as of now.

    Arguments:
        weights_only: leave out callbacks, optimizers, schedulers and precision.
    """
    module, datamodule, strategy = trainer.lightning_module, trainer.datamodule, trainer.strategy
    progress = saved_progress(trainer)
    book = trainer.book
    previous, book.hook = book.hook, "on_save_checkpoint"
    checkpoint: dict[str, Any] = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": API_VERSION,
        "state_dict": strategy.lightning_module_state_dict(),
        "loops": to_loops(progress),
    }
    if not weights_only:
        states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}
        checkpoint["callbacks"] = {key: state for key, state in states.items() if state}
        checkpoint["optimizer_states"] = [strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers]
        checkpoint["lr_schedulers"] = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
        precision_state = strategy.precision_plugin.state_dict()
        if precision_state:
            checkpoint[type(strategy.precision_plugin).__qualname__] = precision_state
        generators = generator_states()
        checkpoint["fulmen"] = {"version": 1, "progress": progress, "generators": generators}
    for owner in (module, datamodule):
        if owner is not None and owner.hparams:
            _write_hparams(checkpoint, owner)
    if datamodule is not None:
        state = datamodule.state_dict()
        if state:
            checkpoint[type(datamodule).__qualname__] = state
    if not weights_only:
        for callback in trainer.callbacks:
            callback.on_save_checkpoint(trainer, module, checkpoint)
    module.on_save_checkpoint(checkpoint)
    book.hook = previous
    return checkpoint


def saved_progress(trainer: Trainer) -> dict[str, Any]:
    """The counters as a file holds them: a batch that was finished counts in full."""
    loop = trainer.fit_loop
    optimization = getattr(loop, "optimization", None)
    stepped = optimization.stepped if optimization is not None else True
    progress = loop.progress.state_dict()
    if progress["position"] in _LOG_STEP_PENDING and stepped:
        progress["log_step"] += 1
    return {
        **progress,
        "stepped": stepped,
        "automatic": trainer.lightning_module.automatic_optimization,
        "val_batches": sum(loop.val_loop.batches_seen.values()),
    }


def _write_hparams(checkpoint: dict[str, Any], owner: Any) -> None:
    if getattr(owner, "_hparams_name", None):
        checkpoint[owner.CHECKPOINT_HYPER_PARAMS_NAME] = owner._hparams_name
    hparams = owner.hparams
    if type(hparams).__module__.startswith("omegaconf"):
        checkpoint[owner.CHECKPOINT_HYPER_PARAMS_KEY] = hparams
        checkpoint[owner.CHECKPOINT_HYPER_PARAMS_TYPE] = type(hparams)
    else:
        checkpoint[owner.CHECKPOINT_HYPER_PARAMS_KEY] = dict(hparams)


class Snapshot:
    """An opened checkpoint. Without a path, restoring does nothing.

    Arguments:
        path: a local path or URL.
        weights_only: handed to `torch.load`.
    """

    def __init__(self, trainer: Trainer, path: Any = None, weights_only: bool | None = None) -> None:
        self.trainer, self.path = trainer, path
        self.content: dict[str, Any] | None = None
        if path is None:
            return
        rank_zero_info(f"Restoring states from the checkpoint path at {path}")
        self.content = migrate_checkpoint(trainer.strategy.load_checkpoint(path, weights_only=weights_only), path)

    def restore_model(self) -> None:
        """Weights, datamodule and callbacks; before the model is set up, or after, if the strategy asks for that."""
        content, trainer = self.content, self.trainer
        if content is None:
            return
        module, datamodule = trainer.lightning_module, trainer.datamodule
        module.on_load_checkpoint(content)
        self._load_weights(module)
        if datamodule is not None and type(datamodule).__qualname__ in content:
            datamodule.load_state_dict(content[type(datamodule).__qualname__])
        self._restore_callbacks()

    def _load_weights(self, module: Any) -> None:
        assert self.content is not None
        if "state_dict" not in self.content:
            raise KeyError(
                f"The checkpoint at {self.path} has no 'state_dict' (keys: {sorted(map(str, self.content))}). "
                "It does not hold the weights of a module. "
                "Use a file written by `trainer.save_checkpoint` or `ModelCheckpoint`."
            )
        try:
            self.trainer.strategy.load_model_state_dict(self.content, strict=module.strict_loading)
        except RuntimeError as error:
            raise RuntimeError(_mismatch(self.path, module, self.content["state_dict"])) from error

    def _restore_callbacks(self) -> None:
        assert self.content is not None
        trainer, states = self.trainer, self.content.get("callbacks")
        if states is None:
            return
        for callback in trainer.callbacks:
            callback.on_load_checkpoint(trainer, trainer.lightning_module, self.content)
        missing = set(states) - {callback.state_key for callback in trainer.callbacks}
        if missing:
            rank_zero_warn(
                f"The checkpoint holds states of callbacks this Trainer does not have: {sorted(missing)}. "
                "They are ignored; pass the same callbacks to continue them."
            )
        for callback in trainer.callbacks:
            state = states.get(callback.state_key)
            if state:
                callback.load_state_dict(deepcopy(state))

    def restore_training(self) -> None:
        """Precision, counters, optimizers and schedulers; after the optimizers were built."""
        content, trainer = self.content, self.trainer
        if content is None:
            return
        precision = trainer.strategy.precision_plugin
        name = type(precision).__qualname__
        if name in content:
            precision.load_state_dict(content[name])
        if trainer.state.fn != "fit":
            rank_zero_info(f"Loaded model weights from the checkpoint at {self.path}")
            return
        self._restore_progress()
        missing = [key for key in ("optimizer_states", "lr_schedulers") if key not in content]
        if missing:
            raise KeyError(
                f"Trying to restore optimizer state but the checkpoint at {self.path} lacks {missing}. "
                "It was saved with weights only. "
                "Use `MyModule.load_from_checkpoint(path)` and fit without `ckpt_path` to start from its weights."
            )
        if trainer.strategy.lightning_restore_optimizer:
            trainer.strategy.load_optimizer_state_dict(content)
        for config, state in zip(trainer.lr_scheduler_configs, content["lr_schedulers"], strict=False):
            config.scheduler.load_state_dict(state)
        rank_zero_info(f"Restored all states from the checkpoint at {self.path}")

    def _restore_progress(self) -> None:
        assert self.content is not None
        trainer, chapter = self.trainer, self.content.get("fulmen") or {}
        loop = trainer.fit_loop
        loop.resume(chapter.get("progress") or from_loops(self.content.get("loops", {})), chapter.get("generators"))
        limit = loop.max_epochs
        if limit is not None and limit != -1 and loop.progress.epochs > limit:
            raise MisconfigurationException(
                f"The checkpoint at {self.path} was saved after {loop.progress.epochs} epochs, but "
                f"`Trainer(max_epochs={limit})`. "
                "There is nothing left to train. "
                f"Raise `max_epochs` above {loop.progress.epochs}."
            )


def _mismatch(path: Any, module: Any, saved: dict[str, Any]) -> str:
    """Which keys and shapes differ, with the nearest names."""
    own = module.state_dict()
    missing = [key for key in own if key not in saved]
    unexpected = [key for key in saved if key not in own]
    shapes = [
        f"{key}: {tuple(saved[key].shape)} in the file, {tuple(own[key].shape)} in the module"
        for key in own
        if key in saved and getattr(own[key], "shape", None) != getattr(saved[key], "shape", None)
    ]
    parts = []
    if missing:
        near = {key: nearest(key, unexpected) for key in missing[:10]}
        listed = [f"{key} (saved as {near[key]}?)" if near[key] else key for key in missing[:10]]
        parts.append(f"missing: {', '.join(listed)}{' ...' if len(missing) > 10 else ''}")
    if unexpected:
        parts.append(f"unexpected: {', '.join(unexpected[:10])}{' ...' if len(unexpected) > 10 else ''}")
    if shapes:
        parts.append(f"of another shape: {'; '.join(shapes[:10])}")
    return (
        f"The checkpoint at {path} does not fit {type(module).__name__}. Keys {'; '.join(parts) or 'differ'}. "
        "It was saved by another model, or the model changed since. "
        "Build the module as it was, or set `self.strict_loading = False` to load what fits."
    )
