"""The table of a model's layers: parameters, train or eval mode, FLOPs, and sizes seen in an example forward."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fulmen.utilities.collections import move_data_to_device
from fulmen.utilities.console import format_table
from fulmen.utilities.console import get_human_readable_count as get_human_readable_count
from fulmen.utilities.modules import capture_modes
from fulmen.utilities.rank_zero import warn_once

if TYPE_CHECKING:
    from fulmen.trainer import Trainer

# Makes this a package for the import system, so that deep paths below it can be served.
__path__: list[str] = []


def _format_count(number: int) -> str:
    return get_human_readable_count(number).strip()


def parse_batch_shape(batch: Any) -> str | list[Any]:
    """The shape of a tensor, the shapes in a list or tuple, ``"?"`` for anything else."""
    if hasattr(batch, "shape"):
        return list(batch.shape)
    return [parse_batch_shape(item) for item in batch] if isinstance(batch, (list, tuple)) else "?"


def count_parameters(parameters: Iterable[Tensor]) -> int:
    """How many numbers they hold; parameters that have no shape yet count as none, with a warning."""
    total = 0
    for parameter in parameters:
        if isinstance(parameter, UninitializedParameter):
            what = "A parameter has no shape yet, so the total number of parameters detected may be too small."
            warn_once(f"{what} Set `self.example_input_array`, and a forward pass will give it one.")
        else:
            total += math.prod(_shape_in_use(parameter))
    return total


def _shape_in_use(parameter: Tensor) -> Iterable[int]:
    """The shape that a parameter stands for."""
    if hasattr(parameter, "ds_numel"):  # DeepSpeed keeps the parameter elsewhere, and leaves an empty one here
        return (parameter.ds_numel,)
    # bitsandbytes packs 4-bit weights into fewer elements, and has this beside them once they are packed.
    packed = parameter.quant_state if hasattr(parameter, "quant_state") else None
    return packed.shape or parameter.shape if packed is not None and hasattr(packed, "shape") else parameter.shape


class LayerSummary:
    """What is known about one module; the sizes are those of the next forward pass, then the hook is gone."""

    in_size: str | list[Any] = "?"
    out_size: str | list[Any] = "?"

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # Script modules take no forward hooks.
        scripted = isinstance(module, torch.jit.ScriptModule)
        self._handle = None if scripted else module.register_forward_hook(self._remember_sizes, with_kwargs=True)

    def _remember_sizes(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = args or tuple(kwargs.values())
        self.in_size = parse_batch_shape(inputs[0] if len(inputs) == 1 else inputs)
        self.out_size = parse_batch_shape(output)
        self.detach_hook()

    def detach_hook(self) -> None:
        """Stop waiting for a forward pass."""
        if self._handle is not None:
            self._handle.remove()

    @property
    def layer_type(self) -> str:
        return type(self._module).__name__  # asked after the forward pass, which changes that of a lazy layer

    @property
    def num_parameters(self) -> int:
        return count_parameters(self._module.parameters())

    @property
    def training(self) -> bool:
        return self._module.training


def _per_layer(attribute: str) -> property:
    """A list with one entry per row of the table."""
    return property(lambda summary: [getattr(layer, attribute) for layer in summary._layer_summary.values()])


class ModelSummary:
    """Everything about the layers of a model down to a depth; ``str()`` of it is a table.

    Args:
        model: with an ``example_input_array``, one forward pass in eval mode measures sizes and FLOPs.
        max_depth: 1 shows the direct children, 0 only the totals, -1 everything.
    """

    def __init__(self, model: nn.Module, max_depth: int = 1) -> None:
        if not isinstance(max_depth, int) or max_depth < -1:
            raise ValueError(f"`max_depth` can be -1, 0 or > 0, got {max_depth}.")
        self._model: Any = model
        self._max_depth = math.inf if max_depth == -1 else max_depth
        self._has_example = hasattr(model, "example_input_array") and model.example_input_array is not None
        self._flops: dict[str, dict[Any, int]] = {}
        self._layer_summary = self.summarize()
        # With mixed precision the weights themselves stay in 32 bits.
        precision = "32" if self._trainer is None else str(self._trainer.precision)
        bits = 32 if "mixed" in precision else int("".join(filter(str.isdigit, precision.split("-")[0])) or 32)
        self._megabytes_per_number = bits / 8 * 1e-6

    @property
    def _trainer(self) -> Trainer | None:
        """The one that trains the model, if it is a `LightningModule` that one trains."""
        trainer = self._model._trainer if hasattr(self._model, "_trainer") else None
        return trainer if hasattr(trainer, "precision") else None

    def summarize(self) -> dict[str, LayerSummary]:
        """Look at the layers again; called by the constructor."""
        layers = {name: LayerSummary(module) for name, module in self.named_modules}
        try:
            if self._has_example:
                self._forward_example()
        finally:
            for layer in layers.values():
                layer.detach_hook()
        return layers

    def _forward_example(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        model = self._model
        example = model.example_input_array
        context: AbstractContextManager[Any] = nullcontext()
        if self._trainer is not None:
            example = model.on_before_batch_transfer(example, 0)
            example = model.transfer_batch_to_device(example, model.device, 0)
            example = model.on_after_batch_transfer(example, 0)
            context = self._trainer.precision_plugin.forward_context()
        elif (parameter := next(model.parameters(), None)) is not None:
            example = move_data_to_device(example, parameter.device)
        args, kwargs = ([], example) if isinstance(example, dict) else (example, {})
        restore = capture_modes(model)
        model.eval()
        try:
            with torch.no_grad(), context, FlopCounterMode(display=False) as counter:
                model(*(args if isinstance(args, (list, tuple)) else [args]), **kwargs)
        finally:
            restore()
        self._flops = counter.get_flop_counts()

    @property
    def named_modules(self) -> list[tuple[str, nn.Module]]:
        parts = self._model.named_modules()
        return [(name, part) for name, part in parts if name and name.count(".") < self._max_depth]

    @property
    def layer_names(self) -> list[str]:
        return list(self._layer_summary)

    layer_types = _per_layer("layer_type")
    in_sizes = _per_layer("in_size")
    out_sizes = _per_layer("out_size")
    param_nums = _per_layer("num_parameters")
    training_modes = _per_layer("training")

    @property
    def total_training_modes(self) -> dict[str, int]:
        """How many sub-modules are in "train" and in "eval" mode, at any depth."""
        modes = [module.training for module in self._model.modules()][1:]
        return {"train": modes.count(True), "eval": modes.count(False)}

    @property
    def total_parameters(self) -> int:
        return count_parameters(self._model.parameters())

    @property
    def trainable_parameters(self) -> int:
        return count_parameters(p for p in self._model.parameters() if p.requires_grad)

    @property
    def total_layer_params(self) -> int:
        return sum(self.param_nums)

    @property
    def model_size(self) -> float:
        """Megabytes of the parameters in the trainer's precision."""
        return self.total_parameters * self._megabytes_per_number

    @property
    def flop_counts(self) -> dict[str, dict[Any, int]]:
        """FLOPs of the example's forward pass by layer and operation."""
        prefix = type(self._model).__name__
        return {name: dict(self._flops.get(f"{prefix}.{name}", {})) for name in self.layer_names}

    @property
    def total_flops(self) -> int:
        return sum(self._flops.get("Global", {}).values())

    def columns(self) -> list[tuple[str, list[str]]]:
        """The table by column, header first; the last row is for parameters held by no layer, if there are any."""
        table = {
            " ": [str(index) for index in range(len(self.layer_names))],
            "Name": self.layer_names,
            "Type": self.layer_types,
            "Params": [_format_count(number) for number in self.param_nums],
            "Mode": ["train" if training else "eval" for training in self.training_modes],
            "FLOPs": [_format_count(sum(operations.values())) for operations in self.flop_counts.values()],
        }
        if self._has_example:
            table["In sizes"] = [str(size) for size in self.in_sizes]
            table["Out sizes"] = [str(size) for size in self.out_sizes]
        if rest := self._count_outside_layers():
            other = {" ": " ", "Name": "other params", "Params": _format_count(rest)}
            for header, cells in table.items():
                cells.append(other.get(header, "n/a"))
        return list(table.items())

    def _count_outside_layers(self) -> int:
        """The size of parameters that no layer of the table holds."""
        in_layers = {parameter for _, part in self.named_modules for parameter in part.parameters()}
        return count_parameters(p for p in self._model.parameters() if p not in in_layers)

    def __str__(self) -> str:
        numbers = (self.total_parameters, self.trainable_parameters, self.model_size)
        return format_summary(self.columns(), *numbers, self.total_training_modes, self.total_flops)

    __repr__ = __str__


class DeepSpeedSummary(ModelSummary):
    """A `ModelSummary` of a model whose parameters DeepSpeed spreads over processes (stage 3).

    The numbers of parameters are those of the whole model, and one more column has the share of this process.

    Args:
        model: as for `ModelSummary`; parameters that are not spread count as they are.
        max_depth: as for `ModelSummary`.

    Examples:
        >>> summary = DeepSpeedSummary(nn.Sequential(nn.Linear(2, 3)))
        >>> summary.param_nums, summary.parameters_per_layer
        ([9], [9])
    """

    @property
    def parameters_per_layer(self) -> list[int]:
        """How many numbers of each layer this process holds."""
        return [sum(map(_count_local, part.parameters())) for _, part in self.named_modules]

    def columns(self) -> list[tuple[str, list[str]]]:
        """The table by column, with one more after the numbers of parameters."""
        table = super().columns()
        shares = [_format_count(number) for number in self.parameters_per_layer]
        rows = len(table[0][1])
        after = [header for header, _ in table].index("Params") + 1
        table.insert(after, ("Params per Device", shares + ["n/a"] * (rows - len(shares))))
        return table


def _count_local(parameter: Any) -> int:
    """The numbers of a parameter that this process holds."""
    if hasattr(parameter, "partition_numel"):  # of DeepSpeed
        return int(parameter.partition_numel())
    return count_parameters([parameter])


def label_totals(
    total: int, trainable: int, megabytes: float, modes: dict[str, int], flops: int
) -> list[tuple[str, str]]:
    """The lines below the table: what is counted, and the number."""
    return [
        ("Trainable params", _format_count(trainable)),
        ("Non-trainable params", _format_count(total - trainable)),
        ("Total params", _format_count(total)),
        ("Total estimated model params size (MB)", get_formatted_model_size(megabytes)),
        ("Modules in train mode", str(modes["train"])),
        ("Modules in eval mode", str(modes["eval"])),
        ("Total Flops", _format_count(flops)),
    ]


def format_summary(columns: list[tuple[str, list[str]]], *numbers: Any) -> str:
    """The table as text, with the `label_totals` of ``numbers`` below it."""
    return "\n".join([format_table(columns), *(f"{number:<10}{label}" for label, number in label_totals(*numbers))])


def summarize(lightning_module: nn.Module, max_depth: int = 1) -> ModelSummary:
    """The summary of a module; `ModelSummary` says what ``max_depth`` means."""
    return ModelSummary(lightning_module, max_depth=max_depth)


def get_formatted_model_size(total_model_size: float) -> str:
    """Megabytes with three decimals."""
    return f"{total_model_size:,.3f}"
