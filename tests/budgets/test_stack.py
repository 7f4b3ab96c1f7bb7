"""How deep the user's `training_step` lies: a traceback has to fit on the screen."""

from __future__ import annotations

from pathlib import Path

import pytest

FRAMES = 8
FILES = 3


@pytest.fixture
def frames(fulmen, tmp_path: Path) -> list[str]:
    """ "file:function" from `Trainer.fit` to the `training_step` of a batch in the middle, both included."""
    from benchmarks import calls

    return calls.frames_from_fit(fulmen, tmp_path)


def test_eight_frames_lie_from_fit_to_training_step(frames: list[str]) -> None:
    # Code knows its class from Python 3.11 on.
    assert frames[0] in ("trainer.py:Trainer.fit", "trainer.py:fit")
    assert frames[-1].endswith("training_step")
    assert len(frames) <= FRAMES, "\n".join(frames)


def test_they_lie_in_three_files_of_the_library(frames: list[str]) -> None:
    assert len({frame.partition(":")[0] for frame in frames[:-1]}) <= FILES, "\n".join(frames)
