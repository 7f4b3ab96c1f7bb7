"""From what a loader hook returned to loaders a loop can count on: checked, adapted to the stage, limited."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fulmen.data import loaders as loader_tools
from fulmen.data.batches import transfer_to
from fulmen.data.combined import CombinedLoader
from fulmen.hooks import DataHooks
from fulmen.profilers.profiler import measured

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen.trainer import Trainer


def prepared_loaders(
    trainer: Trainer, combined: CombinedLoader, label: str, kind: str, limit: int | float
) -> CombinedLoader:
    """The combination with every loader checked, made sequential or undropped where the stage wants it, and limited.

    Arguments:
        label: names the hook or argument in messages.
        kind: "train", "val", "test" or "predict".
        limit: `limit_{kind}_batches`.
    """
    adapted = []
    place = trainer.distributed_sampler_kwargs if trainer.use_distributed_sampler and trainer.world_size > 1 else None
    for loader in combined.flattened:
        loader_tools.check_iterable(loader, label)
        if trainer.overfit_batches and kind in ("train", "val"):
            loader = loader_tools.sequential(loader)
        loader_tools.warn_about(loader, stage=kind, reloaded=bool(trainer.reload_dataloaders_every_n_epochs))
        if place is not None:
            loader = loader_tools.sharded(loader, **place, padded=kind == "train")
        if kind == "predict":
            loader = loader_tools.for_prediction(loader)
        loader_tools.seed_workers(loader, trainer.global_rank)
        adapted.append(trainer.strategy.process_dataloader(loader))
    combined.flattened = adapted
    name = f"limit_{kind}_batches"
    combined.limits = [
        loader_tools.limit_batches(loader_tools.length_of(loader), limit, name=name) for loader in adapted
    ]
    return combined


def batch_transfer(trainer: Trainer) -> Callable[[Any, int], Any]:
    """The compiled way of a batch to the device."""
    return transfer_to(trainer.strategy, trainer.lightning_module, trainer.datamodule, trainer.sources, DataHooks)


def profiled_fetch(trainer: Trainer, action: str) -> Callable[[Callable[[], Any]], Callable[[], Any]] | None:
    """Wraps the fetching of a batch in the profiler; None with the pass-through profiler."""
    profiler = trainer.profiler
    return (lambda fetch: measured(profiler, action, fetch)) if profiler.active else None


def bound_step(trainer: Trainer, name: str) -> Callable[..., Any]:
    """The callable for a step of the module, timed if somebody profiles."""
    strategy = trainer.strategy
    return measured(trainer.profiler, f"[Strategy]{type(strategy).__name__}.{name}", strategy.bind(name))


def loaders_as_given(loop: Any) -> Any:
    """What the user gave a loop, in the same nesting, with loaders that were made again in their places."""
    if loop.loaders is None or isinstance(loop.given_loaders, CombinedLoader):
        return loop.given_loaders
    return loop.loaders.iterables
