"""The table of a model's layers: parameters, train or eval mode, FLOPs, and sizes seen in an example forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fulmen.utilities.collections import move_data_to_device
from fulmen.utilities.modules import capture_modes
from fulmen.utilities.rank_zero import WarningCache
from fulmen.utilities.tables import text_table

# Makes this a package for the import system, so that deep paths below it can be served.
__path__: list[str] = []

UNKNOWN_SIZE = "?"
NOT_APPLICABLE = "n/a"
UNITS = (" ", "K", "M", "B", "T")

warning_cache = WarningCache()


def get_human_readable_count(number: int) -> str:
    """A count with one of the units K, M, B, T: ``1234`` is ``"1.2 K"``; below 1000 the unit is blank."""
    power = min(int(math.log10(number)) // 3, len(UNITS) - 1) if number > 0 else 0
    value = number / 1000**power
    text = f"{value:,.1f}" if power > 0 and value < 100 else f"{int(value):,d}"
    return f"{text} {UNITS[power]}"


def get_formatted_model_size(total_model_size: float) -> str:
    """Megabytes with three decimals."""
    return f"{total_model_size:,.3f}"


def parse_batch_shape(batch: Any) -> str | list:
    """The shape of a tensor, the shapes in a list or tuple, ``"?"`` for anything else."""
    if hasattr(batch, "shape"):
        return list(batch.shape)
    if isinstance(batch, (list, tuple)):
        return [parse_batch_shape(item) for item in batch]
    return UNKNOWN_SIZE


def count_parameters(parameters: Iterable[Tensor]) -> int:
    """How many numbers they hold; parameters that have no shape yet count as none, with a warning."""
    total = 0
    for parameter in parameters:
        if isinstance(parameter, UninitializedParameter):
            what = "A parameter has no shape yet, so the total number of parameters detected may be too small."
            warning_cache.warn(f"{what} Set `self.example_input_array`, and a forward pass will give it one.")
        else:
            # DeepSpeed leaves an empty tensor behind and notes the size of the whole.
            total += getattr(parameter, "ds_numel", None) or math.prod(_unpacked_shape(parameter))
    return total


def _unpacked_shape(parameter: Tensor) -> torch.Size:
    """bitsandbytes packs 4-bit weights into fewer elements and keeps the shape that they stand for."""
    return getattr(getattr(parameter, "quant_state", None), "shape", None) or parameter.shape


class LayerSummary:
    """What is known about one module; the sizes are those of the next forward pass, then the hook is gone."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.in_size: str | list = UNKNOWN_SIZE
        self.out_size: str | list = UNKNOWN_SIZE
        # Script modules take no forward hooks.
        scripted = isinstance(module, torch.jit.ScriptModule)
        self._handle = None if scripted else module.register_forward_hook(self._remember_sizes, with_kwargs=True)

    def __del__(self) -> None:
        self.detach_hook()

    def _remember_sizes(self, _: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        inputs = args or tuple(kwargs.values())
        self.in_size = parse_batch_shape(inputs[0] if len(inputs) == 1 else inputs)
        self.out_size = parse_batch_shape(output)
        self.detach_hook()

    def detach_hook(self) -> None:
        """Stop waiting for a forward pass."""
        handle, self._handle = getattr(self, "_handle", None), None
        if handle is not None:
            handle.remove()

    @property
    def layer_type(self) -> str:
        return str(self._module.__class__.__name__)

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
        self._model = model
        self._max_depth = max_depth
        self._flops: dict[str, dict[Any, int]] = {}
        self._layer_summary = self.summarize()
        trainer = getattr(model, "_trainer", None)
        # With mixed precision the weights themselves stay in 32 bits.
        precision = str(getattr(trainer, "precision", "32"))
        bits = 32 if "mixed" in precision else int("".join(c for c in precision.split("-")[0] if c.isdigit()) or 32)
        self._megabytes_per_number = bits / 8 * 1e-6

    def summarize(self) -> dict[str, LayerSummary]:
        """Look at the layers again; called by the constructor."""
        layers = {name: LayerSummary(module) for name, module in self.named_modules}
        if getattr(self._model, "example_input_array", None) is not None:
            self._forward_example()
        for layer in layers.values():
            layer.detach_hook()
        return layers

    def _forward_example(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        model: Any = self._model
        trainer = getattr(model, "_trainer", None)
        example = model.example_input_array
        prepare: Callable | None = getattr(model, "on_before_batch_transfer", None)
        if trainer is not None and prepare is not None:
            device = getattr(model, "device", torch.device("cpu"))
            example = prepare(example, 0)
            example = model.transfer_batch_to_device(example, device, 0)
            example = model.on_after_batch_transfer(example, 0)
        else:
            first = next(model.parameters(), None)
            example = example if first is None else move_data_to_device(example, first.device)
        plugin = getattr(trainer, "precision_plugin", None)
        restore = capture_modes(model)
        model.eval()
        counter = FlopCounterMode(display=False)
        try:
            with torch.no_grad(), plugin.forward_context() if plugin is not None else nullcontext(), counter:
                if isinstance(example, dict):
                    model(**example)
                elif isinstance(example, (list, tuple)):
                    model(*example)
                else:
                    model(example)
        finally:
            restore()
        prefix = type(model).__name__
        counts = counter.get_flop_counts()
        self._flops = {name: dict(counts.get(f"{prefix}.{name}", {})) for name, _ in self.named_modules}
        self._flops[""] = dict(counts.get("Global", {}))

    @property
    def named_modules(self) -> list[tuple[str, nn.Module]]:
        if self._max_depth == 0:
            return []
        return [
            (name, module)
            for name, module in self._model.named_modules()
            if name and (self._max_depth == -1 or name.count(".") < self._max_depth)
        ]

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
        return {name: self._flops.get(name, {}) for name in self.layer_names}

    @property
    def total_flops(self) -> int:
        return sum(self._flops.get("", {}).values())

    @property
    def leftover_parameters(self) -> int:
        """Parameters that belong to no module of the table but to the model itself."""
        inside = {p for _, module in self.named_modules for p in module.parameters()}
        return count_parameters(p for p in self._model.parameters() if p not in inside)

    def columns(self) -> list[tuple[str, list[str]]]:
        """The table by column, header first; the last row is for parameters held by no layer, if there are any."""
        names, rest = self.layer_names, self.leftover_parameters
        table = {
            " ": [str(index) for index in range(len(names))],
            "Name": names,
            "Type": self.layer_types,
            "Params": [get_human_readable_count(n).strip() for n in self.param_nums],
            "Mode": ["train" if training else "eval" for training in self.training_modes],
            "FLOPs": [get_human_readable_count(sum(ops.values())).strip() for ops in self.flop_counts.values()],
        }
        if getattr(self._model, "example_input_array", None) is not None:
            table["In sizes"] = [str(size) for size in self.in_sizes]
            table["Out sizes"] = [str(size) for size in self.out_sizes]
        if rest:
            other = {" ": " ", "Name": "other params", "Params": get_human_readable_count(rest).strip()}
            for header, cells in table.items():
                cells.append(other.get(header, NOT_APPLICABLE))
        return list(table.items())

    def __str__(self) -> str:
        numbers = totals(
            self.total_parameters,
            self.trainable_parameters,
            self.model_size,
            self.total_training_modes,
            self.total_flops,
        )
        return "\n".join([text_table(self.columns()), *(f"{number:<10}{label}" for label, number in numbers)])

    __repr__ = __str__


class DeepSpeedSummary(ModelSummary):
    """With a column for what this process holds of each layer, after DeepSpeed spread the parameters."""

    @property
    def parameters_per_layer(self) -> list[int]:
        parts = [[getattr(p, "ds_tensor", p) for p in module.parameters()] for _, module in self.named_modules]
        return [sum(part.numel() for part in layer) for layer in parts]

    def columns(self) -> list[tuple[str, list[str]]]:
        columns = super().columns()
        here = [get_human_readable_count(n).strip() for n in self.parameters_per_layer]
        here += [NOT_APPLICABLE] * (len(columns[0][1]) - len(here))
        return [*columns[:4], ("Params per Device", here), *columns[4:]]


def totals(
    parameters: int, trainable: int, megabytes: float, modes: dict[str, int], flops: int
) -> list[tuple[str, str]]:
    """The lines below the table: what is counted, and the number."""
    count = get_human_readable_count
    return [
        ("Trainable params", count(trainable).strip()),
        ("Non-trainable params", count(parameters - trainable).strip()),
        ("Total params", count(parameters).strip()),
        ("Total estimated model params size (MB)", get_formatted_model_size(megabytes)),
        ("Modules in train mode", str(modes["train"])),
        ("Modules in eval mode", str(modes["eval"])),
        ("Total Flops", count(flops).strip()),
    ]


def summarize(lightning_module: nn.Module, max_depth: int = 1) -> ModelSummary:
    """The summary of a module; `ModelSummary` says what ``max_depth`` means."""
    return ModelSummary(lightning_module, max_depth=max_depth)
