"""However and wherever a rank ends wrongly: it is named, and everything ends in time. `trials.endings` tries all."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from trials.endings import FAULTS, HOOKS, STRATEGIES, all_cases, run_case

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads processes from /proc")]


def test_a_rank_that_ends_wrongly_is_named_and_all_end_in_time():
    chosen = list(all_cases())[::7]
    assert {case.strategy for case in chosen} == set(STRATEGIES) and {case.fault for case in chosen} == set(FAULTS)
    assert {case.hook for case in chosen} >= {*HOOKS[-3:], "worker"} and any(case.descriptors for case in chosen)
    with ThreadPoolExecutor(3) as pool:
        found = dict(zip(map(str, chosen), pool.map(run_case, chosen)))
    assert not {case: (one.problems, one.output[-2000:]) for case, one in found.items() if one.problems}
