"""`LightningModule`: a `torch.nn.Module` that says how it is trained."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import wraps
from types import FunctionType
from typing import IO, TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fulmen import export
from fulmen.checkpoint.load import ClassOnlyMethod, load_from_checkpoint
from fulmen.engine.precision import MixedPrecision, clips_by_value
from fulmen.hooks import CheckpointHooks, DataHooks, ModelHooks
from fulmen.hparams import HyperparametersMixin
from fulmen.optimizers import unwrap_optimizer
from fulmen.utilities.collections import apply_to_collection
from fulmen.utilities.errors import MisconfigurationException, describe_received
from fulmen.utilities.introspection import overrides_method
from fulmen.utilities.modules import undo_compilation
from fulmen.utilities.rank_zero import warn_once
from fulmen.utilities.types import GradClipAlgorithmType

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer
    from torch.serialization import MAP_LOCATION
    from typing_extensions import Self

    from fulmen.callbacks.callback import Callback
    from fulmen.engine.strategy import Strategy
    from fulmen.fabric.fabric import Fabric
    from fulmen.loggers.logger import Logger
    from fulmen.optimizers import LightningOptimizer
    from fulmen.trainer import Trainer
    from fulmen.utilities.types import (
        STEP_OUTPUT,
        TRAINING_STEP_OUTPUT,
        ClipAlgorithmName,
        LoggedValue,
        LRSchedulerTypeUnion,
        OptimizerLRScheduler,
        ReduceName,
    )

    DeviceLike = torch.device | str | int
    ClipAlgorithm = ClipAlgorithmName | GradClipAlgorithmType

Number = int | float  # inside the class, `float` is the method
Nested = TypeVar("Nested", bound=Mapping[str, Any] | list[Any] | tuple[Any, ...])


class LightningModule(HyperparametersMixin, ModelHooks, DataHooks, CheckpointHooks, nn.Module):
    """A model, its losses and its optimizers.

    Write `__init__`, `training_step` and `configure_optimizers`; everything else is optional.

    Examples:
        >>> class Regression(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(4, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         return nn.functional.mse_loss(self.layer(x), y)
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    """

    __jit_unused_properties__ = [
        "example_input_array", "current_epoch", "global_step", "global_rank", "local_rank", "logger", "loggers",
        "automatic_optimization", "trainer", "fabric", "strict_loading", "hparams", "hparams_initial", "device", "dtype", "on_gpu",
    ]  # fmt: skip
    CHECKPOINT_HYPER_PARAMS_KEY = "hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "hparams_type"
    device_mesh: ClassVar[DeviceMesh | None] = None  # an instance gets one from `ModelParallelStrategy`

    if TYPE_CHECKING:  # at run time TorchScript would try to read these
        _trainer: Trainer | None
        _book: Any
        _fabric: Fabric | None
        _fabric_optimizers: list[Any]
        _example_input_array: Tensor | tuple[Any, ...] | dict[str, Any] | None
        _automatic_optimization: bool
        _strict_loading: bool | None
        _device: torch.device
        _dtype: torch.dtype
        _requires_grad_before_toggle: dict[Tensor, bool]
        _clipped_norms: dict[int, Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Written to __dict__: assigning to a module goes through its search for parameters, which is slow.
        self.__dict__.update(
            _trainer=None, _book=None, _fabric=None, _fabric_optimizers=[], _example_input_array=None, _automatic_optimization=True, _strict_loading=None,
            _device=torch.device("cpu"), _dtype=torch.get_default_dtype(), _requires_grad_before_toggle={},
            _clipped_norms={},
        )  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:  # modules pickled by older versions lack the newest names
        vars(self).update(_fabric=None, _fabric_optimizers=[])
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        init = vars(cls).get("__init__")
        # A constructor that names no other one has forgotten the base class, and what torch says then hides it.
        if isinstance(init, FunctionType) and "__init__" not in init.__code__.co_names:
            cls.__init__ = _explain_missing_init(cls, init)  # type: ignore[method-assign]

    # ------------------------------------------------------------------ where it runs

    @property
    def on_gpu(self) -> bool:
        """Whether it is on a CUDA device."""
        return self.device.type == "cuda"

    @property
    def device(self) -> torch.device:
        """The device the module was last moved to."""
        device: torch.device = self._device
        if device.type == "cuda" and device.index is None:
            return torch.device(f"cuda:{torch.cuda.current_device()}")
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the module was last converted to."""
        return self._dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        raise RuntimeError("`dtype` is read only. Convert the module with `module.to(dtype)`.")

    @overload
    def to(
        self, device: DeviceLike | None = ..., dtype: torch.dtype | None = ..., non_blocking: bool = ...
    ) -> Self: ...
    @overload
    def to(self, dtype: torch.dtype, non_blocking: bool = ...) -> Self: ...
    @overload
    def to(self, tensor: Tensor, non_blocking: bool = ...) -> Self: ...
    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves and converts, like `torch.nn.Module.to`, and keeps `device` and `dtype` true.

        Examples:
            >>> module = LightningModule().to(torch.float64)
            >>> module.dtype
            torch.float64
        """
        device, dtype = torch._C._nn._parse_to(*args, **kwargs)[:2]
        return self._record_move(super().to(*args, **kwargs), device, dtype)

    def cuda(self, device: torch.device | int | None = None) -> Self:
        """Moves to a CUDA device (default: the current one)."""
        if device is None:
            device = torch.device("cuda", torch.cuda.current_device())
        elif isinstance(device, int):
            device = torch.device("cuda", device)
        return self._record_move(super().cuda(device), device, None)

    def cpu(self) -> Self:
        """Moves to the CPU."""
        return self._record_move(super().cpu(), torch.device("cpu"), None)

    def type(self, dst_type: str | torch.dtype) -> Self:
        """Converts all parameters and buffers."""
        return self._record_move(super().type(dst_type), None, dst_type)

    def float(self) -> Self:
        """Converts floating-point parameters to float32."""
        return self._record_move(super().float(), None, torch.float)

    def double(self) -> Self:
        """Converts floating-point parameters to float64."""
        return self._record_move(super().double(), None, torch.double)

    def half(self) -> Self:
        """Converts floating-point parameters to float16."""
        return self._record_move(super().half(), None, torch.half)

    def bfloat16(self) -> Self:
        """Converts floating-point parameters to bfloat16."""
        return self._record_move(super().bfloat16(), None, torch.bfloat16)

    def _record_move(self, moved: Self, device: torch.device | None, dtype: str | torch.dtype | None) -> Self:
        for module in self.modules():
            if isinstance(module, LightningModule):
                if device is not None:
                    module.__dict__["_device"] = torch.device(device)
                if isinstance(dtype, torch.dtype):
                    module.__dict__["_dtype"] = dtype
        return moved

    # ------------------------------------------------------------------ what it is attached to

    @property
    def trainer(self) -> Trainer:
        """The trainer that is running this module.

        Raises:
            RuntimeError: before the module was given to a trainer.
        """
        trainer = self._trainer
        if trainer is None and self._fabric is not None:
            return TrainerOfFabric(self._fabric)  # type: ignore[return-value]
        if trainer is None:
            # TorchScript reads every attribute there is, and does not mean this one.
            if sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.jit", "torch._jit")):
                return None  # type: ignore[return-value]
            raise RuntimeError(
                f"{type(self).__qualname__} is not attached to a `Trainer`. `trainer.fit(module)` attaches it; "
                "use `self._trainer` to ask without an error."
            )
        return trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        book = None if getattr(trainer, "barebones", False) else getattr(trainer, "book", None)
        for child in self.modules():
            if isinstance(child, LightningModule):
                child.__dict__["_trainer"] = trainer
                child.__dict__["_book"] = book

    @property
    def fabric(self) -> Fabric | None:
        """The `Fabric` that set this module up, if one did."""
        return self._fabric

    @fabric.setter
    def fabric(self, fabric: Fabric | None) -> None:
        for child in self.modules():
            if isinstance(child, LightningModule):
                child.__dict__["_fabric"] = fabric

    def attach_fabric(self, fabric: Fabric, optimizers: list[Any]) -> None:
        """`Fabric.setup` calls this: logging, printing and backward go to it from now on.

        Arguments:
            fabric: whose loop calls the steps of this module.
            optimizers: what `optimizers()` returns.
        """
        self.fabric = fabric
        self.__dict__["_fabric_optimizers"] = optimizers

    @property
    def current_epoch(self) -> int:
        """Epochs finished so far; 0 without a trainer."""
        return self._trainer.current_epoch if self._trainer is not None else 0

    @property
    def global_step(self) -> int:
        """Optimizer steps made so far; 0 without a trainer."""
        return self._trainer.global_step if self._trainer is not None else 0

    @property
    def global_rank(self) -> int:
        """Index of this process over all nodes; 0 without a trainer."""
        owner = self._trainer if self._fabric is None else self._fabric
        return owner.global_rank if owner is not None else 0

    @property
    def local_rank(self) -> int:
        """Index of this process on its node; 0 without a trainer."""
        owner = self._trainer if self._fabric is None else self._fabric
        return owner.local_rank if owner is not None else 0

    @property
    def logger(self) -> Logger | None:
        """The first logger of the trainer, if it has one."""
        if self._fabric is not None:
            return next(iter(self._fabric.loggers), None)
        return self._trainer.logger if self._trainer is not None else None

    @property
    def loggers(self) -> list[Logger]:
        """All loggers of the trainer."""
        if self._fabric is not None:
            return self._fabric.loggers
        return self._trainer.loggers if self._trainer is not None else []

    # ------------------------------------------------------------------ switches

    @property
    def example_input_array(self) -> Tensor | tuple[Any, ...] | dict[str, Any] | None:
        """An input `forward` accepts: a tensor, a tuple of arguments or a dict of keywords."""
        return self._example_input_array

    @example_input_array.setter
    def example_input_array(self, example: Tensor | tuple[Any, ...] | dict[str, Any] | None) -> None:
        self.__dict__["_example_input_array"] = example

    @property
    def automatic_optimization(self) -> bool:
        """False: `training_step` calls `manual_backward` and `optimizer.step` itself."""
        return self._automatic_optimization

    @automatic_optimization.setter
    def automatic_optimization(self, automatic_optimization: bool) -> None:
        self.__dict__["_automatic_optimization"] = automatic_optimization

    @property
    def strict_loading(self) -> bool:
        """Whether a checkpoint must have exactly this module's keys."""
        return self._strict_loading is None or self._strict_loading

    @strict_loading.setter
    def strict_loading(self, strict_loading: bool) -> None:
        self.__dict__["_strict_loading"] = strict_loading

    # ------------------------------------------------------------------ the steps

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes; same as `torch.nn.Module.forward`."""
        return super().forward(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> TRAINING_STEP_OUTPUT:
        """The loss of one batch.

        Called as `training_step(batch, batch_idx)`; `batch_idx` may be left out. A step that asks for `dataloader_iter`
        instead reads its batches itself.

        Returns:
            A tensor with one element; a dict with the key "loss" (handed on to `on_train_batch_end`); or None to skip
            the batch. With several optimizers it may be a generator, which yields one loss for each of them. With
            manual optimization anything may be returned.

        Examples:
            >>> class Regression(LightningModule):
            ...     def training_step(self, batch, batch_idx):
            ...         x, y = batch
            ...         loss = nn.functional.mse_loss(self(x), y)
            ...         self.log("train_loss", loss)
            ...         return loss
        """
        return None

    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Looks at one validation batch, in eval mode and without gradients.

        Called as `validation_step(batch, batch_idx, dataloader_idx=0)`; the last one, or two, may be left out.

        Returns:
            Anything, for `on_validation_batch_end`; usually nothing, as metrics are logged.

        Examples:
            >>> class Regression(LightningModule):
            ...     def validation_step(self, batch, batch_idx):
            ...         x, y = batch
            ...         self.log("val_loss", nn.functional.mse_loss(self(x), y))
        """
        return None

    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Looks at one test batch, in eval mode and without gradients; called and used like `validation_step`."""
        return None

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts one batch, in eval mode and without gradients; by default `self(batch)`.

        Called as `predict_step(batch, batch_idx, dataloader_idx=0)`; the last one, or two, may be left out.

        Returns:
            The predictions of the batch, which `Trainer.predict` collects on the CPU.

        Examples:
            >>> class Classifier(LightningModule):
            ...     def forward(self, batch):
            ...         return batch
            ...     def predict_step(self, batch, batch_idx):
            ...         return self(batch).argmax(dim=-1)
            >>> Classifier().predict_step(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), 0)
            tensor([1, 0])
        """
        batch = kwargs.get("batch", args[0] if args else None)
        return self(batch)

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Callbacks that belong to the model; they replace those of the same class in the trainer.

        Returns:
            One or several, made anew by each call.

        Examples:
            >>> from fulmen.callbacks import EarlyStopping
            >>> class Net(LightningModule):
            ...     def configure_callbacks(self):
            ...         return EarlyStopping(monitor="val_loss")
        """
        return []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizers, and their learning-rate schedulers.

        Returns:
            An optimizer; a list of optimizers; `([optimizers], [schedulers])`; a dict with "optimizer" and
            "lr_scheduler"; a list of such dicts; or None to train without one. A scheduler is an object or a dict of
            the form `LRSchedulerConfigType`: "scheduler", and optionally "interval" ("epoch" or "step"), "frequency",
            "monitor" (the logged name that `ReduceLROnPlateau` watches), "strict" and "name".

        Examples:
            >>> class Net(LightningModule):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.layer = nn.Linear(4, 1)
            ...     def configure_optimizers(self):
            ...         optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            ...         scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
            ...         return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
            >>> sorted(Net().configure_optimizers())
            ['lr_scheduler', 'optimizer']
        """
        raise MisconfigurationException(
            f"`{type(self).__name__}.configure_optimizers` was called but is not implemented. Without an optimizer "
            "nothing would be learned. Define it, for example: `def configure_optimizers(self): return "
            "torch.optim.Adam(self.parameters(), lr=1e-3)`."
        )

    # ------------------------------------------------------------------ logging

    def log(
        self, name: str, value: LoggedValue, prog_bar: bool = False, logger: bool | None = None,
        on_step: bool | None = None, on_epoch: bool | None = None, reduce_fx: ReduceName | Callable[..., Any] = "mean",
        enable_graph: bool = False, sync_dist: bool = False, sync_dist_group: ProcessGroup | None = None,
        add_dataloader_idx: bool = True, batch_size: int | None = None, metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:  # fmt: skip
        """Keeps a value for loggers, callbacks and the progress bar. It stays on its device until somebody reads it.

        Arguments:
            name: the key; `name_step` and `name_epoch` when both are on.
            value: a number, a tensor with one element, or a torchmetrics `Metric`.
            prog_bar: show it in the progress bar.
            logger: send it to the loggers; None means yes.
            on_step: log the value now. The default depends on the hook: yes in training, no in evaluation.
            on_epoch: log the value reduced over the epoch. The default is the opposite of `on_step`.
            reduce_fx: "mean" (weighted by batch size), "sum", "min" or "max" over the epoch.
            enable_graph: keep the graph of the value, for those who want to call `backward` on it.
            sync_dist: reduce the value of a step over all processes; those over an epoch always are.
            sync_dist_group: the processes to reduce over; all by default.
            add_dataloader_idx: append `/dataloader_idx_N` when there are several loaders.
            batch_size: weight of this value in a mean; looked up in the batch when left out.
            metric_attribute: name of the attribute that holds the `Metric`, if it cannot be found.
            rank_zero_only: the value is logged on the first process alone, and reduced over no others.

        Raises:
            MisconfigurationException: in hooks where nothing can be logged (see docs/hooks.md), or for a value or
                combination of arguments that cannot be reduced.

        Examples:
            >>> class Net(LightningModule):
            ...     def training_step(self, batch, batch_idx):
            ...         loss = self(batch).mean()
            ...         self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
            ...         return loss
        """
        book = self._book
        if book is None:
            return self._log_without_book(name, value)
        arguments = (  # in the order of `LogOptions`; a plain tuple, which costs no call
            prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, sync_dist_group,
            add_dataloader_idx, metric_attribute, rank_zero_only,
        )  # fmt: skip
        if is_dynamo_compiling():  # the compiler reads True here
            book.defer(name, value, arguments, batch_size, enable_graph)
        else:
            book.write(name, value, arguments, batch_size)

    def log_dict(
        self, dictionary: Mapping[str, LoggedValue], prog_bar: bool = False, logger: bool | None = None,
        on_step: bool | None = None, on_epoch: bool | None = None, reduce_fx: ReduceName | Callable[..., Any] = "mean",
        enable_graph: bool = False, sync_dist: bool = False, sync_dist_group: ProcessGroup | None = None,
        add_dataloader_idx: bool = True, batch_size: int | None = None, rank_zero_only: bool = False,
    ) -> None:  # fmt: skip
        """`log` for several names at once; the other arguments are those of `log`.

        Arguments:
            dictionary: a mapping from names to values, or a torchmetrics `MetricCollection`.

        Examples:
            >>> class Net(LightningModule):
            ...     def validation_step(self, batch, batch_idx):
            ...         self.log_dict({"val_loss": 0.3, "val_accuracy": 0.9}, batch_size=len(batch))
        """
        try:
            items = dictionary.items()
        except (AttributeError, TypeError):
            fix = "Pass a mapping from names to numbers, or a `MetricCollection`; of one metric, its computed values."
            raise TypeError(f"`self.log_dict` received {describe_received(dictionary)}. {fix}") from None
        if hasattr(dictionary, "compute_groups"):
            # a MetricCollection: the members themselves, not copies, under their prefixed names
            items = dictionary.items(keep_base=False, copy_state=False)  # type: ignore[call-arg]
        if self._fabric is not None:
            self._fabric.log_dict(metrics=dict(items))
            return
        for name, value in items:
            self.log(
                name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, sync_dist_group,
                add_dataloader_idx, batch_size, None, rank_zero_only,
            )  # fmt: skip

    def _log_without_book(self, name: str, value: LoggedValue) -> None:
        """`self.log` without a logbook: with Fabric, barebones, or on its own."""
        if is_dynamo_compiling():
            return  # a warning would break the graph
        if self._fabric is not None:
            self._fabric.log_dict(metrics={name: value})
        elif self._trainer is not None:
            warn_once("`self.log` does nothing: the trainer runs with `barebones=True`. Remove one of the two.")
        else:
            warn_once(
                f"`self.log('{name}', ...)` is ignored: the `self.trainer` reference is not registered on "
                f"{type(self).__name__} yet. "
                "Values are kept only while `trainer.fit`, `validate` or `test` runs."
            )

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints on one process only, above the progress bar if there is one."""
        trainer = self._trainer
        if self._fabric is not None:
            self._fabric.print(*args, **kwargs)
        elif trainer is None or trainer.is_global_zero:
            bar = trainer.progress_bar_callback if trainer is not None else None
            (bar.print if bar is not None and bar.is_enabled else print)(*args, **kwargs)

    @overload
    def all_gather(
        self, data: Tensor | Number, group: ProcessGroup | None = None, sync_grads: bool = False
    ) -> Tensor: ...
    @overload
    def all_gather(self, data: Nested, group: ProcessGroup | None = None, sync_grads: bool = False) -> Nested: ...
    def all_gather(self, data: Any, group: ProcessGroup | None = None, sync_grads: bool = False) -> Any:
        """Tensors of all processes, along a new first dimension, and unchanged on one device; numbers become tensors.

        Every process must call this, with tensors of the same shapes.

        Arguments:
            data: a tensor, a number, or lists, tuples and dicts of them.
            group: the processes that exchange; all by default.
            sync_grads: let gradients flow back to the process a tensor is from.

        Returns:
            The same structure, with a tensor of shape `(world_size, ...)` for each.

        Raises:
            RuntimeError: without a trainer.
        """
        if self._fabric is not None:
            return self._fabric.all_gather(data, group=group, sync_grads=sync_grads)
        strategy = self.trainer.strategy
        as_tensor = apply_to_collection(data, (bool, int, float), lambda v: torch.tensor(v, device=self.device))
        if strategy.world_size == 1:
            return as_tensor
        if self.trainer.evaluating:  # where processes have other batches
            found: list[Tensor] = []
            apply_to_collection(as_tensor, Tensor, found.append)
            strategy.check_equal_shapes(found, group)
        return apply_to_collection(as_tensor, Tensor, strategy.all_gather, group=group, sync_grads=sync_grads)

    # ------------------------------------------------------------------ optimization

    @overload
    def optimizers(self, use_pl_optimizer: Literal[True] = True) -> LightningOptimizer | list[LightningOptimizer]: ...
    @overload
    def optimizers(self, use_pl_optimizer: Literal[False]) -> Optimizer | list[Optimizer]: ...
    @overload
    def optimizers(self, use_pl_optimizer: bool) -> Optimizer | list[LightningOptimizer] | list[Optimizer]: ...
    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizers of the run, for manual optimization.

        Arguments:
            use_pl_optimizer: wrapped ones, whose `step` knows about precision and counting; False: your own objects.

        Returns:
            The optimizer if there is one, else the list of them in the order of `configure_optimizers`.

        Raises:
            RuntimeError: without a trainer.

        Examples:
            >>> class Net(LightningModule):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.automatic_optimization = False
            ...     def training_step(self, batch, batch_idx):
            ...         optimizer = self.optimizers()
            ...         optimizer.zero_grad()
            ...         self.manual_backward(self(batch).mean())
            ...         optimizer.step()
        """
        if self._fabric is not None:
            return self._fabric_optimizers[0] if len(self._fabric_optimizers) == 1 else self._fabric_optimizers
        trainer = self.trainer
        found: Sequence[Optimizer] = trainer.lightning_optimizers if use_pl_optimizer else trainer.optimizers
        return found[0] if len(found) == 1 else list(found)

    def lr_schedulers(self) -> LRSchedulerTypeUnion | list[LRSchedulerTypeUnion] | None:
        """The schedulers of the run, for manual optimization: the only one, a list of several, or None.

        Raises:
            RuntimeError: without a trainer.
        """
        configs = self.trainer.lr_scheduler_configs
        if not configs:
            return None
        return configs[0].scheduler if len(configs) == 1 else [config.scheduler for config in configs]

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """`loss.backward()` for manual optimization: scaled by the precision, with the hooks around it.

        Arguments:
            loss: a tensor with one element; not divided by anything.
            args: handed to `backward`, as are `kwargs`.

        Raises:
            MisconfigurationException: with automatic optimization, where the trainer calls backward itself.
        """
        if self._fabric is not None:
            self._fabric.backward(loss, *args, **kwargs)
            return
        if self.automatic_optimization:
            raise MisconfigurationException(
                "`manual_backward` was called with automatic optimization. "
                "The trainer calls backward itself, gradients would be counted twice. "
                "Set `self.automatic_optimization = False` in `__init__`, or return the loss instead."
            )
        self.trainer.strategy.backward(loss, None, *args, **kwargs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Calls `loss.backward()`; override it to do something else."""
        loss.backward(*args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Optimizer, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Makes one optimizer step. An override must run the closure: it is the forward and the backward.

        Arguments:
            epoch: the number of the epoch, from 0.
            batch_idx: the number of the batch in this epoch, from 0.
            optimizer: a `LightningOptimizer`.
            optimizer_closure: runs `training_step`, `zero_grad` and `backward`, and returns the loss.

        Examples:
            >>> class Net(LightningModule):
            ...     def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            ...         for group in optimizer.param_groups:
            ...             group["lr"] = min(1.0, (self.global_step + 1) / 500) * 0.1  # warm-up
            ...         optimizer.step(closure=optimizer_closure)
        """
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clears the gradients; override it to do something else."""
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: LRSchedulerTypeUnion, metric: Tensor | Number | None) -> None:
        """Steps one scheduler; override it for one that does not follow torch's.

        Arguments:
            scheduler: one of `configure_optimizers`.
            metric: the value of the metric it watches, or None.
        """
        if metric is None:
            scheduler.step()  # type: ignore[call-arg]
        else:
            scheduler.step(metric)  # type: ignore[arg-type]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: Number | None = None,
        gradient_clip_algorithm: ClipAlgorithm | None = None,
    ) -> None:
        """Clips the gradients before each step; called with the trainer's values, also when clipping is off.

        Examples:
            >>> class Net(LightningModule):
            ...     def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            ...         if self.current_epoch > 0:
            ...             self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        """
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: Number | None = None,
        gradient_clip_algorithm: ClipAlgorithm | None = None,
    ) -> Tensor | None:
        """Clips the gradients of one optimizer, by norm (default) or by value; unscaled ones, whatever the precision.

        Arguments:
            optimizer: whose parameters' gradients are clipped.
            gradient_clip_val: the bound; None takes the trainer's, 0 or less does nothing.
            gradient_clip_algorithm: "norm" or "value"; None takes the trainer's.

        Returns:
            The norm before clipping, if it had to be known: one number on the device, ready for `self.log`.
        """
        if self._fabric is not None:
            return self._clip_with_fabric(optimizer, gradient_clip_val, gradient_clip_algorithm)
        value = self._choose_setting("gradient_clip_val", gradient_clip_val, self.trainer.gradient_clip_val)
        algorithm = gradient_clip_algorithm and gradient_clip_algorithm.lower()
        algorithm = (
            self._choose_setting("gradient_clip_algorithm", algorithm, self.trainer.gradient_clip_algorithm) or "norm"
        )
        algorithm = algorithm.value if isinstance(algorithm, GradClipAlgorithmType) else algorithm
        if algorithm not in ("norm", "value"):
            raise MisconfigurationException(
                f"`gradient_clip_algorithm={algorithm!r}` is invalid. Use 'norm' or 'value'."
            )
        if not value:
            return None
        raw = unwrap_optimizer(optimizer)
        precision = self.trainer.strategy.precision_plugin
        if not self.automatic_optimization and isinstance(precision, MixedPrecision):
            precision.unscale_gradients(raw)  # the step comes later, and will not do it again
        norm = precision.clip_gradients(raw, value, GradClipAlgorithmType(algorithm))
        if norm is not None:
            self._clipped_norms[id(raw)] = norm  # for `GradientNorm`, so that it need not be computed twice
        return norm

    def _clip_with_fabric(
        self, optimizer: Optimizer, value: Number | None, algorithm: ClipAlgorithm | None
    ) -> Tensor | None:
        if not value or self._fabric is None:
            return None
        if clips_by_value(algorithm):
            return self._fabric.clip_gradients(self, optimizer, clip_val=value)
        return self._fabric.clip_gradients(self, optimizer, max_norm=value)

    @staticmethod
    def _choose_setting(name: str, given: Any, trainers: Any) -> Any:
        """The module's choice or the trainer's, if they do not contradict each other."""
        if given is None:
            return trainers
        if trainers is not None and given != trainers:
            raise MisconfigurationException(
                f"`Trainer({name}={trainers!r})`, but `clip_gradients` was called with {given!r}. Two different bounds "
                "were asked for. Set it in one of the two places only."
            )
        return given

    def toggle_optimizer(self, optimizer: Optimizer) -> None:
        """Only the parameters of this optimizer require gradients, until `untoggle_optimizer`."""
        before = dict(self._requires_grad_before_toggle)  # of another one, that is still toggled
        for other in self.trainer.optimizers if len(self.trainer.optimizers) > 1 else ():
            for parameter in _parameters_of(other):
                before.setdefault(parameter, parameter.requires_grad)
                parameter.requires_grad = False
        for parameter in _parameters_of(optimizer):
            parameter.requires_grad = before.get(parameter, parameter.requires_grad)
        self.__dict__["_requires_grad_before_toggle"] = before

    def untoggle_optimizer(self, optimizer: Optimizer | None = None) -> None:
        """Undoes `toggle_optimizer`."""
        for parameter, requires_grad in self._requires_grad_before_toggle.items():
            parameter.requires_grad = requires_grad
        self.__dict__["_requires_grad_before_toggle"] = {}

    @contextmanager
    def toggled_optimizer(self, optimizer: Optimizer) -> Generator[None]:
        """Inside, only the parameters of this optimizer require gradients."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    # ------------------------------------------------------------------ the rest

    def freeze(self) -> Self:
        """No parameter requires gradients any more, and the module is in eval mode.

        Examples:
            >>> LightningModule().freeze().training
            False
        """
        self.requires_grad_(False)
        return self.eval()

    def unfreeze(self) -> Self:
        """All parameters require gradients, and the module is in train mode."""
        self.requires_grad_(True)
        return self.train()

    to_onnx = export.to_onnx
    to_torchscript = export.to_torchscript
    to_tensorrt = export.to_tensorrt

    @ClassOnlyMethod
    def load_from_checkpoint(
        cls, checkpoint_path: str | os.PathLike[str] | IO[bytes], map_location: MAP_LOCATION = None,
        hparams_file: str | os.PathLike[str] | None = None, strict: bool | None = None,
        weights_only: bool | None = None, **kwargs: Any,
    ) -> Self:  # fmt: skip
        """A module as it was saved: built from the stored hyper-parameters, with the stored weights.

        Arguments:
            checkpoint_path: path, URL or file object.
            map_location: as for `torch.load`; None keeps the saved device if it exists.
            hparams_file: .yaml or .csv with hyper-parameters that the file lacks.
            strict: whether the keys must match; None takes `strict_loading`.
            weights_only: handed to `torch.load`; False unpickles anything, for files you trust.
            kwargs: arguments of `__init__`, before the stored ones.

        Raises:
            TypeError: when called on an instance, or when `__init__` needs an argument that nobody gives.

        Examples:
            >>> class Net(LightningModule):
            ...     def __init__(self, width: int = 8):
            ...         super().__init__()
            ...         self.save_hyperparameters()
            ...         self.layer = nn.Linear(width, 1)
            >>> from fulmen import Trainer
            >>> trainer = Trainer(accelerator="cpu", logger=False)
            >>> trainer.strategy.connect(Net(width=16))
            >>> trainer.save_checkpoint("net.ckpt", weights_only=True)
            >>> Net.load_from_checkpoint("net.ckpt").layer.in_features
            16
        """
        module: Self = load_from_checkpoint(
            cls, checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs
        )
        return module

    def __getstate__(self) -> dict[str, Any]:
        # A trainer holds processes, files and loaders: a copied or pickled module starts unattached.
        # Compiled methods cannot be pickled, and would go on calling this module: the copy has those of its class.
        state = undo_compilation(super().__getstate__())  # type: ignore[no-untyped-call]
        own: dict[str, Any] = {"_trainer": None, "_book": None, "_fabric": None, "_fabric_optimizers": []}
        return {**state, **own, "_requires_grad_before_toggle": {}, "_clipped_norms": {}}


class TrainerOfFabric:
    """What `self.trainer` is under Fabric: who this process is, and which strategy it has; nothing else."""

    def __init__(self, fabric: Fabric) -> None:
        self.global_rank = fabric.global_rank
        self.local_rank = fabric.local_rank
        self.node_rank = fabric.node_rank
        self.world_size = fabric.world_size
        self.is_global_zero = fabric.is_global_zero
        self.strategy = fabric.strategy

    def __getattr__(self, name: str) -> Any:
        what = f"Your LightningModule code tried to access `self.trainer.{name}` but this attribute is not available"
        fix = "Keep what the loop knows in the loop, and hand it to the module."
        raise AttributeError(f"{what} when using Fabric with a LightningModule. {fix}", name=name)


def missing_super_init(module: object) -> str:
    """What is wrong with a module whose base constructor has not run."""
    return f"`{type(module).__name__}.__init__` does not call `super().__init__()`. Make that its first line."


def _explain_missing_init(cls: type, init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that says so when it did not reach that of `torch.nn.Module`."""

    @wraps(init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except AttributeError as error:
            if "_modules" in vars(self):
                raise
            raise AttributeError(missing_super_init(self)) from error
        if type(self) is cls and "_modules" not in vars(self):
            raise TypeError(missing_super_init(self))

    return checked_init


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def make_late_layers(module: LightningModule, strategy: Strategy) -> None:
    """Calls the hook that makes layers when a run starts, if the module has one."""
    if overrides_method(module, "configure_model", LightningModule):
        with strategy.tensor_init_context(), strategy.model_sharded_context():
            module.configure_model()
    elif overrides_method(module, "configure_sharded_model", LightningModule):
        with strategy.model_sharded_context():
            module.configure_sharded_model()
