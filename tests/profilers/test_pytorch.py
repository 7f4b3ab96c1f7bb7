from __future__ import annotations

import json
import os
import pickle

import pytest
import torch

from fulmen.profilers import PyTorchProfiler
from fulmen.utilities.errors import MisconfigurationException


def run_batches(profiler, num_batches, module=None):
    """What the Trainer calls around the batches of `fit`."""
    module = module or torch.nn.Sequential(torch.nn.Linear(4, 4))
    with profiler.profile("run_training_epoch"):
        for _ in range(num_batches):
            with profiler.profile("run_training_batch"), profiler.profile("[Strategy]S.training_step"):
                module(torch.ones(2, 4)).sum().backward()


def steps_in(trace):
    events = json.loads(trace.read_text())["traceEvents"]
    return sorted({event["name"] for event in events if event["name"].startswith("ProfilerStep#")})


def test_the_default_schedule_records_three_steps_after_two(tmp_path):
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="p")
    profiler.module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    profiler.setup("fit", local_rank=0)
    run_batches(profiler, 8, profiler.module)
    profiler.describe()
    report = (tmp_path / "fit-p-0.txt").read_text()
    assert report.startswith("FIT Profiler Report\nProfile stats for: records rank: 0\n")
    assert "[pl][profile][Strategy]S.training_step" in report
    assert "[pl][module]torch.nn.modules.linear.Linear: 0" in report
    (trace,) = tmp_path.glob("fit-p-0-run_training_batch.*.pt.trace.json")
    assert steps_in(trace) == ["ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"]
    assert {event.key: event.count for event in profiler.function_events.key_averages()}["aten::linear"] == 3
    assert not profiler.module[0]._forward_hooks  # the labels are gone
    profiler.teardown("fit")


def test_each_repetition_of_the_schedule_writes_a_trace(tmp_path):
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=2)
    profiler = PyTorchProfiler(dirpath=tmp_path, schedule=schedule)
    profiler.setup("fit")
    run_batches(profiler, 6)
    profiler.teardown("fit")
    assert len(list(tmp_path.glob("*.pt.trace.json"))) == 2


def test_without_a_schedule_everything_is_recorded():
    profiler = PyTorchProfiler(schedule=None, export_to_chrome=False)
    with profiler.profile("preparation"):
        torch.ones(3) + 1
    run_batches(profiler, 2)
    counts = {event.key: event.count for event in profiler.summary() and profiler.function_events.key_averages()}
    assert counts["[pl][profile]preparation"] == 1
    assert counts["[pl][profile]run_training_batch"] == 2
    assert profiler.profiler is None  # the summary ended it
    run_batches(profiler, 1)
    assert profiler.profiler is None


def test_steps_of_evaluation_are_batches_and_each_stage_starts_anew(tmp_path):
    profiler = PyTorchProfiler(dirpath=tmp_path, record_module_names=False)
    for stage in ("validate", "test"):
        profiler.setup(stage)
        step = {"validate": "[Strategy]S.validation_step", "test": "[Strategy]S.test_step"}[stage]
        for _ in range(6):
            with profiler.profile(step):
                torch.ones(3) + 1
        report = profiler.summary()
        assert report.startswith(f"{stage.upper()} Profiler Report")
        assert f"[pl][profile]{step}"[:40] in report
        profiler.teardown(stage)
        assert list(tmp_path.glob(f"{stage}-*.pt.trace.json"))


def test_validation_inside_fit_does_not_advance_the_schedule(tmp_path):
    profiler = PyTorchProfiler(dirpath=tmp_path)
    profiler.setup("fit")
    for _ in range(10):
        with profiler.profile("[Strategy]S.validation_step"):
            torch.ones(1)
    assert profiler.profiler is None
    run_batches(profiler, 5)
    profiler.teardown("fit")
    (trace,) = tmp_path.glob("*.pt.trace.json")
    assert steps_in(trace) == ["ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"]


def test_shapes_and_table_options_reach_the_table():
    profiler = PyTorchProfiler(
        schedule=None, group_by_input_shapes=True, export_to_chrome=False, row_limit=5, sort_by_key="count",
        table_kwargs={"max_name_column_width": 20}, profile_memory=True,
    )  # fmt: skip
    run_batches(profiler, 2)
    report = profiler.summary()
    assert "Input Shapes" in report and "CPU Mem" in report
    rows = [line for line in report.splitlines() if "aten" in line or "[pl]" in line]
    assert 0 < len(rows) <= 5
    assert "..." in report  # long names are cut at 20


def test_stacks_are_exported_for_flame_graphs(tmp_path):
    profiler = PyTorchProfiler(dirpath=tmp_path, export_to_chrome=False, export_to_flame_graph=True)
    profiler.setup("fit")
    run_batches(profiler, 6)
    profiler.teardown("fit")
    assert os.listdir(tmp_path) == ["fit-run_training_batch.stack"]


def test_a_trace_without_a_place_to_go_is_warned_about():
    profiler = PyTorchProfiler(schedule=None)
    run_batches(profiler, 1)
    with pytest.warns(UserWarning, match="no `dirpath`"):
        assert profiler.summary()


def test_nothing_recorded_is_an_empty_report():
    profiler = PyTorchProfiler()
    run_batches(profiler, 0)
    assert profiler.summary() == ""
    profiler.describe()


def test_wrong_options_are_refused_at_once():
    with pytest.raises(MisconfigurationException, match=r"sort_by_key='cpu_tim'.*Did you mean `cpu_time`"):
        PyTorchProfiler(sort_by_key="cpu_tim")
    with pytest.raises(KeyError, match="invalid key 'zz'"):
        PyTorchProfiler(table_kwargs={"zz": 1})
    with pytest.raises(KeyError, match="an argument of `PyTorchProfiler` itself"):
        PyTorchProfiler(table_kwargs={"row_limit": 1})
    with pytest.raises(
        MisconfigurationException,
        match="`schedule` must be a function that returns a `torch.profiler.ProfilerAction`, but this is 3",
    ):
        PyTorchProfiler(schedule=3)
    with pytest.raises(MisconfigurationException, match="returns a `torch.profiler.ProfilerAction`, but this is 'x'"):
        PyTorchProfiler(schedule=lambda step: "x")
    with pytest.warns(UserWarning, match="does not know .'unknown_option'."):
        PyTorchProfiler(unknown_option=1)


def test_it_pickles_while_recording():
    profiler = PyTorchProfiler(schedule=None, export_to_chrome=False)
    profiler.start("x")
    copy = pickle.loads(pickle.dumps(profiler))
    assert copy.profiler is None
    profiler.stop("x")
    profiler.teardown(None)
