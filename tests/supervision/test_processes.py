"""What the system tells about processes and threads, and whether a busy machine makes them look idle."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fulmen.supervision.processes import seconds_ready

COMPUTES_BESIDE_ANOTHER = """
import os, subprocess, sys, threading, time
from fulmen.supervision.processes import seconds_ready

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
os.nice(19)
thread = threading.main_thread().native_id
try:
    before, began, used = seconds_ready(thread), time.monotonic(), time.thread_time()
    while time.monotonic() - began < 2:
        pass
    print(time.monotonic() - began, time.thread_time() - used, seconds_ready(thread) - before)
finally:
    rival.kill()
"""


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not tell how long threads wait")
def test_a_thread_that_gets_no_processor_has_waited_for_one():
    done = subprocess.run(
        [sys.executable, "-c", COMPUTES_BESIDE_ANOTHER], capture_output=True, text=True, timeout=1200, check=True
    )
    elapsed, used, waited = map(float, done.stdout.split())
    assert used < elapsed / 2  # the other one has the processor
    assert used + waited > 0.9 * elapsed


def test_a_thread_that_sleeps_waits_for_no_processor():
    thread = threading.get_native_id()
    before, began = seconds_ready(thread), time.monotonic()
    time.sleep(1)
    assert seconds_ready(thread) - before < 0.5 * (time.monotonic() - began)
    assert seconds_ready(1 << 30) == 0.0  # no thread of this process
