"""`DeepSpeedStrategy` of Fabric: the engine of the optional package ``deepspeed`` around the module."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from fulmen.engine import deepspeed as engine_deepspeed
from fulmen.engine.accelerators import Accelerator
from fulmen.engine.cluster import ClusterEnvironment
from fulmen.engine.precision import Precision
from fulmen.fabric.checkpoint import collect_states, load_states
from fulmen.fabric.strategy import ParallelStrategy
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.optional import import_optional, is_installed

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

    from fulmen.fabric.checkpoint import Filter
    from fulmen.utilities.types import _PATH


class DeepSpeedStrategy(ParallelStrategy, engine_deepspeed.DeepSpeedStrategy):
    """Runs forward pass, backward pass and update in the engine of ``deepspeed``.

    The arguments are those of DeepSpeed's configuration, which its documentation explains; ``config``, a dict or the
    path of a JSON file (or `PL_DEEPSPEED_CONFIG_PATH`), replaces them all. Needs `pip install deepspeed` and CUDA.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """

    def __init__(
        self, accelerator: Accelerator | None = None, zero_optimization: bool = True, stage: int = 2, remote_device: str | None = None,
        offload_optimizer: bool = False, offload_parameters: bool = False, offload_params_device: str = "cpu",
        nvme_path: str = "/local_nvme", params_buffer_count: int = 5, params_buffer_size: int = 100_000_000,
        max_in_cpu: int = 1_000_000_000, offload_optimizer_device: str = "cpu", optimizer_buffer_count: int = 4,
        block_size: int = 1048576, queue_depth: int = 8, single_submit: bool = False, overlap_events: bool = True,
        thread_count: int = 1, pin_memory: bool = False, sub_group_size: int = 1_000_000_000_000,
        contiguous_gradients: bool = True, overlap_comm: bool = True, allgather_partitions: bool = True,
        reduce_scatter: bool = True, allgather_bucket_size: int = 200_000_000, reduce_bucket_size: int = 200_000_000,
        zero_allow_untested_optimizer: bool = True, logging_batch_size_per_gpu: int | None = None, config: dict[str, Any] | _PATH | None = None,
        logging_level: int = logging.WARN, parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None, loss_scale: float = 0, initial_scale_power: int = 16,
        loss_scale_window: int = 1000, hysteresis: int = 2, min_loss_scale: int = 1,
        partition_activations: bool = False, cpu_checkpointing: bool = False,
        contiguous_memory_optimization: bool = False, synchronize_checkpoint_boundary: bool = False,
        load_full_weights: bool = False, precision: Precision | None = None, process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30), exclude_frozen_parameters: bool = False,
    ) -> None:  # fmt: skip
        if not is_installed("deepspeed"):
            what = "`DeepSpeedStrategy` needs the package `deepspeed`, which is not installed."
            raise ModuleNotFoundError(
                f"{what} Run `pip install deepspeed`, or use `strategy='fsdp'`.", name="deepspeed"
            )
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__", "precision")}
        engine_deepspeed.DeepSpeedStrategy.__init__(
            self, **{**given, "logging_batch_size_per_gpu": logging_batch_size_per_gpu or 1}, precision_plugin=precision
        )

    setup_is_joint = True
    has_own_backward = True

    # ------------------------------------------------------------------ setting up

    def setup_module(self, module: Module) -> Module:
        """The engine around a module that is not trained."""
        deepspeed = import_optional("deepspeed", "for `DeepSpeedStrategy`")
        self.complete_loop_config()
        self._lightning_module = module
        engine: Module
        engine, *_ = deepspeed.initialize(model=module, config=self.config)
        self.model = engine
        return engine

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Refuses: the engine is made of both.

        Raises:
            NotImplementedError: always.
        """
        what = "DeepSpeed makes one engine of a module and its optimizer."
        raise NotImplementedError(f"{what} Set them up together: `fabric.setup(module, optimizer)`.")

    def setup_module_and_optimizers(
        self, module: Module, optimizers: list[Optimizer], scheduler: LRScheduler | None = None
    ) -> tuple[Module, list[Optimizer], LRScheduler | None]:
        """The engine around the module, and its optimizer.

        Raises:
            ValueError: there are several optimizers, or none.
        """
        if len(optimizers) != 1:
            raise ValueError(f"DeepSpeed takes one optimizer, not {len(optimizers)}. Set up the module with one.")
        self.complete_loop_config()
        self._lightning_module = module
        self.optimizers = list(optimizers)
        self.init_deepspeed()
        return self.model, self.optimizers, scheduler

    def complete_loop_config(self) -> None:
        """What the engine has to know besides, unless the configuration says it."""
        if "gradient_accumulation_steps" in self.config:
            what = "The DeepSpeed configuration has `gradient_accumulation_steps`, and steps are yours to make."
            raise MisconfigurationException(f"{what} Leave it out, and use `fabric.no_backward_sync`.")
        self.config.setdefault("train_micro_batch_size_per_gpu", self.batch_size)
        self.add_precision_config()

    def module_sharded_context(self) -> AbstractContextManager[Any]:
        """Entered where a module is made: with stage 3, layers are spread as they are made."""
        return self.model_sharded_context()

    # ------------------------------------------------------------------ steps

    def backward(self, tensor: Tensor, module: Module | None, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """The engine scales the loss and backpropagates."""
        with self.preparing_backward():
            self.model.backward(tensor, *args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:  # type: ignore[override]
        """The engine clips and steps, after a ``closure``."""
        closure = kwargs.pop("closure", None)
        outcome = None if closure is None else closure()
        self.model.step(**kwargs)
        return outcome

    def clip_gradients_norm(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refuses: the engine clips, in its step.

        Raises:
            NotImplementedError: always.
        """
        what = "DeepSpeed clips gradients in its step."
        raise NotImplementedError(f"{what} Use `DeepSpeedStrategy(config={{'gradient_clipping': 1.0, ...}})`.")

    clip_gradients_value = clip_gradients_norm  # type: ignore[assignment]

    # ------------------------------------------------------------------ files

    def save_checkpoint(  # type: ignore[override]
        self,
        path: _PATH,
        state: dict[str, Module | Optimizer | Any],
        storage_options: Any = None,
        filter: dict[str, Filter] | None = None,
    ) -> None:
        """A folder with the engine's files under ``checkpoint``, and what else is in the state; all processes write it.

        Raises:
            TypeError: for `storage_options` or a `filter`.
            ValueError: the engine is not in the state.
        """
        if storage_options is not None or filter is not None:
            what = "`storage_options` and `filter`: the engine of DeepSpeed writes its own files."
            raise TypeError(f"{what} Leave them out, or set `exclude_frozen_parameters=True`.")
        self._check_engine_in(state)
        rest = {key: value for key, value in state.items() if not isinstance(value, (Module, Optimizer))}
        frozen = {"exclude_frozen_parameters": True} if self.exclude_frozen_parameters else {}
        folder = self.broadcast(os.fspath(path))
        own = collect_states(self, rest, {})
        self.model.save_checkpoint(folder, client_state=own, tag=engine_deepspeed.ENGINE_FOLDER, **frozen)

    def load_checkpoint(  # type: ignore[override]
        self,
        path: _PATH,
        state: Module | Optimizer | dict[str, Module | Optimizer | Any] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """The engine reads its own files; what else is in the folder goes into the state."""
        folder = self.broadcast(os.fspath(path))
        if isinstance(state, (Module, Optimizer)) or self.load_full_weights:
            return super().load_checkpoint(folder, state, strict, weights_only)
        if not state:
            what = "`DeepSpeedStrategy.load_checkpoint` needs the module that the checkpoint is to be loaded into."
            raise ValueError(f"{what} Pass it in `state`: `{{'model': model, ...}}`.")
        self._check_engine_in(state)
        found, rest = self.model.load_checkpoint(
            folder, tag=engine_deepspeed.ENGINE_FOLDER, load_module_strict=strict,
            load_optimizer_states=any(isinstance(value, Optimizer) for value in state.values()),
            load_lr_scheduler_states=False,
        )  # fmt: skip
        if found is None:
            what = f"DeepSpeed found no checkpoint of its own in {folder!r}."
            raise RuntimeError(f"{what} Pass the folder that `save_checkpoint` wrote.")
        others = {key: value for key, value in state.items() if not isinstance(value, (Module, Optimizer))}
        remaining = load_states(self, others, rest, strict)
        state.update(others)
        return remaining

    def _check_engine_in(self, state: dict[str, Any]) -> None:
        if not any(value is self.model for value in state.values() if isinstance(value, Module)):
            what = "The state of a checkpoint of DeepSpeed has to hold the module that was set up."
            raise ValueError(f"{what} Put it in: `{{'model': model, ...}}`.")
