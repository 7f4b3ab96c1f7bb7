"""Runs that are ended with SIGKILL and resumed: a sample of the trials of `trials.resume`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))
from trials import resume


@pytest.mark.parametrize(
    "mix", [pytest.param(mix, marks=pytest.mark.slow) if mix.startswith("several") else mix for mix in resume.MIXES]
)
def test_a_run_that_is_killed_and_resumed_ends_in_the_same_bits(mix, capfd):
    told: list[str] = []
    with capfd.disabled():
        assert resume.run_trials(mix, range(5), told.append) == 0, "\n".join(told)
