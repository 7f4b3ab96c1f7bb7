"""What processes find out together: do they see the same files, and whose samples are whose?"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset, DistributedSampler, Sampler

from fulmen.storage.filesystem import is_remote, local_path

if TYPE_CHECKING:
    from fulmen.engine.strategy import Strategy
    from fulmen.utilities.types import _PATH

_PROBE = ".fulmen_shared_folder"
_POLL_S = 0.02  # seconds


def is_shared_filesystem(strategy: Strategy, path: _PATH | None = None, timeout: float = 3) -> bool:
    """Do all processes see the same files under a path? All of them call this, once they have met.

    Arguments:
        strategy: of a Fabric or Trainer.
        path: by default the working directory. It must exist, and rank 0 must be able to write there.
        timeout: seconds in which a file of rank 0 has to appear to the others.

    Returns:
        True for one process, and for paths of object stores.

    Raises:
        FileNotFoundError: the path does not exist on some process.
    """
    if strategy.world_size == 1 or (path is not None and is_remote(path)):
        return True
    folder = Path.cwd() if path is None else Path(local_path(path)).resolve()
    if not strategy.reduce_boolean_decision(strategy.broadcast(folder) == folder):
        return False
    if not strategy.reduce_boolean_decision(folder.exists()):
        what = f"The path {str(folder)!r} does not exist on all processes, so nothing can be said about it."
        raise FileNotFoundError(f"{what} Make it first.")
    probe = (folder.parent if folder.is_file() else folder) / _PROBE
    probe.unlink(missing_ok=True)
    strategy.barrier()
    if strategy.is_global_zero:
        probe.touch()
    found = _wait_for_file(probe, timeout)
    strategy.barrier()
    everywhere = strategy.reduce_boolean_decision(found)
    with contextlib.suppress(OSError):  # another process was first
        probe.unlink()
    return everywhere


def _wait_for_file(path: Path, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not os.path.lexists(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


class DistributedSamplerWrapper(DistributedSampler[Any]):
    """The samples that a sampler of the user's own chooses, each for one of the processes.

    Arguments:
        sampler: any sampler; it is read as a whole at the start of each epoch, and must give the same everywhere.
        args: of `DistributedSampler` after the dataset, like `kwargs`; the order is that of the sampler.

    >>> list(DistributedSamplerWrapper([5, 6, 7, 8], num_replicas=2, rank=1))
    [6, 8]
    """

    def __init__(self, sampler: Sampler[Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(SamplerOutput(sampler), *args, **{"shuffle": False, **kwargs})

    def __iter__(self) -> Iterator[Any]:
        chosen = self.dataset
        assert isinstance(chosen, SamplerOutput)
        chosen.read_sampler()
        return (chosen[index] for index in super().__iter__())

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch begins, to this sampler and to the one inside."""
        super().set_epoch(epoch)
        chosen = self.dataset
        assert isinstance(chosen, SamplerOutput)
        if hasattr(chosen.sampler, "set_epoch"):
            chosen.sampler.set_epoch(epoch)


class SamplerOutput(Dataset[Any]):
    """What a sampler chose, as a dataset of it."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.chosen: list[Any] = []

    def read_sampler(self) -> None:
        """Lets the sampler choose."""
        self.chosen = list(self.sampler)

    def __getitem__(self, index: int) -> Any:
        return self.chosen[index]

    def __len__(self) -> int:
        return len(self.sampler)
