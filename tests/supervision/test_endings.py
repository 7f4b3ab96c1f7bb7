"""However a run of several processes ends, all of them end, soon, and say so in their exit code."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")


def pids(folder):
    """Those of both ranks, once they train."""
    deadline = time.monotonic() + 600
    files = [folder / f"pid-{rank}" for rank in range(2)]
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(file.read_text()) for file in files]


def gone(pid):
    """Has it ended, at the latest in a moment? The kernel takes one to end the children of a killed process."""
    for _ in range(40):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("mode", [pytest.param("raises 0", marks=pytest.mark.slow), "raises 1", "dies 1"])
def test_a_failure_of_one_process_ends_all(script, ended, tmp_path, mode):
    code, output = ended(script(mode, "ddp"), seconds=600)
    assert code != 0 and all(map(gone, pids(tmp_path)))
    assert (f"rank {mode[-1]} is unhappy" in output) or "ended with exit code 7" in output


@pytest.mark.parametrize(
    ("strategy", "who", "number", "codes"),
    [
        ("ddp", "main", signal.SIGTERM, (143,)),
        ("ddp", "rank 1", signal.SIGTERM, (143,)),
        pytest.param("ddp", "main", signal.SIGINT, (130,), marks=pytest.mark.slow),
        pytest.param("ddp", "main", signal.SIGKILL, (-9,), marks=pytest.mark.slow),
        pytest.param("ddp_fork", "main", signal.SIGTERM, (143,), marks=pytest.mark.slow),
        pytest.param("ddp_fork", "rank 0", signal.SIGTERM, (143,), marks=pytest.mark.slow),
        ("ddp_fork", "all", signal.SIGINT, (130,)),
        ("ddp_fork", "main", signal.SIGKILL, (-9,)),
        ("ddp_fork", "rank 1", signal.SIGKILL, (1,)),
    ],
)
def test_a_signal_ends_all_processes_soon(script, ended, tmp_path, strategy, who, number, codes):
    process = script("long", strategy)
    ranks = pids(tmp_path)
    if who == "all":
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid if who == "main" else ranks[int(who[-1])], number)
    code, output = ended(process)
    assert code in codes, output
    assert all(map(gone, ranks))
    if number == signal.SIGTERM:
        # Both stopped after the same batch: none of them lost the other on its way. Who had forked them hears too.
        assert output.count("heard of SIGTERMException") == 2 + (strategy == "ddp_fork"), output
