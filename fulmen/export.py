"""Leaving Python: ONNX, TorchScript and TensorRT files of a module."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Literal

import torch

from fulmen.storage.filesystem import atomic_write
from fulmen.utilities.modules import capture_modes
from fulmen.utilities.optional import import_optional
from fulmen.utilities.rank_zero import rank_zero_deprecation

if TYPE_CHECKING:
    from fulmen.module import LightningModule


def to_onnx(
    module: LightningModule,
    file_path: str | os.PathLike[str] | IO[bytes] | None = None,
    input_sample: Any = None,
    **kwargs: Any,
) -> Any:
    """Write the module in eval mode as an ONNX file; without a path only return what `torch.onnx.export` returns.

    `input_sample` (default: `module.example_input_array`) is a tensor, a tuple of positional arguments or a dict of
    named ones.
    """
    import_optional("onnx", "by `to_onnx`")
    from torch import onnx  # slow to import

    if kwargs.get("dynamo", inspect.signature(onnx.export).parameters["dynamo"].default):
        import_optional("onnxscript", "by `to_onnx` with `dynamo=True`")
    positional, named = _inputs(module, input_sample, "to_onnx")
    if named:
        kwargs["kwargs"] = {**named, **(kwargs.get("kwargs") or {})}
    target: Any = os.fspath(file_path) if isinstance(file_path, os.PathLike) else file_path
    with _evaluating(module):
        return onnx.export(module, positional, target, **kwargs)


def to_torchscript(
    module: LightningModule, file_path: str | os.PathLike[str] | None = None, method: str | None = "script", example_inputs: Any = None,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """The module as TorchScript, in eval mode, and as a file if a path is given.

    "script" compiles the code of `forward`; "trace" records what it does with `example_inputs`, which are given like
    `input_sample` of `to_onnx`.
    """
    rank_zero_deprecation("`to_torchscript` is deprecated like TorchScript itself. Use `torch.export.export`.")
    if method not in ("script", "trace"):
        raise ValueError(f"`to_torchscript(method={method!r})` is not known. Use 'script' or 'trace'.")
    with _evaluating(module):
        if method == "script":
            converted = torch.jit.script(module, **kwargs)
        else:
            positional, named = _inputs(module, example_inputs, "to_torchscript", "example_inputs")
            if named:
                kwargs["example_kwarg_inputs"] = named
            converted = torch.jit.trace(module, example_inputs=None if named else positional, **kwargs)
    if file_path is not None:
        atomic_write(file_path, lambda file: torch.jit.save(converted, file))
    return converted


def to_tensorrt(
    module: LightningModule, file_path: str | os.PathLike[str] | IO[bytes] | None = None, input_sample: Any = None,
    ir: Literal["default", "dynamo", "ts"] = "default",
    output_format: Literal["exported_program", "torchscript"] = "exported_program", retrace: bool = False,
    default_device: str | torch.device = "cuda", **compile_kwargs: Any,
) -> Any:  # fmt: skip
    """The module compiled for TensorRT, in eval mode, and as a file if a path is given.

    Args:
        file_path: of the file to write; an open file for "ts" only.
        input_sample: as for `to_onnx`; by default ``module.example_input_array``.
        ir: through which representation it is compiled: "dynamo" (which "default" is, too) or "ts", TorchScript.
        output_format: of the file; "ts" can write "torchscript" only.
        retrace: trace the compiled module again when it is saved.
        default_device: where it is compiled; the module is moved there, and back.
        **compile_kwargs: for `torch_tensorrt.compile`, such as ``enabled_precisions``.

    Returns:
        What `torch_tensorrt.compile` returns.

    Raises:
        ModuleNotFoundError: `torch_tensorrt` is not installed.
        ValueError: there is no input, or arguments do not go together.
    """
    tensorrt = import_optional("torch_tensorrt", f"by `{type(module).__name__}.to_tensorrt`")
    _check_formats(ir, output_format, saves=file_path is not None)
    before = module.device
    module.to(default_device)
    try:
        positional, named = _inputs(module, input_sample, "to_tensorrt")
        inputs = {"arg_inputs": positional, "kwarg_inputs": named} if named else {"inputs": positional}
        with _evaluating(module):
            compiled = tensorrt.compile(module, ir=ir, **inputs, **compile_kwargs)
            if isinstance(file_path, (str, os.PathLike)) and ir == "ts":
                atomic_write(file_path, lambda file: torch.jit.save(compiled, file))
            elif file_path is not None and ir == "ts":
                torch.jit.save(compiled, file_path)
            elif file_path is not None:
                tensorrt.save(compiled, file_path, output_format=output_format, retrace=retrace, **inputs)
    finally:
        module.to(before)
    return compiled


def _check_formats(ir: str, output_format: str, saves: bool) -> None:
    """Raises for arguments of `to_tensorrt` that are not known, or do not go together."""
    if ir not in ("default", "dynamo", "ts"):
        raise ValueError(f"`to_tensorrt(ir={ir!r})` is not known. Use 'default', 'dynamo' or 'ts'.")
    if output_format not in ("exported_program", "torchscript"):
        what = f"`to_tensorrt(output_format={output_format!r})` is not known."
        raise ValueError(f"{what} Use 'exported_program' or 'torchscript'.")
    if ir == "ts" and output_format != "torchscript" and saves:
        what = f"`to_tensorrt(ir='ts')` compiles TorchScript, which cannot be saved as {output_format!r}."
        raise ValueError(f"{what} Pass `output_format='torchscript'`.")


def _inputs(
    module: LightningModule, given: Any, method: str, name: str = "input_sample"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of `forward`, which went through the module's transfer hooks as a batch would."""
    sample = module.example_input_array if given is None else given
    if sample is None:
        what = f"`{method}` received no `{name}`, and `{type(module).__name__}.example_input_array` is None."
        raise ValueError(f"{what} Pass an input of `forward`: `{method}(..., {name}=torch.randn(...))`.")
    sample = module.on_before_batch_transfer(sample, 0)
    sample = module.on_after_batch_transfer(module.transfer_batch_to_device(sample, module.device, 0), 0)
    if isinstance(sample, Mapping):
        return (), dict(sample)
    return (tuple(sample) if isinstance(sample, (tuple, list)) else (sample,)), {}


@contextmanager
def _evaluating(module: LightningModule) -> Iterator[None]:
    """In eval mode and without gradients."""
    restore = capture_modes(module)
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        restore()
