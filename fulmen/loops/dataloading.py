"""From what a loader hook returned to loaders a loop can count on: checked, adapted to the stage, limited."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

from fulmen.data import loaders as loader_tools
from fulmen.data import samplers
from fulmen.data.combined import CombinedLoader, loader_length
from fulmen.data.loader_state import is_map_style
from fulmen.data.transfer import compile_transfer
from fulmen.hooks import DataHooks
from fulmen.profilers.profiler import measured
from fulmen.utilities.introspection import adapt_to_signature, takes_argument

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from fulmen.loops.evaluate import EvaluationLoop
    from fulmen.loops.fit import FitLoop
    from fulmen.trainer import Trainer


def prepare_loaders(
    trainer: Trainer, combined: CombinedLoader, label: str, kind: str, limit: int | float
) -> CombinedLoader:
    """The combination with every loader checked, adapted to the stage, cut to this process's part, and limited.

    Arguments:
        label: names the hook or argument in messages.
        kind: "train", "val", "test" or "predict".
        limit: `limit_{kind}_batches`.
    """
    given = combined.flattened
    options = trainer.distributed_sampler_kwargs if trainer.use_distributed_sampler and trainer.world_size > 1 else None
    seeds = trainer.strategy.broadcast([samplers.order_seed(loader) for loader in given]) if options else []
    adapted: list[Iterable[Any]] = []
    limits: list[int | float] = []
    for index, loader in enumerate(given):
        loader_tools.check_iterable(loader, label)
        whole = _adapt_to_stage(trainer, loader, kind)
        part = _cut_to_rank(trainer, whole, kind, options, seeds[index]) if options else whole
        # A fraction is one of all batches, however they were dealt out.
        total = loader_length(whole) if part is not whole and kind != "train" else inf
        if kind == "predict" and trainer.prediction_writers:
            part = loader_tools.record_indices(part)
        adapted.append(trainer.strategy.process_dataloader(part))
        limits.append(_limit_of(trainer, adapted[-1], total, limit, f"limit_{kind}_batches"))
    combined.flattened = adapted
    combined.limits = limits
    return combined


def _adapt_to_stage(trainer: Trainer, loader: Iterable[Any], kind: str) -> Iterable[Any]:
    """The loader without shuffling or `drop_last` where the stage needs that, with seeded workers."""
    if trainer.overfit_batches and kind in ("train", "val"):
        loader = loader_tools.disable_shuffling(loader)
    loader_tools.warn_about_settings(loader, stage=kind, reloaded=bool(trainer.reload_dataloaders_every_n_epochs))
    loader_tools.seed_workers(loader, trainer.global_rank)
    return loader_tools.keep_last_batch(loader) if kind == "predict" else loader


def _cut_to_rank(
    trainer: Trainer, loader: Iterable[Any], kind: str, options: dict[str, int], seed: int
) -> Iterable[Any]:
    if is_map_style(loader):
        return samplers.shard_samples(loader, **options, padded=kind == "train", seed=seed)
    loader_tools.set_epoch(loader, trainer.current_epoch)  # what comes first is read here, to compare
    return samplers.RoundRobinLoader(loader, **options, exchange=trainer.strategy.exchange_objects)


def _limit_of(
    trainer: Trainer, loader: Iterable[Any], total: int | float, limit: int | float, name: str
) -> int | float:
    """How many batches are read of a loader, of which all processes together have ``total`` (infinite if they do not share)."""
    length = loader_tools.check_length(loader)
    if isinstance(limit, float) and 0 < limit < 1 and total < inf:
        wanted = int(loader_tools.limit_batches(total, limit, name=name))
        return min(length, len(range(trainer.global_rank, wanted, trainer.world_size)))
    return loader_tools.limit_batches(length, limit, name=name)


def prepare_train_loaders(trainer: Trainer, given: Any, label: str) -> CombinedLoader:
    """The loaders of training as a combination that gives one batch of each at once.

    Raises:
        ValueError: if they are combined to give their batches one after the other.
    """
    combined = given if isinstance(given, CombinedLoader) else CombinedLoader(given, "max_size_cycle")
    if combined.mode == "sequential":
        raise ValueError(
            'Training does not support the `CombinedLoader(mode="sequential")` mode. '
            "A training step takes one batch of every loader at once. Use the mode 'max_size_cycle', 'max_size' or "
            "'min_size', or concatenate the datasets."
        )
    return prepare_loaders(trainer, combined, label, "train", trainer.limit_train_batches)


def build_transfer(trainer: Trainer) -> Callable[[Any, int], Any]:
    """The function that moves a batch to the device."""
    return compile_transfer(trainer.strategy, trainer.lightning_module, trainer.datamodule, trainer.sources, DataHooks)


def build_fetch_profiler(trainer: Trainer, action: str) -> Callable[[Callable[[], Any]], Callable[[], Any]] | None:
    """Wraps the fetching of a batch in the profiler; None with the pass-through profiler."""
    profiler = trainer.profiler
    return (lambda fetch: measured(profiler, action, fetch)) if profiler.active else None


def bind_step(trainer: Trainer, name: str, arguments: Sequence[str]) -> Callable[..., Any]:
    """The callable for a step of the module, timed by a profiler; it takes all of these arguments by position."""
    strategy = trainer.strategy
    method = getattr(trainer.lightning_module, name)
    if takes_argument(method, "dataloader_iter", explicit=True):
        arguments = ("dataloader_iter", *arguments[1:])
    step = strategy.bind_step(name)
    if name == "training_step" and strategy.buffers is not None:
        step = strategy.buffers.sync_before(step)
    step = adapt_to_signature(step, method, arguments)
    return measured(trainer.profiler, f"[Strategy]{type(strategy).__name__}.{name}", step)


def loaders_as_given(loop: FitLoop | EvaluationLoop) -> Iterable[Any] | None:
    """What the user gave a loop, in the same nesting, with loaders that were made again in their places."""
    if loop.loaders is None or isinstance(loop.given_loaders, CombinedLoader):
        return loop.given_loaders
    given: Iterable[Any] = loop.loaders.iterables
    return given
