"""`AsyncCheckpointIO`: a checkpoint is copied at once and written while training continues."""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch.nn import Parameter

from fulmen.storage.checkpoint_io import CheckpointIO, _WrappingCheckpointIO, load_with
from fulmen.utilities.rank_zero import log, rank_zero_info, rank_zero_warn
from fulmen.utilities.types import _PATH


class Job(NamedTuple):
    """What the background has to do with a file, and whether that exists afterwards."""

    path: str
    exists: bool
    act: Callable[[], Any]


class AsyncCheckpointIO(_WrappingCheckpointIO):
    """Writes with another `CheckpointIO`, in a thread: a save takes as long as copying the state into host memory.

    One copy exists at a time: a save waits until the one before is written. Whatever else is done to files, here or with
    `after_writing`, happens in the order it was asked for, and nothing of it once a write has failed. That error is
    logged when it occurs, and raised by the next save, load or `wait`. The process does not end before all is written.

    Arguments:
        checkpoint_io: what writes; by default a `TorchCheckpointIO`.
        always: if False, only what is saved inside of `in_background()` is written while training continues.

    Raises:
        TypeError: `checkpoint_io` writes in the background itself.

    Examples:
        >>> import torch
        >>> io = AsyncCheckpointIO()
        >>> weight = torch.ones(2)
        >>> io.save_checkpoint({"weight": weight}, "model.ckpt")  # the file appears later
        >>> weight += 1  # does not reach the copy
        >>> io.wait()
        >>> io.load_checkpoint("model.ckpt")
        {'weight': tensor([1., 1.])}
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None, *, always: bool = True) -> None:
        if isinstance(checkpoint_io, AsyncCheckpointIO):
            raise TypeError("`AsyncCheckpointIO(AsyncCheckpointIO(...))`: once is enough. Pass the one inside.")
        super().__init__(checkpoint_io)
        self.always = self._wanted = always
        self._jobs: deque[Job] = deque()  # the first one is being done
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.failed = False  # could something not be done since the newest save?
        self._stager = HostStager()
        self._copied = False
        self._newest: Callable[[Any], None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without threads and copies, which belong to this process."""
        return {"checkpoint_io": self.checkpoint_io, "always": self.always}

    def __setstate__(self, state: dict[str, Any]) -> None:
        AsyncCheckpointIO.__init__(self, **state)

    # ------------------------------------------------------------------ the four verbs

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Copies the checkpoint and returns; the file appears later, complete.

        Args:
            checkpoint: tensors may be changed as soon as this returns.
            path: of the file.
            storage_options: handed to `checkpoint_io`.
        """
        self.wait()
        options = {} if storage_options is None else {"storage_options": storage_options}
        if not self._wanted:
            self.checkpoint_io.save_checkpoint(checkpoint, path, **options)
            return
        copy = checkpoint
        self._copied = False
        ready: list[Any] = []
        try:
            copy, ready = self._stager.stage_checkpoint(checkpoint)
            self._copied = True
        except Exception as error:  # `checkpoint_io` knows best what is wrong with it, if anything
            rank_zero_warn(f"Training waits for the checkpoint {os.fspath(path)!r}, which cannot be copied: {error}")
        self.failed = False
        self._newest = partial(self._write_copy, copy, ready, options)
        self.write_again(path)

    def load_checkpoint(
        self, path: _PATH, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a file, after all was written."""
        self.wait()
        return load_with(self.checkpoint_io, path, map_location, weights_only)

    def verify_checkpoint(self, path: _PATH) -> None:
        """Looks at a file, after all was written."""
        self.wait()
        self.checkpoint_io.verify_checkpoint(path)

    def remove_checkpoint(self, path: _PATH) -> None:
        """Removes a file after what is being written: until then it may be the only good one."""
        self.after_writing(partial(self.checkpoint_io.remove_checkpoint, path), path, exists=False)

    def teardown(self) -> None:
        """Waits until all is written, lets the memory go, and raises what went wrong."""
        failure = self.drain_jobs()
        self._newest = None
        self._stager = HostStager()
        self.checkpoint_io.teardown()
        if failure is not None:
            raise failure

    # ------------------------------------------------------------------ the background

    @contextmanager
    def in_background(self) -> Generator[None]:
        """Inside, saves return before they are written."""
        before = self._wanted
        self._wanted = True
        try:
            yield
        finally:
            self._wanted = before

    @property
    def is_writing(self) -> bool:
        """Is something still to be written or done?"""
        return bool(self._jobs)

    def write_again(self, path: _PATH) -> None:
        """The newest copy under one more path; nothing where no copy was made, as on other ranks."""
        if self._newest is not None:
            self.after_writing(partial(self._newest, path), path, exists=True)
            if not self._copied:
                self.wait()

    def after_writing(self, act: Callable[[], Any], path: _PATH, exists: bool) -> None:
        """Does something to the file of that path when all that was asked for before is done; at once if that is so."""
        job = Job(os.fspath(path), exists, act)
        with self._lock:
            idle = not self._jobs and not exists and self._failure is None
            if not idle:
                self._jobs.append(job)
                if self._thread is None:  # no daemon: the interpreter waits for it
                    self._thread = threading.Thread(target=self._run_jobs, name="fulmen-checkpoints")
                    self._thread.start()
        if idle:
            act()

    def will_exist(self, path: _PATH) -> bool | None:
        """Whether a file exists when all is done; None if nothing is being done to it."""
        with self._lock:
            return next((job.exists for job in reversed(self._jobs) if job.path == os.fspath(path)), None)

    def drain_jobs(self) -> BaseException | None:
        """Waits until all is done; returns, and forgets, what went wrong."""
        while (thread := self._thread) is not None:
            thread.join()
        failure = self._failure
        self._failure = None
        return failure

    def wait(self) -> None:
        """Waits until all is done, and raises what went wrong."""
        if (failure := self.drain_jobs()) is not None:
            raise failure

    def _run_jobs(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._thread = None
                    return
                job = self._jobs[0]
            try:
                if self._failure is None:
                    job.act()
            except BaseException as error:
                log.error(f"In the background, {job.path!r} failed: {type(error).__name__}: {error}")
                self._failure = error
                self.failed = True
            with self._lock:
                self._jobs.popleft()

    def _write_copy(self, copy: dict[str, Any], ready: list[Any], options: dict[str, Any], path: _PATH) -> None:
        for event in ready:
            event.synchronize()  # sync, of this thread alone: the copy of that device has arrived
        self.checkpoint_io.save_checkpoint(copy, path, **options)


def unwrap_async_io(io: CheckpointIO, why: str) -> CheckpointIO:
    """The `CheckpointIO` itself for those who cannot write in the background, which is said."""
    if not isinstance(io, AsyncCheckpointIO):
        return io
    rank_zero_info(f"Training waits while a checkpoint is written: {why}.")
    return io.checkpoint_io


class HostStager:
    """Copies checkpoints into host memory, which is kept from one to the next: fresh memory is twice as slow to fill."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, bool], list[Tensor]] = {}

    def stage_checkpoint(self, checkpoint: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
        """A copy that later changes do not reach, and events to wait for; the copy before is overwritten.

        Tensors that share memory do so in the copy. Other objects are copied as `copy.deepcopy` does it.
        """
        free = self._blocks
        self._blocks = {}
        memo: dict[int, Any] = {}
        blocks: dict[int, Tensor] = {}
        devices = set()
        for tensor in _tensors_in(checkpoint):
            if id(tensor) in memo or not _is_plain(tensor):
                continue
            storage = tensor.untyped_storage()
            if (block := blocks.get(storage._cdata)) is None:
                block = blocks[storage._cdata] = self._copy_storage(storage, free)
                devices.add(storage.device)
            copy = torch.empty(0, dtype=tensor.dtype)
            copy.set_(block.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
            copy.requires_grad_(tensor.requires_grad)
            memo[id(tensor)] = Parameter(copy, tensor.requires_grad) if isinstance(tensor, Parameter) else copy
        events = []
        for device in devices:
            if device.type == "cuda":  # training continues at once: its kernels follow the copy on the same stream
                events.append(torch.cuda.Event())
                events[-1].record(torch.cuda.current_stream(device))
        return deepcopy(checkpoint, memo), events

    def _copy_storage(self, storage: UntypedStorage, free: dict[tuple[int, bool], list[Tensor]]) -> Tensor:
        size = storage.nbytes()
        pinned = storage.device.type == "cuda"
        kept = free.get((size, pinned))
        block = kept.pop() if kept else torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._blocks.setdefault((size, pinned), []).append(block)
        if storage.device.type != "cpu":
            whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            block.copy_(whole, non_blocking=pinned)
        elif size:
            # `copy_` would wake all of torch's threads for each tensor, at many times the price where cores are busy.
            ctypes.memmove(block.data_ptr(), storage.data_ptr(), size)
        return block


def _tensors_in(value: object) -> Iterator[Tensor]:
    """Those in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(child)


def _is_plain(tensor: Tensor) -> bool:
    """Can it be rebuilt from its memory and shape? Others are left to their own `__deepcopy__`."""
    special = tensor.is_quantized or tensor.is_meta or tensor.is_conj() or tensor.is_neg() or bool(vars(tensor))
    return type(tensor) in (Tensor, Parameter) and tensor.layout is torch.strided and not special
