"""From what a loader hook returned to loaders a loop can count on: checked, adapted to the stage, limited."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

from fulmen.data import loaders as loader_tools
from fulmen.data import samplers
from fulmen.data.combined import CombinedLoader, loader_length
from fulmen.data.transfer import compile_transfer
from fulmen.hooks import DataHooks
from fulmen.profilers.profiler import measured
from fulmen.utilities.introspection import by_signature, takes_argument

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fulmen.trainer import Trainer


def prepare_loaders(
    trainer: Trainer, combined: CombinedLoader, label: str, kind: str, limit: int | float
) -> CombinedLoader:
    """The combination with every loader checked, made sequential, or without `drop_last`, where the stage wants it, and limited.

    Arguments:
        label: names the hook or argument in messages.
        kind: "train", "val", "test" or "predict".
        limit: `limit_{kind}_batches`.
    """
    adapted, limits = [], []
    strategy, world = trainer.strategy, trainer.world_size
    place = trainer.distributed_sampler_kwargs if trainer.use_distributed_sampler and world > 1 else None
    seeds = strategy.broadcast([samplers.order_seed(loader) for loader in combined.flattened]) if place else []
    for index, loader in enumerate(combined.flattened):
        loader_tools.check_iterable(loader, label)
        if trainer.overfit_batches and kind in ("train", "val"):
            loader = loader_tools.disable_shuffling(loader)
        loader_tools.warn_about_settings(loader, stage=kind, reloaded=bool(trainer.reload_dataloaders_every_n_epochs))
        loader_tools.seed_workers(loader, trainer.global_rank)
        whole = loader = loader_tools.keep_last_batch(loader) if kind == "predict" else loader
        if place:
            if not loader_tools.is_map_style(loader):  # what comes first is read here, to compare
                loader_tools.set_epoch(loader, trainer.current_epoch)
            loader = samplers.shard_samples(loader, **place, padded=kind == "train", seed=seeds[index])
            loader = samplers.read_round_robin(loader, **place, exchange=strategy.exchange_objects)
        total = loader_length(whole) if loader is not whole and kind != "train" else inf
        if kind == "predict" and trainer.prediction_writers:
            loader = loader_tools.record_indices(loader)
        adapted.append(strategy.process_dataloader(loader))
        name = f"limit_{kind}_batches"
        length = loader_tools.check_length(adapted[-1])
        if isinstance(limit, float) and 0 < limit < 1 and total < inf:
            # A fraction is one of all batches, however they were dealt out.
            wanted = int(loader_tools.limit_batches(total, limit, name=name))
            limits.append(min(length, len(range(trainer.global_rank, wanted, world))))
        else:
            limits.append(loader_tools.limit_batches(length, limit, name=name))
    combined.flattened, combined.limits = adapted, limits
    return combined


def build_transfer(trainer: Trainer) -> Callable[[Any, int], Any]:
    """The compiled way of a batch to the device."""
    return compile_transfer(trainer.strategy, trainer.lightning_module, trainer.datamodule, trainer.sources, DataHooks)


def build_fetch_profiler(trainer: Trainer, action: str) -> Callable[[Callable[[], Any]], Callable[[], Any]] | None:
    """Wraps the fetching of a batch in the profiler; None with the pass-through profiler."""
    profiler = trainer.profiler
    return (lambda fetch: measured(profiler, action, fetch)) if profiler.active else None


def bind_step(trainer: Trainer, name: str, arguments: Sequence[str]) -> Callable[..., Any]:
    """The callable for a step of the module, timed if somebody profiles; it takes all of these arguments by position."""
    strategy, method = trainer.strategy, getattr(trainer.lightning_module, name)
    if takes_argument(method, "dataloader_iter", explicit=True):
        arguments = ("dataloader_iter", *arguments[1:])
    step = strategy.bind_step(name)
    if name == "training_step" and strategy.buffers is not None:
        step = strategy.buffers.sync_before(step)
    step = by_signature(step, method, arguments)
    return measured(trainer.profiler, f"[Strategy]{type(strategy).__name__}.{name}", step)


def loaders_as_given(loop: Any) -> Any:
    """What the user gave a loop, in the same nesting, with loaders that were made again in their places."""
    if loop.loaders is None or isinstance(loop.given_loaders, CombinedLoader):
        return loop.given_loaders
    return loop.loaders.iterables
