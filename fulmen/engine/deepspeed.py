"""`DeepSpeedStrategy`: the engine of the optional package ``deepspeed`` around the module, on CUDA devices."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from fulmen.engine.accelerators import Accelerator
from fulmen.engine.buffers import Buffers
from fulmen.engine.cluster import ClusterEnvironment
from fulmen.engine.parallel import ParallelStrategy
from fulmen.engine.precision import HalfPrecision, Precision, clips_by_value
from fulmen.storage.async_io import unwrap_async_io
from fulmen.storage.integrity import load_verified
from fulmen.utilities.collections import declared_batch_size
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.optional import import_optional, is_installed
from fulmen.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from fulmen.trainer import Trainer
    from fulmen.utilities.types import _PATH, GradClipAlgorithmType

SUPPORTED_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")
# The folder with the engine's files in a checkpoint, and the one with what the Trainer saves.
ENGINE_FOLDER = "checkpoint"
MODEL_STATES_FILE = "mp_rank_00_model_states.pt"


class DeepSpeedPrecision(Precision):
    """The numbers of DeepSpeed: the engine scales losses, keeps weights of 32 bits and clips.

    Raises:
        ValueError: for a precision that it has not.
    """

    def __init__(self, precision: str) -> None:
        if precision not in SUPPORTED_PRECISIONS:
            known = ", ".join(map(repr, SUPPORTED_PRECISIONS))
            raise ValueError(f"`DeepSpeedPrecision({precision!r})`: DeepSpeed computes in one of {known}.")
        self.precision = precision
        self.half = (
            Precision()
            if precision == "32-true"
            else HalfPrecision("bf16-true" if precision.startswith("bf16") else "16-true")
        )

    @property
    def config_entries(self) -> dict[str, Any]:
        """Which numbers, for the configuration."""
        kinds = {"16": "fp16", "bf16": "bf16"}
        kind = kinds.get(self.precision.split("-")[0])
        return {} if kind is None else {kind: {"enabled": True}}

    def convert_module(self, module: Module) -> Module:
        return self.half.convert_module(module) if self.precision.endswith("true") else module

    def convert_input(self, data: Any) -> Any:
        return self.half.convert_input(data)

    def convert_output(self, data: Any) -> Any:
        return self.half.convert_output(data)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return self.half.tensor_init_context() if self.precision.endswith("true") else nullcontext()

    module_init_context = tensor_init_context

    def clip_gradients(
        self, optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: str | GradClipAlgorithmType = "norm"
    ) -> None:
        """The engine clips by norm, in its step."""
        if clip_val > 0 and clips_by_value(gradient_clip_algorithm):
            raise MisconfigurationException("DeepSpeed clips by norm only. Use `gradient_clip_algorithm='norm'`.")


class DeepSpeedStrategy(ParallelStrategy):
    """Runs the training step, the backward pass and the update in the engine of ``deepspeed``.

    The arguments are those of DeepSpeed's configuration, which its documentation explains; ``config``, a dict or the
    path of a JSON file (or `PL_DEEPSPEED_CONFIG_PATH`), replaces them all. Needs `pip install deepspeed` and CUDA.
    """

    strategy_name = "deepspeed"
    DEEPSPEED_ENV_VAR = "PL_DEEPSPEED_CONFIG_PATH"
    restore_checkpoint_after_setup = True
    lightning_restore_optimizer = False
    save_is_collective = True

    def __init__(
        self, accelerator: Accelerator | None = None, zero_optimization: bool = True, stage: int = 2, remote_device: str | None = None,
        offload_optimizer: bool = False, offload_parameters: bool = False, offload_params_device: str = "cpu",
        nvme_path: str = "/local_nvme", params_buffer_count: int = 5, params_buffer_size: int = 100_000_000,
        max_in_cpu: int = 1_000_000_000, offload_optimizer_device: str = "cpu", optimizer_buffer_count: int = 4,
        block_size: int = 1048576, queue_depth: int = 8, single_submit: bool = False, overlap_events: bool = True,
        thread_count: int = 1, pin_memory: bool = False, sub_group_size: int = 1_000_000_000_000,
        contiguous_gradients: bool = True, overlap_comm: bool = True, allgather_partitions: bool = True,
        reduce_scatter: bool = True, allgather_bucket_size: int = 200_000_000, reduce_bucket_size: int = 200_000_000,
        zero_allow_untested_optimizer: bool = True, logging_batch_size_per_gpu: str | int = "auto", config: dict[str, Any] | _PATH | None = None,
        logging_level: int = logging.WARN, parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None, loss_scale: float = 0, initial_scale_power: int = 16,
        loss_scale_window: int = 1000, hysteresis: int = 2, min_loss_scale: int = 1,
        partition_activations: bool = False, cpu_checkpointing: bool = False,
        contiguous_memory_optimization: bool = False, synchronize_checkpoint_boundary: bool = False,
        load_full_weights: bool = False, precision_plugin: Precision | None = None, process_group_backend: str | None = None,
        timeout: timedelta | None = timedelta(minutes=30), exclude_frozen_parameters: bool = False,
    ) -> None:  # fmt: skip
        given = dict(locals())
        if not is_installed("deepspeed"):
            what = "`strategy='deepspeed'` needs the package `deepspeed`, which is not installed."
            raise MisconfigurationException(f"{what} Run `pip install deepspeed`, or use `strategy='fsdp'`.")
        super().__init__(
            accelerator, parallel_devices, cluster_environment, None, precision_plugin, process_group_backend, timeout
        )
        self.remote_device = remote_device
        self.load_full_weights = load_full_weights
        self.exclude_frozen_parameters = exclude_frozen_parameters
        self.logging_level = logging_level
        self.loss_scale = loss_scale
        self.initial_scale_power = initial_scale_power
        self.loss_scale_window = loss_scale_window
        self.hysteresis = hysteresis
        self.min_loss_scale = min_loss_scale
        self.batch_size = logging_batch_size_per_gpu
        config = config if config is not None else os.environ.get(self.DEEPSPEED_ENV_VAR)
        self.config = build_config(given) if config is None else read_config(config)

    def precision_for(self, name: str) -> DeepSpeedPrecision:
        """The precision of that name."""
        return DeepSpeedPrecision(name)

    @property
    def zero_stage_3(self) -> bool:
        """Are parameters spread over processes?"""
        return bool(self.config.get("zero_optimization", {}).get("stage") == 3)

    @property
    def deepspeed_engine(self) -> Any:
        """The engine, from setup to teardown."""
        return self.model

    def setup_environment(self) -> None:
        if self.root_device.type != "cuda":
            raise RuntimeError("DeepSpeed runs on CUDA devices here. Use `accelerator='cuda'`, or `strategy='fsdp'`.")
        super().setup_environment()
        import deepspeed

        deepspeed.init_distributed(self.process_group_backend, dist_init_required=False)
        logging.getLogger("DeepSpeed").setLevel(self.logging_level)

    def setup(self, trainer: Trainer) -> None:
        self.complete_config(trainer)
        self.checkpoint_io = unwrap_async_io(self.checkpoint_io, "DeepSpeed writes its own files")
        super().setup(trainer)
        if trainer.state.fn == "fit":
            self.init_deepspeed()

    def complete_config(self, trainer: Trainer) -> None:
        """What the Trainer decides goes into the configuration."""
        clip = trainer.gradient_clip_val
        if clip and clips_by_value(trainer.gradient_clip_algorithm):
            raise MisconfigurationException("DeepSpeed clips by norm only. Use `gradient_clip_algorithm='norm'`.")
        if "gradient_accumulation_steps" in self.config:
            what = "The DeepSpeed configuration has `gradient_accumulation_steps`, which the Trainer counts."
            raise MisconfigurationException(f"{what} Leave it out, and use `accumulate_grad_batches`.")
        size = self.batch_size
        if size == "auto":
            size = declared_batch_size(trainer.first_train_loader) or 1
        self.config.setdefault("train_micro_batch_size_per_gpu", size)
        self.config.setdefault("gradient_clipping", float(clip or 0.0))
        self.add_precision_config()

    def add_precision_config(self) -> None:
        """What the precision decides goes into the configuration, unless it is there."""
        scaling = {
            "loss_scale": self.loss_scale, "initial_scale_power": self.initial_scale_power,
            "loss_scale_window": self.loss_scale_window, "hysteresis": self.hysteresis,
            "min_loss_scale": self.min_loss_scale,
        }  # fmt: skip
        precision: Any = self.precision_plugin
        for kind, settings in precision.config_entries.items():
            self.config.setdefault(kind, {**settings, **(scaling if kind == "fp16" else {})})

    def init_deepspeed(self) -> None:
        """Makes the engine."""
        import deepspeed

        if len(self.optimizers) != 1 or len(self.lr_scheduler_configs) > 1:
            found = f"{len(self.optimizers)} optimizers and {len(self.lr_scheduler_configs)} schedulers"
            raise MisconfigurationException(f"DeepSpeed takes one optimizer and one scheduler, not {found}.")
        learning = [parameter for parameter in self._lightning_module.parameters() if parameter.requires_grad]
        config = {**self.config, "gradient_accumulation_steps": 1}  # windows are counted by the loop
        self.model, optimizer, _, _ = deepspeed.initialize(
            model=self._lightning_module, model_parameters=learning, optimizer=self.optimizers[0], config=config
        )
        self.optimizers = [optimizer]
        self.model.set_gradient_accumulation_boundary(True)
        self.buffers = Buffers(self._lightning_module, self.root_device)

    def model_sharded_context(self) -> AbstractContextManager[Any]:
        """With stage 3, layers are spread over the processes as they are made."""
        if not self.zero_stage_3:
            return nullcontext()
        import deepspeed

        context: AbstractContextManager[Any] = deepspeed.zero.Init(
            remote_device=self.remote_device, config_dict_or_path=self.config
        )
        return context

    def _precision_backward(self, loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> None:
        self.model.backward(loss, *args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """The engine scales the loss and backpropagates."""
        self._precision_backward(closure_loss, optimizer, *args, **kwargs)
        return closure_loss

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, model: Module | None = None, **kwargs: Any
    ) -> Any:
        """The engine clips and steps."""
        outcome = None if closure is None else closure()
        self.model.step(**kwargs)
        return outcome

    @contextmanager
    def _accumulating(self) -> Generator[None]:
        self.model.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.model.set_gradient_accumulation_boundary(True)

    def no_backward_sync(self, module: Module | None = None, enabled: bool = True) -> AbstractContextManager[Any]:
        has_engine = self.model is not self._lightning_module
        return self._accumulating() if enabled and has_engine else nullcontext()

    # ------------------------------------------------------------------ files

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty while the engine has the weights: it writes them."""
        return {} if self.model is not self._lightning_module else super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Empty: the engine writes it."""
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: dict[str, Any] | None = None
    ) -> None:
        """A folder with the engine's files under ``checkpoint``, written by all processes."""
        if self.model is self._lightning_module:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise TypeError(f"`{storage_options=}`: DeepSpeed's checkpoints have no options. Leave them out.")
        path = self.broadcast(os.fspath(filepath))
        frozen = {"exclude_frozen_parameters": True} if self.exclude_frozen_parameters else {}
        rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        self.model.save_checkpoint(path, client_state=rest, tag=ENGINE_FOLDER, **frozen)

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """What the Trainer needs; the engine loads its own part when it exists."""
        if self.load_full_weights or not os.path.isdir(os.path.join(checkpoint_path, ENGINE_FOLDER)):
            return super().load_checkpoint(checkpoint_path, weights_only)
        file = os.path.join(checkpoint_path, ENGINE_FOLDER, MODEL_STATES_FILE)
        with open(file, "rb") as states:
            # DeepSpeed itself reads the others, and trusts them.
            content = load_verified(states, file, "cpu", weights_only)
        rank_zero_info(f"The weights are loaded by DeepSpeed from {checkpoint_path}")
        return {"state_dict": {}, "optimizer_states": [], "lr_schedulers": [], **content, "path": checkpoint_path}

    def verify_checkpoint(self, checkpoint_path: _PATH) -> None:
        if not os.path.isdir(os.path.join(checkpoint_path, ENGINE_FOLDER)):  # a folder of the engine has no hashes
            super().verify_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        if "path" not in checkpoint or self.model is self._lightning_module:
            super().load_model_state_dict(checkpoint, strict)
            return
        found, _ = self.model.load_checkpoint(checkpoint["path"], tag=ENGINE_FOLDER, load_module_strict=strict)
        if found is None:
            what = f"DeepSpeed found no checkpoint of its own in {checkpoint['path']}."
            raise RuntimeError(f"{what} Pass the folder that `save_checkpoint` wrote.")


def build_config(given: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration, from the arguments of the strategy."""

    def pick(*names: str) -> dict[str, Any]:
        return {name: given[name] for name in names}

    names: tuple[str, ...] = ("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization")
    config: dict[str, Any] = {
        "activation_checkpointing": pick(*names, "synchronize_checkpoint_boundary"),
        "aio": pick("block_size", "queue_depth", "single_submit", "overlap_events", "thread_count"),
        "zero_allow_untested_optimizer": given["zero_allow_untested_optimizer"],
    }
    if not given["zero_optimization"]:
        return config
    names = ("stage", "contiguous_gradients", "overlap_comm", "allgather_partitions", "reduce_scatter")
    zero = pick(*names, "allgather_bucket_size", "reduce_bucket_size", "sub_group_size")
    place = pick("nvme_path", "pin_memory")
    if given["offload_optimizer"]:
        count = {"buffer_count": given["optimizer_buffer_count"]}
        zero["offload_optimizer"] = {"device": given["offload_optimizer_device"], **place, **count}
    if given["offload_parameters"]:
        sizes = {"buffer_count": given["params_buffer_count"], "buffer_size": given["params_buffer_size"]}
        zero["offload_param"] = {"device": given["offload_params_device"], **place, **sizes, **pick("max_in_cpu")}
    return {**config, "zero_optimization": zero}


def read_config(config: dict[str, Any] | _PATH) -> dict[str, Any]:
    """A copy of the dict, or what a JSON file holds."""
    if isinstance(config, dict):
        return dict(config)
    if not os.path.isfile(config):
        raise MisconfigurationException(f"There is no DeepSpeed configuration at {config!r}. Pass its path, or a dict.")
    with open(config) as file:
        read: dict[str, Any] = json.load(file)
    return read


def ds_checkpoint_dir(checkpoint_dir: _PATH, tag: str | None = None) -> str:
    """The folder with DeepSpeed's own files in a checkpoint; by default the newest one."""
    if tag is None:
        with open(os.path.join(checkpoint_dir, "latest")) as file:
            tag = file.read().strip()
    folder = os.path.join(checkpoint_dir, tag)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"There is no folder {folder!r}. Pass the path that `save_checkpoint` was given.")
    return folder


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: _PATH, output_file: _PATH, tag: str | None = None
) -> dict[str, Any]:
    """Writes a folder of DeepSpeed as one file, which every strategy loads. Returns its content."""
    folder = ds_checkpoint_dir(checkpoint_dir, tag)
    import_optional("deepspeed", "to read its checkpoints")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    client = torch.load(os.path.join(folder, MODEL_STATES_FILE), map_location="cpu", weights_only=False)
    own = ("module", "optimizer", "lr_scheduler", "param_shapes", "buffer_names", "frozen_param_fragments")
    content = {key: value for key, value in client.items() if key not in own}
    content["state_dict"] = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    torch.save(content, output_file)
    return content
