from __future__ import annotations

import glob
import os
import pickle
import pstats
import time

import pytest

from fulmen.profilers import AdvancedProfiler, PassThroughProfiler, Profiler, SimpleProfiler, XLAProfiler


class Recorder(Profiler):
    """The least that a profiler of one's own needs."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = []

    def start(self, action_name):
        self.calls.append(f"start {action_name}")

    def stop(self, action_name):
        self.calls.append(f"stop {action_name}")

    def summary(self):
        return f"{len(self.calls)} calls\n"


def test_a_profiler_needs_only_start_and_stop():
    assert Profiler.__abstractmethods__ == {"start", "stop"}
    profiler = Recorder()
    with profiler.profile("a") as name:
        assert name == "a"
    with pytest.raises(KeyError), profiler.profile("b"):
        raise KeyError
    assert profiler.calls == ["start a", "stop a", "start b", "stop b"]
    assert profiler.active


def test_the_pass_through_profiler_says_that_nobody_needs_to_call_it():
    profiler = PassThroughProfiler()
    assert not profiler.active
    with profiler.profile("a") as name:
        assert name == "a"
    assert profiler.summary() == ""
    profiler.describe()


def test_tpus_are_refused_with_an_alternative():
    with pytest.raises(NotImplementedError, match="pytorch"):
        XLAProfiler()


def test_reports_are_appended_to_a_file_per_stage_and_rank(tmp_path):
    profiler = Recorder(filename="times")
    profiler.setup("fit", local_rank=None, log_dir=str(tmp_path / "logs"))
    profiler.describe()
    profiler.describe()
    profiler.teardown("fit")
    profiler.setup("test", local_rank=1, log_dir="ignored from the second time on")
    profiler.start("x")
    profiler.describe()
    assert (tmp_path / "logs" / "fit-times.txt").read_text() == "0 calls\n0 calls\n"
    assert (tmp_path / "logs" / "test-times-1.txt").read_text() == "1 calls\n"
    assert profiler.local_rank == 1


def test_without_a_filename_the_report_is_logged(caplog):
    with caplog.at_level("INFO", logger="fulmen"):
        Recorder(dirpath="unused").describe()
    assert caplog.messages == ["0 calls\n"]


def test_the_simple_profiler_counts_and_times_actions():
    profiler = SimpleProfiler()
    for _ in range(3):
        with profiler.profile("outer"), profiler.profile("inner"):
            time.sleep(0.001)
    with profiler.profile("rare"):
        pass
    assert {name: len(times) for name, times in profiler.recorded_durations.items()} == {
        "outer": 3,
        "inner": 3,
        "rare": 1,
    }
    assert all(
        outer >= inner >= 0.001 for outer, inner in zip(*map(profiler.recorded_durations.get, ("outer", "inner")))
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in profiler.summary().splitlines() if "|" in line]
    assert rows[0] == ["Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %"]
    assert rows[1][0] == "Total" and rows[1][2] == "7"
    assert [row[0] for row in rows[2:]] == ["outer", "inner", "rare"]  # most expensive first
    assert float(rows[2][3]) == pytest.approx(sum(profiler.recorded_durations["outer"]), rel=1e-3)
    assert 0 < float(rows[2][4]) <= 100
    assert profiler.current_actions == {}


def test_the_short_table_leaves_out_counts():
    profiler = SimpleProfiler(extended=False)
    with profiler.profile("a"):
        pass
    lines = profiler.summary().splitlines()
    assert lines[0] == "Profiler Report"
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert table[0] == ["Action", "Mean duration (s)", "Total time (s)"]
    assert [row[0] for row in table[1:]] == ["a"]


def test_the_report_names_the_stage(tmp_path):
    profiler = SimpleProfiler(dirpath=tmp_path, filename="s")
    profiler.setup("fit")
    assert profiler.summary().startswith("FIT Profiler Report\n")


@pytest.mark.parametrize("profiler_class", [SimpleProfiler, AdvancedProfiler])
def test_stopping_what_was_never_started_is_an_error(profiler_class):
    with pytest.raises(ValueError, match="`x` cannot stop: it was never started"):
        profiler_class().stop("x")


def test_starting_twice_is_an_error():
    profiler = SimpleProfiler()
    profiler.start("x")
    with pytest.raises(ValueError, match="`x` has already started"):
        profiler.start("x")


def test_the_simple_profiler_pickles():
    profiler = SimpleProfiler()
    with profiler.profile("a"):
        pass
    copy = pickle.loads(pickle.dumps(profiler))
    with copy.profile("b"):
        pass
    assert set(copy.recorded_durations) == {"a", "b"}


def slow_sum():
    return sum(range(10))


def other_sum():
    return sum(range(20))


def test_the_advanced_profiler_lists_functions_per_action():
    profiler = AdvancedProfiler()
    profiler.setup("fit", local_rank=0)
    with profiler.profile("outer"):
        slow_sum()
        with profiler.profile("inner"):
            other_sum()
        slow_sum()
    report = profiler.summary()
    assert report.startswith("FIT Profiler Report\nProfile stats for: outer rank: 0\n")
    outer, inner = report.split("Profile stats for: inner")
    assert "slow_sum" in outer and "other_sum" not in outer
    assert "other_sum" in inner
    (row,) = [line.split() for line in outer.splitlines() if "slow_sum" in line]
    assert row[0] == "2"  # before and after the inner action


def test_actions_that_overlap_may_end_in_any_order():
    profiler = AdvancedProfiler()
    profiler.start("a")
    profiler.start("b")
    profiler.stop("a")
    other_sum()
    profiler.stop("b")
    with pytest.raises(ValueError):
        profiler.stop("a")
    assert "other_sum" in profiler.summary().split("Profile stats for: b")[1]


def test_the_number_of_lines_can_be_limited():
    profiler = AdvancedProfiler(line_count_restriction=1)
    with profiler.profile("a"):
        slow_sum()
    assert "due to restriction <1>" in profiler.summary()


def test_profiles_can_be_dumped_for_other_tools(tmp_path):
    profiler = AdvancedProfiler(dirpath=tmp_path, filename="f", dump_stats=True)
    profiler.setup("fit", local_rank=0)
    with profiler.profile("[Callback]a/b c"):
        slow_sum()
    profiler.describe()
    assert sorted(os.listdir(tmp_path)) == ["fit-f-0-[Callback]a_b c.prof", "fit-f-0.txt"]
    stats = pstats.Stats(glob.glob(f"{tmp_path}/*.prof")[0])
    assert any(function[2] == "slow_sum" for function in stats.stats)
    profiler.teardown("fit")
    assert profiler.profiled_actions == {}
    assert pickle.loads(pickle.dumps(profiler)).dump_stats


@pytest.mark.parametrize("kind", [SimpleProfiler, AdvancedProfiler])
@pytest.mark.parametrize(
    ("name", "file"), [("a/b", "a_b"), ("x\n\t\x07\x1by", "x_y"), ('p:q*?"<>|r', "p_q_r"), ("..\\up", ".._up")]
)
def test_names_of_files_have_nothing_that_a_file_system_or_a_terminal_minds(tmp_path, kind, name, file):
    profiler = kind(dirpath=tmp_path / "new" / "folder", filename=name)
    profiler.setup("fit")
    with profiler.profile("act"):
        pass
    profiler.describe()
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [f"fit-{file}.txt"]
