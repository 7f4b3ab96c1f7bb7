"""Operators, kernels and memory, measured by `torch.profiler`."""

from __future__ import annotations

import functools
import inspect
import os
from contextlib import ExitStack
from math import inf
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerAction

from fulmen.module import LightningModule
from fulmen.profilers.profiler import Profiler
from fulmen.storage.filesystem import ensure_dir
from fulmen.utilities.errors import MisconfigurationException, suggest_name
from fulmen.utilities.rank_zero import rank_zero_warn

WAIT = 1
WARMUP = 1
ACTIVE = 3


class PyTorchProfiler(Profiler):
    """Which operators and kernels run in each action, with a trace for chrome://tracing, Perfetto or TensorBoard.

    One step of the schedule is one training batch in ``fit``, and one batch of the loop in validate, test and predict.

    Args:
        group_by_input_shapes: tell calls of an operator with different shapes apart.
        emit_nvtx: only mark actions for ``nvprof`` or Nsight.
        export_to_chrome: write a trace to ``dirpath`` at the end of each recorded window.
        row_limit: how many rows the table has; -1 for all.
        sort_by_key: column to sort by; by default the total time, on CUDA if there is CUDA.
        record_module_names: label the forward of each sub-module.
        table_kwargs: passed to the table, such as ``max_name_column_width``.
        profiler_kwargs: passed to `torch.profiler.profile`. ``schedule`` defaults to one step waiting, one warming up
            and three recorded; None records everything. ``export_to_flame_graph=True`` writes stacks too, weighted by
            ``metric`` ("self_cpu_time_total").

    Examples:
        >>> profiler = PyTorchProfiler(dirpath="traces", filename="trace", row_limit=10)
        >>> trainer = Trainer(profiler=profiler)  # doctest: +SKIP
    """

    STEP_FUNCTIONS = {"training_step", "validation_step", "test_step", "predict_step"}
    AVAILABLE_SORT_KEYS = {
        "cpu_time", "cuda_time", "cpu_time_total", "cuda_time_total", "cpu_memory_usage", "cuda_memory_usage",
        "self_cpu_memory_usage", "self_cuda_memory_usage", "count",
    }  # fmt: skip

    def __init__(
        self, dirpath: str | os.PathLike[str] | None = None, filename: str | None = None,
        group_by_input_shapes: bool = False, emit_nvtx: bool = False, export_to_chrome: bool = True,
        row_limit: int = 20, sort_by_key: str | None = None, record_module_names: bool = True,
        table_kwargs: dict[str, Any] | None = None, **profiler_kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(dirpath, filename)
        self._emit_nvtx = emit_nvtx
        self._export_to_chrome = export_to_chrome
        self._group_by_input_shapes = group_by_input_shapes
        self._record_module_names = record_module_names
        self._sort_by_key = sort_by_key or ("cuda_time_total" if torch.cuda.is_available() else "cpu_time_total")
        if self._sort_by_key not in (columns := self.AVAILABLE_SORT_KEYS):
            hint = suggest_name(self._sort_by_key, columns)
            raise MisconfigurationException(f"`{sort_by_key=}` is not a column.{hint} Use one of {sorted(columns)}.")
        _check_table_kwargs(table_kwargs or {})
        self._table_kwargs = {**(table_kwargs or {}), "row_limit": row_limit}
        self._export_to_flame_graph = profiler_kwargs.pop("export_to_flame_graph", False)
        self._metric = profiler_kwargs.pop("metric", "self_cpu_time_total")
        self._default_schedule = "schedule" not in profiler_kwargs
        _check_schedule(profiler_kwargs.setdefault("schedule", _default_schedule))
        self._profiler_kwargs = _keep_known_options(profiler_kwargs)
        self._profiler_kwargs.update({"record_shapes": True} if group_by_input_shapes else {})
        self._profiler_kwargs.update({"with_stack": True} if self._export_to_flame_graph else {})
        self.profiler: torch.profiler.profile | torch.autograd.profiler.emit_nvtx | None = None
        self.function_events: EventList | None = None
        self._open = ExitStack()
        self._labels: dict[str, record_function] = {}
        self._step_action: str | None = None
        self._finished = False  # the recording of this stage has ended

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Nothing is recorded yet.

        Args:
            stage: "fit", "validate", "test" or "predict".
            local_rank: the place of this process on its machine; None for a single process.
            log_dir: where files go without a ``dirpath``.
        """
        super().setup(stage, local_rank, log_dir)
        self._finish_recording()
        self.function_events = self._step_action = None
        self._finished = False

    def start(self, action_name: str) -> None:
        """Labels what runs from now on; the first step begins the recording.

        Args:
            action_name: what is measured.
        """
        # Nothing is recorded before the first step of a schedule; without a schedule everything is.
        everything = self._emit_nvtx or self._profiler_kwargs["schedule"] is None
        if self.profiler is None and not self._finished and (everything or self._is_step(action_name)):
            self._begin_recording()
        if self.profiler is not None and action_name not in self._labels:
            self._labels[action_name] = _open_label(f"[pl][profile]{action_name}")

    def stop(self, action_name: str) -> None:
        """Ends the label; a step moves the schedule on.

        Args:
            action_name: what is measured.
        """
        if label := self._labels.pop(action_name, None):
            label.__exit__(None, None, None)
        if isinstance(self.profiler, torch.profiler.profile) and self._is_step(action_name):
            self._step_action = action_name
            self.profiler.step()

    def summary(self) -> str:
        """The table of the last recorded window; ends the recording."""
        self._finish_recording()
        if self.function_events is None:
            return ""
        by_shape = self._group_by_input_shapes
        averages = self.function_events.key_averages(group_by_input_shapes=by_shape)
        return self._write_report({"records": averages.table(sort_by=self._sort_by_key, **self._table_kwargs)})

    def teardown(self, stage: str | None) -> None:
        """Ends the recording.

        Args:
            stage: of the run.
        """
        self._finish_recording()

    def _is_step(self, action_name: str) -> bool:
        if self._step_action is not None:
            return action_name == self._step_action
        function = action_name.rpartition(".")[2]
        return function == "run_training_batch" if self._stage == "fit" else function in self.STEP_FUNCTIONS

    def _num_steps(self) -> float:
        """How many steps the run has at most, as far as the Trainer knows."""
        trainer = self.module._trainer if isinstance(self.module, LightningModule) else None
        if trainer is None or self._stage is None:
            return inf
        if self._stage == "fit":
            return trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
        if self._stage == "validate":
            return sum(trainer.num_val_batches)
        return sum(trainer.num_test_batches if self._stage == "test" else trainer.num_predict_batches)

    def _begin_recording(self) -> None:
        if self._emit_nvtx:
            self._open.enter_context(torch.cuda.profiler.profile())
            marks = torch.autograd.profiler.emit_nvtx()
            self.profiler = self._open.enter_context(marks)
        else:
            options = {"on_trace_ready": self._export_trace, **self._profiler_kwargs}
            if self._default_schedule and self._num_steps() < WAIT + WARMUP + ACTIVE:
                rank_zero_warn("The run has too few steps for the default schedule: every step is profiled.")
                options["schedule"] = None
            self.profiler = self._open.enter_context(torch.profiler.profile(**options))
        if self._record_module_names and self.module is not None:
            _label_modules(self.module, self._open)

    def _export_trace(self, profiler: torch.profiler.profile) -> None:
        """A window was recorded: keep its events, and write the files asked for."""
        self.function_events = profiler.events()
        if self.dirpath is None and (self._export_to_chrome or self._export_to_flame_graph):
            rank_zero_warn("The trace was not written, because there is no `dirpath`. Pass one to `PyTorchProfiler`.")
            return
        path = self._report_path(self._step_action or "", extension="")
        if self._export_to_chrome:
            torch.profiler.tensorboard_trace_handler(*os.path.split(path))(profiler)
        if self._export_to_flame_graph:
            ensure_dir(os.path.dirname(path))
            profiler.export_stacks(f"{path}.stack", metric=self._metric)

    def _finish_recording(self) -> None:
        for label in reversed(self._labels.values()):
            label.__exit__(None, None, None)
        self._labels.clear()
        self._finished = self._finished or self.profiler is not None
        self._open.close()
        self.profiler = None

    def __getstate__(self) -> dict[str, Any]:  # what is being recorded stays in this process
        return {**self.__dict__, "profiler": None, "function_events": None, "_open": ExitStack(), "_labels": {}}


def _check_table_kwargs(table_kwargs: dict[str, Any]) -> None:
    """Raises for what the table of events does not take."""
    allowed = set(inspect.signature(EventList.table).parameters) - {"self", "sort_by", "row_limit"}
    for key in set(table_kwargs) - allowed:
        own = " It is an argument of `PyTorchProfiler` itself." if key in ("row_limit", "sort_by") else ""
        raise KeyError(f"`table_kwargs` has the invalid key {key!r}.{own} Allowed are {sorted(allowed)}.")


def _check_schedule(schedule: object) -> None:
    """Raises for what gives no actions of torch's profiler; None is no schedule."""
    if schedule is not None and not (callable(schedule) and isinstance(schedule(0), ProfilerAction)):
        got = repr(schedule(0)) if callable(schedule) else repr(schedule)
        what = f"`schedule` must be a function that returns a `torch.profiler.ProfilerAction`, but this is {got}."
        raise MisconfigurationException(f"{what} Use `torch.profiler.schedule(wait=…, warmup=…, active=…)`.")


def _keep_known_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those that the profiler of this version of PyTorch takes; a warning names the others."""
    known = inspect.signature(torch.profiler.profile).parameters
    if unknown := sorted(set(options) - set(known)):
        rank_zero_warn(f"`torch.profiler.profile` of this version of PyTorch does not know {unknown}: ignored.")
    return {key: value for key, value in options.items() if key in known}


def _default_schedule(step: int) -> ProfilerAction:  # a function of this file, because that of torch cannot be pickled
    action: ProfilerAction = torch.profiler.schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1)(step)
    return action


def _open_label(text: str) -> record_function:
    """Names in the trace what runs from now on, until its `__exit__`."""
    label: record_function = record_function(text).__enter__()
    return label


def _label_modules(root: torch.nn.Module, until: ExitStack) -> None:
    """Label the forward of each named sub-module in the trace, until the stack is closed."""
    running: list[record_function] = []

    def enter(text: str, *_: Any) -> None:
        running.append(_open_label(text))

    def leave(*_: Any) -> None:
        if running:
            running.pop().__exit__(None, None, None)

    for name, module in root.named_modules():
        if name and not isinstance(module, torch.jit.ScriptModule):
            text = f"[pl][module]{type(module).__module__}.{type(module).__qualname__}: {name}"
            until.callback(module.register_forward_pre_hook(functools.partial(enter, text)).remove)
            until.callback(module.register_forward_hook(leave, always_call=True).remove)
