"""What a verb needs and does not find is an error of the type that the API has for it."""

from __future__ import annotations

import pytest
from support import Regression, make_loader, make_trainer

import fulmen as pl
from fulmen.utilities.errors import MisconfigurationException

VERBS = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}


@pytest.mark.parametrize("verb", VERBS)
def test_a_loader_that_is_not_there_and_one_that_is_no_method(verb):
    hook = f"{VERBS[verb]}_dataloader"
    with pytest.raises(MisconfigurationException, match=hook):
        getattr(make_trainer(), verb)(Regression())
    for nothing in (None, 5):
        on_class, on_instance = type("Net", (Regression,), {hook: nothing})(), Regression()
        setattr(on_instance, hook, nothing)
        for model in (on_class, on_instance):
            with pytest.raises(TypeError, match=hook):
                getattr(make_trainer(), verb)(model)
    with pytest.raises(TypeError, match=hook):
        getattr(make_trainer(), verb)(type("Net", (Regression,), {hook: lambda self: None})())


def test_prediction_needs_a_step_or_a_forward():
    class Bare(pl.LightningModule):
        pass

    emptied = Bare()
    emptied.forward = None
    for model in (Bare(), emptied):
        with pytest.raises(MisconfigurationException, match=r"`predict_step`, which calls `forward`.*has neither"):
            make_trainer().predict(model, [1, 2])

    class Calls(pl.LightningModule):
        def __call__(self, batch):
            return batch

    class Steps(pl.LightningModule):
        def predict_step(self, batch, batch_idx):
            return batch

    given = Bare()
    given.forward = lambda batch: batch
    for model in (Calls(), Steps(), given):
        assert len(make_trainer().predict(model, make_loader())) == 3


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("none.ckpt", FileNotFoundError),
        ("", ValueError),
        ("best", ValueError),
        ("hpc", ValueError),
        ("folder", OSError),
    ],
)
def test_a_checkpoint_that_is_not_there(verb, path, kind, tmp_path):
    (tmp_path / "folder").mkdir()
    path = path if path in ("", "best", "hpc") else str(tmp_path / path)
    with pytest.raises(kind):
        getattr(make_trainer(default_root_dir=tmp_path), verb)(Regression(), make_loader(), ckpt_path=path)
