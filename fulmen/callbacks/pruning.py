"""`ModelPruning`: sets weights to zero while training, with `torch.nn.utils.prune`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Module, Parameter
from torch.nn.utils import prune

from fulmen.callbacks.callback import Callback
from fulmen.callbacks.stochastic_weight_averaging import StochasticWeightAveraging
from fulmen.callbacks.weight_averaging import WeightAveraging
from fulmen.checkpoint.pruned import MASK, ORIGINAL, apply_masks
from fulmen.module import LightningModule
from fulmen.utilities.errors import MisconfigurationException, describe_received, suggest_name
from fulmen.utilities.introspection import is_overridden
from fulmen.utilities.rank_zero import rank_zero_debug, rank_zero_info, rank_zero_warn
from fulmen.utilities.types import TrainerFn

if TYPE_CHECKING:
    from fulmen.engine.strategy import Strategy
    from fulmen.trainer import Trainer

    ParameterList = Sequence[tuple[Module, str]]
    Amount = int | float | Callable[[int], int | float]

# By name: the function that prunes one parameter, and the class that may prune all of them together.
_METHODS: dict[str, tuple[Callable[..., Any], type[prune.BasePruningMethod]]] = {
    "ln_structured": (prune.ln_structured, prune.LnStructured),
    "l1_unstructured": (prune.l1_unstructured, prune.L1Unstructured),
    "random_structured": (prune.random_structured, prune.RandomStructured),
    "random_unstructured": (prune.random_unstructured, prune.RandomUnstructured),
}


class PrunedCount(NamedTuple):
    """How many elements of a parameter are zero by its mask, of how many."""

    zeros: int
    elements: int

    def __str__(self) -> str:
        return f"{self.zeros} ({self.zeros / self.elements:.2%})"


class ModelPruning(Callback):
    """Prunes parameters at the end of each epoch: a share of those that are left is zero from then on.

    A pruned parameter ``weight`` is the product of ``weight_orig``, which learns, and ``weight_mask``, until pruning is
    made permanent. Checkpoints hold the masks, so a resumed run ends in the same bits.

    Arguments:
        pruning_fn: "l1_unstructured", "random_unstructured", "ln_structured" or "random_structured"; or a subclass of
            `torch.nn.utils.prune.BasePruningMethod`, together with ``use_global_unstructured``.
        parameters_to_prune: pairs of a module and the name of its parameter; by default all of these names.
        parameter_names: by default "weight" and "bias".
        use_global_unstructured: rank all parameters together instead of each by itself.
        amount: the share of what is left, if a float; the number of elements, if an int; or a function of the epoch.
        apply_pruning: whether to prune, or a function of the epoch that says so.
        make_pruning_permanent: when training ends, and in checkpoints, leave plain parameters with zeros in them.
        use_lottery_ticket_hypothesis: put parameters back to their values before training each time they were pruned,
            or where a function of the epoch says so. See https://arxiv.org/abs/1803.03635
        resample_parameters: with the above, draw new values by ``reset_parameters`` instead.
        pruning_dim: along which whole rows are pruned by the structured functions.
        pruning_norm: the order of the norm by which "ln_structured" ranks them.
        verbose: 0 for nothing, 1 to log how much is pruned, 2 to log it for each parameter too.
        prune_on_train_epoch_end: False prunes after each validation of a training run instead.

    Raises:
        MisconfigurationException: arguments that do not go together, or parameters the module does not have.
        ValueError: an amount outside of its range, or a structured function for parameters of one dimension.

    Examples:
        >>> pruning = ModelPruning("l1_unstructured", amount=0.2, use_lottery_ticket_hypothesis=False)
        >>> every_other = ModelPruning("l1_unstructured", apply_pruning=lambda epoch: epoch % 2 == 1)
    """

    PARAMETER_NAMES = ("weight", "bias")

    def __init__(
        self, pruning_fn: Callable[..., Any] | str, parameters_to_prune: ParameterList = (),
        parameter_names: list[str] | None = None, use_global_unstructured: bool = True, amount: Amount = 0.5,
        apply_pruning: bool | Callable[[int], bool] = True, make_pruning_permanent: bool = True,
        use_lottery_ticket_hypothesis: bool | Callable[[int], bool] = True, resample_parameters: bool = False,
        pruning_dim: int | None = None, pruning_norm: int | None = None, verbose: int = 0,
        prune_on_train_epoch_end: bool = True,
    ) -> None:  # fmt: skip
        self._parameter_names = tuple(parameter_names or self.PARAMETER_NAMES)
        for name in self._parameter_names:
            if name not in self.PARAMETER_NAMES:
                what = f"`parameter_names`: {name} isn't in {self.PARAMETER_NAMES}."
                fix = f"Set `PARAMETER_NAMES` in a subclass to prune others.{suggest_name(name, self.PARAMETER_NAMES)}"
                raise MisconfigurationException(f"{what} {fix}")
        if verbose not in (0, 1, 2):
            raise MisconfigurationException(f"`verbose={verbose!r}` must be one of 0, 1 and 2.")
        self._chosen = parameters_to_prune
        self._chosen_paths: list[tuple[str, str]] = []  # the same in words, which a copy of the module understands
        self._use_global_unstructured = use_global_unstructured
        self.pruning_fn, self._method_name = _choose_function(
            pruning_fn, use_global_unstructured, pruning_dim, pruning_norm
        )
        self._structured = not use_global_unstructured and "_structured" in self._method_name
        self.amount = _check_amount(amount)
        self._apply_pruning = apply_pruning
        self._make_pruning_permanent = make_pruning_permanent
        self._use_lottery_ticket_hypothesis = use_lottery_ticket_hypothesis
        self._resample_parameters = resample_parameters
        self._verbose = verbose
        self._prune_on_train_epoch_end = prune_on_train_epoch_end
        self._forget_run()

    def _forget_run(self) -> None:
        """As before a run."""
        self._parameters_to_prune: list[tuple[Module, str]] = []
        self._names: list[str] = []  # of these parameters, in the whole module
        self._initial: dict[str, Tensor] = {}
        self._unpruned_layers: dict[int, Module] = {}  # copies of layers that can draw new values, by identity
        self._stored: dict[str, Any] = {}  # a state to continue from
        self._strategy: Strategy | None = None
        self._rewound_at: int | None = None  # optimizer steps made when parameters were last put back

    def filter_parameters_to_prune(self, parameters_to_prune: ParameterList = ()) -> ParameterList:
        """Override it to leave some out: gets pairs of module and name, and returns those to prune."""
        return parameters_to_prune

    @staticmethod
    def sanitize_parameters_to_prune(
        pl_module: LightningModule, parameters_to_prune: ParameterList = (), parameter_names: Sequence[str] = ()
    ) -> ParameterList:
        """The parameters to prune as pairs of a module and a name.

        Args:
            pl_module: whose sub-modules are looked at.
            parameters_to_prune: such pairs, which are checked; without any, all parameters of these names.
            parameter_names: by default `PARAMETER_NAMES`.

        Raises:
            MisconfigurationException: they are no pairs, or the module does not have them.
        """
        names = parameter_names or ModelPruning.PARAMETER_NAMES
        containers = (LightningModule, nn.ModuleDict, nn.ModuleList)
        layers = [part for part in pl_module.modules() if not isinstance(part, containers)]
        if not parameters_to_prune:
            return [(layer, name) for name in names for layer in layers if _is_prunable(layer, name)]
        _check_pairs(parameters_to_prune, layers, type(pl_module).__name__)
        return parameters_to_prune

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer is not None and stage == "fit":
            _refuse_what_moves_parameters(trainer)
            self._strategy = trainer.strategy
        self._collect_parameters(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._parameters_to_prune or is_overridden("configure_model", pl_module):  # layers were made since
            self._collect_parameters(pl_module)
        if not self._parameters_to_prune:
            what = (
                f"`{type(pl_module).__name__}` has no parameters called {' or '.join(self._parameter_names)} to prune."
            )
            raise MisconfigurationException(f"{what} Pass `parameters_to_prune` or `parameter_names`.")
        # Optimizers exist now, in the order of the parameters before any of them was pruned.
        self._restore_masks()

    def _collect_parameters(self, pl_module: LightningModule) -> None:
        """Finds the parameters to prune, and keeps their values."""
        if self._chosen_paths:
            self._chosen = [(pl_module.get_submodule(path), name) for path, name in self._chosen_paths]
        found = self.sanitize_parameters_to_prune(pl_module, self._chosen, self._parameter_names)
        self._parameters_to_prune = list(self.filter_parameters_to_prune(found))
        paths = {id(part): path for path, part in pl_module.named_modules()}
        if self._chosen:
            self._chosen_paths = [(paths[id(layer)], name) for layer, name in self._chosen]
        self._names = [f"{paths.get(id(layer), '')}.{name}" for layer, name in self._parameters_to_prune]
        self._check_sizes()
        if self._use_lottery_ticket_hypothesis:
            self._keep_values()

    def _keep_values(self) -> None:
        """Keeps the values from before training, and layers that can draw new ones."""
        for full_name, (layer, name) in zip(self._names, self._parameters_to_prune):
            self._initial.setdefault(full_name, _find_original(layer, name).detach().clone())
            can_draw = self._resample_parameters and hasattr(layer, "reset_parameters")
            if can_draw and id(layer) not in self._unpruned_layers and _find_mask(layer, name) is None:
                self._unpruned_layers[id(layer)] = deepcopy(layer)

    def _check_sizes(self) -> None:
        sizes = {name: _find_original(*pair) for name, pair in zip(self._names, self._parameters_to_prune)}
        flat = [name for name, tensor in sizes.items() if tensor.dim() <= 1]
        if self._structured and flat:
            what = f"`{self._method_name}` prunes rows, and these parameters have one dimension: {', '.join(flat)}."
            raise ValueError(f"{what} Use `parameter_names=['weight']` or `parameters_to_prune` to leave them out.")
        if not isinstance(self.amount, int) or self._structured:
            return
        counts = {name: tensor.numel() for name, tensor in sizes.items()}
        counts = {"all parameters": sum(counts.values())} if self._use_global_unstructured and counts else counts
        for name, count in counts.items():
            if self.amount > count:
                what = f"`amount={self.amount}` is more than the {count} elements of {name}."
                raise ValueError(f"{what} Use a smaller number, or a share between 0.0 and 1.0.")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._prune_on_train_epoch_end:
            rank_zero_debug("`ModelPruning` prunes at the end of the epoch.")
            self._prune_if_due(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if training and not self._prune_on_train_epoch_end:
            rank_zero_debug("`ModelPruning` prunes at the end of validation.")
            self._prune_if_due(trainer)

    def _prune_if_due(self, trainer: Trainer) -> None:
        epoch = trainer.current_epoch
        due = self._apply_pruning(epoch) if callable(self._apply_pruning) else self._apply_pruning
        amount = self.amount(epoch) if callable(self.amount) else self.amount
        if not due or not amount:
            return
        self.apply_pruning(amount)
        rewind = self._use_lottery_ticket_hypothesis
        if rewind(epoch) if callable(rewind) else rewind:
            self.apply_lottery_ticket_hypothesis()
            self._rewound_at = trainer.global_step

    def apply_pruning(self, amount: int | float) -> None:
        """Prunes this amount of what is left of the parameters.

        Args:
            amount: a share between 0.0 and 1.0, or a number of elements.
        """
        before = _count_pruned(self._parameters_to_prune) if self._verbose else []
        if self._use_global_unstructured:
            options = {"amount": amount} if "amount" in inspect.signature(self.pruning_fn).parameters else {}
            prune.global_unstructured(self._parameters_to_prune, pruning_method=self.pruning_fn, **options)
        else:
            for layer, name in self._parameters_to_prune:
                self.pruning_fn(layer, name=name, amount=amount)
        self._share_masks()
        if self._verbose:
            self._report_pruned(before, amount)

    def _share_masks(self) -> None:
        """What was drawn at random is that of the first process on all of them."""
        if self._strategy is None or self._strategy.world_size == 1:
            return
        masks = {name: _find_mask(layer, key) for name, (layer, key) in zip(self._names, self._parameters_to_prune)}
        shared = self._strategy.broadcast({name: None if m is None else m.bool().cpu() for name, m in masks.items()})
        for name, mask in masks.items():
            drawn = shared[name]
            if mask is not None and drawn is not None:
                mask.copy_(drawn)

    @torch.no_grad()
    def apply_lottery_ticket_hypothesis(self) -> None:
        """Puts the pruned parameters back to their values before training, or to new ones; masks stay."""
        drawn = {key: deepcopy(layer) for key, layer in self._unpruned_layers.items()}
        for layer in drawn.values():
            layer.reset_parameters()  # type: ignore[operator]
        for full_name, (layer, name) in zip(self._names, self._parameters_to_prune):
            source = getattr(drawn[id(layer)], name) if id(layer) in drawn else self._initial.get(full_name)
            if source is not None:
                _find_original(layer, name).copy_(source)
                _refresh_product(layer, name)

    def make_pruning_permanent(self, module: Module) -> None:
        """Replaces the pairs of `torch.nn.utils.prune` inside by plain parameters, which have zeros in them.

        Args:
            module: with pruned layers, or without any.
        """
        for layer in module.modules():
            for key in [key for key, _ in layer.named_buffers(recurse=False) if key.endswith(MASK)]:
                if _is_pruned(layer, name := key.removesuffix(MASK)):
                    prune.remove(layer, name)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._rewound_at is not None and self._rewound_at == trainer.global_step:
            what = "`ModelPruning` put the parameters back to their values before training, and training ended there."
            fix = "Pass `use_lottery_ticket_hypothesis=False`, or a function of the epoch that spares the last one."
            rank_zero_warn(f"{what} {fix}")
        self._stored = self.state_dict()  # what is saved from now on, and a second fit, continue as well
        if self._make_pruning_permanent:
            rank_zero_debug("`ModelPruning` makes pruning permanent at the end of training.")
            self.make_pruning_permanent(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.weights_to_save(checkpoint["state_dict"])

    def weights_to_save(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds: plain weights, if pruning is made permanent."""
        if not self._make_pruning_permanent:
            return state_dict
        rank_zero_debug("`ModelPruning` makes pruning permanent in this checkpoint.")
        return apply_masks(state_dict)

    def state_dict(self) -> dict[str, Any]:
        masks: dict[str, Tensor] = {}
        hidden: dict[str, Tensor] = {}  # values below the masks, which the weights in the file do not have
        scores: dict[str, Tensor] = {}  # products that are older than their factors: by them is pruned next
        for full_name, (layer, name) in zip(self._names, self._parameters_to_prune):
            if (mask := _find_mask(layer, name)) is not None:
                original = _find_original(layer, name).detach()
                product = getattr(layer, name).detach()
                masks[full_name] = mask.bool().cpu()
                hidden[full_name] = original[mask == 0].cpu()
                if not torch.equal(product, original * mask):
                    scores[full_name] = product.cpu()
        if not masks and (self._stored or not self._initial):
            return self._stored
        state = {"masks": masks, "hidden": hidden, "scores": scores, "rewound_at": self._rewound_at}
        return {**state, "initial": {name: tensor.cpu() for name, tensor in self._initial.items()}}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._stored = {}  # the masks are those of the file, if it has any

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stored = state_dict
        self._rewound_at = state_dict.get("rewound_at")
        self._initial.update(state_dict.get("initial", {}))

    @torch.no_grad()
    def _restore_masks(self) -> None:
        """Prunes as the stored state says."""
        stored = self._stored
        self._stored = {}
        for full_name, (layer, name) in zip(self._names, self._parameters_to_prune):
            mask = stored.get("masks", {}).get(full_name)
            if mask is None:
                continue
            mask = mask.to(_find_original(layer, name).device)
            if (existing := _find_mask(layer, name)) is None:
                prune.custom_from_mask(layer, name, mask)
            else:
                existing.copy_(mask)
            original = _find_original(layer, name)
            original[~mask] = stored["hidden"][full_name].to(original.device, original.dtype)
            _refresh_product(layer, name, stored["scores"].get(full_name))

    def _report_pruned(self, before: list[PrunedCount], amount: int | float) -> None:
        after = _count_pruned(self._parameters_to_prune)
        elements = sum(count.elements for count in after)
        first, then = (sum(count.zeros for count in counts) for counts in (before, after))
        shares = f"{first}/{elements} ({first / elements:.2%}) -> {then}/{elements} ({then / elements:.2%})"
        rank_zero_info(f"Applied `{self._method_name}`. Pruned: {shares}")
        if self._verbose == 2:
            for (layer, name), old, new in zip(self._parameters_to_prune, before, after):
                where = f"`{layer!r}.{name}` with amount={amount}"
                rank_zero_info(f"Applied `{self._method_name}` to {where}. Pruned: {old} -> {new}")

    def __getstate__(self) -> dict[str, Any]:
        of_run: dict[str, Any] = {"_strategy": None, "_parameters_to_prune": [], "_names": [], "_unpruned_layers": {}}
        chosen = () if self._chosen_paths else self._chosen
        return {**vars(self), **of_run, "_chosen": chosen, "_stored": self.state_dict()}


def _count_pruned(parameters: ParameterList) -> list[PrunedCount]:
    counts = []
    for layer, name in parameters:
        mask = _find_mask(layer, name)
        zeros = 0 if mask is None else int((mask == 0).sum())
        counts.append(PrunedCount(zeros, _find_original(layer, name).numel()))
    return counts


def _choose_function(
    pruning_fn: Callable[..., Any] | str, together: bool, dim: int | None, norm: int | None
) -> tuple[Any, str]:
    """What prunes, one parameter or all of them, and its name."""
    if isinstance(pruning_fn, str):
        name, one, for_all = _find_by_name(pruning_fn, dim, norm)
        if not together:
            return one, name
        pruning_fn = for_all
    elif not (isinstance(pruning_fn, type) and issubclass(pruning_fn, prune.BasePruningMethod)):
        what = f"`pruning_fn` must be one of {list(_METHODS)}, or a subclass of torch's `BasePruningMethod`;"
        fix = " Pass the class, not an instance." if isinstance(pruning_fn, prune.BasePruningMethod) else ""
        raise MisconfigurationException(f"{what} received {pruning_fn!r}.{fix}")
    elif not together:
        what = f"`{pruning_fn.__name__}` prunes all parameters together, against `use_global_unstructured=False`."
        raise MisconfigurationException(f"{what} Leave that out, or use one of {list(_METHODS)}.")
    method: Any = pruning_fn  # torch declares `PRUNING_TYPE` in the subclasses only
    if method.PRUNING_TYPE != "unstructured":
        what = (
            f"`{method.__name__}` is {method.PRUNING_TYPE}: only what is unstructured can rank all parameters together."
        )
        raise MisconfigurationException(f"{what} Pass `use_global_unstructured=False` and its name.")
    return method, method.__name__


def _find_by_name(
    given: str, dim: int | None, norm: int | None
) -> tuple[str, Callable[..., Any], type[prune.BasePruningMethod]]:
    """The name, the function for one parameter, with its options, and the class for all."""
    name = given.lower()
    if name not in _METHODS:
        what = f"`pruning_fn={given!r}` is not available in PyTorch, which has {list(_METHODS)}."
        raise MisconfigurationException(f"{what}{suggest_name(name, _METHODS)}")
    one, method = _METHODS[name]
    if not name.endswith("_structured"):
        return name, partial(one), method
    if dim is None:
        what = f"For `{name}`, `pruning_dim` should be provided."
        raise MisconfigurationException(f"{what} It is the dimension along which rows are pruned, such as 0.")
    if name != "ln_structured":
        return name, partial(one, dim=dim), method
    if norm is None:
        what = "For `ln_structured`, `pruning_norm` should be provided."
        raise MisconfigurationException(f"{what} It is the order of the norm that ranks rows, such as 2.")
    return name, partial(one, n=norm, dim=dim), method


def _check_amount(amount: Amount) -> Amount:
    if isinstance(amount, bool) or not (isinstance(amount, (int, float)) or callable(amount)):
        what = "`amount` must be a share (float), a number of elements (int), or a function of the epoch;"
        raise MisconfigurationException(f"{what} received {describe_received(amount)}.")
    if isinstance(amount, (int, float)) and not (amount >= 0 and (isinstance(amount, int) or amount <= 1)):
        raise ValueError(f"`amount={amount}` must be a float between 0.0 and 1.0, or an int that is not negative.")
    return amount


def _refuse_what_moves_parameters(trainer: Trainer) -> None:
    """Raises where parameters are not whole tensors of the module that it may replace."""
    strategy = type(trainer.strategy).__name__
    if strategy.startswith(("FSDP", "DeepSpeed", "ModelParallel")):
        what = f"`ModelPruning` prunes whole parameters, and `{strategy}` splits them."
        raise MisconfigurationException(f"{what} Use one device or `strategy='ddp'`.")
    averages = [
        type(c).__name__ for c in trainer.callbacks if isinstance(c, (WeightAveraging, StochasticWeightAveraging))
    ]
    if averages:
        what = f"`ModelPruning` replaces parameters that `{averages[0]}` follows."
        raise MisconfigurationException(f"{what} Keep one of the two callbacks.")


def _check_pairs(parameters_to_prune: object, layers: list[Module], owner: str) -> None:
    """Raises if these are no pairs of one of the layers and the name of its parameter."""
    if not isinstance(parameters_to_prune, (list, tuple)) or not all(map(_is_pair, parameters_to_prune)):
        what = "`parameters_to_prune` must be a list of pairs of a module and the name of its parameter;"
        fix = "For example: `[(model.layer, 'weight')]`."
        raise MisconfigurationException(f"{what} received {describe_received(parameters_to_prune)}. {fix}")
    here = {id(layer) for layer in layers}
    foreign = [layer for layer, _ in parameters_to_prune if id(layer) not in here]
    missing = [name for layer, name in parameters_to_prune if not _is_prunable(layer, name)]
    if foreign or missing:
        what = f"`parameters_to_prune` names what the model does not have: modules {foreign}, parameters {missing}."
        raise MisconfigurationException(f"{what} Use layers of `{owner}` and their parameters.")


def _is_pair(pair: object) -> bool:
    return (
        isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], Module) and isinstance(pair[1], str)
    )


def _is_prunable(layer: Module, name: str) -> bool:
    own = dict(layer.named_parameters(recurse=False))
    return name in own or name + ORIGINAL in own


def _find_original(layer: Module, name: str) -> Parameter:
    """The parameter that learns, pruned or not."""
    own = dict(layer.named_parameters(recurse=False))
    return own[name + ORIGINAL if name + ORIGINAL in own else name]


def _is_pruned(layer: Module, name: str) -> bool:
    return _find_mask(layer, name) is not None and name + ORIGINAL in dict(layer.named_parameters(recurse=False))


def _find_mask(layer: Module, name: str) -> Tensor | None:
    """The mask of a parameter; None if it is not pruned."""
    return dict(layer.named_buffers(recurse=False)).get(name + MASK)


def _refresh_product(layer: Module, name: str, product: Tensor | None = None) -> None:
    """Lets the layer show what it computes with, or what it did when it last ran; each forward pass does this too."""
    mask = _find_mask(layer, name)
    original = _find_original(layer, name)
    if mask is not None:
        setattr(layer, name, original * mask if product is None else product.to(original.device, original.dtype))
