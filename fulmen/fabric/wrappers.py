"""What `Fabric.setup` gives back: a module, an optimizer and a loader that behave like those they wrap.

What a wrapper does in each step is decided when it is made: with weights of 32 bits on one device, calling the module
and stepping are calls of the user's own objects and nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fulmen.data.loaders import set_epoch
from fulmen.data.tensor_batches import iterate_batches
from fulmen.engine.precision import MixedPrecision, Precision
from fulmen.fabric.strategy import Strategy
from fulmen.optimizers import OptimizerWrapper
from fulmen.utilities.collections import apply_to_collection, move_data_to_device
from fulmen.utilities.introspection import overrides_method
from fulmen.utilities.modules import call_as_forward, unwrap_compiled

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

# Of a `LightningModule`: they are the forward pass of a training loop.
STEP_METHODS = ("training_step", "validation_step", "test_step", "predict_step")
_OWN_BACKWARD = (
    "The current strategy and precision selection requires you to call `fabric.backward(loss)` instead of "
    "`loss.backward()`: the loss is scaled first, or an engine takes part."
)


class _FabricModule(nn.Module):
    """A module of a loop of the user's own, called in the numbers and by the wrapper of a strategy.

    Attributes are read from and written to the original module, and its state is that of the original, so a wrapped
    module can stand wherever the module itself could.

    Arguments:
        forward_module: what is called, as the strategy made it.
        strategy: says in which numbers.
        original_module: the user's; the same if the strategy wraps nothing.
    """

    _original_module: nn.Module
    _forward_module: nn.Module
    _device: torch.device | None
    _dtype: torch.dtype

    def __init__(self, forward_module: nn.Module, strategy: Strategy, original_module: nn.Module | None = None) -> None:
        super().__init__()
        original: Any = forward_module if original_module is None else original_module
        precision: Any = strategy.precision
        is_plain = isinstance(precision, Precision) and not changes_numbers(precision)
        guards_backward = needs_own_backward(strategy)
        wraps_calls = unwrap_compiled(forward_module) is not original
        super().__setattr__("_original_module", original)
        # Written to `__dict__`: nothing is looked up among sub-modules in a step, and nothing is registered twice.
        vars(self).update(
            _forward_module=forward_module,
            _strategy=strategy,
            _is_plain=is_plain and not guards_backward,
            _guards_backward=guards_backward,
            _converts=isinstance(precision, Precision) and not is_plain,
            _wraps_calls=wraps_calls or (isinstance(strategy, Strategy) and strategy.forward_is_collective),
            _forward_methods=set(STEP_METHODS),
            _device=None,
            _dtype=torch.get_default_dtype(),
            _fabric_module_initialized=True,
        )

    @property
    def module(self) -> nn.Module:
        """The original module."""
        return self._original_module

    @property
    def forward_module(self) -> nn.Module:
        """What is called: the original module, or the wrapper that the strategy put around it."""
        return self._forward_module

    def record_device(self, device: torch.device) -> None:
        """The module was moved to that device."""
        vars(self)["_device"] = device

    @property
    def device(self) -> torch.device:
        """Where the module was last moved to."""
        if self._device is None:
            first = next(self._original_module.parameters(), None)
            return torch.device("cpu") if first is None else first.device
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """What the module was last converted to."""
        return self._dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        raise RuntimeError("`dtype` is read only. Convert the module with `module.to(dtype)`.")

    @property
    def training(self) -> bool:
        """The mode of the original module."""
        return getattr(vars(self).get("_modules", {}).get("_original_module"), "training", True)

    @training.setter
    def training(self, mode: bool) -> None:
        """It is set where the original is; `train` comes here first, and then there."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns; where the precision says so, for converted arguments, and converted back."""
        if self._is_plain:
            return self._forward_module(*args, **kwargs)
        precision = self._strategy.precision
        convert = precision.convert_forward_input if isinstance(precision, Precision) else precision.convert_input
        args, kwargs = convert((args, kwargs))
        with precision.forward_context():
            output = self._forward_module(*args, **kwargs)
        output = precision.convert_output(output)
        if self._guards_backward:
            apply_to_collection(output, Tensor, self._guard_backward)
        return output

    def _guard_backward(self, tensor: Tensor) -> None:
        """Lets a backward pass that nobody prepared raise an error."""
        strategy = self._strategy

        def check_prepared(_: Tensor) -> None:
            if not strategy.backward_is_prepared:
                raise RuntimeError(_OWN_BACKWARD)

        if tensor.requires_grad:
            tensor.register_hook(check_prepared)

    def mark_forward_method(self, method: str | Callable[..., Any]) -> None:
        """Makes a method part of the forward pass: it is called through the strategy's wrapper, like `forward`.

        Arguments:
            method: its name, or the method of the original module.

        Raises:
            ValueError: for `forward`, which is one already.
            AttributeError: the module has no such method.
            TypeError: for anything else.
        """
        if not isinstance(method, str) and not inspect.ismethod(method):
            raise TypeError(f"Expected a method or a string, but got: {type(method).__name__}. Pass its name.")
        name = method if isinstance(method, str) else method.__name__
        if name == "forward":
            raise ValueError("You cannot mark the forward method itself as a forward method: it is one. Leave it out.")
        if not inspect.ismethod(getattr(self._original_module, name, None)):
            owner = type(self._original_module).__name__
            what = f"You marked {name!r} as a forward method, but `{owner}.{name}` does not exist or is not a method."
            raise AttributeError(f"{what} Pass the name of a method that the class defines.")
        self._forward_methods.add(name)

    # ------------------------------------------------------------------ like the original

    def __getattr__(self, name: str) -> Any:
        modules = vars(self).get("_modules", {})
        if name == "_original_module" or "_original_module" not in modules:
            return super().__getattr__(name)
        original: nn.Module = modules["_original_module"]
        value: Any = getattr(original, name)
        if not inspect.ismethod(value) or value.__self__ is not original:
            return value
        if name in self._forward_methods and (self._wraps_calls or self._converts):
            return self._call_through_forward(value)
        return refuse_layer_calls(value, original, name) if self._wraps_calls else value

    def __setattr__(self, name: str, value: object) -> None:
        own = name in vars(self) or hasattr(type(self), name) or "_fabric_module_initialized" not in vars(self)
        if own:
            super().__setattr__(name, value)  # type: ignore[arg-type]
        else:
            setattr(self._original_module, name, value)

    def __delattr__(self, name: str) -> None:
        if name in vars(self):
            super().__delattr__(name)
        else:
            delattr(self._original_module, name)

    def __dir__(self) -> list[str]:
        own: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return sorted({*own, *dir(self._original_module)})

    def _call_through_forward(self, method: Callable[..., Any]) -> Callable[..., Any]:
        run = call_as_forward(self._original_module, self.__call__, method)

        @wraps(method)
        def call_forward_module(*args: Any, **kwargs: Any) -> Any:
            return run(*args, **kwargs)

        call_forward_module.__name__ = "call_forward_module"
        return call_forward_module

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """That of the original module."""
        return self._original_module.state_dict(*args, **kwargs)

    def load_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Any], strict: bool = True, **kwargs: Any
    ) -> Any:
        """Loads into the original module."""
        return self._original_module.load_state_dict(state_dict, strict=strict, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Under the names that they have in the original module."""
        return self._original_module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Under the names that they have in the original module."""
        return self._original_module.named_buffers(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Moves and converts the original module."""
        device, dtype = torch._C._nn._parse_to(*args, **kwargs)[:2]
        self._original_module.to(*args, **kwargs)
        return self._record_move(device, dtype)

    def cuda(self, device: torch.device | int | None = None) -> Any:
        """Moves the original module to a CUDA device."""
        self._original_module.cuda(device)
        return self._record_move(torch.device("cuda", torch.cuda.current_device()) if device is None else device, None)

    def cpu(self) -> Any:
        """Moves the original module to the CPU."""
        self._original_module.cpu()
        return self._record_move(torch.device("cpu"), None)

    def type(self, dst_type: str | torch.dtype) -> Any:
        """Converts all parameters and buffers."""
        self._original_module.type(dst_type)
        return self._record_move(None, dst_type if isinstance(dst_type, torch.dtype) else None)

    def float(self) -> Any:
        """Converts floating-point parameters to float32."""
        self._original_module.float()
        return self._record_move(None, torch.float32)

    def double(self) -> Any:
        """Converts floating-point parameters to float64."""
        self._original_module.double()
        return self._record_move(None, torch.float64)

    def half(self) -> Any:
        """Converts floating-point parameters to float16."""
        self._original_module.half()
        return self._record_move(None, torch.float16)

    def _record_move(self, device: torch.device | int | None, dtype: torch.dtype | None) -> _FabricModule:
        if device is not None:
            vars(self)["_device"] = torch.device("cuda", device) if isinstance(device, int) else device
        if dtype is not None:
            vars(self)["_dtype"] = dtype
        return self


def changes_numbers(precision: Precision) -> bool:
    """Does it convert what goes into a model or comes out, or enter a context around it?"""
    names = ("convert_input", "convert_forward_input", "convert_output", "forward_context")
    return any(overrides_method(precision, name, Precision) for name in names)


def needs_own_backward(strategy: Strategy) -> bool:
    """Are gradients wrong unless the strategy makes them?"""
    if not isinstance(strategy, Strategy) or not isinstance(strategy.precision, Precision):
        return False
    precision = strategy.precision
    base = MixedPrecision if isinstance(precision, MixedPrecision) else Precision
    scales = isinstance(precision, MixedPrecision) and precision.scaler is not None
    changed = any(overrides_method(precision, name, base) for name in ("pre_backward", "backward", "post_backward"))
    return scales or changed or strategy.has_own_backward or overrides_method(strategy, "backward", Strategy)


def refuse_layer_calls(method: Callable[..., Any], original: nn.Module, name: str) -> Callable[..., Any]:
    """The method, which raises a RuntimeError as soon as it calls a layer: the strategy's wrapper would not know."""

    def refuse_call(*_: Any) -> None:
        what = f"You are calling the method `{type(original).__name__}.{name}()` from outside the model."
        why = "It runs layers that the selected strategy has to prepare."
        fix = f"Mark it after `fabric.setup()`: `fabric_model.mark_forward_method({name!r})`."
        raise RuntimeError(f"{what} {why} {fix}")

    @wraps(method)
    def call_watched(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as hooks:
            for layer in original.modules():
                hooks.callback(layer.register_forward_pre_hook(refuse_call).remove)
            return method(*args, **kwargs)

    return call_watched


class _FabricOptimizer(OptimizerWrapper):
    """An optimizer of a loop of the user's own: an instance of its class, whose `step` knows strategy and precision.

    Arguments:
        optimizer: whose state and attributes are read and written.
        strategy: makes the step.
        callbacks: those with a method `on_after_optimizer_step` hear of each step.
    """

    _own_names = (
        "_optimizer", "_strategy", "_callbacks", "_listeners", "_num_callbacks", "_steps_itself", "_stepped",
    )  # fmt: skip

    def __init__(self, optimizer: Optimizer, strategy: Strategy, callbacks: Sequence[Any] | None = None) -> None:
        kind = optimizer.__class__  # of a stand-in, that of what it stands for
        self.__class__ = type("Fabric" + kind.__name__, (self.__class__, kind), {})
        self._optimizer = optimizer
        self._strategy = strategy
        self._callbacks: Sequence[Any] = [] if callbacks is None else callbacks
        self._listeners: list[Callable[..., Any]] = []
        self._num_callbacks = 0  # of which it is known whether they listen
        self._steps_itself = steps_by_itself(strategy)
        # A strategy that is not of this package may have an engine that steps.
        has_engine = not isinstance(strategy, Strategy) and hasattr(strategy, "model")
        self._stepped: Any = strategy.model if has_engine else optimizer

    def __reduce__(self) -> tuple[Any, ...]:
        return _FabricOptimizer, (self._optimizer, self._strategy)  # a copy has no callbacks of a loop

    def __repr__(self) -> str:
        return f"Fabric{self._optimizer!r}"

    def state_dict(self) -> dict[str, Any]:
        """The state, as the strategy has it."""
        return self._strategy.get_optimizer_state(self._optimizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads into the wrapped optimizer."""
        if isinstance(self._strategy, Strategy):
            self._strategy.load_optimizer_state(self._optimizer, state_dict)
        else:
            self._optimizer.load_state_dict(state_dict)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Clears the gradients."""
        self._optimizer.zero_grad(*args, **kwargs)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, in the way of the strategy and the precision.

        Arguments:
            closure: recomputes the loss and its gradients; optional.
        """
        if closure is not None:
            result = self._strategy.optimizer_step(self._stepped, closure=closure)
        elif self._steps_itself:
            result = self._optimizer.step()
        else:
            result = self._strategy.optimizer_step(self._stepped)
        if self._callbacks:
            self._notify_callbacks()
        return result

    def _notify_callbacks(self) -> None:
        if len(self._callbacks) != self._num_callbacks:
            found = [getattr(callback, "on_after_optimizer_step", None) for callback in self._callbacks]
            self._listeners = [listener for listener in found if callable(listener)]
            self._num_callbacks = len(self._callbacks)
        for listener in self._listeners:
            listener(strategy=self._strategy, optimizer=self._optimizer)


def steps_by_itself(strategy: Strategy) -> bool:
    """Is a step nothing but `optimizer.step()`?"""
    is_ours = isinstance(strategy, Strategy) and isinstance(strategy.precision, Precision)
    return is_ours and strategy.precision.step_is_default and not overrides_method(strategy, "optimizer_step", Strategy)


class _FabricDataLoader:
    """A loader of a loop of the user's own: its batches arrive on the device, and samplers know the epoch.

    Arguments:
        dataloader: whose attributes are read and written.
        device: where batches go; None leaves them where they are.
    """

    _dataloader: DataLoader[Any]
    _device: torch.device | None

    def __init__(self, dataloader: DataLoader[Any], device: torch.device | None = None) -> None:
        vars(self).update(_dataloader=dataloader, _device=device, _num_iter_calls=0)

    @property
    def dataloader(self) -> DataLoader[Any]:
        """The loader that is wrapped."""
        return self._dataloader

    @property
    def device(self) -> torch.device | None:
        """Where batches go."""
        return self._device

    def __len__(self) -> int:
        return len(self._dataloader)

    def __iter__(self) -> Iterator[Any]:
        set_epoch(self._dataloader, self._num_iter_calls)
        vars(self)["_num_iter_calls"] += 1
        device = self._device
        for batch in iterate_batches(self._dataloader):
            yield batch if device is None else move_data_to_device(batch, device)

    def __getattr__(self, name: str) -> Any:
        if name in ("_dataloader", "_device"):  # not there yet: unpickling
            raise AttributeError(name)
        return getattr(self._dataloader, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in vars(self):
            vars(self)[name] = value
        else:
            setattr(self._dataloader, name, value)


def compile_like(module: nn.Module, compiled: Any) -> nn.Module:
    """A module compiled with the options of another one that `torch.compile` made."""
    again: nn.Module = type(compiled)(module, compiled.dynamo_ctx)
    return again


def is_wrapped(obj: object) -> bool:
    """Did `Fabric` set it up? It may have been compiled since.

    >>> is_wrapped(nn.Linear(2, 2))
    False
    """
    return isinstance(unwrap_compiled(obj), (_FabricModule, _FabricOptimizer, _FabricDataLoader))


def unwrap_objects(collection: object) -> Any:
    """A collection with the user's own modules, optimizers and loaders instead of wrappers and compiled modules."""

    def unwrap_object(obj: object) -> object:
        inner = unwrap_compiled(obj)
        if isinstance(inner, _FabricModule):
            return unwrap_compiled(inner.module)
        if isinstance(inner, _FabricOptimizer):
            return inner.optimizer
        return inner.dataloader if isinstance(inner, _FabricDataLoader) else inner

    kinds = (_FabricModule, _FabricOptimizer, _FabricDataLoader, nn.Module)
    return apply_to_collection(collection, kinds, unwrap_object)
