"""`Fabric` on one device: its arguments, a loop of one's own, what is refused, callbacks and loggers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support import Regression
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen import Fabric
from fulmen.plugins import MixedPrecision


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu")


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))


def test_a_loop_of_ones_own_has_the_bits_of_the_plain_one(fabric: Fabric) -> None:
    def train(fabric: Fabric | None) -> list[torch.Tensor]:
        model = make_net()
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        loader = DataLoader(TensorDataset(torch.randn(20, 4)), batch_size=4, shuffle=True)
        if fabric is not None:
            model, optimizer, scheduler = fabric.setup(model, optimizer, scheduler=scheduler)
            loader = fabric.setup_dataloaders(loader)
        for _ in range(2):
            for (batch,) in loader:
                optimizer.zero_grad()
                loss = model(batch).square().mean()
                loss.backward() if fabric is None else fabric.backward(loss)
                if fabric is None:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                else:
                    fabric.clip_gradients(model, optimizer, max_norm=0.1)
                optimizer.step()
            scheduler.step()
        return [parameter.detach() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(None), train(fabric), strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"devices": 0}, ValueError, "devices"),
        ({"devices": "0"}, ValueError, "devices"),
        ({"devices": []}, ValueError, "devices"),
        ({"devices": -1}, TypeError, "devices"),
        ({"num_nodes": 0}, ValueError, "num_nodes"),
        ({"accelerator": "cocofruit"}, ValueError, "invalid accelerator name"),
        ({"accelerator": "tpu"}, RuntimeError, "tpu"),
        ({"strategy": "ddpp"}, ValueError, "Did you mean `ddp`"),
        ({"precision": "17"}, ValueError, "invalid"),
        ({"plugins": "foo"}, TypeError, "Found invalid type for plugin"),
        ({"plugins": [MixedPrecision("bf16-mixed", "cpu")] * 2}, ValueError, "two of the kind"),
        ({"plugins": MixedPrecision("bf16-mixed", "cpu"), "precision": "64-true"}, ValueError, "Choose one"),
        ({"acelerator": "cpu"}, TypeError, "Did you mean `accelerator`"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, words) -> None:
    with pytest.raises(error, match=words):
        Fabric(**{"accelerator": "cpu", **arguments})


def test_arguments_have_names_and_the_environment_has_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="positional"):
        Fabric("cpu")  # type: ignore[misc]
    monkeypatch.setenv("LT_DEVICES", "2")
    monkeypatch.setenv("LT_ACCELERATOR", "cpu")
    assert Fabric().world_size == 2
    assert Fabric(devices=3).world_size == 3
    monkeypatch.setenv("LT_CLI_USED", "1")
    with pytest.raises(ValueError, match=r"`Fabric\(devices=3, ...\)` but it conflicts with the value `--devices=2`"):
        Fabric(devices=3)
    with pytest.raises(TypeError, match="Overriding `Program.run"):
        Program()


def test_what_the_cpu_cannot_is_replaced_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="Using `precision='bf16-mixed'`"):
        assert Fabric(accelerator="cpu", precision="16-mixed").strategy.precision.precision == "bf16-mixed"
    with pytest.warns(UserWarning, match="`strategy='ddp'`"):
        Fabric(accelerator="cpu", strategy="dp", devices=2)


class Program(Fabric):
    def run(self, number: int, by: int = 1) -> int:
        return number * by


def test_launching(fabric: Fabric) -> None:
    assert fabric.launch(lambda fabric, a, b=1: (fabric.world_size, a, b), 5, b=3) == (1, 5, 3)
    assert Program(accelerator="cpu").run(2, by=4) == 8
    with pytest.raises(TypeError, match="needs to be a function"):
        fabric.launch(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="at least one argument"):
        fabric.launch(lambda: 1)
    with pytest.raises(RuntimeError, match="launched already"):
        fabric.launch(lambda fabric: fabric.launch())
    with pytest.raises(TypeError, match="needs to be called with a function"):
        Fabric(accelerator="cpu", strategy="ddp_spawn", devices=2).launch()
    assert fabric.launch(lambda fabric: 7) == 7


def test_nothing_is_exchanged_before_launch() -> None:
    several = Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn")
    model = nn.Linear(1, 1)
    for act in (
        lambda: several.setup(model), lambda: several.setup_module(model), several.barrier, several.init_module,
        lambda: several.broadcast(1), lambda: several.all_gather(1), lambda: several.all_reduce(1), several.init_tensor,
        lambda: several.setup_dataloaders(DataLoader(range(3))),
        lambda: several.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"you must call `.launch\(\)`"):
            act()
    with pytest.raises(RuntimeError, match="No models were set up"):
        several.backward(torch.ones(1, requires_grad=True).sum())


def test_mistakes_in_setup_are_refused_and_change_nothing(fabric: Fabric) -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(DataLoader(range(3)))
    meta = torch.optim.SGD(nn.Linear(1, 1, device="meta").parameters(), lr=0.1)
    for act, error, words in (
        (lambda: fabric.setup(wrapped), ValueError, "only once"),
        (lambda: fabric.setup(torch.compile(wrapped, backend="eager")), ValueError, "only once"),
        (lambda: fabric.setup_module(wrapped), ValueError, "only once"),
        (lambda: fabric.setup(nn.Linear(1, 1), wrapped_optimizer), ValueError, "only once"),
        (lambda: fabric.setup(nn.Linear(1, 1), optimizer), ValueError, "None of the parameters"),
        (lambda: fabric.setup(3), TypeError, "torch.nn.Module"),
        (lambda: fabric.setup_optimizers(), ValueError, "at least one optimizer"),
        (lambda: fabric.setup_optimizers(wrapped_optimizer), ValueError, "only once"),
        (lambda: fabric.setup_optimizers(meta), RuntimeError, "meta-device"),
        (lambda: fabric.setup(nn.Linear(1, 1, device="meta"), meta), RuntimeError, "meta-device"),
        (lambda: fabric.setup_dataloaders(), ValueError, "at least one dataloader"),
        (lambda: fabric.setup_dataloaders(loader), ValueError, "only once"),
        (lambda: fabric.setup_dataloaders([1]), TypeError, "Only PyTorch DataLoader"),  # type: ignore[arg-type]
        (lambda: fabric.clip_gradients(wrapped, wrapped_optimizer), ValueError, "either"),
        (lambda: fabric.clip_gradients(wrapped, wrapped_optimizer, 1.0, 1.0), ValueError, "only one of"),
        (lambda: fabric.no_backward_sync(model), TypeError, "set up the model first"),
    ):
        with pytest.raises(error, match=words):
            act()
    assert len(fabric.setup(model, optimizer)) == 2  # the user's own objects may be wrapped again


def test_clipping_reads_gradients_that_are_finite(fabric: Fabric) -> None:
    model = nn.Linear(2, 1, bias=False)
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert fabric.clip_gradients(wrapped, optimizer, max_norm=1.0) == 5.0
    assert torch.allclose(model.weight.grad, torch.tensor([[0.6, 0.8]]))
    assert fabric.clip_gradients(wrapped, optimizer, clip_val=0.7) is None
    assert torch.allclose(model.weight.grad, torch.tensor([[0.6, 0.7]]))
    model.weight.grad = torch.tensor([[float("nan"), 4.0]])
    with pytest.raises(RuntimeError, match="non-finite"):
        fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.dtype)
        return x * self.weight if x.is_floating_point() else x

    def training_step(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return self(x)


@pytest.mark.parametrize(
    ("precision", "computes_in"),
    [("32-true", None), ("bf16-mixed", torch.bfloat16), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)],
)
def test_numbers_go_in_as_the_precision_says_and_come_out_as_usual(precision, computes_in) -> None:
    model = Fabric(accelerator="cpu", precision=precision).setup(Steps())
    for dtype in (torch.float16, torch.float32, torch.float64):
        out = model(torch.ones(2, dtype=dtype))
        assert model.seen[-1] == (computes_in or dtype)
        assert computes_in is None or out.dtype == torch.float32
    assert model(torch.ones(2, dtype=torch.int)).dtype == torch.int
    if precision == "bf16-mixed":
        model.training_step(torch.ones(2))
        assert model.seen[-2] == torch.bfloat16


def test_a_scaled_loss_is_only_backpropagated_by_fabric() -> None:
    fabric = Fabric(
        accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
    )
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match=r"call `fabric.backward\(loss\)`"):
        wrapped(torch.ones(1, 2)).sum().backward()
    optimizer.zero_grad()
    fabric.backward(wrapped(torch.ones(1, 2)).sum())
    assert fabric.clip_gradients(wrapped, optimizer, max_norm=100.0) == pytest.approx(3**0.5, rel=1e-3)
    optimizer.step()
    assert torch.allclose(model.weight, before - 0.1)
    optimizer.zero_grad()
    fabric.backward(wrapped(torch.full((1, 2), float("inf"))).sum())
    optimizer.step()  # is left out
    assert torch.allclose(model.weight, before - 0.1)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.number = 1

    def forward(self, x):
        return self.layer(x)

    def encode(self, x):
        return self.layer(x) + 1

    def twice(self, x):
        return 2 * x


def test_methods_that_run_layers_are_part_of_forward_or_refused() -> None:
    class Wrapping(type(Fabric(accelerator="cpu").strategy)):  # type: ignore[misc]
        def setup_module(self, module):
            return Wrapper(module)

    fabric = Fabric(accelerator="cpu", strategy=Wrapping("cpu"))
    model = fabric.setup(Layered())
    x = torch.ones(1, 2)
    assert model.twice(3) == 6
    with pytest.raises(RuntimeError, match=r"Layered.encode\(\).*mark_forward_method\('encode'\)"):
        model.encode(x)
    for wrong, error in (
        (3, TypeError),
        ("forward", ValueError),
        ("encod", AttributeError),
        ("number", AttributeError),
    ):
        with pytest.raises(error):
            model.mark_forward_method(wrong)
    model.mark_forward_method("encode")
    calls = model.forward_module.calls
    assert torch.equal(model.encode(x), model.module.layer(x) + 1)
    assert model.forward_module.calls == calls + 1
    assert torch.equal(model(x), model.module.layer(x))
    assert torch.equal(Fabric(accelerator="cpu").setup(model.module).encode(x), model.module.encode(x))


def test_a_wrapped_module_is_like_the_original(fabric: Fabric) -> None:
    original = Layered()
    model = fabric.setup(original)
    model.number = 2
    model.other = nn.Linear(1, 1)
    assert (original.number, "other" in dict(original.named_children())) == (2, True)
    assert list(model.state_dict()) == list(original.state_dict()) == [name for name, _ in model.named_parameters()]
    model.load_state_dict({name: torch.zeros_like(value) for name, value in original.state_dict().items()})
    assert not original.layer.weight.any()
    assert (model.eval().training, original.layer.training) == (False, False)
    assert (model.device, model.dtype, model.double().dtype) == (torch.device("cpu"), torch.float32, torch.float64)
    with pytest.raises(AttributeError, match="'Layered' object has no attribute 'missing'"):
        _ = model.missing
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fulmen.fabric.is_wrapped(other) and other.module is not original
        assert torch.equal(other(torch.ones(1, 2).double()), model(torch.ones(1, 2).double()))
        assert other.forward_module is other.module


def test_a_wrapped_optimizer_is_like_the_original(fabric: Fabric) -> None:
    heard = []

    class Listener:
        def on_after_optimizer_step(self, strategy, optimizer):
            heard.append(optimizer)

    model = nn.Linear(2, 1)
    original = torch.optim.Adam(model.parameters(), lr=0.1)
    fabric = Fabric(accelerator="cpu", callbacks=[Listener(), object()])
    wrapped_model, optimizer = fabric.setup(model, original)
    assert isinstance(optimizer, torch.optim.Adam) and type(optimizer).__name__ == "FabricAdam"
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def closure():
        optimizer.zero_grad()
        loss = wrapped_model(torch.ones(1, 2)).sum()
        fabric.backward(loss)
        return loss

    assert optimizer.step(closure).requires_grad
    scheduler.step()
    assert original.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.05
    assert heard == [original]
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    optimizer.load_state_dict(state)
    assert optimizer.state is original.state and optimizer.state[model.weight]["step"] == 1
    assert optimizer.optimizer is original and fulmen.fabric.is_wrapped(optimizer)
    assert type(pickle.loads(pickle.dumps(optimizer))).__name__ == "FabricAdam"


def test_compiled_modules_are_compiled_around_the_wrapper(fabric: Fabric) -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    net = nn.Linear(2, 1)
    x = torch.ones(1, 2)
    before = fabric.setup(torch.compile(net, backend=backend))
    assert before.module is net and torch.equal(before(x), net(x)) and len(graphs) == 1
    uncompiled = fabric.setup(torch.compile(net, backend=backend), _reapply_compile=False)
    assert torch.equal(uncompiled(x), net(x))
    after = torch.compile(fabric.setup(net), backend=backend)
    assert torch.equal(after(x), net(x)) and fulmen.fabric.is_wrapped(after)
    assert list(fabric.setup(torch.compile(net, backend=backend)).state_dict()) == ["weight", "bias"]


def test_loaders_move_batches_and_count_epochs(fabric: Fabric) -> None:
    class Sampler(torch.utils.data.SequentialSampler):
        epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    data = range(4)
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=2, sampler=Sampler(data)))
    assert [[batch.tolist() for batch in loader] for _ in range(2)] == [[[0, 1], [2, 3]]] * 2
    assert Sampler.epochs == [0, 1]
    assert (len(loader), loader.batch_size, loader.device) == (2, 2, torch.device("cpu"))
    assert not isinstance(loader, DataLoader)
    assert fabric.setup_dataloaders(DataLoader(data), move_to_device=False).device is None
    assert len(fabric.setup_dataloaders(DataLoader(data), DataLoader(data))) == 2


def test_callbacks_get_what_they_accept(fabric: Fabric) -> None:
    heard = []

    class Listener:
        not_a_method = 3

        def on_after_setup(self, fabric, module):
            heard.append(type(module.module).__name__)

        def on_something(self, a, b=2):
            heard.append((a, b))

    fabric = Fabric(accelerator="cpu", callbacks=[object(), Listener()])
    fabric.setup(nn.Linear(1, 1))
    fabric.setup_module(nn.Linear(1, 1))
    fabric.call("on_something", 1, b=5, c=6)
    fabric.call("on_something", a=3)
    fabric.call("on_nothing")
    with pytest.warns(UserWarning, match="`Listener.not_a_method` because it is not callable"):
        fabric.call("not_a_method")
    assert heard == ["Linear", (1, 5), (3, 2)]


class KeepingLogger:
    def __init__(self) -> None:
        self.rows: list[tuple] = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((dict(metrics), step))


def test_loggers_get_numbers() -> None:
    logger = KeepingLogger()
    fabric = Fabric(accelerator="cpu", loggers=logger)
    fabric.log("a", torch.tensor(1.5), step=3)
    fabric.log_dict({"a": torch.tensor([2]), "b": 3})
    with pytest.raises(ValueError, match="does not contain a single element"):
        fabric.log("a", torch.ones(2))
    assert logger.rows == [({"a": 1.5}, 3), ({"a": 2, "b": 3}, None)]
    assert fabric.logger is logger and fabric.loggers == [logger]
    with pytest.raises(IndexError):
        _ = Fabric(accelerator="cpu").logger


def test_numbers_become_tensors_where_they_would_travel(fabric: Fabric) -> None:
    found = fabric.all_gather({"a": 1, "b": [2.0, True, torch.ones(2)], "c": "text"})
    assert (
        found["a"].dtype == torch.int32 and found["b"][0].dtype == torch.float32 and found["b"][1].dtype == torch.uint8
    )
    assert found["b"][2].shape == (2,) and found["c"] == "text"
    assert fabric.all_reduce(2.0) == 2.0 and fabric.broadcast({"x": 1}) == {"x": 1}
    with fabric.rank_zero_first():
        pass
    with fabric.init_tensor():
        assert torch.ones(1).device.type == "cpu"
    with Fabric(accelerator="cpu", precision="bf16-true").init_module():
        assert nn.Linear(1, 1).weight.dtype == torch.bfloat16


def test_seeding_covers_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    assert Fabric.seed_everything(3, verbose=False) == 3
    loader = Fabric(accelerator="cpu").setup_dataloaders(DataLoader(range(2)))
    assert loader.worker_init_fn is not None


def test_a_lightning_module_speaks_to_fabric() -> None:
    logger = KeepingLogger()
    fabric = Fabric(accelerator="cpu", loggers=logger)
    ended = []

    class Module(Regression):
        def on_train_epoch_end(self):
            ended.append(self.global_rank)

    own = Module()
    with pytest.raises(RuntimeError, match="not attached"):
        _ = own.trainer
    model, optimizer = fabric.setup(own, own.configure_optimizers())
    loss = model.training_step((torch.ones(2, 4), torch.ones(2, 1)), 0)
    own.manual_backward(loss)
    own.clip_gradients(optimizer, 0.1)
    own.optimizers().step()
    own.log_dict({"a": 1.0, "b": torch.tensor(2.0)})
    fabric.call("on_train_epoch_end")
    assert logger.rows == [({"train_loss": loss.item()}, None), ({"a": 1.0, "b": 2.0}, None)]
    assert ended == [0]
    assert own.fabric is fabric and own.optimizers() is optimizer and own.logger is logger
    assert (own.trainer.world_size, own.trainer.is_global_zero) == (1, True)
    with pytest.raises(AttributeError, match="`self.trainer.current_epoch` but this attribute is not available"):
        _ = own.trainer.current_epoch
    assert copy.deepcopy(own).fabric is None
