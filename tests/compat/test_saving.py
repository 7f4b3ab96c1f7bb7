"""Hyper-parameters in files, under the names of the API."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from fulmen.core.saving import (
    load_hparams_from_tags_csv,
    load_hparams_from_yaml,
    save_hparams_to_tags_csv,
    save_hparams_to_yaml,
)

PARAMS = {"lr": 0.1, "name": "net", "layers": [8, 4], "more": {"on": True, "rate": 1e-5}, "nothing": None}


@pytest.mark.parametrize(
    ("save", "load", "ending"),
    [
        (save_hparams_to_yaml, load_hparams_from_yaml, "yaml"),
        (save_hparams_to_tags_csv, load_hparams_from_tags_csv, "csv"),
    ],
)
def test_what_is_written_is_read(tmp_path, save, load, ending):
    path = tmp_path / f"hparams.{ending}"
    save(path, PARAMS)
    assert load(path) == PARAMS
    save(str(path), Namespace(a=1, text="x, y\nz"))  # replaces the file
    assert load(str(path)) == {"a": 1, "text": "x, y\nz"}
    with pytest.warns(UserWarning, match="does not exist"):
        assert load(tmp_path / f"nothing.{ending}") == {}
    with pytest.raises(RuntimeError, match="Missing folder: .*nowhere"):
        save(tmp_path / "nowhere" / path.name, PARAMS)
    with pytest.raises(TypeError, match="must be a dictionary or a namespace, not a `int`"):
        save(path, 5)
    assert load(path)["a"] == 1


def test_objects_become_text_that_any_reader_loads(tmp_path):
    save_hparams_to_yaml(tmp_path / "a.yaml", {"loss": torch.nn.functional.mse_loss, "weights": torch.ones(2)})
    assert load_hparams_from_yaml(tmp_path / "a.yaml") == {
        "loss": "torch.nn.functional.mse_loss", "weights": [1.0, 1.0],
    }  # fmt: skip
    (tmp_path / "b.yaml").write_text("loss: !!python/name:torch.nn.functional.mse_loss\n")
    with pytest.raises(ValueError, match="names an object of Python"):
        load_hparams_from_yaml(tmp_path / "b.yaml")
