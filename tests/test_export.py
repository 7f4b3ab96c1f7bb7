"""Exported modules compute what the module computes, and the module stays as it was."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from support import Regression

import fulmen as pl
from fulmen.utilities.errors import LightningDeprecationWarning

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
