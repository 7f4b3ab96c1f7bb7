"""Starting the processes of a loop of one's own, and watching over them."""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fulmen.data.loaders import record_arguments
from fulmen.engine.process_launcher import ProcessLauncher
from fulmen.utilities.introspection import parameters_of, takes_argument

if TYPE_CHECKING:
    from fulmen.engine.launch import Launcher
    from fulmen.fabric.fabric import Fabric


def do_nothing(*_: Any) -> None:
    """What `launch` runs if it gets no function."""


def check_function(function: object, launcher: Launcher | None) -> None:
    """Raises a TypeError unless this can be launched."""
    if not callable(function):
        what = f"`Fabric.launch(...)` needs to be a function, but got {function!r}."
        fix = "Pass the function and its arguments: `fabric.launch(train, 1, 2)`, not `fabric.launch(train(1, 2))`."
        raise TypeError(f"{what} {fix}")
    if function is not do_nothing and not parameters_of(function):
        what = f"`Fabric.launch(function={function})` needs to take at least one argument."
        raise TypeError(f"{what} The launcher will pass in the `Fabric` object: `def train(fabric): ...`.")
    if function is do_nothing and isinstance(launcher, ProcessLauncher):
        what = f"To spawn processes with `start_method={launcher.start_method!r}`, `.launch()` needs to be called with"
        raise TypeError(f"{what} a function that contains the code to launch in processes: `fabric.launch(train)`.")


def launch_function(fabric: Fabric, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the function returns, in the processes of the strategy."""
    launcher = fabric.strategy.launcher
    run = partial(_run_launched, fabric, function, args, kwargs)
    if launcher is None:
        return run()
    launch: Callable[..., Any] = launcher.launch
    # Launchers for Lightning's Fabric do not ask whose run it is.
    asks = takes_argument(launch, "trainer", explicit=True)
    return launch(_call_first, run, trainer=fabric) if asks else launch(_call_first, run)


def _call_first(run: Callable[[], Any]) -> Any:
    return run()


def _run_launched(fabric: Fabric, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In each of the processes."""
    strategy = fabric.strategy
    with fabric.enter_process():
        if function is do_nothing:
            watch_script(fabric)
            return None
        strategy.start_watchdog(FabricRun(fabric, "in the launched function"))
        try:
            with record_arguments():
                result = function(*args, **kwargs)
            strategy.finish_saving()
            if strategy.report_to_parent is None:  # else once the result is on its way
                strategy.stop_watchdog()
            return result
        except BaseException as error:
            reason = strategy.abort(error)
            strategy.stop_watchdog()
            if reason is not error:
                raise reason from error
            raise


def watch_script(fabric: Fabric) -> None:
    """From here to the end of the script, a process that fails is found out, and the others end with it."""
    strategy = fabric.strategy
    strategy.start_watchdog(FabricRun(fabric, "after `fabric.launch()`"))
    if strategy.watchdog is None:
        return
    show_error = sys.excepthook

    def leave_others(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        reason = strategy.abort(error)
        strategy.stop_watchdog()
        show_error(type(reason), reason, reason.__traceback__)

    sys.excepthook = leave_others
    atexit.register(strategy.stop_watchdog)


class FabricRun:
    """What the watchdog may ask of a loop of the user's own: a `fulmen.supervision.protocols.SupervisedRun`.

    Arguments:
        position: where the run is, as far as anybody but the user knows.
    """

    def __init__(self, fabric: Fabric, position: str) -> None:
        self.fabric = fabric
        self.position = position

    def describe_position(self) -> str:
        return self.position

    def notify_exception(self, error: BaseException) -> None:
        """Nobody is told: callbacks of Fabric hear what the loop calls."""

    def finalize_loggers(self) -> None:
        for logger in self.fabric.loggers:
            with contextlib.suppress(Exception):
                logger.finalize("failed")

    def handles_signal(self, number: int) -> bool:
        return False

    def request_stop(self, number: int) -> bool:
        return False

    def is_saving_last(self) -> bool:
        return False
