"""Layers spread over a mesh of real processes."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from ranks import run_ranks
from support import Regression, SavesAfterFirstEpoch, make_loader, make_trainer
from torch import nn

import fulmen as pl
from fulmen.strategies import DDPStrategy, ModelParallelStrategy


class Net(pl.LightningModule):
    """Two layers over the tensor axis, everything over the data axis; or a plain module where there is no mesh."""

    place = "cpu"
    spread = True

    def __init__(self) -> None:
        super().__init__()
        self.net = None
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.kinds: set[str] = set()

    def configure_model(self):
        if self.net is not None:
            return
        with torch.device(self.place):
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1))
        if self.device_mesh is None or not self.spread:
            return
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        tensor, data = self.device_mesh["tensor_parallel"], self.device_mesh["data_parallel"]
        if tensor.size() > 1:
            parallelize_module(self.net, tensor, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if data.size() > 1:
            fully_shard(self.net, mesh=data)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        norm = self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if norm is not None:
            self.norms.append(norm.item())

    def configure_optimizers(self):
        self.kinds = {type(parameter.data).__name__ for parameter in self.parameters()}
        return torch.optim.Adam(self.parameters(), lr=0.02)


class OnMeta(Net):
    place = "meta"


class NotSpread(Net):
    spread = False


def fit(strategy, kind=Net, devices=2, save=None, ckpt_path=None, **settings):
    torch.manual_seed(0)
    model = kind()
    trainer = make_trainer(
        strategy=strategy,
        devices=devices,
        callbacks=[SavesAfterFirstEpoch(save)] if save else [],
        **{"max_epochs": 2, **settings},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, make_loader(40, 4), ckpt_path=ckpt_path)
    return {"losses": model.losses, "norms": model.norms, "kinds": model.kinds, "weights": model.state_dict()}


def largest_difference(a, b) -> float:
    assert list(a) == list(b)
    return max((a[name] - b[name]).abs().max().item() for name in a)


CASES = {"plain": {}, "clipped": {"gradient_clip_val": 0.1}, "accumulated": {"accumulate_grad_batches": 2}}


def on_two(folder: str):
    """Each case on a row, on a column, and without a mesh; checkpoints; mistakes."""
    found = {}
    for name, settings in CASES.items():
        found[name, "ddp"] = fit(DDPStrategy(), **settings)
        found[name, "data"] = fit(ModelParallelStrategy(2, 1), **settings)
        found[name, "tensor"] = fit(ModelParallelStrategy(1, 2), **settings)
    found["plain", "meta"] = fit(ModelParallelStrategy(1, 2), OnMeta)
    for kind in (True, False):
        make = lambda kind=kind: ModelParallelStrategy(save_distributed_checkpoint=kind)  # noqa: E731
        path = f"{folder}/{kind}.ckpt"
        found["whole", kind] = fit(make(), save=path)
        found["resumed", kind] = fit(make(), ckpt_path=path)
    with pytest.raises(RuntimeError) as caught:
        fit(ModelParallelStrategy(2, 1), NotSpread)
    with pytest.raises(RuntimeError, match="is not the number of processes"):
        fit(ModelParallelStrategy(2, 2))
    return found, str(caught.value)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    return folder, *run_ranks(2, on_two, str(folder))[0]


def single(settings):
    """The losses of one process."""
    return fit("auto", devices=1, **settings)


@pytest.mark.parametrize("case", CASES)
def test_numbers_do_not_depend_on_how_layers_are_spread(trained, case):
    found = trained[1]
    for reference, name in ((found[case, "ddp"], "data"), (single(CASES[case]), "tensor")):
        spread = found[case, name]
        assert "DTensor" in spread["kinds"]
        assert spread["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        assert spread["norms"] == pytest.approx(reference["norms"], abs=1e-5)
        assert largest_difference(spread["weights"], reference["weights"]) < 1e-5
    assert bool(found[case, "tensor"]["norms"]) is (case == "clipped")


def test_layers_on_the_meta_device_begin_as_if_they_had_been_made_here(trained):
    found = trained[1]
    assert found["plain", "meta"]["losses"] == found["plain", "tensor"]["losses"]


@pytest.mark.parametrize("folders", [True, False])
def test_a_resumed_run_ends_in_the_same_bits(trained, folders):
    folder, found, _ = trained
    assert os.path.isdir(folder / f"{folders}.ckpt") is folders
    whole, resumed = found["whole", folders], found["resumed", folders]
    assert largest_difference(whole["weights"], resumed["weights"]) == 0
    model = Net.load_from_checkpoint(folder / f"{folders}.ckpt")
    assert {type(p.data) for p in model.parameters()} == {torch.Tensor}


def test_gradients_that_nobody_would_average_are_refused(trained):
    assert "'net.0.weight'" in trained[2] and "fully_shard(self.model" in trained[2]


def on_four(folder: str):
    path = f"{folder}/half.ckpt"
    clipped = {"gradient_clip_val": 0.1, "devices": 4}
    whole = fit(ModelParallelStrategy(2, 2), save=path, **clipped)
    return whole, fit(ModelParallelStrategy(2, 2), ckpt_path=path, **clipped)


def test_both_axes_at_once(trained, tmp_path):
    whole, resumed = run_ranks(4, on_four, str(tmp_path))[0]
    reference = trained[1]["clipped", "ddp"]
    assert whole["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    assert whole["norms"] == pytest.approx(reference["norms"], abs=1e-5)
    assert largest_difference(whole["weights"], resumed["weights"]) == 0
    Net.load_from_checkpoint(tmp_path / "half.ckpt")


def test_a_module_that_does_not_say_how_is_refused():
    with pytest.raises(TypeError, match="`Regression` has no `configure_model`"):
        make_trainer(strategy=ModelParallelStrategy(start_method="fork"), devices=2).fit(Regression(), make_loader())


@pytest.mark.parametrize("sizes", [(0, "auto"), ("auto", 1.5), ("all", 2)])
def test_sizes_are_numbers_of_processes(sizes):
    with pytest.raises(ValueError, match="must be a number of processes"):
        ModelParallelStrategy(*sizes)


def test_the_mesh_is_there_when_processes_have_met():
    with pytest.raises(RuntimeError, match="when the processes have met"):
        _ = ModelParallelStrategy().device_mesh
