"""`DDPStrategy`: every process has the whole model, and gradients are averaged in the backward pass."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, parallel
from torch.nn.modules.batchnorm import _BatchNorm

from fulmen.engine import collectives
from fulmen.engine.accelerators import Accelerator
from fulmen.engine.buffers import Buffers
from fulmen.engine.cluster import ClusterEnvironment
from fulmen.engine.parallel import ParallelStrategy
from fulmen.engine.precision import Precision
from fulmen.engine.strategy import Strategy
from fulmen.engine.sync_batchnorm import SyncBatchNorm
from fulmen.storage.checkpoint_io import CheckpointIO
from fulmen.utilities.collections import declared_batch_size
from fulmen.utilities.errors import MisconfigurationException, explain, suggest_name
from fulmen.utilities.introspection import is_generator
from fulmen.utilities.modules import call_as_forward, mode_of_module, parameter_names
from fulmen.utilities.rank_zero import warn_once

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from fulmen.trainer import Trainer

T = TypeVar("T")

SMALL_BATCH = 8  # of one device, for batch norm
# What `DistributedDataParallel` takes, and nobody else decides.
_DDP_ARGUMENTS = tuple(name for name in inspect.signature(parallel.DistributedDataParallel).parameters if name not in ("module", "device_ids", "output_device"))  # fmt: skip
# Whether buffers are those of rank 0: the name of today, if torch knows it, and the older one.
_BUFFER_ARGUMENTS = [name for name in ("forward_sync_buffers", "broadcast_buffers") if name in _DDP_ARGUMENTS]


class DistributedDataParallel(parallel.DistributedDataParallel):
    """Torch's wrapper, whose mode is that of the module, whoever changes it."""

    training = mode_of_module


class DDPStrategy(ParallelStrategy):
    """Torch's `DistributedDataParallel` around the training step of automatic optimization with one optimizer.

    In manual optimization, and with a `training_step` that yields, gradients are averaged at the end of each backward
    pass, without overlap: for the parameters that it reached, whichever they are. `toggle_model(sync_grad=False)` puts
    it off. Buffers are those of rank 0, taken over before they are read: running statistics of batch norm before
    validation, others before every step.

    Arguments:
        parallel_devices: one for each process of this node; by default those of the Trainer.
        ddp_comm_state: the state that `ddp_comm_hook` gets.
        ddp_comm_hook: exchanges the gradients of a bucket, as torch's `register_comm_hook` takes it; on any device.
        ddp_comm_wrapper: is called with `ddp_comm_hook` and gives the hook that is registered.
        model_averaging_period: not supported.
        process_group_backend: "gloo", "nccl", ...; None takes what suits the device.
        timeout: how long a process waits for the others, when they meet and in each collective; None is 30 minutes.
        start_method: "popen" runs the script again for each device; "spawn", "fork" and "forkserver" run only the call.
        find_unused_parameters: some steps leave parameters out of the loss; None is no.
        static_graph: every step runs the same operations; None is no.
        bucket_cap_mb: MB of gradients that are averaged together; None is torch's choice.
        kwargs: further arguments of `DistributedDataParallel`; `gradient_as_bucket_view` is on unless they say no. With
            `broadcast_buffers=False` each process trains with buffers of its own; validation is with those of rank 0.

    Raises:
        MisconfigurationException: for a `model_averaging_period`.
        TypeError: for an argument that `DistributedDataParallel` does not have.

    >>> DDPStrategy(find_unused_parameters=True).find_unused_parameters
    True
    """

    strategy_name = "ddp"

    def __init__(
        self, accelerator: Accelerator | None = None, parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None, checkpoint_io: CheckpointIO | None = None, precision_plugin: Precision | None = None,
        ddp_comm_state: object | None = None, ddp_comm_hook: Callable[..., Any] | None = None,
        ddp_comm_wrapper: Callable[..., Any] | None = None, model_averaging_period: int | None = None,
        process_group_backend: str | None = None, timeout: timedelta | None = timedelta(minutes=30),
        start_method: str = "popen", find_unused_parameters: bool | None = None, static_graph: bool | None = None,
        bucket_cap_mb: int | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin, process_group_backend,
            timeout, start_method,
        )  # fmt: skip
        if model_averaging_period is not None:
            what = f"`DDPStrategy(model_averaging_period={model_averaging_period})`: models are not averaged here."
            raise MisconfigurationException(f"{what} Leave it out: gradients are averaged at every step.")
        for name in kwargs:
            if name not in _DDP_ARGUMENTS:
                known = f"Known are those of `DistributedDataParallel`: {', '.join(_DDP_ARGUMENTS)}."
                raise TypeError(f"`DDPStrategy` has no argument `{name}`.{suggest_name(name, _DDP_ARGUMENTS)} {known}")
        self._ddp_comm_state = ddp_comm_state
        self._ddp_comm_hook = ddp_comm_hook
        self._ddp_comm_wrapper = ddp_comm_wrapper
        # Named, so that command lines know them.
        named = {
            "find_unused_parameters": find_unused_parameters,
            "static_graph": static_graph,
            "bucket_cap_mb": bucket_cap_mb,
        }
        given = {name: value for name, value in named.items() if value is not None}
        self._ddp_kwargs = {"gradient_as_bucket_view": True, **given, **kwargs}
        self.gradient_averager: GradientAverager | None = None
        self._ddp_parameters: list[Tensor] = []  # the parameters DDP waits for, in its order

    @property
    def find_unused_parameters(self) -> bool:
        """May a step leave parameters out?"""
        return bool(self._ddp_kwargs.get("find_unused_parameters"))

    # ------------------------------------------------------------------ the model

    def wrap_model(self, trainer: Trainer) -> None:
        """For fit: the wrapper, or what averages gradients without it. For others: the weights of rank 0."""
        module = self._lightning_module
        tensors = [*module.parameters(), *module.buffers()]
        if any(torch.nn.parameter.is_lazy(tensor) for tensor in tensors):
            what = (
                f"`{type(module).__name__}` has lazy layers that saw no batch yet: weights of unknown shape cannot be"
            )
            raise RuntimeError(f"{what} exchanged. Run a batch through them in `configure_model`.")
        if trainer.state.fn != "fit":
            collectives.broadcast_tensors(tensors, self.root_device)
            return
        chosen = [self._ddp_kwargs[name] for name in _BUFFER_ARGUMENTS if self._ddp_kwargs.get(name) is not None]
        self.buffers = Buffers(module, self.root_device, per_process=chosen[:1] == [False])
        learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
        wraps = module.automatic_optimization and not is_generator(module.training_step) and bool(learning)
        if wraps:
            self._ddp_parameters = learning
            self.configure_ddp()
        elif self._ddp_comm_hook is not None:
            what = "`DDPStrategy(ddp_comm_hook=...)` works with automatic optimization and one optimizer only."
            raise MisconfigurationException(f"{what} Leave it out.")
        else:
            collectives.broadcast_tensors(tensors, self.root_device)
        # Those that are frozen now may learn later.
        other = module.parameters() if not wraps else (p for p in module.parameters() if not p.requires_grad)
        self.gradient_averager = GradientAverager(other, self.root_device, self.find_unused_parameters)

    def configure_ddp(self) -> None:
        """Wraps the model; weights and buffers of rank 0 are in all processes afterwards."""
        self.model = self._setup_model(self.model)
        self._register_ddp_hooks()

    def _setup_model(self, model: Module) -> parallel.DistributedDataParallel:
        """The model in its wrapper."""
        options = dict(self._ddp_kwargs)
        if self.buffers is not None and not self.buffers.per_process:
            # Torch forgets buffers that are replaced, and those of the batches inside an accumulation window.
            options = {name: value for name, value in options.items() if name not in _BUFFER_ARGUMENTS} | {
                _BUFFER_ARGUMENTS[0]: False
            }
            self.buffers.broadcast()  # older versions of torch would not
        return DistributedDataParallel(model, device_ids=self.determine_ddp_device_ids(), **options)

    def _register_ddp_hooks(self) -> None:
        """Gives the wrapper the user's way of exchanging gradients."""
        if (hook := self._ddp_comm_hook) is not None:
            hook = hook if self._ddp_comm_wrapper is None else self._ddp_comm_wrapper(hook)
            self.model.register_comm_hook(self._ddp_comm_state, hook)

    def determine_ddp_device_ids(self) -> list[int] | None:
        """None: batches are on the device when they come, the wrapper need not look."""
        return None

    def wrap_step(self, step_name: str) -> Callable[..., Any]:
        if not isinstance(self.model, parallel.DistributedDataParallel):
            return super().wrap_step(step_name)
        step: Callable[..., Any] = getattr(self._lightning_module, step_name)
        # Evaluation has no gradients to exchange.
        return call_through_wrapper(self, step, self._ddp_parameters) if step_name == "training_step" else step

    def zero_loss(self) -> Tensor | None:
        wrapped = isinstance(self.model, parallel.DistributedDataParallel)
        static = self._ddp_kwargs.get("static_graph")
        kinds = (SyncBatchNorm, torch.nn.SyncBatchNorm)
        exchanging = any(isinstance(layer, kinds) for layer in self._lightning_module.modules())
        if not wrapped or static or exchanging:
            return None
        nothing_of_each = lambda: sum(p.flatten()[:0].sum() for p in self._ddp_parameters)  # noqa: E731
        step = call_through_wrapper(self, nothing_of_each, self._ddp_parameters)
        loss: Tensor = (step if self.buffers is None else self.buffers.sync_before(step))()
        return loss

    def check_gradients(self) -> None:
        """After the first backward pass whose gradients are exchanged: did it reach all parameters?

        Raises:
            RuntimeError: names those that it did not reach.
        """
        if not self.find_unused_parameters and not self._ddp_kwargs.get("static_graph"):
            missing = [parameter for parameter in self._ddp_parameters if parameter.grad is None]
            if missing:
                raise RuntimeError(unused_parameters_message(parameter_names(self._lightning_module, missing)))

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        if self.gradient_averager is not None:
            self.gradient_averager.set_owners(self.optimizers)

    @contextmanager
    def _without_sync(self) -> Generator[None]:
        assert self.gradient_averager is not None
        wrapped = isinstance(self.model, parallel.DistributedDataParallel)
        with self.gradient_averager.disabled(), self.model.no_sync() if wrapped else nullcontext():
            yield

    def no_backward_sync(self, module: Module | None = None, enabled: bool = True) -> AbstractContextManager[Any]:
        return self._without_sync() if enabled and self.gradient_averager is not None else nullcontext()

    def process_dataloader(self, dataloader: T) -> T:
        world = self.world_size
        size = declared_batch_size(dataloader)
        fits_apart = self.gradient_averager is not None and self._layer_sync is None and world > 1
        if fits_apart and size is not None and size <= SMALL_BATCH and has_batch_norm(self._lightning_module):
            what = f"Batch norm sees {size} samples on each of {world} devices, which is few for statistics."
            warn_once(f"{what} `Trainer(sync_batchnorm=True)` takes those of all devices together.")
        return dataloader

    def teardown(self) -> None:
        if self.gradient_averager is not None:
            self.gradient_averager.remove_hooks()
        self.gradient_averager = None
        self._ddp_parameters = []
        super().teardown()


def call_through_wrapper(
    strategy: Strategy, step: Callable[..., Any], reduced: Sequence[Tensor] = ()
) -> Callable[..., Any]:
    """The step, called through the forward pass of the wrapper: that is where DDP prepares for the backward pass.

    The wrapper itself is not kept: it holds the process group, whose threads have to end before the process does.

    Arguments:
        strategy: whose `model` is the wrapper.
        reduced: the parameters whose gradients the wrapper waits for, to name those that got none.
    """
    module: Any = strategy.lightning_module
    call = call_as_forward(module, lambda *args, **kwargs: strategy.model(*args, **kwargs), step)

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except RuntimeError as error:
            indices = re.search(r"did not receive grad for rank \d+: ([\d\s]+)", str(error))
            if "Expected to have finished reduction" not in str(error):
                raise
            missing = [reduced[int(index)] for index in indices[1].split()] if indices else []
            raise RuntimeError(unused_parameters_message(parameter_names(module, missing))) from error

    return run


def has_batch_norm(module: Module) -> bool:
    """Does it have layers whose statistics are those of a batch?"""
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


def unused_parameters_message(names: list[str]) -> str:
    """The error for parameters that a backward pass did not reach."""
    shown = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    what = f"The loss of `training_step` does not depend on the parameters {shown or '(not known which)'}."
    why = "DDP waits for the gradient of every parameter."
    fix = "Remove or freeze them (`requires_grad_(False)`), or use `strategy='ddp_find_unused_parameters_true'`."
    return explain(what, why, fix)


class GradientAverager:
    """Averages over the processes what a backward pass added to gradients, at its end.

    Averaging is linear: of a gradient that was averaged before and grew since, only what came differs. So several
    backward passes before a step need no bookkeeping but which parameters they reached. A pass takes along those that
    passes before reached without an exchange, if they belong to an optimizer of a parameter it reached itself.

    Arguments:
        differs: whether processes may reach different parameters; one more collective per pass tells then.
    """

    def __init__(self, parameters: Iterable[Tensor], device: torch.device, differs: bool) -> None:
        # Quantised ones never learn.
        self.parameters = [p for p in parameters if p.is_floating_point() or p.is_complex()]
        self.device = device
        self.differs = differs
        self.enabled = True
        self.owner: dict[int, int] = {}  # of which optimizer; those of none belong together
        self.reached: set[int] = set()  # since the last exchange
        self.now: set[int] = set()  # by the backward pass that is running
        self.due = False
        self.hooks = []
        for index, parameter in enumerate(self.parameters):
            learns = parameter.requires_grad
            # Torch takes the hook of a parameter that learns only, but keeps it when that changes.
            parameter.requires_grad_(True)
            self.hooks.append(
                parameter.register_post_accumulate_grad_hook(lambda _, index=index: self.mark_reached(index))
            )
            parameter.requires_grad_(learns)

    def set_owners(self, optimizers: Iterable[Optimizer]) -> None:
        """Whose parameters are stepped together."""
        index_of = {id(parameter): index for index, parameter in enumerate(self.parameters)}
        for number, optimizer in enumerate(optimizers):
            for parameter in (p for group in optimizer.param_groups for p in group["params"] if id(p) in index_of):
                self.owner[index_of[id(parameter)]] = number

    @contextmanager
    def disabled(self) -> Generator[None]:
        """Inside, backward passes add to gradients without an exchange."""
        before = self.enabled
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = before

    def mark_reached(self, index: int) -> None:
        """A gradient is there."""
        self.reached.add(index)
        if not self.enabled:
            return
        self.now.add(index)
        if not self.due:
            self.due = True
            torch.autograd.Variable._execution_engine.queue_callback(self.average_reached)

    def average_reached(self) -> None:
        """At the end of the backward pass."""
        self.due = False
        owners = {self.owner.get(index) for index in self.now}
        found = sorted(index for index in self.reached if self.owner.get(index) in owners)
        if self.differs:
            mine = torch.zeros(len(self.parameters), dtype=torch.int32)
            mine[found] = 1
            found = collectives.all_reduce_tensor(mine, self.device, op="max").nonzero().flatten().tolist()
        self.now.clear()
        self.reached.difference_update(found)
        gradients = []
        for parameter in (self.parameters[index] for index in found):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        with torch.no_grad():
            for bucket in collectives.bucket_tensors(gradients):
                flat = torch.cat([grad.reshape(-1) for grad in bucket]) if len(bucket) > 1 else bucket[0].reshape(-1)
                total = flat.to(collectives.comm_device(self.device))
                dist.all_reduce(total)
                total /= dist.get_world_size()
                for grad, part in zip(bucket, total.split_with_sizes([grad.numel() for grad in bucket])):
                    grad.copy_(part.view_as(grad))

    def remove_hooks(self) -> None:
        for hook in self.hooks:
            hook.remove()
