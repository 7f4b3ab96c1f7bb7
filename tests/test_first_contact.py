"""What somebody meets who tries the package for the first time: what tools show, and what mistakes are answered with."""

from __future__ import annotations

import inspect

import pytest

import fulmen as pl


def test_help_and_tools_see_the_arguments_of_the_trainer():
    names = list(inspect.signature(pl.Trainer).parameters)
    assert names[:4] == ["accelerator", "strategy", "devices", "num_nodes"] and len(names) == 42
    assert ["self", *names] == list(inspect.signature(pl.Trainer.__init__).parameters)
    assert {p.kind for p in inspect.signature(pl.Trainer).parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


def test_arguments_passed_twice_or_too_often_are_a_type_error():
    with pytest.raises(TypeError, match="multiple values for argument 'accelerator'"):
        pl.Trainer("cpu", accelerator="cpu")
    with pytest.raises(TypeError, match="at most 42 arguments, but 43 were given"):
        pl.Trainer(*[None] * 43)
