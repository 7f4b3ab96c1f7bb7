"""`BitsandbytesPrecision`: linear layers whose weights take 4 or 8 bits."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from fulmen.engine.precision import HalfPrecision
from fulmen.utilities.errors import suggest_name
from fulmen.utilities.optional import import_optional, is_installed

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from fulmen.utilities.types import LRSchedulerConfig

# The class in `bitsandbytes.nn` and its arguments. "-dq" quantises the scales of the weights once more. Inputs beyond
# the threshold are computed in float16 (Dettmers et al. 2022, "LLM.int8()", section 3.2).
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("Linear4bit", {"quant_type": "nf4", "compress_statistics": False}),
    "nf4-dq": ("Linear4bit", {"quant_type": "nf4", "compress_statistics": True}),
    "fp4": ("Linear4bit", {"quant_type": "fp4", "compress_statistics": False}),
    "fp4-dq": ("Linear4bit", {"quant_type": "fp4", "compress_statistics": True}),
    "int8": ("Linear8bitLt", {"has_fp16_weights": False, "threshold": 6.0}),
    "int8-training": ("Linear8bitLt", {"has_fp16_weights": True, "threshold": 6.0}),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class BitsandbytesPrecision(HalfPrecision):
    """Weights of `torch.nn.Linear` are frozen and stored in few bits; all else is stored and computed in ``dtype``.

    They are quantised when the model moves to its device, and whenever weights of 16 or 32 bits are loaded.

    Arguments:
        mode: "int8-training" stores float16 weights, which train, and quantises them for each product.
        dtype: float16 for the two int8 modes; for the others bfloat16 (the default, where the GPU has it), float16 or
            float32.
        ignore_modules: names, as in `named_modules`, of what stays as it is, with everything inside.
    """

    replaces_layers = True

    def __init__(
        self,
        mode: Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"],
        dtype: torch.dtype | None = None,
        ignore_modules: Iterable[str] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"`{mode=}` must be one of {', '.join(map(repr, MODES))}.{suggest_name(str(mode), MODES)}")
        allowed = (torch.float16,) if mode.startswith("int8") else DTYPES
        if dtype is not None and dtype not in allowed:
            raise ValueError(f"`{mode=}` with `{dtype=}`: it computes in {' or '.join(map(str, allowed))}.")
        super().__init__()
        self._package: Any = import_optional("bitsandbytes", "for `BitsandbytesPrecision`", ">=0.46")
        if dtype is None:
            old_gpu = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = torch.float16 if old_gpu or len(allowed) == 1 else torch.bfloat16
        self.mode = mode
        self.dtype = dtype
        self.precision = "32-true"
        self._hooks: list[RemovableHandle] = []
        self.ignore_modules = {ignore_modules} if isinstance(ignore_modules, str) else set(ignore_modules or ())

    @property
    def device_types(self) -> set[str]:
        """What the installed version runs on."""
        # Weights of 8 bits that train are evaluated by CUDA alone; on the CPU, versions before 0.49 crash the process.
        only = self.mode == "int8-training" or not is_installed("bitsandbytes", ">=0.49")
        return {"cuda"} if only else set(self._package.supported_torch_devices)

    def check_device(self, device: torch.device) -> None:
        if device.type not in (served := self.device_types):
            what = f"`BitsandbytesPrecision({self.mode!r})` with the installed bitsandbytes does not run on `{device}`"
            raise RuntimeError(f"{what}, only on {', '.join(sorted(served))}. Choose another mode or accelerator.")

    def convert_module(self, module: nn.Module) -> nn.Module:
        modules = dict(module.named_modules())
        own = (self._package.nn.Linear4bit, self._package.nn.Linear8bitLt)
        if any(isinstance(layer, own) for layer in modules.values()):
            return module  # made by `module_init_context`, by the user, or in an earlier run
        for name in self.ignore_modules - set(modules):
            raise ValueError(f"`ignore_modules`: the model has no module {name!r}.{suggest_name(name, modules)}")
        kept = tuple(f"{name}." for name in self.ignore_modules)
        linear = [m for name, m in modules.items() if type(m) is nn.Linear and not f"{name}.".startswith(kept)]
        if not linear:
            what = f"`BitsandbytesPrecision` found no `torch.nn.Linear` to quantise in {type(module).__name__}."
            raise TypeError(f"{what} Use 'bf16-true', or leave names out of `ignore_modules`.")
        module = super().convert_module(module)
        for layer in linear:
            self._quantize_layer(layer)
        return module

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[LRSchedulerConfig]
    ) -> tuple[nn.Module, list[Optimizer], list[LRSchedulerConfig]]:
        # The package quantises weights anew when they have no gradients; ours are cleared after the forward.
        trained = [
            layer for layer in model.modules() if is_trained_8bit(vars(layer).get("_parameters", {}).get("weight"))
        ]

        def forget(*_: Any) -> None:
            for layer in trained:
                drop_quantized_copy(layer)

        for optimizer in optimizers if trained else ():
            if hasattr(optimizer, "register_step_post_hook"):
                self._hooks.append(optimizer.register_step_post_hook(forget))
        return super().connect(model, optimizers, lr_schedulers)

    def teardown(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        super().teardown()

    @contextmanager
    def forward_context(self) -> Generator[None]:
        """Tensors created inside have the dtype; the fused kernels of attention, which read weights, are off."""
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with super().forward_context():
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)

    @contextmanager
    def module_init_context(self) -> Generator[None]:
        """Linear layers made inside are quantised one by one, unless `ignore_modules` needs their names first."""
        plain = nn.Linear.__init__

        def init(layer: nn.Linear, *args: Any, **kwargs: Any) -> None:
            plain(layer, *args, **kwargs)
            if type(layer) is nn.Linear:
                self._quantize_layer(layer)

        if not self.ignore_modules:
            nn.Linear.__init__ = init  # type: ignore[assignment, method-assign]
        try:
            with self.tensor_init_context():
                yield
        finally:
            nn.Linear.__init__ = plain  # type: ignore[method-assign]

    def _quantize_layer(self, layer: nn.Linear) -> None:
        """Makes the layer one of bitsandbytes, in place: its hooks, and who else has it, stay."""
        kind, given = MODES[self.mode]
        if kind == "Linear4bit":
            given = {**given, "compute_dtype": self.dtype}
        bias = layer.bias is not None
        make = self._package.nn.Linear4bit if kind == "Linear4bit" else self._package.nn.Linear8bitLt
        made = make(layer.in_features, layer.out_features, bias=bias, device="meta", **given)
        # On some CPUs it repacks weights for inference, and training fails after that (bitsandbytes 0.50).
        made.support_avx512bf16_for_cpu = False
        old = layer.weight
        vars(layer).update({name: value for name, value in vars(made).items() if name not in vars(layer)})
        layer.__class__ = type(made)
        settings = {**vars(made.weight), **({"module": layer} if is_4bit(made.weight) else {})}
        trained = old.requires_grad and made.weight.requires_grad
        layer.weight = type(made.weight)(old.data, requires_grad=trained, **settings)
        layer.register_load_state_dict_pre_hook(quantize_on_load)
        if old.device.type not in ("cpu", "meta") and not is_trained_8bit(layer.weight):
            set_weights(layer, old.data, {})


def quantize_on_load(layer: Any, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    """Before a state is loaded: takes its weights, quantised or not, and leaves torch the layer's own to copy.

    Loaded by torch alone, floats would be cut to whole numbers, and what is stored beside packed weights be refused.
    """
    key = f"{prefix}weight"
    old = layer.weight
    weight = state.get(key)
    if weight is None:
        return
    if weight.is_floating_point() and old.is_floating_point():
        # They stay floats until the layer is quantised, for "int8-training" always; torch would assign a plain one.
        if metadata.get("assign_to_params_buffers"):
            state[key] = type(old)(weight, requires_grad=old.requires_grad, **vars(old))
        drop_quantized_copy(layer)
    else:
        _load_quantized(layer, weight, state, prefix)


def _load_quantized(layer: Any, weight: torch.Tensor, state: dict[str, Any], prefix: str) -> None:
    """Quantises the weights, or takes packed ones with what is stored beside them."""
    key = f"{prefix}weight"
    old = layer.weight
    beside = f"{key}." if is_4bit(old) else f"{prefix}SCB"
    extra = {name: value for name, value in state.items() if name.startswith(beside)}
    as_made = weight.shape == (layer.out_features, layer.in_features)
    is_float = weight.is_floating_point()
    if is_float and not as_made:
        return  # to torch's own complaint
    fits = is_float or (bool(extra) and _takes_packed(old, as_made))
    if old.device.type == "meta" or not fits:
        what = f"size mismatch for {key}: {weight.dtype} of shape {tuple(weight.shape)} does not fit {layer}"
        raise RuntimeError(f"{what} on {old.device}. Use the mode that quantised it, or load weights of 16 or 32 bits.")
    set_weights(layer, weight, {name.removeprefix(prefix): value for name, value in extra.items()})
    for name in (*extra, f"{prefix}weight_format"):
        state.pop(name, None)
    state[key] = old


def _takes_packed(weight: torch.Tensor, as_made: bool) -> bool:
    """Can it be replaced by quantised weights, which are of the layer's shape or not?"""
    return (as_made or is_4bit(weight)) and not is_trained_8bit(weight)


def drop_quantized_copy(layer: Any) -> None:
    """Lets a layer with 8 bits quantise its weights anew: it keeps a copy since its first forward."""
    if hasattr(layer, "state"):
        layer.state.CB = None
        layer.state.SCB = None


def is_4bit(weight: object) -> bool:
    """Is it a weight of `Linear4bit`?"""
    return hasattr(weight, "quant_type")


def is_trained_8bit(weight: object) -> bool:
    """Is it a weight of `Linear8bitLt` that stays in float16, to be trained?"""
    return hasattr(weight, "has_fp16_weights") and bool(weight.has_fp16_weights)


def set_weights(layer: Any, weight: torch.Tensor, extra: dict[str, Any]) -> None:
    """Gives a layer other weights: floats to quantise, or packed ones with what is stored beside them."""
    old = layer.weight
    device = old.device
    if is_4bit(old):
        if extra:
            new = type(old).from_prequantized(weight, extra, device=device, module=layer)
            if (shape := tuple(new.quant_state.shape)) != (layer.out_features, layer.in_features):
                raise RuntimeError(f"size mismatch: the 4-bit weights are of shape {shape}, the layer is {layer}.")
        else:
            given = {"compress_statistics": old.compress_statistics, "quant_type": old.quant_type, "module": layer}
            new = type(old)(weight.to(device, layer.compute_dtype), requires_grad=False, **given).to(device)
    else:
        scale = extra.get("SCB")
        if scale is None:
            quantise = import_optional("bitsandbytes", "to quantise weights").functional.int8_vectorwise_quant
            weight, scale, _ = quantise(weight.to(device, torch.float16))
        weight = weight.to(device)
        scale = scale.to(device)
        new = type(old)(weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=scale)
    # The parameter stays the one that an optimizer knows.
    old.data = new.data
    vars(old).update(vars(new))
