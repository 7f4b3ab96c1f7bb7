"""What a Trainer is assembled from."""

from __future__ import annotations

from fulmen import Callback, Trainer
from fulmen.callbacks import EarlyStopping, ModelCheckpoint


class Mine(Callback):
    pass


def test_the_users_list_stays_as_it_is(tmp_path):
    mine = [Mine()]
    first, second = (Trainer(accelerator="cpu", callbacks=mine, default_root_dir=tmp_path) for _ in range(2))
    assert [type(callback) for callback in mine] == [Mine]
    assert len(first.callbacks) == len(second.callbacks) > 1


def test_checkpoints_come_last_and_the_others_as_they_were_given(tmp_path):
    given = [ModelCheckpoint(monitor="a"), Mine(), EarlyStopping("a")]
    trainer = Trainer(accelerator="cpu", callbacks=given, default_root_dir=tmp_path)
    kinds = [type(callback) for callback in trainer.callbacks]
    assert kinds[:2] == [Mine, EarlyStopping]
    assert kinds[-1] is ModelCheckpoint
    assert kinds.count(ModelCheckpoint) == 1
