"""Callbacks that train a part of the module first and the rest later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch.nn import Module, Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from fulmen.callbacks.callback import Callback
from fulmen.optimizers import optimizer_of, schedule_new_groups
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer

    Modules = Module | Iterable["Modules"]


def multiplicative(epoch: int) -> float:
    """Doubles the learning rate in every epoch."""
    return 2.0


class BaseFinetuning(Callback):
    """Base class for training a part of the module first and the rest later.

    Freeze layers in `freeze_before_training` and hand them to an optimizer in `finetune_function`. Give the optimizer only
    what is trainable at the start: ``filter(lambda p: p.requires_grad, self.parameters())``. The groups that are added later
    are part of the checkpoint, and are added again when a run resumes.

    Examples:
        >>> class UnfreezeEncoder(BaseFinetuning):
        ...     def freeze_before_training(self, pl_module):
        ...         self.freeze(pl_module.encoder)
        ...     def finetune_function(self, pl_module, epoch, optimizer):
        ...         if epoch == 10:
        ...             self.unfreeze_and_add_param_group(pl_module.encoder, optimizer)
    """

    def __init__(self) -> None:
        self._forget_run()

    def _forget_run(self) -> None:
        self._internal_optimizer_metadata: dict[int, list[dict[str, Any]]] = {}  # groups, with names of parameters
        self._resumed = False

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freezes what is not trained at first; called in `setup`, before optimizers exist."""
        raise NotImplementedError

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        """Unfreezes what is due; called at the start of every epoch, once per optimizer."""
        raise NotImplementedError

    @staticmethod
    def flatten_modules(modules: Modules) -> list[Module]:
        """All modules inside that have no children, or parameters of their own.

        Examples:
            >>> from torch.nn import Linear, ReLU, Sequential
            >>> BaseFinetuning.flatten_modules(Sequential(Sequential(ReLU()), Linear(1, 1)))
            [ReLU(), Linear(in_features=1, out_features=1, bias=True)]
        """
        if not isinstance(modules, Module):
            return [module for part in modules for module in BaseFinetuning.flatten_modules(part)]
        return [module for module in modules.modules() if not list(module.children()) or module._parameters]

    @staticmethod
    def filter_params(modules: Modules, train_bn: bool = True, requires_grad: bool = True) -> Iterator[Parameter]:
        """The parameters that do, or do not, require gradients.

        Args:
            modules: a module, or any nesting of iterables of modules.
            train_bn: whether those of batch norm are among them.
            requires_grad: which ones: those that require gradients, or those that do not.
        """
        for module in BaseFinetuning.flatten_modules(modules):
            if train_bn or not isinstance(module, _BatchNorm):
                yield from (p for p in module.parameters(recurse=False) if p.requires_grad == requires_grad)

    @staticmethod
    def make_trainable(modules: Modules) -> None:
        """Undoes `freeze`: parameters require gradients, and batch norm tracks its statistics."""
        for module in BaseFinetuning.flatten_modules(modules):
            _set_trainable(module, True)

    @staticmethod
    def freeze_module(module: Module) -> None:
        """Freezes the parameters the module holds itself, and the running statistics of a batch norm."""
        _set_trainable(module, False)

    @staticmethod
    def freeze(modules: Modules, train_bn: bool = True) -> None:
        """Freezes everything inside.

        Args:
            modules: a module, or any nesting of iterables of modules.
            train_bn: leave batch norm trainable.
        """
        for module in BaseFinetuning.flatten_modules(modules):
            _set_trainable(module, train_bn and isinstance(module, _BatchNorm))

    @staticmethod
    def filter_on_optimizer(optimizer: Optimizer, params: Iterable[Parameter]) -> list[Parameter]:
        """Those of ``params`` that the optimizer does not have yet; warns if it has some of them.

        Args:
            optimizer: the optimizer whose groups are looked at.
            params: the parameters to choose from.
        """
        params = list(params)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        new = [p for p in params if id(p) not in known]
        if len(new) < len(params):
            what = f"{len(params) - len(new)} of the parameters to unfreeze are in the optimizer already and skipped."
            rank_zero_warn(f"{what} Give it only `filter(lambda p: p.requires_grad, self.parameters())` at first.")
        return new

    @staticmethod
    def unfreeze_and_add_param_group(modules: Modules, optimizer: Optimizer, lr: float | None = None,
                                     initial_denom_lr: float = 10.0, train_bn: bool = True) -> None:  # fmt: skip
        """Unfreezes modules and adds their parameters to an optimizer as a group.

        Args:
            modules: a module, or any nesting of iterables of modules.
            optimizer: the optimizer that shall train them.
            lr: learning rate of the group; None takes that of the first group, divided by ``initial_denom_lr``.
            initial_denom_lr: see ``lr``.
            train_bn: whether parameters of batch norm are added, too.
        """
        BaseFinetuning.make_trainable(modules)
        new = BaseFinetuning.filter_on_optimizer(optimizer, BaseFinetuning.filter_params(modules, train_bn))
        if new:
            rate = optimizer.param_groups[0]["lr"] / initial_denom_lr if lr is None else lr
            optimizer.add_param_group({"params": new, "lr": rate})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.freeze_before_training(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = dict(pl_module.named_parameters())
        for idx, groups in self._internal_optimizer_metadata.items():
            optimizer = trainer.optimizers[idx]
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            restored = [{**group, "params": [parameters[name] for name in group["params"]]} for group in groups]
            # A resumed run loads the state of its optimizers next, with all groups. A second fit has new optimizers, whose
            # first groups are as the script made them.
            start = 0 if self._resumed else len(optimizer.param_groups)
            optimizer.param_groups[start:] = restored[start:]
            added = {id(p) for group in restored for p in group["params"]} - known
            for module in pl_module.modules():  # files of others do not say what was unfrozen
                if added & {id(p) for p in module.parameters(recurse=False)}:
                    _set_trainable(module, True)
            _extend_schedulers(trainer, optimizer)
        self._resumed = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for idx, optimizer in enumerate(trainer.optimizers):
            self.finetune_function(pl_module, trainer.current_epoch, optimizer)
            stored = self._internal_optimizer_metadata.setdefault(idx, [])
            added = optimizer.param_groups[len(stored) :]
            if added:
                _extend_schedulers(trainer, optimizer)
                names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
                stored += [{**group, "params": [names[id(p)] for p in group["params"]]} for group in added]

    def state_dict(self) -> dict[str, Any]:
        return {"internal_optimizer_metadata": self._internal_optimizer_metadata}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = True
        self._internal_optimizer_metadata = state_dict["internal_optimizer_metadata"]


class BackboneFinetuning(BaseFinetuning):
    """Trains everything but ``pl_module.backbone`` first, and the backbone with a learning rate of its own later.

    Args:
        unfreeze_backbone_at_epoch: the epoch, counted from 0, from which on the backbone is trained.
        lambda_func: in every later epoch the learning rate of the backbone is multiplied by ``lambda_func(epoch + 1)``.
        backbone_initial_ratio_lr: its first learning rate, as a part of that of the optimizer's first group.
        backbone_initial_lr: its first learning rate as a number, in the place of that ratio.
        should_align: never let it be larger than that of the first group.
        initial_denom_lr: handed on to `unfreeze_and_add_param_group`.
        train_bn: whether batch norm is trained, before and after.
        verbose: tell both learning rates in every epoch.
        rounding: digits of the learning rates that are told.

    Raises:
        MisconfigurationException: in a run, if the module has no module called ``backbone``.

    Examples:
        >>> finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=5, backbone_initial_lr=1e-4)
    """

    def __init__(
        self, unfreeze_backbone_at_epoch: int = 10, lambda_func: Callable[[int], float] = multiplicative,
        backbone_initial_ratio_lr: float = 10e-2, backbone_initial_lr: float | None = None, should_align: bool = True,
        initial_denom_lr: float = 10.0, train_bn: bool = True, verbose: bool = False, rounding: int = 12,
    ) -> None:  # fmt: skip
        self.unfreeze_backbone_at_epoch = unfreeze_backbone_at_epoch
        self.lambda_func = lambda_func
        self.backbone_initial_ratio_lr = backbone_initial_ratio_lr
        self.backbone_initial_lr = backbone_initial_lr
        self.should_align = should_align
        self.initial_denom_lr = initial_denom_lr
        self.train_bn = train_bn
        self.verbose = verbose
        self.rounding = rounding
        super().__init__()

    def _forget_run(self) -> None:
        super()._forget_run()
        self.previous_backbone_lr: float | None = None

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        if not isinstance(getattr(pl_module, "backbone", None), Module):
            what = f"`BackboneFinetuning`: `{type(pl_module).__name__}` has no module called `backbone`."
            raise MisconfigurationException(f"{what} Derive from `BaseFinetuning` to choose other layers.")
        self.freeze(pl_module.backbone, train_bn=self.train_bn)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        if epoch < self.unfreeze_backbone_at_epoch:
            return
        current = optimizer.param_groups[0]["lr"]
        if epoch == self.unfreeze_backbone_at_epoch or self.previous_backbone_lr is None:  # a resumed run: it is late
            initial = self.backbone_initial_lr
            lr = current * self.backbone_initial_ratio_lr if initial is None else initial
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr, self.initial_denom_lr, self.train_bn)
        else:
            lr = self.previous_backbone_lr * self.lambda_func(epoch + 1)
            optimizer.param_groups[-1]["lr"] = lr = min(lr, current) if self.should_align else lr
        self.previous_backbone_lr = lr
        if self.verbose:
            digits = self.rounding
            rank_zero_info(f"Current lr: {round(float(current), digits)}, backbone lr: {round(float(lr), digits)}")

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "previous_backbone_lr": self.previous_backbone_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.previous_backbone_lr = state_dict["previous_backbone_lr"]
        super().load_state_dict(state_dict)


def _extend_schedulers(trainer: Trainer, optimizer: Optimizer) -> None:
    """Schedulers of the optimizer learn of its new groups."""
    for config in trainer.lr_scheduler_configs:
        if optimizer_of(config.scheduler) is optimizer:
            schedule_new_groups(config.scheduler)


def _set_trainable(module: Module, trainable: bool) -> None:
    if isinstance(module, _BatchNorm):
        module.track_running_stats = trainable
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(trainable)
