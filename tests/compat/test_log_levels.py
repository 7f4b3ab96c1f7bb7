"""Levels and handlers that programs set on the loggers of Lightning."""

import logging

import pytest
from support import Regression, make_loader, make_trainer

from fulmen.compat.foreign import LOGGERS, follow_loggers, is_wanted


@pytest.fixture
def messages():
    """What reaches a handler of the logger that Lightning's documentation names."""

    class Keeping(logging.Handler):
        def emit(self, record):
            kept.append(record.getMessage())

    kept = []
    own = logging.getLogger("fulmen")
    parent = own.parent
    handler = Keeping()
    logging.getLogger("lightning.pytorch").addHandler(handler)
    follow_loggers()
    yield kept
    logging.getLogger("lightning.pytorch").removeHandler(handler)
    own.parent = parent
    own.removeFilter(is_wanted)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.NOTSET)


def train():
    make_trainer(max_steps=1).fit(Regression(), make_loader())


def test_a_handler_of_lightning_gets_the_messages(messages):
    train()
    assert any("max_steps=1" in message for message in messages)


@pytest.mark.parametrize("name", LOGGERS)
def test_a_level_of_lightning_holds(name, messages):
    logging.getLogger(name).setLevel(logging.ERROR)
    train()
    assert messages == []
    logging.getLogger(name).setLevel(logging.INFO)
    train()
    assert messages


def test_the_door_puts_them_in_charge(run_python):
    code = """
import logging, fulmen.compat
fulmen.compat.install()
from lightning.pytorch.utilities import rank_zero_only
assert logging.getLogger("fulmen").parent is logging.getLogger("lightning.pytorch")
"""
    assert run_python(code) == 0
