"""`TransformerEnginePrecision`: matrix products in FP8, by NVIDIA's Transformer Engine."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fulmen.engine.precision import HalfPrecision
from fulmen.utilities.optional import is_installed
from fulmen.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Generator

    from transformer_engine.common.recipe import Recipe

PACKAGE = "transformer_engine"
MINIMUM = ">=0.11"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TransformerEnginePrecision(HalfPrecision):
    """Linear layers compute in FP8; everything else, batches and stored weights included, in ``weights_dtype``.

    Arguments:
        weights_dtype: bfloat16, float16 or float32.
        recipe: how FP8 numbers are scaled: a recipe of Transformer Engine, or the arguments of its `DelayedScaling`,
            where ``fp8_format`` may be a name such as "HYBRID".
        replace_layers: put layers of Transformer Engine in place of `torch.nn.Linear` and `torch.nn.LayerNorm`. None
            does so unless the model has some already; True replaces what is left of torch's.
        fallback_compute_dtype: of operations without an FP8 version; by default ``weights_dtype``.

    FP8 takes tensors whose last size is a multiple of 16 and whose other sizes multiply to a multiple of 8: batches too.
    """

    replaces_layers = True

    def __init__(
        self,
        *,
        weights_dtype: torch.dtype,
        recipe: Mapping[str, Any] | Recipe | None = None,
        replace_layers: bool | None = None,
        fallback_compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.precision = "transformer-engine"
        self.dtype = weights_dtype
        self.weights_dtype = weights_dtype
        self.fallback_compute_dtype = fallback_compute_dtype or weights_dtype
        self.replace_layers = replace_layers
        chosen = {"weights_dtype": self.weights_dtype, "fallback_compute_dtype": self.fallback_compute_dtype}
        for name, dtype in chosen.items():
            if dtype not in DTYPES:
                raise ValueError(f"`{name}={dtype!r}`: Transformer Engine computes in {', '.join(map(str, DTYPES))}.")
        if not is_installed(PACKAGE, MINIMUM):
            what = f"`{PACKAGE}` {MINIMUM} is needed to compute in FP8 (on an NVIDIA GPU), but it is not installed."
            how = f"Run `pip install --no-build-isolation '{PACKAGE}[pytorch]{MINIMUM}'`, or use 'bf16-mixed'."
            raise ModuleNotFoundError(f"{what} {how}", name=PACKAGE)
        self._engine = importlib.import_module(f"{PACKAGE}.pytorch")
        if recipe is None or isinstance(recipe, Mapping):
            recipes = importlib.import_module(f"{PACKAGE}.common.recipe")
            settings = dict(recipe or {})
            if isinstance(form := settings.get("fp8_format"), str):
                settings["fp8_format"] = recipes.Format[form]
            recipe = recipes.DelayedScaling(**settings)
        self.recipe = recipe
        # Newer versions know `autocast`, and deprecate the older name.
        new = self._engine.autocast if hasattr(self._engine, "autocast") else None
        given = {"enabled": True, "recipe" if new else "fp8_recipe": recipe}
        self._fp8: Any = partial(new or self._engine.fp8_autocast, **given)

    def convert_module(self, module: nn.Module) -> nn.Module:
        has_some = any(type(layer).__module__.startswith(f"{PACKAGE}.") for layer in module.modules())
        module = super().convert_module(module)
        if self.replace_layers or (self.replace_layers is None and not has_some):
            self._replace_layers(module)
        return module

    @contextmanager
    def forward_context(self) -> Generator[None]:
        """FP8 where Transformer Engine has it, else autocast."""
        fallback = self.fallback_compute_dtype
        mixed = torch.autocast("cuda", dtype=fallback, enabled=fallback != torch.float32)
        with super().forward_context(), mixed, self._fp8():
            yield

    def _replace_layers(self, module: nn.Module) -> None:
        odd = []
        for path, parent in list(module.named_modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is nn.Linear and (layer.in_features % 16 or layer.out_features % 16):
                    odd.append(f"{path}.{name}" if path else name)
                elif (made := self._counterpart(layer)) is not None:
                    # The same parameters, so that shared ones stay shared.
                    for key, parameter in layer.named_parameters():
                        setattr(made, key, parameter)
                    setattr(parent, name, made.train(layer.training))
        if odd:
            what = f"Linear layers compute in {self.fallback_compute_dtype}, not in FP8: {', '.join(odd)}."
            rank_zero_warn(f"{what} FP8 takes sizes that are multiples of 16. Pad `in_features` and `out_features`.")

    def _counterpart(self, layer: nn.Module) -> Any:
        """An empty layer of Transformer Engine that does the same, or None."""
        given: dict[str, Any] = {"params_dtype": self.weights_dtype, "device": "meta"}
        if type(layer) is nn.Linear:
            return self._engine.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, **given)
        if type(layer) is nn.LayerNorm and layer.weight is not None and layer.bias is not None:
            shape = layer.normalized_shape
            return self._engine.LayerNorm(shape[0], eps=layer.eps, **given) if len(shape) == 1 else None
        return None
