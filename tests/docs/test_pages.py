"""What docstrings must say of the Trainer's arguments and of hooks, and pages of docs/ that are written from them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from fulmen import Callback, LightningDataModule, LightningModule, Trainer
from fulmen.hooks import EPOCH, EVALUATION, HOOKS, LOG_RULES, NEVER, STEP, CheckpointHooks, DataHooks, ModelHooks

from .pages import PAGES, ROOT, explained_arguments

VERBS = ("fit", "validate", "test", "predict")
SAYINGS = {STEP: "Logs per step.", EVALUATION: "Logs per epoch.", EPOCH: "Logs only per epoch.", NEVER: "Logs nothing."}


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_those_of_the_docstrings(name: str) -> None:
    written = (Path(ROOT) / "docs" / name).read_text(encoding="utf-8")
    assert written == PAGES[name](), "Run `python tests/docs/pages.py`."


def test_every_argument_of_the_trainer_is_explained_in_its_help() -> None:
    explained = [argument.name for argument in explained_arguments(str(Trainer.__doc__))]
    assert sorted(explained) == sorted(inspect.signature(Trainer).parameters) and len(explained) == 42


@pytest.mark.parametrize("verb", [*VERBS, "save_checkpoint", "init_module"])
def test_every_argument_of_a_verb_is_explained(verb: str) -> None:
    method = getattr(Trainer, verb)
    for name in list(inspect.signature(method).parameters)[1:]:
        assert re.search(rf"^ +{name}: \S", method.__doc__, re.MULTILINE), name


def test_every_hook_says_when_it_runs_and_what_may_be_logged() -> None:
    names = [hook.name for hook in HOOKS]
    shared = [name for name in names if hasattr(Callback, name)]
    assert len(shared) == 37  # beside `state_key`, `state_dict` and `load_state_dict`
    for owner in (Callback, ModelHooks, CheckpointHooks):
        for name in names:
            if name in vars(owner):
                docstring = vars(owner)[name].__doc__ or ""
                assert SAYINGS[LOG_RULES[name]] in " ".join(docstring.split()), f"{owner.__name__}.{name}"


@pytest.mark.parametrize("owner", [Trainer, LightningModule, LightningDataModule, Callback, DataHooks])
def test_everything_public_has_a_docstring(owner: type) -> None:
    ours = [cls for cls in owner.__mro__ if cls.__module__.startswith("fulmen.")]
    bare = [
        f"{cls.__name__}.{name}"
        for cls in ours
        for name, value in vars(cls).items()
        if not name.startswith("_")
        if (callable(value) or isinstance(value, (property, classmethod))) and not inspect.getdoc(value)
    ]
    assert not bare
