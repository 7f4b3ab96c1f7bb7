"""Starting the processes of a loop of one's own, and watching over them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from fulmen.data.loaders import record_arguments
from fulmen.engine.process_launcher import ProcessLauncher
from fulmen.utilities.introspection import parameters_of

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
    return run() if launcher is None else launcher.launch(_call_first, run, owner=fabric)


def _call_first(run: Callable[[], Any]) -> Any:
    return run()


def _run_launched(fabric: Fabric, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In each of the processes."""
    with fabric.enter_process(), record_arguments():
        return function(*args, **kwargs)
