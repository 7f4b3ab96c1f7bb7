"""`LightningModule`: a `torch.nn.Module` that says how it is trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from fulmen import export
from fulmen.checkpoint.load import ClassOnlyMethod, load_from_checkpoint
from fulmen.engine.precision import MixedPrecision
from fulmen.hooks import CheckpointHooks, DataHooks, ModelHooks
from fulmen.hparams import HyperparametersMixin
from fulmen.utilities.collections import apply_to_collection
from fulmen.utilities.errors import MisconfigurationException, describe_received
from fulmen.utilities.modules import uncompiled
from fulmen.utilities.rank_zero import warn_once
from fulmen.utilities.types import GradClipAlgorithmType

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from torch.optim import Optimizer
    from typing_extensions import Self

    from fulmen.callbacks.callback import Callback
    from fulmen.trainer import Trainer
    from fulmen.utilities.types import OptimizerLRScheduler

Number = int | float  # inside the class, `float` is the method


def _from_trainer(name: str, otherwise: Any, doc: str) -> Any:
    """A property that asks the trainer, and has a value without one."""

    def read(self: Any) -> Any:
        return getattr(self._trainer, name) if self._trainer is not None else otherwise

    return property(read, doc=doc)


class LightningModule(HyperparametersMixin, ModelHooks, DataHooks, CheckpointHooks, nn.Module):
    """A model, its losses and its optimizers.

    Write `__init__`, `training_step` and `configure_optimizers`; everything else is optional.

    Example:
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
        "automatic_optimization", "trainer", "strict_loading", "hparams", "hparams_initial", "device", "dtype", "on_gpu",
    ]  # fmt: skip
    CHECKPOINT_HYPER_PARAMS_KEY = "hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "hparams_type"
    device_mesh = None  # put here by `ModelParallelStrategy`
    fabric: Any = None  # put here by `Fabric.setup`

    if TYPE_CHECKING:  # at run time TorchScript would try to read these
        _trainer: Any
        _book: Any
        _example_input_array: Any
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
            _trainer=None, _book=None, _example_input_array=None, _automatic_optimization=True, _strict_loading=None,
            _device=torch.device("cpu"), _dtype=torch.get_default_dtype(), _requires_grad_before_toggle={},
            _clipped_norms={},
        )  # fmt: skip

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        init = vars(cls).get("__init__")
        # A constructor that names no other one has forgotten the base class, and what torch says then hides it.
        if "__init__" not in getattr(getattr(init, "__code__", None), "co_names", ("__init__",)):
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

    def to(self, *args: Any, **kwargs: Any) -> LightningModule:
        """Moves and converts, like `torch.nn.Module.to`."""
        device, dtype = torch._C._nn._parse_to(*args, **kwargs)[:2]
        return self._placed(super().to(*args, **kwargs), device, dtype)

    def cuda(self, device: torch.device | int | None = None) -> LightningModule:
        """Moves to a CUDA device (default: the current one)."""
        if device is None:
            device = torch.device("cuda", torch.cuda.current_device())
        elif isinstance(device, int):
            device = torch.device("cuda", device)
        return self._placed(super().cuda(device), device, None)

    def cpu(self) -> LightningModule:
        """Moves to the CPU."""
        return self._placed(super().cpu(), torch.device("cpu"), None)

    def type(self, dst_type: str | torch.dtype) -> LightningModule:
        """Converts all parameters and buffers."""
        return self._placed(super().type(dst_type), None, dst_type)

    def float(self) -> LightningModule:
        """Converts floating-point parameters to float32."""
        return self._placed(super().float(), None, torch.float)

    def double(self) -> LightningModule:
        """Converts floating-point parameters to float64."""
        return self._placed(super().double(), None, torch.double)

    def half(self) -> LightningModule:
        """Converts floating-point parameters to float16."""
        return self._placed(super().half(), None, torch.half)

    def bfloat16(self) -> LightningModule:
        """Converts floating-point parameters to bfloat16."""
        return self._placed(super().bfloat16(), None, torch.bfloat16)

    def _placed(self, moved: Any, device: torch.device | None, dtype: Any) -> Any:
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

    current_epoch = _from_trainer("current_epoch", 0, "Epochs finished so far; 0 without a trainer.")
    global_step = _from_trainer("global_step", 0, "Optimizer steps made so far; 0 without a trainer.")
    global_rank = _from_trainer("global_rank", 0, "Index of this process over all nodes; 0 without a trainer.")
    local_rank = _from_trainer("local_rank", 0, "Index of this process on its node; 0 without a trainer.")
    logger = _from_trainer("logger", None, "The first logger.")
    loggers = property(lambda self: [] if self._trainer is None else self._trainer.loggers, doc="All loggers.")

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

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The loss of one batch.

        Called as `training_step(batch, batch_idx)`; `batch_idx` may be left out.

        Returns:
            A scalar tensor; a dict with the key "loss" (handed on to `on_train_batch_end`); or None to skip the batch.
        """

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Looks at one validation batch: `validation_step(batch, batch_idx, dataloader_idx=0)`."""

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Looks at one test batch: `test_step(batch, batch_idx, dataloader_idx=0)`."""

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts one batch; by default `self(batch)`."""
        batch = kwargs.get("batch", args[0] if args else None)
        return self(batch)

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Callbacks that belong to the model; they replace those of the same class in the trainer."""
        return []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizers, and their learning-rate schedulers.

        Returns:
            An optimizer; a list of optimizers; `([optimizers], [schedulers])`; a dict with "optimizer" and
            "lr_scheduler" (a scheduler or a dict with "scheduler", "interval", "frequency", "monitor", "strict",
            "name"); a list of such dicts; or None to train without one.
        """
        raise MisconfigurationException(
            f"`{type(self).__name__}.configure_optimizers` was called but is not implemented. Without an optimizer "
            "nothing would be learned. Define it, for example: `def configure_optimizers(self): return "
            "torch.optim.Adam(self.parameters(), lr=1e-3)`."
        )

    # ------------------------------------------------------------------ logging

    def log(
        self, name: str, value: Any, prog_bar: bool = False, logger: bool | None = None,
        on_step: bool | None = None, on_epoch: bool | None = None, reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False, sync_dist: bool = False, sync_dist_group: Any = None,
        add_dataloader_idx: bool = True, batch_size: int | None = None, metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:  # fmt: skip
        """Keeps a value for loggers, callbacks and the progress bar. It stays on its device until somebody reads it.

        Arguments:
            name: the key; `name_step` and `name_epoch` when both are on.
            value: a number, a tensor with one element, or a torchmetrics `Metric`.
            on_step, on_epoch: log now, and/or the value reduced over the epoch. Defaults depend on the hook: now in
                training, over the epoch in evaluation.
            reduce_fx: "mean" (weighted by batch size), "sum", "min" or "max" over the epoch.
            batch_size: weight of this value in a mean; looked up in the batch when left out.
            add_dataloader_idx: append `/dataloader_idx_N` when there are several loaders.
            metric_attribute: name of the attribute that holds the `Metric`, if it cannot be found.
        """
        book = self._book
        if book is None:
            return self._log_nowhere(name)
        options = (
            prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, sync_dist_group,
            add_dataloader_idx, metric_attribute, rank_zero_only,
        )  # fmt: skip
        if is_dynamo_compiling():  # the compiler reads True here
            book.jot(name, value, options, batch_size)
        else:
            book.write(name, value, options, batch_size)

    def log_dict(
        self, dictionary: Mapping[str, Any], prog_bar: bool = False, logger: bool | None = None,
        on_step: bool | None = None, on_epoch: bool | None = None, reduce_fx: str | Callable[..., Any] = "mean",
        enable_graph: bool = False, sync_dist: bool = False, sync_dist_group: Any = None,
        add_dataloader_idx: bool = True, batch_size: int | None = None, rank_zero_only: bool = False,
    ) -> None:  # fmt: skip
        """`log` for several names at once: a mapping, or a torchmetrics `MetricCollection`."""
        try:
            items = dictionary.items()
        except (AttributeError, TypeError):
            fix = "Pass a mapping from names to numbers, or a `MetricCollection`; of one metric, its computed values."
            raise TypeError(f"`self.log_dict` received {describe_received(dictionary)}. {fix}") from None
        if hasattr(dictionary, "compute_groups"):
            # a MetricCollection: the members themselves, not copies, under their prefixed names
            items = dictionary.items(keep_base=False, copy_state=False)  # type: ignore[call-arg]
        for name, value in items:
            self.log(
                name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, sync_dist_group,
                add_dataloader_idx, batch_size, None, rank_zero_only,
            )  # fmt: skip

    def _log_nowhere(self, name: str) -> None:
        """`self.log` without a logbook: barebones, or no trainer at all."""
        if is_dynamo_compiling():
            return  # a warning would break the graph
        if self._trainer is not None:
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
        if trainer is None or trainer.is_global_zero:
            bar = trainer and trainer.progress_bar_callback
            (bar.print if bar is not None and bar.is_enabled else print)(*args, **kwargs)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Tensors of all processes, along a new first dimension, and unchanged on one device; numbers become tensors."""
        strategy = self.trainer.strategy
        as_tensor = apply_to_collection(data, (bool, int, float), lambda v: torch.tensor(v, device=self.device))
        if getattr(strategy, "world_size", 1) == 1:
            return as_tensor
        if self.trainer.evaluating:  # where processes have other batches
            found: list[Tensor] = []
            apply_to_collection(as_tensor, Tensor, found.append)
            strategy.check_equal_shapes(found, group)
        return apply_to_collection(as_tensor, Tensor, strategy.all_gather, group=group, sync_grads=sync_grads)

    # ------------------------------------------------------------------ optimization

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """The optimizer, or the list of them.

        Arguments:
            use_pl_optimizer: wrapped ones, whose `step` knows about precision and counting; False: your own objects.
        """
        found = self.trainer.lightning_optimizers if use_pl_optimizer else self.trainer.optimizers
        return found[0] if len(found) == 1 else list(found)

    def lr_schedulers(self) -> Any:
        """The scheduler, the list of them, or None."""
        configs = self.trainer.lr_scheduler_configs
        if not configs:
            return None
        return configs[0].scheduler if len(configs) == 1 else [config.scheduler for config in configs]

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """`loss.backward()` for manual optimization: scaled by the precision, with the hooks around it."""
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
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Makes one optimizer step. An override must run the closure: it is the forward and the backward.

        Arguments:
            epoch, batch_idx: where training is.
            optimizer: a `LightningOptimizer`.
            optimizer_closure: runs `training_step`, `zero_grad` and `backward`, and returns the loss.
        """
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clears the gradients; override it to do something else."""
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Steps one scheduler; `metric` is given to those that watch one."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: Number | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips the gradients before the step; called with the trainer's values, also when clipping is off."""
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def clip_gradients(
        self, optimizer: Optimizer, gradient_clip_val: Number | None = None, gradient_clip_algorithm: str | None = None
    ) -> Tensor | None:
        """Clips the gradients of one optimizer, by norm (default) or by value; unscaled ones, whatever the precision.

        Arguments:
            gradient_clip_val: the bound; None takes the trainer's, 0 or less does nothing.
            gradient_clip_algorithm: "norm" or "value"; None takes the trainer's.

        Returns:
            The norm before clipping, if it had to be known: one number on the device, ready for `self.log`.
        """
        value = self._agreed("gradient_clip_val", gradient_clip_val, self.trainer.gradient_clip_val)
        algorithm = gradient_clip_algorithm and gradient_clip_algorithm.lower()
        algorithm = self._agreed("gradient_clip_algorithm", algorithm, self.trainer.gradient_clip_algorithm) or "norm"
        if getattr(algorithm, "value", algorithm) not in ("norm", "value"):
            raise MisconfigurationException(
                f"`gradient_clip_algorithm={algorithm!r}` is invalid. Use 'norm' or 'value'."
            )
        if not value:
            return None
        raw, precision = getattr(optimizer, "optimizer", optimizer), self.trainer.strategy.precision_plugin
        if not self.automatic_optimization and isinstance(precision, MixedPrecision):
            precision.unscale_gradients(raw)  # the step comes later, and will not do it again
        kind = GradClipAlgorithmType(getattr(algorithm, "value", algorithm))
        norm = precision.clip_gradients(raw, value, kind)
        if norm is not None:
            self._clipped_norms[id(raw)] = norm  # for `GradientNorm`, so that it need not be computed twice
        return norm

    @staticmethod
    def _agreed(name: str, given: Any, trainers: Any) -> Any:
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
        for other in self.optimizers(use_pl_optimizer=False) if len(self.trainer.optimizers) > 1 else ():
            for parameter in _parameters(other):
                before.setdefault(parameter, parameter.requires_grad)
                parameter.requires_grad = False
        for parameter in _parameters(optimizer):
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

    def freeze(self) -> LightningModule:
        """No parameter requires gradients any more, and the module is in eval mode."""
        self.requires_grad_(False)
        return self.eval()

    def unfreeze(self) -> LightningModule:
        """All parameters require gradients, and the module is in train mode."""
        self.requires_grad_(True)
        return self.train()

    to_onnx = export.to_onnx
    to_torchscript = export.to_torchscript

    @ClassOnlyMethod
    def load_from_checkpoint(
        cls, checkpoint_path: Any, map_location: Any = None, hparams_file: Any = None, strict: bool | None = None,
        weights_only: bool | None = None, **kwargs: Any,
    ) -> Self:  # fmt: skip
        """A module as it was saved: built from the stored hyper-parameters, with the stored weights.

        Arguments:
            checkpoint_path: path, URL or file object.
            map_location: as for `torch.load`; None keeps the saved device if it exists.
            hparams_file: .yaml or .csv with hyper-parameters that the file lacks.
            strict: whether the keys must match; None takes `strict_loading`.
            kwargs: arguments of `__init__`, before the stored ones.
        """
        return load_from_checkpoint(cls, checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A trainer holds processes, files and loaders: a copied or pickled module starts unattached.
        # Compiled methods cannot be pickled, and would go on calling this module: the copy has those of its class.
        state = uncompiled(super().__getstate__())
        return {**state, "_trainer": None, "_book": None, "_requires_grad_before_toggle": {}, "_clipped_norms": {}}


def missing_super_init(module: object) -> str:
    """What is wrong with a module whose base constructor has not run."""
    return f"`{type(module).__name__}.__init__` does not call `super().__init__()`. Make that its first line."


def _explain_missing_init(cls: type, init: Any) -> Any:
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


def _parameters(optimizer: Any) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
