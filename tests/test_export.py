"""Exported modules compute what the module computes, and the module stays as it was."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest
import torch
from support import Regression

import fulmen as pl
from fulmen.utilities.errors import LightningDeprecationWarning
from fulmen.utilities.optional import is_installed

needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="needs onnx")
needs_onnxscript = pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs onnxscript")
scripts = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.dropout = torch.nn.Dropout()
        self.frozen = torch.nn.Dropout().eval()

    def forward(self, x):
        return self.frozen(self.dropout(self.layer(x)))


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x():
    return torch.randn(3, 2)


def expected(net, x):
    return torch.nn.functional.linear(x, net.layer.weight, net.layer.bias)


def as_before(net):
    return net.training and net.dropout.training and not net.frozen.training and torch.is_grad_enabled()


def run_onnx(path, x):
    reference = pytest.importorskip("onnx.reference")
    evaluator = reference.ReferenceEvaluator(str(path))
    return torch.from_numpy(evaluator.run(None, {evaluator.input_names[0]: x.numpy()})[0])


@needs_onnx
@pytest.mark.filterwarnings("ignore")
def test_onnx_computes_the_same_by_the_older_exporter(net, x, tmp_path):
    net.to_onnx(tmp_path / "net.onnx", {"x": x}, dynamo=False)
    __import__("onnx").checker.check_model(str(tmp_path / "net.onnx"))
    assert torch.allclose(run_onnx(tmp_path / "net.onnx", x), expected(net, x), atol=1e-6)
    assert as_before(net)


@needs_onnx
@needs_onnxscript
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_computes_the_same_by_the_newer_exporter(net, x, tmp_path):
    net.example_input_array = x
    program = net.to_onnx(tmp_path / "net.onnx", dynamo=True)
    assert program is not None
    __import__("onnx").checker.check_model(str(tmp_path / "net.onnx"))
    assert torch.allclose(run_onnx(tmp_path / "net.onnx", x), expected(net, x), atol=1e-6)
    assert as_before(net)


@needs_onnx
def test_onnx_needs_an_input(net):
    with pytest.raises(ValueError, match="example_input_array"):
        net.to_onnx("net.onnx", dynamo=False)


@pytest.mark.skipif(importlib.util.find_spec("onnx") is not None, reason="needs onnx to be absent")
def test_onnx_says_how_to_install_it(net, x):
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        net.to_onnx("net.onnx", x)


@needs_onnx
@pytest.mark.filterwarnings("ignore")
def test_the_input_goes_through_the_transfer_hooks_once(x, tmp_path):
    seen = []

    class Hooked(Net):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            seen.append("before")
            return batch["features"]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            seen.append("after")
            return batch

    Hooked().to_onnx(tmp_path / "net.onnx", {"features": x}, dynamo=False)
    assert seen == ["before", "after"]


@scripts
def test_scripting_computes_the_same_without_a_trainer(net, x, tmp_path):
    with pytest.warns(LightningDeprecationWarning, match="to_torchscript"):
        net.to_torchscript(tmp_path / "net.pt")
    assert torch.allclose(torch.jit.load(tmp_path / "net.pt")(x), expected(net, x))
    assert as_before(net)
    with pytest.raises(RuntimeError, match="not attached"):
        _ = net.trainer


@scripts
@pytest.mark.parametrize("as_dict", [False, True])
def test_tracing_computes_the_same(net, x, as_dict):
    traced = net.to_torchscript(method="trace", example_inputs={"x": x} if as_dict else x)
    assert torch.allclose(traced(x), expected(net, x))
    assert as_before(net)


@scripts
def test_torchscript_refuses_what_it_cannot_do(net):
    with pytest.raises(ValueError, match="'script' or 'trace'"):
        net.to_torchscript(method="compile")
    with pytest.raises(ValueError, match="example_inputs"):
        net.to_torchscript(method="trace")


def test_a_module_without_a_trainer_is_traced_scripted_and_drawn(tmp_path):
    module, example = Regression().eval(), torch.ones(2, 4)
    assert torch.equal(torch.jit.trace(module, example)(example), module(example))
    pl.loggers.TensorBoardLogger(tmp_path, log_graph=True).log_graph(module, example)
    assert list(tmp_path.rglob("events*"))
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        _ = module.trainer


class Engine:
    """What a compiler of TensorRT is asked for; the real one needs an NVIDIA GPU."""

    def __init__(self, module, **options):
        self.module = module
        self.options = options
        self.training = module.training

    def __call__(self, x):
        return self.module(x)


@pytest.fixture
def tensorrt(monkeypatch, tmp_path):
    """A package of the name and the functions that are called, which records what it gets."""
    (tmp_path / "torch_tensorrt.py").write_text(
        "saved = []\n"
        "def compile(module, **options):\n    from test_export_engine import Engine\n    return Engine(module, **options)\n"
        "def save(compiled, path, **options):\n    saved.append((path, options))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "test_export_engine", sys.modules[__name__])
    is_installed.cache_clear()
    yield importlib.import_module("torch_tensorrt")
    sys.modules.pop("torch_tensorrt")
    is_installed.cache_clear()


def test_tensorrt_gets_the_module_in_eval_mode_with_its_inputs(net, x, tensorrt, tmp_path):
    net.train()
    engine = net.to_tensorrt(tmp_path / "net.ep", x, default_device="cpu", enabled_precisions={torch.float16})
    assert engine.module is net and not engine.training and net.training
    assert engine.options["ir"] == "default" and engine.options["enabled_precisions"] == {torch.float16}
    assert torch.equal(engine.options["inputs"][0], x)
    [(path, options)] = tensorrt.saved
    assert (
        path == tmp_path / "net.ep" and options["output_format"] == "exported_program" and options["retrace"] is False
    )
    net.example_input_array = {"x": x}
    named = net.to_tensorrt(default_device="cpu", ir="dynamo").options
    assert named["arg_inputs"] == () and torch.equal(named["kwarg_inputs"]["x"], x) and len(tensorrt.saved) == 1
    for options, words in (
        ({"ir": "onnx"}, "`to_tensorrt\\(ir='onnx'\\)` is not known"),
        ({"output_format": "onnx"}, "output_format='onnx'"),
        ({"ir": "ts", "file_path": "a.ts"}, "Pass `output_format='torchscript'`"),
    ):
        with pytest.raises(ValueError, match=words):
            net.to_tensorrt(**options)


@scripts
def test_torchscript_for_tensorrt_is_saved_as_a_file(net, x, tensorrt, monkeypatch, tmp_path):
    monkeypatch.setattr(tensorrt, "compile", lambda module, inputs, **options: torch.jit.trace(module, inputs))
    net.to_tensorrt(tmp_path / "net.ts", x, ir="ts", output_format="torchscript", default_device="cpu")
    assert torch.equal(torch.jit.load(tmp_path / "net.ts")(x), expected(net, x))


def test_without_the_package_it_says_what_to_install(net):
    with pytest.raises(ModuleNotFoundError, match="`torch_tensorrt` is needed by `Net.to_tensorrt`.*pip install"):
        net.to_tensorrt()
