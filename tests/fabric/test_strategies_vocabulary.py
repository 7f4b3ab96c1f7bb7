"""Fabric's strategies: modules and optimizers are handed to them, and a state is what the user puts together."""

from __future__ import annotations

import os

import pytest
import torch
from ranks import run_ranks
from torch import nn

import fulmen.strategies
from fulmen import Fabric
from fulmen.checkpoint.consolidate import consolidate
from fulmen.engine.cluster import LightningEnvironment
from fulmen.fabric.accelerators import ACCELERATOR_REGISTRY, CPUAccelerator
from fulmen.fabric.plugins import HalfPrecision, MixedPrecision, Precision, TorchCheckpointIO
from fulmen.fabric.strategies import (
    STRATEGY_REGISTRY,
    DataParallelStrategy,
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from fulmen.fabric.utilities import is_shared_filesystem
from fulmen.fabric.utilities.distributed import DistributedSamplerWrapper


def make_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def batch_of(rank: int) -> torch.Tensor:
    return torch.arange(8.0).reshape(2, 4) * (rank + 1) - 3


# ---------------------------------------------------------------------- names


def test_names_are_those_of_fabric():
    names = {
        "ddp", "ddp_find_unused_parameters_true", "ddp_fork", "ddp_notebook", "ddp_spawn", "deepspeed",
        "deepspeed_stage_1", "deepspeed_stage_1_offload", "deepspeed_stage_2", "deepspeed_stage_2_offload",
        "deepspeed_stage_3", "deepspeed_stage_3_offload", "deepspeed_stage_3_offload_nvme", "dp", "fsdp",
        "fsdp_cpu_offload", "single_tpu", "single_xla", "xla", "xla_fsdp",
    }  # fmt: skip
    assert set(STRATEGY_REGISTRY.available_strategies()) == names
    assert STRATEGY_REGISTRY.get("ddp_spawn").start_method == "spawn"
    assert STRATEGY_REGISTRY.get("ddp_find_unused_parameters_true").find_unused_parameters
    assert STRATEGY_REGISTRY.get("fsdp_cpu_offload").cpu_offload
    assert isinstance(STRATEGY_REGISTRY.get("dp"), DataParallelStrategy)
    assert {"cpu", "cuda", "mps"} <= set(ACCELERATOR_REGISTRY.available_accelerators())


def test_classes_register_their_names():
    registry = type(STRATEGY_REGISTRY)("strategy", taken=ValueError)
    DDPStrategy.register_strategies(registry)
    Strategy.register_strategies(registry)
    assert set(registry) == {name for name in STRATEGY_REGISTRY if name.startswith("ddp")}
    assert type(registry.get("ddp_fork")) is DDPStrategy
    trainers = type(STRATEGY_REGISTRY)("strategy", taken=ValueError)
    fulmen.strategies.FSDPStrategy.register_strategies(trainers)
    assert set(trainers) == {"fsdp"}


def test_they_are_the_engine_s_strategies():
    assert issubclass(DDPStrategy, fulmen.strategies.DDPStrategy) and issubclass(DDPStrategy, ParallelStrategy)
    assert issubclass(FSDPStrategy, fulmen.strategies.FSDPStrategy) and issubclass(Strategy, fulmen.strategies.Strategy)
    with pytest.raises(TypeError, match=r"works with `Fabric`.*fulmen.strategies.DDPStrategy"):
        DDPStrategy().setup(None)


# ---------------------------------------------------------------------- one device


def test_parts_that_were_not_given_are_the_usual_ones():
    strategy = SingleDeviceStrategy()
    assert type(strategy.checkpoint_io) is TorchCheckpointIO and type(strategy.precision) is Precision
    assert set(SingleDeviceStrategy().given_parts().values()) == {None}
    storage, numbers = TorchCheckpointIO(), HalfPrecision()
    given = SingleDeviceStrategy("cpu", CPUAccelerator(), storage, numbers)
    assert given.given_parts()["checkpoint_io"] is storage and given.precision is numbers
    assert (given.world_size, given.global_rank, given.is_global_zero) == (1, 0, True)
    assert given.all_reduce("x", group=None, reduce_op="sum") == "x" and given.barrier("name", 1, here=2) is None
    with pytest.raises(ValueError, match="not on one of the cpu devices"):
        CPUAccelerator().setup_device(torch.device("cuda"))


def test_a_state_is_saved_and_loaded(tmp_path):
    strategy = SingleDeviceStrategy()
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    strategy.backward(net(batch_of(0)).sum(), net)
    strategy.optimizer_step(optimizer)
    scheduler.step()
    state = {"net": net, "optimizer": optimizer, "scheduler": scheduler, "epoch": 3, "words": ["a"]}
    strategy.save_checkpoint(tmp_path / "all.ckpt", state)
    written = torch.load(tmp_path / "all.ckpt")
    assert set(written) == set(state) and written["epoch"] == 3
    assert torch.equal(written["net"]["0.weight"], net[0].weight)

    other = make_net()
    others = torch.optim.Adam(other.parameters(), lr=0.5)
    target = {"net": other, "optimizer": others, "epoch": 0}
    rest = strategy.load_checkpoint(tmp_path / "all.ckpt", target)
    assert target["epoch"] == 3 and target["net"] is other and set(rest) == {"scheduler", "words"}
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))
    assert others.param_groups[0]["lr"] == pytest.approx(0.01) and len(others.state) == 4
    assert set(strategy.load_checkpoint(tmp_path / "all.ckpt")) == set(state)

    with pytest.raises(KeyError, match=r"key 'epochs' that does not exist.*Did you mean `epoch`"):
        strategy.load_checkpoint(tmp_path / "all.ckpt", {"epochs": 1})
    lenient = {"epochs": 1}
    assert "epoch" in strategy.load_checkpoint(tmp_path / "all.ckpt", lenient, strict=False) and lenient["epochs"] == 1


def test_a_filter_keeps_entries(tmp_path):
    strategy = SingleDeviceStrategy()
    net = make_net()
    keeps_weights = {"net": lambda name, value: name.endswith("weight")}
    strategy.save_checkpoint(tmp_path / "part.ckpt", {"net": net, "n": 1}, filter=keeps_weights)
    written = torch.load(tmp_path / "part.ckpt")
    assert set(written["net"]) == {"0.weight", "2.weight"} and written["n"] == 1
    with pytest.raises(RuntimeError, match="Missing key"):
        strategy.load_checkpoint(tmp_path / "part.ckpt", {"net": net})
    strategy.load_checkpoint(tmp_path / "part.ckpt", {"net": net}, strict=False)


def test_a_file_may_be_one_state_dict(tmp_path):
    strategy = SingleDeviceStrategy()
    net, other = make_net(), make_net()
    with torch.no_grad():
        net[0].weight.fill_(2.0)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    torch.save(torch.optim.SGD(net.parameters(), lr=0.7).state_dict(), tmp_path / "sgd.pt")
    assert strategy.load_checkpoint(tmp_path / "net.pt", other) == {}
    assert torch.equal(other[0].weight, net[0].weight)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    assert strategy.load_checkpoint(tmp_path / "sgd.pt", optimizer) == {} and optimizer.param_groups[0]["lr"] == 0.7


@pytest.mark.parametrize("precision", [Precision(), MixedPrecision("bf16-mixed", "cpu"), HalfPrecision("bf16-true")])
def test_gradients_are_clipped(precision):
    strategy = SingleDeviceStrategy(precision=precision)
    net = precision.convert_module(nn.Linear(2, 1, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    net.weight.grad = torch.tensor([[3.0, 4.0]], dtype=net.weight.dtype)
    assert float(strategy.clip_gradients_norm(net, optimizer, max_norm=1.0)) == 5.0
    assert net.weight.grad.float().tolist()[0] == pytest.approx([0.6, 0.8], rel=1e-2)
    strategy.clip_gradients_value(net, optimizer, clip_val=0.7)
    assert net.weight.grad.float().tolist()[0] == pytest.approx([0.6, 0.7], rel=1e-2)
    net.weight.grad = torch.tensor([[float("inf"), 4.0]], dtype=net.weight.dtype)
    with pytest.raises(RuntimeError, match="non-finite|is inf"):
        strategy.clip_gradients_norm(net, optimizer, max_norm=1.0)


def test_the_precision_of_the_user_is_asked():
    class Doubling(Precision):
        def pre_backward(self, tensor, module):
            return tensor * 2

        def optimizer_step(self, optimizer, *args, **kwargs):
            return "stepped"

    strategy = SingleDeviceStrategy(precision=Doubling())
    weight = nn.Parameter(torch.ones(2))
    strategy.backward((weight * 3).sum(), None)
    assert weight.grad.tolist() == [6.0, 6.0]
    assert strategy.optimizer_step(torch.optim.SGD([weight], lr=1.0)) == "stepped"


def test_modules_are_made_in_the_numbers_of_the_precision():
    strategy = SingleDeviceStrategy(precision=HalfPrecision("bf16-true"))
    with strategy.module_init_context():
        assert nn.Linear(2, 2).weight.dtype == torch.bfloat16
    with strategy.tensor_init_context():
        assert torch.zeros(2).dtype == torch.bfloat16
    with SingleDeviceStrategy().module_init_context(empty_init=True):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        nn.Linear(2, 2)
        assert torch.equal(torch.get_rng_state(), before)  # no values were drawn
    assert strategy.setup_module_and_optimizers("m", ["o"], "s") == ("m", ["o"], "s")


def test_data_parallel_is_one_process():
    strategy = DataParallelStrategy(accelerator=CPUAccelerator(), parallel_devices=[torch.device("cpu")])
    assert (strategy.world_size, strategy.num_processes, strategy.distributed_sampler_kwargs) == (1, 1, None)
    net = make_net()
    wrapped = nn.DataParallel(net)
    assert torch.equal(wrapped(batch_of(0)), net(batch_of(0)))
    assert set(strategy.get_module_state_dict(wrapped)) == set(net.state_dict())
    strategy.load_module_state_dict(wrapped, net.state_dict())
    found = strategy.all_reduce({"a": torch.tensor([1.0, 3.0]), "n": torch.tensor([1, 4])})
    assert found["a"].item() == 2.0 and found["n"].item() == 2 and found["n"].dtype == torch.int64
    assert strategy.broadcast("x") == "x" and strategy.reduce_boolean_decision(True)
    strategy.barrier()


def test_samples_of_an_own_sampler_are_dealt_out():
    class Even:
        epoch = 0

        def __iter__(self):
            return iter([0 + self.epoch, 2 + self.epoch, 4 + self.epoch])

        def __len__(self):
            return 3

        def set_epoch(self, epoch):
            self.epoch = epoch

    parts = [DistributedSamplerWrapper(Even(), num_replicas=2, rank=rank) for rank in range(2)]
    assert [list(part) for part in parts] == [[0, 4], [2, 0]]  # padded from the beginning
    parts[1].set_epoch(10)
    assert list(parts[1]) == [12, 10]


# ---------------------------------------------------------------------- several processes


def connected(strategy):
    """The strategy as Fabric has it when the processes have met; they have, in these tests."""
    strategy.setup_environment()
    return strategy


def parts() -> dict:
    return {
        "accelerator": CPUAccelerator(),
        "parallel_devices": [torch.device("cpu")] * 2,
        "cluster_environment": LightningEnvironment(),
    }


def train_with_ddp() -> dict:
    strategy = connected(DDPStrategy(**parts()))
    rank = strategy.global_rank
    torch.manual_seed(rank)
    net = nn.Linear(4, 2)
    wrapped = strategy.setup_module(net)
    first = {name: tensor.clone() for name, tensor in strategy.get_module_state_dict(wrapped).items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with strategy.no_backward_sync(wrapped):
        strategy.backward(wrapped(batch_of(rank)).sum(), wrapped)
    alone = net.weight.grad.clone()
    net.zero_grad()
    with strategy.no_backward_sync(wrapped, enabled=False):
        strategy.backward(wrapped(batch_of(rank)).sum(), wrapped)
    together = net.weight.grad.clone()
    strategy.optimizer_step(optimizer)
    refused = None
    try:
        strategy.no_backward_sync(net)
    except TypeError as error:
        refused = str(error)
    return {
        "rank": rank, "first": first, "alone": alone, "together": together, "last": net.weight.detach().clone(),
        "refused": refused, "reduced": strategy.all_reduce(torch.tensor(rank + 1.0), reduce_op="sum").item(),
        "mean": strategy.all_reduce(torch.tensor([rank])).item(), "text": strategy.all_reduce("text"),
        "sampler": strategy.distributed_sampler_kwargs,
    }  # fmt: skip


def train_with_fsdp(folder: str, precision: str) -> dict:
    """Two steps, saved as shards and as a file, and loaded again."""
    strategy = connected(FSDPStrategy(**parts(), auto_wrap_policy={nn.Linear}))
    strategy.precision = strategy.precision_for(precision)
    rank = strategy.global_rank
    net = strategy.precision.convert_module(make_net())
    made_before = torch.optim.Adam(net.parameters(), lr=0.1)
    model, (optimizer,), _ = strategy.setup_module_and_optimizers(net, [made_before])
    norms = []
    for _ in range(2):
        with strategy.precision.forward_context():
            loss = model(strategy.precision.convert_input(batch_of(rank))).float().sum()
        strategy.backward(loss, model)
        norms.append(float(strategy.clip_gradients_norm(model, optimizer, max_norm=1.0)))
        strategy.optimizer_step(optimizer)
        optimizer.zero_grad()
    state = {"model": model, "optimizer": optimizer, "epoch": 5}
    shards, file = os.path.join(folder, "shards"), os.path.join(folder, "file.ckpt")
    strategy.save_checkpoint(shards, state)
    full = connected(FSDPStrategy(**parts(), state_dict_type="full"))
    full.precision = strategy.precision
    full.save_checkpoint(file, state)
    found: dict = {"norms": norms, "optimizer": optimizer is made_before}
    for name, path, loader in (("shards", shards, strategy), ("file", file, full)):
        fresh, (others,), _ = loader.setup_module_and_optimizers(*fresh_pair(loader.precision))
        target = {"model": fresh, "optimizer": others, "epoch": 0}
        rest = loader.load_checkpoint(path, target)
        same = [torch.equal(a.to_local(), b.to_local()) for a, b in zip(model.parameters(), fresh.parameters())]
        state_of = [optimizer.state[a]["exp_avg"] for a in model.parameters()]
        loaded = [others.state[b]["exp_avg"] for b in fresh.parameters()]
        same += [torch.equal(a.to_local(), b.to_local()) for a, b in zip(state_of, loaded)]
        found[name] = all(same), target["epoch"], rest
    found["weights"] = {name: value.full_tensor().detach() for name, value in model.state_dict().items()}
    errors = {
        "module": lambda: strategy.load_checkpoint(shards, {"epoch": 1}),
        "optimizer": lambda: strategy.load_checkpoint(shards, optimizer),
        "key": lambda: strategy.load_checkpoint(shards, {"model": model, "epochs": 1}),
        "options": lambda: strategy.save_checkpoint(shards, state, storage_options={}),
        "filter": lambda: strategy.save_checkpoint(shards, state, filter={"model": lambda *_: True}),
        "made early": lambda: strategy.setup_optimizer(torch.optim.SGD(make_net().parameters(), lr=1.0)),
        "folder": lambda: full.save_checkpoint(folder, state),
    }
    found["errors"] = {name: error_of(act) for name, act in errors.items()}
    with strategy.no_backward_sync(model):
        model(batch_of(rank).to(model[0].weight.dtype)).sum().backward()
    return found


def fresh_pair(precision):
    torch.manual_seed(99)
    net = precision.convert_module(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    return net, [torch.optim.Adam(net.parameters(), lr=0.7)]


def error_of(act) -> str:
    try:
        act()
    except Exception as error:
        return type(error).__name__
    return ""


def split_layers(module, mesh):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(module, mesh["tensor_parallel"], plan)


def run_in_parallel() -> dict:
    strategy = ModelParallelStrategy(split_layers, data_parallel_size=1, tensor_parallel_size=2)
    strategy.accelerator, strategy.parallel_devices = CPUAccelerator(), [torch.device("cpu")] * 2
    strategy.use_environment(LightningEnvironment())
    connected(strategy)
    torch.manual_seed(3)
    model = strategy.setup_module(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    output = model(batch_of(0)).detach() + 0  # waits until it has arrived
    kinds = [type(parameter).__name__ for parameter in model.parameters()]
    lost = ModelParallelStrategy(lambda module, mesh: None)
    lost._device_mesh = strategy.device_mesh
    lost.parallel_devices, lost.cluster_environment = strategy.parallel_devices, strategy.cluster_environment
    lost.precision = Precision()
    return {
        "output": output, "kinds": kinds, "sampler": strategy.distributed_sampler_kwargs,
        "lost": error_of(lambda: lost.setup_module(make_net())),
    }  # fmt: skip


def loop_with_fabric(folder: str) -> dict:
    """The same loop as a user writes it, on each strategy."""
    found = {}
    for name, strategy in (("ddp", "ddp"), ("fsdp", FSDPStrategy(state_dict_type="full")), ("shards", "fsdp")):
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, precision="bf16-mixed")
        fabric.launch()
        net = make_net()
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        for part in range(2):
            with fabric.no_backward_sync(model, enabled=part == 0):
                fabric.backward(model(batch_of(fabric.global_rank + part)).sum())
        norm = fabric.clip_gradients(model, optimizer, max_norm=10.0)
        optimizer.step()
        path = os.path.join(folder, name)
        fabric.save(path, {"model": model, "inner": {"optimizer": optimizer}, "step": 7})
        new = {"model": model, "step": 0}
        rest = fabric.load(path, new)
        found[name] = {
            "kind": type(fabric.strategy).__name__, "norm": float(norm), "step": new["step"], "rest": list(rest),
            "is folder": os.path.isdir(path), "same": new["model"] is model,
        }  # fmt: skip
    return found


def on_each_rank(folder: str) -> dict:
    found = {"ddp": train_with_ddp()}
    strategy = connected(DDPStrategy(**parts()))
    found["shared"] = is_shared_filesystem(strategy, folder), is_shared_filesystem(strategy)
    found["own"] = is_shared_filesystem(strategy, os.path.join(folder, str(strategy.global_rank)))
    found["nowhere"] = error_of(lambda: is_shared_filesystem(strategy, os.path.join(folder, "nowhere")))
    for precision in ("32-true", "bf16-true"):
        os.makedirs(os.path.join(folder, precision), exist_ok=True)
        found[precision] = train_with_fsdp(os.path.join(folder, precision), precision)
    found["parallel"] = run_in_parallel()
    os.makedirs(os.path.join(folder, "loop"), exist_ok=True)
    found["loop"] = loop_with_fabric(os.path.join(folder, "loop"))
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    return folder, run_ranks(2, on_each_rank, str(folder))


def test_ddp_averages_gradients(both):
    first, second = (found["ddp"] for found in both[1])
    assert (first["rank"], second["rank"]) == (0, 1)
    assert all(torch.equal(first["first"][name], second["first"][name]) for name in ("weight", "bias"))
    for found in (first, second):  # d(sum)/d(weight) is the sum of the inputs, for each output
        own = batch_of(found["rank"]).sum(0).expand(2, 4)
        mean = (batch_of(0).sum(0) + batch_of(1).sum(0)).expand(2, 4) / 2
        assert torch.equal(found["alone"], own) and torch.equal(found["together"], mean)
        assert torch.equal(found["last"], first["first"]["weight"].add(mean, alpha=-0.1))
        assert "`Linear`" in found["refused"]
        assert (found["reduced"], found["mean"], found["text"]) == (3.0, 0.5, "text")
        assert found["sampler"] == {"num_replicas": 2, "rank": found["rank"]}


def test_what_processes_see_of_each_other_s_files(both):
    for found in both[1]:
        assert found["shared"] == (True, True)
        assert found["own"] is False  # each has another path
        assert found["nowhere"] == "FileNotFoundError"
    assert not [name for name in os.listdir(both[0]) if name.startswith(".fulmen")]


def by_hand():
    """The same two steps on one process, with the gradients of both batches averaged."""
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        ((net(batch_of(0)).sum() + net(batch_of(1)).sum()) / 2).backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), 1.0)))
        optimizer.step()
    return net, norms


def test_fsdp_takes_the_steps_of_one_process(both):
    net, norms = by_hand()
    for found in both[1]:
        sharded = found["32-true"]
        assert sharded["optimizer"] and sharded["norms"] == pytest.approx(norms, rel=1e-5)
        for name, value in net.state_dict().items():
            torch.testing.assert_close(sharded["weights"][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_sharded_states_are_loaded_as_they_were(both, precision):
    folder, ranks = both
    for found in ranks:
        assert found[precision]["shards"] == (True, 5, {}) and found[precision]["file"] == (True, 5, {})
        assert found[precision]["errors"] == {
            "module": "ValueError", "optimizer": "NotImplementedError", "key": "KeyError", "options": "TypeError",
            "filter": "NotImplementedError", "made early": "ValueError", "folder": "IsADirectoryError",
        }  # fmt: skip
    weights = ranks[0][precision]["weights"]
    file = torch.load(folder / precision / "file.ckpt")
    one = torch.load(consolidate(folder / precision / "shards"))
    assert file["epoch"] == one["epoch"] == 5
    assert len(file["optimizer"]["state"]) == 4 and set(one["optimizer"]["state"]) == set(weights)
    for name, value in weights.items():
        assert torch.equal(file["model"][name], value) and torch.equal(one["model"][name], value)


def test_shards_are_loaded_on_one_device_too(both):
    folder, ranks = both
    net = make_net()
    target = {"model": net, "optimizer": torch.optim.Adam(net.parameters(), lr=0.5), "epoch": 0}
    assert SingleDeviceStrategy().load_checkpoint(folder / "32-true" / "shards", target) == {}
    assert target["epoch"] == 5 and target["optimizer"].param_groups[0]["lr"] == 0.1
    assert all(torch.equal(net.state_dict()[name], value) for name, value in ranks[0]["32-true"]["weights"].items())
    assert {state["exp_avg"].shape for state in target["optimizer"].state.values()} == {
        p.shape for p in net.parameters()
    }


def test_layers_are_split_by_the_user_s_function(both):
    torch.manual_seed(3)
    whole = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    for found in both[1]:
        split = found["parallel"]
        torch.testing.assert_close(split["output"], whole(batch_of(0)).detach())
        assert split["kinds"] == ["DTensor"] * 4 or set(split["kinds"]) == {"Parameter"}
        assert split["sampler"] == {"num_replicas": 1, "rank": 0} and split["lost"] == "TypeError"


def test_a_loop_of_the_user_s_own_runs_on_each(both):
    for found in both[1]:
        kinds = {name: (loop["kind"], loop["is folder"]) for name, loop in found["loop"].items()}
        assert kinds == {
            "ddp": ("DDPStrategy", False), "fsdp": ("FSDPStrategy", False), "shards": ("FSDPStrategy", True),
        }  # fmt: skip
        for loop in found["loop"].values():
            assert (loop["step"], loop["rest"], loop["same"]) == (7, ["inner"], True)
            assert loop["norm"] == pytest.approx(found["loop"]["ddp"]["norm"], rel=2e-2) and loop["norm"] > 0


def test_strategies_of_the_trainer_are_refused():
    with pytest.raises(ValueError, match=r"Use `fulmen.fabric.strategies.DDPStrategy`"):
        Fabric(accelerator="cpu", strategy=fulmen.strategies.DDPStrategy())
    assert type(Fabric(accelerator="cpu", devices=1).strategy) is SingleDeviceStrategy
    assert type(Fabric(accelerator="cpu", devices=1, strategy="ddp").strategy) is DDPStrategy
    own = SingleDeviceStrategy("cpu", precision=HalfPrecision("bf16-true"))
    assert Fabric(accelerator="cpu", devices=1, strategy=own).strategy is own


def test_what_a_user_overrides_in_a_strategy_is_called(tmp_path):
    calls = []

    class Own(SingleDeviceStrategy):
        def backward(self, tensor, module, *args, **kwargs):
            calls.append("backward")
            super().backward(tensor, module, *args, **kwargs)

        def optimizer_step(self, optimizer, **kwargs):
            calls.append("step")
            return super().optimizer_step(optimizer, **kwargs)

        def save_checkpoint(self, path, state, storage_options=None, filter=None):
            calls.append(sorted(state))
            super().save_checkpoint(path, state, storage_options, filter)

        def load_checkpoint(self, path, state=None, strict=True, weights_only=None):
            calls.append("load")
            return super().load_checkpoint(path, state, strict, weights_only)

    fabric = Fabric(accelerator="cpu", devices=1, strategy=Own("cpu"))
    net = make_net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    fabric.backward(model(batch_of(0)).sum())
    optimizer.step()
    fabric.save(tmp_path / "x", {"model": model, "n": 1})
    fabric.load(tmp_path / "x", {"model": model})
    assert calls == ["backward", "step", ["model", "n"], "load"]


def test_xla_says_that_it_is_not_supported():
    from fulmen.accelerators import XLAAccelerator
    from fulmen.fabric.plugins import XLACheckpointIO, XLAPrecision
    from fulmen.fabric.plugins.environments import XLAEnvironment
    from fulmen.fabric.strategies import SingleDeviceXLAStrategy, XLAFSDPStrategy, XLAStrategy

    assert not XLAAccelerator.is_available() and not XLAEnvironment.detect()
    makers = [XLAAccelerator, XLACheckpointIO, XLAPrecision, XLAEnvironment, XLAStrategy, XLAFSDPStrategy]
    makers += [lambda: SingleDeviceXLAStrategy(0), lambda: fulmen.strategies.SingleDeviceXLAStrategy(0)]
    makers += [fulmen.strategies.XLAStrategy]
    for make in makers:
        with pytest.raises(ModuleNotFoundError, match="XLA devices such as TPUs"):
            make()
