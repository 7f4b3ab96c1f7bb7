"""What `Fabric.save` writes and `Fabric.load` reads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fulmen import Fabric
from fulmen.storage.integrity import DamagedCheckpointError


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu")


def make_state(fabric: Fabric, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    net = nn.Linear(2, 1)
    adam = torch.optim.Adam(net.parameters(), lr=0.1)
    model, optimizer = fabric.setup(net, adam)
    fabric.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "scheduler": torch.optim.lr_scheduler.StepLR(adam, 1), "step": seed}


def test_a_state_comes_back_as_it_was(fabric: Fabric, tmp_path) -> None:
    saved = make_state(fabric, 1)
    saved["nested"] = {"again": saved["model"], "epoch": 7}
    fabric.save(tmp_path / "a.ckpt", saved)
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert list(content["model"]) == ["weight", "bias"] and content["nested"]["epoch"] == 7

    state = make_state(fabric, 0)
    inner = nn.Linear(2, 1)
    state["nested"] = {"again": inner, "epoch": 0}
    model = state["model"]
    del state["scheduler"]
    assert list(fabric.load(tmp_path / "a.ckpt", state)) == ["scheduler"]
    assert state["model"] is model and state["step"] == 1
    assert state["nested"] == {"again": inner, "epoch": 7}
    assert torch.equal(model.weight, saved["model"].weight) and torch.equal(inner.weight, saved["model"].weight)
    moments = [s.state_dict()["state"][0]["exp_avg"] for s in (state["optimizer"], saved["optimizer"])]
    assert torch.equal(*moments)
    assert sorted(fabric.load(tmp_path / "a.ckpt")) == ["model", "nested", "optimizer", "scheduler", "step"]


def test_names_that_are_missing_are_said_before_anything_is_loaded(fabric: Fabric, tmp_path) -> None:
    fabric.save(tmp_path / "a.ckpt", make_state(fabric, 1))
    state = make_state(fabric, 0)
    before = state["model"].weight.detach().clone()
    with pytest.raises(KeyError, match="contains a key 'stepp' that does not exist.*Did you mean `step`"):
        fabric.load(tmp_path / "a.ckpt", {**state, "stepp": 0})
    assert torch.equal(state["model"].weight, before)
    partial = {"stepp": 0, "step": 0}
    assert list(fabric.load(tmp_path / "a.ckpt", partial, strict=False)) == ["model", "optimizer", "scheduler"]
    assert partial == {"stepp": 0, "step": 1}


def test_a_filter_says_which_entries_are_written(fabric: Fabric, tmp_path) -> None:
    state = make_state(fabric)
    fabric.save(tmp_path / "a.ckpt", state, filter={"model": lambda name, value: "bias" in name})
    assert list(torch.load(tmp_path / "a.ckpt", weights_only=True)["model"]) == ["bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        fabric.load(tmp_path / "a.ckpt", {"model": state["model"]})
    fabric.load(tmp_path / "a.ckpt", {"model": state["model"]}, strict=False)
    for wrong, error, words in (
        ({"modell": len}, ValueError, "Did you mean `model`"),
        (len, TypeError, "Filter should be a dictionary"),
        ({"model": "bias"}, TypeError, "for key 'model' to be a callable"),
    ):
        with pytest.raises(error, match=words):
            fabric.save(tmp_path / "b.ckpt", state, filter=wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "b.ckpt").exists()


def test_files_that_are_the_state_of_one_object(fabric: Fabric, tmp_path) -> None:
    state = make_state(fabric)
    for name in ("model", "optimizer"):
        torch.save(state[name].state_dict(), tmp_path / name)
        fabric.load_raw(tmp_path / name, state[name])
    with pytest.raises(RuntimeError, match="Unexpected key"):
        fabric.load_raw(tmp_path / "model", nn.Linear(2, 1, bias=False))
    fabric.load_raw(tmp_path / "model", nn.Linear(2, 1, bias=False), strict=False)
    with pytest.raises(TypeError, match="Pass a module or an optimizer"):
        fabric.load_raw(tmp_path / "model", {"model": state["model"]})  # type: ignore[arg-type]


def test_a_save_that_fails_leaves_the_file_before_and_damage_is_found(fabric: Fabric, tmp_path) -> None:
    path = tmp_path / "a.ckpt"
    fabric.save(path, {"step": 1})
    with pytest.raises(AttributeError, match=r"`checkpoint\['bad'\]` cannot be pickled"):
        fabric.save(path, {"step": 2, "bad": lambda: 0})
    with pytest.raises(TypeError, match="Pass a dictionary"):
        fabric.save(path, nn.Linear(1, 1))  # type: ignore[arg-type]
    assert fabric.load(path) == {"step": 1} and [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError):
        fabric.load(path)
