"""`Fabric`: a training loop of one's own, on any device, in any precision, on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fulmen.data.loaders import seed_workers
from fulmen.data.samplers import shard_loader
from fulmen.engine.parallel import ParallelStrategy
from fulmen.fabric import checkpoint
from fulmen.fabric.arguments import as_list, choose_strategy, is_using_cli, load_callbacks
from fulmen.fabric.launch import check_function, do_nothing, launch_function, watch_script
from fulmen.fabric.process import FabricProcess
from fulmen.fabric.validation import check_loaders, check_module, check_optimizers, check_parameters
from fulmen.fabric.wrappers import (
    _FabricDataLoader,
    _FabricModule,
    _FabricOptimizer,
    compile_like,
    needs_own_backward,
    unwrap_objects,
)
from fulmen.module import LightningModule
from fulmen.utilities.collections import apply_to_collection, move_data_to_device
from fulmen.utilities.errors import PossibleUserWarning
from fulmen.utilities.introspection import parameters_of, takes_argument
from fulmen.utilities.modules import is_compiled, unwrap_compiled
from fulmen.utilities.rank_zero import rank_zero_deprecation, rank_zero_warn

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

    from fulmen.engine.accelerators import Accelerator
    from fulmen.engine.cluster import ClusterEnvironment
    from fulmen.engine.precision import Precision
    from fulmen.fabric.strategy import Strategy
    from fulmen.loggers.logger import Logger
    from fulmen.storage.checkpoint_io import CheckpointIO
    from fulmen.utilities.types import _PATH

    Plugin = Precision | CheckpointIO | ClusterEnvironment

T = TypeVar("T")


class Fabric(FabricProcess):
    """Devices, processes and precision for a training loop of your own.

    Arguments:
        accelerator: "cpu", "cuda", "mps", "gpu", "auto", or an `Accelerator`.
        strategy: "ddp", "fsdp", ..., "auto", or a `Strategy`: how work is spread over several devices.
        devices: how many, which ones (a list of indices), or "auto".
        num_nodes: how many machines.
        precision: "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", ...
        plugins: one or several of `Precision`, `CheckpointIO` and `ClusterEnvironment`.
        callbacks: one or several objects whose methods `call` calls.
        loggers: one or several, for `log` and `log_dict`.

    Raises:
        ValueError: for a value that is not known, or that contradicts another.
        TypeError: for a plugin that is none.
        RuntimeError: for hardware that is not here.

    Examples:
        >>> import torch
        >>> import torch
        >>> fabric = Fabric(accelerator="cpu")
        >>> model = nn.Linear(2, 1)
        >>> model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> loss = model(torch.ones(4, 2)).square().mean()
        >>> fabric.backward(loss)
        >>> optimizer.step()
    """

    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        precision: int | str | None = None,
        plugins: Plugin | list[Plugin] | None = None,
        callbacks: list[Any] | Any | None = None,
        loggers: Logger | list[Logger] | None = None,
    ) -> None:
        chosen = choose_strategy(
            plugins, accelerator=accelerator, strategy=strategy, devices=devices, num_nodes=num_nodes,
            precision=precision,
        )  # fmt: skip
        super().__init__(chosen)
        self._callbacks = [*as_list(callbacks), *load_callbacks()]
        self._loggers = as_list(loggers)
        self._models_setup = 0
        self._last_module: _FabricModule | None = None
        self._launching = False
        # Until a module is set up, several processes would not exchange what a backward pass makes.
        self._prepares_backward = self.needs_launch or needs_own_backward(chosen)
        if type(self).run is not Fabric.run:
            if is_using_cli():
                what = f"Overriding `{type(self).__name__}.run()` and launching from the CLI is not allowed."
                raise TypeError(f"{what} Run the script normally, or change it to use `fabric = Fabric(...)` directly.")
            self.run = partial(self._launch_run, self.run)  # type: ignore[method-assign]
        if is_using_cli():
            with self.enter_process():  # they exist, and everything may be used right away
                watch_script(self)

    @property
    def loggers(self) -> list[Logger]:
        """All loggers."""
        return self._loggers

    @property
    def logger(self) -> Logger:
        """The first logger; without any, an IndexError."""
        first: Logger = self._loggers[0]
        return first

    @property
    def _precision(self) -> Precision:
        return self._strategy.precision

    # ------------------------------------------------------------------ processes

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Override it with the whole program: calling it then starts the processes first.

        Examples:
            >>> class Program(Fabric):
            ...     def run(self, number):
            ...         return number + self.global_rank
            >>> Program(accelerator="cpu").run(3)
            3
        """

    def launch(self, function: Callable[..., Any] = do_nothing, *args: Any, **kwargs: Any) -> Any:
        """Starts the processes, and runs a function in each of them.

        Where the script itself is run once per process, the function may be left out: all processes exist from there on.
        On one device nothing has to be launched.

        Arguments:
            function: gets this object, then `args` and `kwargs`.

        Returns:
            What the function returned; where processes are spawned or forked, what it did on rank 0.

        Raises:
            TypeError: the function is none, takes no argument, or is missing where processes are spawned or forked.
            RuntimeError: in a process that was launched already.

        Examples:
            >>> Fabric(accelerator="cpu").launch(lambda fabric, x: fabric.world_size + x, 4)
            5
        """
        check_function(function, self._strategy.launcher)
        if is_using_cli():
            what = "This script was launched through the CLI, and processes have already been created."
            raise RuntimeError(f"{what} Calling `.launch()` again is not allowed: leave it out.")
        return self._launch(function, self, args, kwargs)

    def _launch_run(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`run` of a subclass, in launched processes."""
        return self._launch(run, None, args, kwargs)

    def _launch(self, function: Callable[..., Any], first: Fabric | None, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._launching or (self.needs_launch and self._launched and function is do_nothing):
            what = "`fabric.launch()` was called in a process that was launched already."
            raise RuntimeError(f"{what} Call it once, before everything that needs several processes.")
        return launch_function(self, function, args if first is None else (first, *args), kwargs)

    @contextmanager
    def enter_process(self) -> Generator[None]:
        """In a process that was launched: the environment is set up, and inside nothing is launched again."""
        self._strategy.setup_environment()
        self._launched = True
        self._launching = True
        try:
            yield
        finally:
            self._launching = False

    # ------------------------------------------------------------------ setting up

    def setup(
        self,
        module: nn.Module,
        *optimizers: Optimizer,
        scheduler: LRScheduler | None = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> Any:
        """Prepares a module and its optimizers: device, precision, and the wrapper of the strategy.

        Arguments:
            module: moved to the device and converted in place; a compiled one is compiled again around the wrapper.
            optimizers: of its parameters.
            scheduler: of an optimizer; strategies such as DeepSpeed replace it, others give it back.
            move_to_device: False leaves the module where it is.

        Returns:
            The wrapped module; with optimizers a tuple of it, the wrapped optimizers, and the scheduler if there is one.

        Raises:
            ValueError: for what was set up before.
            RuntimeError: before `launch` with several devices, or for an optimizer on the meta device.

        Examples:
            >>> import torch
            >>> fabric = Fabric(accelerator="cpu")
            >>> model = nn.Linear(2, 1)
            >>> model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
            >>> type(optimizer).__name__
            'FabricSGD'
        """
        self._check_launched()
        check_module(module)
        check_optimizers(optimizers, allow_meta=self._strategy.forward_is_collective)
        check_parameters(module, optimizers)
        compiled = module if _reapply_compile and is_compiled(module) else None
        original: Any = module if compiled is None else unwrap_compiled(module)
        prepared = self._prepare_module(original, list(optimizers), move_to_device)
        found: list[Optimizer] = []
        if optimizers:
            prepared, found, scheduler = self._strategy.setup_module_and_optimizers(
                prepared, list(optimizers), scheduler
            )
        else:
            prepared = self._strategy.setup_module(prepared)
        wrapped = self._wrap_module(prepared, original, compiled, move_to_device)
        if isinstance(original, LightningModule) and not any(callback is original for callback in self._callbacks):
            self._callbacks.append(original)
        wrapped_optimizers = [_FabricOptimizer(optimizer, self._strategy, self._callbacks) for optimizer in found]
        if isinstance(original, LightningModule):
            original.attach_fabric(self, wrapped_optimizers)
        self.call("on_after_setup", fabric=self, module=wrapped)
        if not optimizers:
            return wrapped
        return (wrapped, *wrapped_optimizers) if scheduler is None else (wrapped, *wrapped_optimizers, scheduler)

    def setup_module(
        self, module: nn.Module, move_to_device: bool = True, _reapply_compile: bool = True
    ) -> _FabricModule:
        """Prepares a module without its optimizers, which `setup_optimizers` takes.

        Arguments:
            module: as for `setup`.
            move_to_device: False leaves it where it is.

        Returns:
            The wrapped module.

        Raises:
            ValueError: for what was set up before.
            RuntimeError: before `launch` with several devices.
        """
        self._check_launched()
        check_module(module)
        compiled = module if _reapply_compile and is_compiled(module) else None
        original: Any = module if compiled is None else unwrap_compiled(module)
        prepared = self._strategy.setup_module(self._prepare_module(original, [], move_to_device))
        wrapped = self._wrap_module(prepared, original, compiled, move_to_device)
        if isinstance(original, LightningModule):
            original.attach_fabric(self, [])
        return wrapped

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Prepares optimizers of modules that `setup_module` prepared.

        Returns:
            The wrapped optimizer, or a tuple of them.

        Raises:
            ValueError: for none, or one that was set up before.
            RuntimeError: the strategy only sets up modules and optimizers together, or parameters have no values yet.
        """
        self._check_launched()
        if self._strategy.setup_is_joint:
            what = f"The `{type(self._strategy).__name__}` requires the model and optimizer(s) to be set up jointly"
            raise RuntimeError(f"{what} through `.setup(model, optimizer, ...)`.")
        if not optimizers:
            raise ValueError("`setup_optimizers` requires at least one optimizer as input.")
        check_optimizers(optimizers, allow_meta=False)
        found = [self._strategy.setup_optimizer(optimizer) for optimizer in optimizers]
        wrapped = [_FabricOptimizer(optimizer, self._strategy, self._callbacks) for optimizer in found]
        return wrapped[0] if len(wrapped) == 1 else tuple(wrapped)

    def setup_dataloaders(
        self, *dataloaders: DataLoader[Any], use_distributed_sampler: bool = True, move_to_device: bool = True
    ) -> Any:
        """Prepares loaders: each process reads its part, and batches arrive on the device.

        Arguments:
            dataloaders: shuffled loaders stay shuffled, others are read in order.
            use_distributed_sampler: False reads all of the data in every process.
            move_to_device: False leaves batches where they are.

        Returns:
            The wrapped loader, or a list of them.

        Raises:
            ValueError: for none, or one that was set up before.
            TypeError: for what is no `DataLoader`.

        Examples:
            >>> loader = Fabric(accelerator="cpu").setup_dataloaders(DataLoader(range(4), batch_size=2))
            >>> [batch.tolist() for batch in loader]
            [[0, 1], [2, 3]]
        """
        self._check_launched()
        check_loaders(dataloaders)
        wrapped = []
        for loader in dataloaders:
            prepared: Any = loader
            if use_distributed_sampler and self.world_size > 1 and isinstance(self._strategy, ParallelStrategy):
                prepared = shard_loader(loader, **self._strategy.distributed_sampler_kwargs)
            seed_workers(prepared, self.global_rank)
            prepared = self._strategy.process_dataloader(prepared)
            wrapped.append(_FabricDataLoader(prepared, self.device if move_to_device else None))
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def _prepare_module(self, module: nn.Module, optimizers: list[Optimizer], move_to_device: bool) -> nn.Module:
        module = self._precision.convert_module(module)
        if not move_to_device:
            return module
        devices = {parameter.device for parameter in module.parameters()}
        if len(devices) > 1:
            what = f"The model passed to `Fabric.setup()` has {len(devices)} parameters on different devices"
            first = next(p.device for p in module.parameters() if p.device != self.device)
            fix = f"The model will be moved to {self.device} as a whole. To avoid that, set `move_to_device=False`."
            rank_zero_warn(f"{what} (for example on {first}). {fix}", category=PossibleUserWarning)
        if isinstance(module, nn.Module):
            self._strategy.module_to_device(module)
        return module

    def _wrap_module(
        self, prepared: nn.Module, original: nn.Module, compiled: nn.Module | None, moved: bool
    ) -> _FabricModule:
        called = prepared if compiled is None else compile_like(prepared, compiled)
        wrapped = _FabricModule(called, self._strategy, original_module=original)
        if moved:
            wrapped.record_device(self.device)
        self._models_setup += 1
        self._prepares_backward = needs_own_backward(self._strategy)
        self._last_module = wrapped
        return wrapped

    # ------------------------------------------------------------------ a step

    def backward(self, tensor: Tensor, *args: Any, model: _FabricModule | None = None, **kwargs: Any) -> None:
        """In place of `loss.backward()`: scaled where the precision scales, and by an engine where a strategy has one.

        Arguments:
            tensor: the loss.
            args: handed to `Tensor.backward`, as are `kwargs`.
            model: whose loss it is; only DeepSpeed with several modules needs to know.

        Raises:
            RuntimeError: nothing was set up, where the strategy or the precision has to prepare it.
            ValueError: it is not known whose loss it is.
        """
        if not self._prepares_backward:
            tensor.backward(*args, **kwargs)
            return
        strategy = self._strategy
        module = model if model is not None else self._last_module
        if module is None:
            raise RuntimeError("No models were set up for backward. Did you forget to call `fabric.setup()`?")
        if strategy.has_own_backward and model is None and self._models_setup > 1:
            what = "When using multiple models with this strategy, you need to pass the model:"
            raise ValueError(f"{what} `fabric.backward(loss, model=model)`.")
        with strategy.preparing_backward():
            strategy.backward(tensor, unwrap_compiled(module.forward_module), *args, **kwargs)

    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor | None:
        """Clips gradients, unscaled ones whatever the precision, and over all processes that hold a part of them.

        Arguments:
            module: that was set up.
            optimizer: whose parameters' gradients are clipped.
            clip_val: the largest absolute value of an element.
            max_norm: the largest norm of all together; exactly one of the two is given.
            norm_type: the order of the norm, or `float("inf")`.
            error_if_nonfinite: raise if the norm is infinite or not a number.

        Returns:
            With `max_norm` the norm before clipping, a tensor with one element.

        Raises:
            ValueError: for both, or neither.
            RuntimeError: the norm is not finite.
        """
        if (clip_val is None) == (max_norm is None):
            given = (
                "only one of `clip_val` or `max_norm`" if clip_val is not None else "either `clip_val` or `max_norm`"
            )
            raise ValueError(f"You must specify {given}: `fabric.clip_gradients(module, optimizer, max_norm=1.0)`.")
        raw_module = unwrap_objects(module)
        raw = unwrap_objects(optimizer)
        if clip_val is not None:
            self._strategy.clip_gradients_value(raw_module, raw, clip_val)
            return None
        assert max_norm is not None
        return self._strategy.clip_gradients_norm(raw_module, raw, max_norm, norm_type, error_if_nonfinite)

    def autocast(self) -> AbstractContextManager[Any]:
        """Operations outside of the model, inside of this context, are made in the precision of the model."""
        return self._precision.forward_context()

    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> AbstractContextManager[Any]:
        """Inside, backward passes add to gradients without an exchange between processes, to accumulate them.

        The last backward pass before a step has to be outside. Forward passes belong inside, too.

        Arguments:
            module: that was set up.
            enabled: False does nothing, which saves an `if` in the loop.

        Raises:
            TypeError: the module was not set up.
        """
        wrapped = unwrap_compiled(module)
        if not isinstance(wrapped, _FabricModule):
            what = "You need to set up the model first before you can call `fabric.no_backward_sync()`:"
            raise TypeError(f"{what} `model = fabric.setup(model, ...)`.")
        if not enabled:
            return nullcontext()
        return self._strategy.no_backward_sync(unwrap_compiled(wrapped.forward_module), enabled)

    def to_device(self, obj: T) -> T:
        """A module, moved in place, or a tensor or nested collection on the device of this process."""
        if isinstance(obj, nn.Module):
            self._strategy.module_to_device(obj)
            return obj
        moved: T = move_data_to_device(obj, self.device)
        return moved

    # ------------------------------------------------------------------ making tensors and modules

    def init_tensor(self) -> AbstractContextManager[Any]:
        """Tensors created inside are on the device, in the dtype of the precision."""
        self._check_launched()
        return self._strategy.tensor_init_context()

    def init_module(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Modules created inside are on the device, in the dtype of the precision, or sharded from the start.

        Arguments:
            empty_init: leave weights uninitialised, because a checkpoint will fill them.
        """
        self._check_launched()
        return self._strategy.module_init_context(empty_init)

    def sharded_model(self) -> AbstractContextManager[Any]:
        """The former name of a part of `init_module`."""
        rank_zero_deprecation("`Fabric.sharded_model()` is deprecated in favor of `Fabric.init_module()`.")
        self._check_launched()
        return self._strategy.module_sharded_context()

    # ------------------------------------------------------------------ checkpoints

    def save(
        self, path: _PATH, state: dict[str, Any], filter: dict[str, Callable[[str, Any], bool]] | None = None
    ) -> None:
        """Writes modules, optimizers and values to a file, or with shards to a folder. All processes call this.

        A kill at any instant leaves the old content or the new, and the file contains its own digest.

        Arguments:
            path: of the file or folder.
            state: modules, optimizers, whatever has a `state_dict`, and plain values, by name; also nested.
            filter: for a name in `state` a function of `(name, value)` that says which entries of it are written.

        Raises:
            TypeError: for a filter that is none, or a value that cannot be pickled.
            ValueError: for a filter of what is not in the state.

        Examples:
            >>> fabric = Fabric(accelerator="cpu")
            >>> fabric.save("last.ckpt", {"model": nn.Linear(2, 1), "step": 5})
            >>> fabric.load("last.ckpt")["step"]
            5
        """
        checkpoint.check_filter(state, filter)
        self._strategy.save_checkpoint(path, unwrap_objects(state), filter=filter)
        self.barrier()

    def load(
        self, path: _PATH, state: dict[str, Any] | None = None, strict: bool = True, *, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads what `save` wrote. All processes call this.

        Arguments:
            path: of the file or folder.
            state: objects to load into, and names whose values are put there.
            strict: whether all names of the state, and all weights of a module, have to be there.
            weights_only: False also builds objects of any class, whose code runs then; only for files you trust.

        Returns:
            What was not asked for: without a state, everything.

        Raises:
            KeyError: the checkpoint lacks a name of the state; nothing was loaded then.
        """
        unwrapped = unwrap_objects(state)
        rest = self._strategy.load_checkpoint(path, unwrapped, strict, weights_only)
        self.barrier()
        if state is not None:
            checkpoint.put_values(state, unwrapped)
        return rest

    def load_raw(
        self, path: _PATH, obj: nn.Module | Optimizer, strict: bool = True, *, weights_only: bool | None = None
    ) -> None:
        """Loads a file that holds nothing but the state of one module or optimizer.

        Arguments:
            path: of the file.
            obj: is changed in place.
            strict: whether the names have to be those of the module.
            weights_only: as for `load`.
        """
        target = unwrap_objects(obj)
        checkpoint.check_raw_target(target)
        self._strategy.load_checkpoint(path, target, strict, weights_only)

    # ------------------------------------------------------------------ callbacks and loggers

    def call(self, hook_name: str, *args: Any, **kwargs: Any) -> None:
        """Calls the method of that name on every callback that has it.

        Arguments:
            args: handed to each, as are those of `kwargs` that the method accepts.

        Examples:
            >>> class Greeter:
            ...     def on_start(self, name):
            ...         print("hello", name)
            >>> Fabric(accelerator="cpu", callbacks=Greeter()).call("on_start", name="you", other=1)
            hello you
        """
        for callback in self._callbacks:
            method = getattr(callback, hook_name, None)
            if method is None:
                continue
            if not callable(method):
                where = f"{type(callback).__name__}.{hook_name}"
                rank_zero_warn(f"Skipping the callback `{where}` because it is not callable.")
                continue
            known = parameters_of(method)
            accepted = {name: value for name, value in kwargs.items() if not known or takes_argument(method, name)}
            method(*args, **accepted)

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Hands a number, or a tensor with one element, to all loggers."""
        self.log_dict(metrics={name: value}, step=step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Hands several numbers to all loggers.

        Arguments:
            metrics: numbers by name; a tensor is fetched, so it has to have one element.
            step: at which they belong; None leaves that to the logger.

        Raises:
            ValueError: for a tensor with several elements.
        """
        numbers = apply_to_collection(metrics, Tensor, _fetch_number)
        for logger in self._loggers:
            logger.log_metrics(metrics=numbers, step=step)


def _fetch_number(value: Tensor) -> float | int | bool:
    if value.numel() != 1:
        what = f"The metric `{value}` does not contain a single element, thus it cannot be converted to a scalar."
        raise ValueError(f"{what} Log its mean, or its elements one by one.")
    number: float | int | bool = value.item()  # sync: loggers get numbers
    return number
