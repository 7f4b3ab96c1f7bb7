"""What all tests share: one thread, a working directory of their own, and small real models and data."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from support import Regression, make_loader
from torch.utils.data import DataLoader

pytest_plugins = ["processes"]
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests start processes and wait for them come first, so that none of them is left over at the end."""
    folders = {
        folder: place for place, folder in enumerate(("supervision", "engine", "loops", "metrics", "checkpoint"))
    }
    items.sort(key=lambda item: folders.get(item.path.parent.name, len(folders)))


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    """Runs write where they are started: each test in a folder of its own, with a clean environment."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    for name in list(os.environ):
        if name.startswith("PL_"):
            monkeypatch.delenv(name)
    torch.manual_seed(0)
    return tmp_path


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Ctrl-C does here, and in what is started from here, what it does to a program in a terminal.

    What was started in the background of a script ignores SIGINT, and so does all that it starts.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material beside the checkout; tests that look there are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the reference material in {SHARED.name}/ beside the checkout", allow_module_level=False)
    return SHARED


@pytest.fixture
def model() -> Regression:
    torch.manual_seed(0)
    return Regression()


@pytest.fixture
def loader() -> DataLoader:
    return make_loader()
