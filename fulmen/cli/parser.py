"""`LightningArgumentParser`: arguments of trainers, modules, datamodules, callbacks, optimizers and schedulers."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn, Union

import torch
from jsonargparse import (
    ActionConfigFile,
    ArgumentParser,
    Namespace,
    _typehints,
    class_from_function,
    register_unresolvable_import_paths,
    set_parsing_settings,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fulmen.callbacks.callback import Callback
from fulmen.cli.explain import explain
from fulmen.cli.types import LRSchedulerTypeTuple, ReduceLROnPlateau
from fulmen.datamodule import LightningDataModule
from fulmen.engine.accelerators import Accelerator
from fulmen.engine.strategy import Strategy
from fulmen.module import LightningModule
from fulmen.trainer import Trainer
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.optional import is_installed

if TYPE_CHECKING:
    SchedulerClass = type[LRScheduler] | type[ReduceLROnPlateau]

SUPPORTED = (Trainer, LightningModule, LightningDataModule, Callback)
# Packages of classes that may be named in a configuration without their path.
DOORS = ("callbacks", "loggers", "profilers", "strategies", "plugins", "accelerators")
OF_FABRIC = ("fulmen.fabric.", "fulmen.loggers.fabric.")
# Arguments of the Trainer that take registered names too, which its type hints cannot list.
REGISTERED = {"accelerator": Union[str, Accelerator], "strategy": Union[str, Strategy]}  # noqa: UP007


class ConfigFile(ActionConfigFile):  # type: ignore[misc]
    """The option `--config`, which remembers the files it was given, so that errors can name a line of them."""

    def __call__(
        self, parser: LightningArgumentParser, cfg: Namespace, values: object, option_string: str | None = None
    ) -> None:
        parser.files_read.append(str(values))
        super().__call__(parser, cfg, values, option_string)


class LightningArgumentParser(ArgumentParser):  # type: ignore[misc]
    """An `ArgumentParser` of jsonargparse that knows the classes of this package.

    Arguments:
        args: Passed to jsonargparse.
        description: What the help says about the program.
        env_prefix: How names of environment variables begin.
        default_env: Whether environment variables are read.
        kwargs: Passed to jsonargparse.
    """

    def __init__(
        self, *args: Any, description: str = "Lightning Trainer command line tool", env_prefix: str = "PL",
        default_env: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        prepare_jsonargparse()
        super().__init__(*args, description=description, env_prefix=env_prefix, default_env=default_env, **kwargs)
        self.callback_keys: list[str] = []
        # For each key the class or classes, and what the built optimizer is linked to.
        self.optimizer_keys: dict[str, tuple[Any, str]] = {}
        self.lr_scheduler_keys: dict[str, tuple[Any, str]] = {}
        self.command_parsers: dict[str, LightningArgumentParser] = {}
        self.files_read: list[str] = []

    def add_lightning_class_args(
        self,
        lightning_class: Callable[..., Trainer | LightningModule | LightningDataModule | Callback]
        | type[Trainer]
        | type[LightningModule]
        | type[LightningDataModule]
        | type[Callback],
        nested_key: str,
        subclass_mode: bool = False,
        required: bool = True,
    ) -> list[str]:
        """Adds the arguments of a class, or of a function that returns an object of one.

        Arguments:
            lightning_class: The class, or a function whose return annotation is the class.
            nested_key: What the arguments begin with.
            subclass_mode: Let the user choose the class among `lightning_class` and its subclasses.
            required: Whether the user must choose.

        Returns:
            The names of the arguments.

        Raises:
            MisconfigurationException: for a class of another kind.
        """
        cls = as_class(lightning_class)
        if not issubclass(cls, SUPPORTED):
            raise MisconfigurationException(
                f"Cannot add arguments from: {lightning_class!r}. Pass a callable that returns, or a subclass of: "
                "Trainer, LightningModule, LightningDataModule, or Callback."
            )
        if issubclass(cls, Callback):
            self.callback_keys.append(nested_key)
        if subclass_mode:
            added = self.add_subclass_arguments(cls, nested_key, fail_untyped=False, required=required)
            return list(added or ())
        if issubclass(cls, Trainer):
            return self._add_trainer_arguments(cls, nested_key)
        return list(self.add_class_arguments(cls, nested_key, fail_untyped=False, sub_configs=True))

    def _add_trainer_arguments(self, cls: type[Trainer], key: str) -> list[str]:
        parameters = inspect.signature(cls).parameters
        by_name = [name for name in REGISTERED if name in parameters]
        added: list[str] = self.add_class_arguments(
            cls, key, skip=set(by_name), instantiate=False, fail_untyped=False, sub_configs=True
        )
        group = self.groups.get(key, self)
        for name in by_name:
            group.add_argument(f"--{key}.{name}", type=REGISTERED[name], default=parameters[name].default)
        added = [*added, *(f"{key}.{name}" for name in by_name)]
        texts = argument_texts(cls.__doc__ or "")
        for action in self._actions:
            name = action.dest.removeprefix(f"{key}.")
            if action.dest in added and name in texts and not action.help:
                action.help = texts[name].replace("%", "%%")
        return added

    def add_optimizer_args(
        self,
        optimizer_class: type[Optimizer] | tuple[type[Optimizer], ...] = (Optimizer,),
        nested_key: str = "optimizer",
        link_to: str = "AUTOMATIC",
    ) -> None:
        """Adds the arguments of an optimizer.

        Arguments:
            optimizer_class: The class, or a tuple of classes: the user chooses one of those, or of their subclasses.
            nested_key: What the arguments begin with.
            link_to: The argument of the module that gets them as a dict for `instantiate_class`; "AUTOMATIC": the
                command line makes the optimizer.
        """
        self._add_classes(optimizer_class, nested_key, "params")
        self.optimizer_keys[nested_key] = (optimizer_class, link_to)

    def add_lr_scheduler_args(
        self,
        lr_scheduler_class: SchedulerClass | tuple[SchedulerClass, ...] = LRSchedulerTypeTuple,
        nested_key: str = "lr_scheduler",
        link_to: str = "AUTOMATIC",
    ) -> None:
        """Adds the arguments of a learning rate scheduler; its arguments are those of `add_optimizer_args`.

        Arguments:
            lr_scheduler_class: The class, or a tuple of classes to choose from.
            nested_key: What the arguments begin with.
            link_to: The argument of the module that gets them as a dict; "AUTOMATIC": the command line makes it.
        """
        self._add_classes(lr_scheduler_class, nested_key, "optimizer")
        self.lr_scheduler_keys[nested_key] = (lr_scheduler_class, link_to)

    def _add_classes(self, classes: object, nested_key: str, given_later: str) -> None:
        options: dict[str, Any] = {"instantiate": False, "fail_untyped": False, "skip": {given_later}}
        if isinstance(classes, tuple):
            self.add_subclass_arguments(classes, nested_key, required=False, **options)
        else:
            self.add_class_arguments(classes, nested_key, sub_configs=True, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with what is wrong, where it stands, and what was probably meant."""
        parsers = [self, *self.command_parsers.values()]
        files = [path for parser in parsers for path in parser.files_read]
        keys = {action.dest for parser in parsers for action in parser._actions}
        super().error(explain(message, files, keys), ex)
        raise SystemExit(2)  # what jsonargparse has done already


@functools.cache
def prepare_jsonargparse() -> None:
    """What jsonargparse must know once: files with a URL, functions without a path, and all our classes by name."""
    set_parsing_settings(config_read_mode_fsspec_enabled=is_installed("fsspec"))
    register_unresolvable_import_paths(torch)
    # A name means what the Trainer takes: Fabric's classes of the same names, which it refuses, are given by their paths.
    # jsonargparse has no public way to leave classes out.
    find_paths = _typehints.get_all_subclass_paths

    @functools.wraps(find_paths)
    def find_named_classes(*args: Any, **kwargs: Any) -> list[str]:
        return [path for path in find_paths(*args, **kwargs) if not path.startswith(OF_FABRIC)]

    _typehints.get_all_subclass_paths = find_named_classes
    for door in DOORS:
        for name in importlib.import_module(f"fulmen.{door}").__all__:
            pkgutil.resolve_name(f"fulmen.{door}:{name}")


def as_class(source: Callable[..., Any]) -> type:
    """The class itself, or one whose constructor is the function."""
    if inspect.isclass(source):
        return source
    try:
        made: type = class_from_function(source)
    except ValueError as error:
        name = source.__name__ if inspect.isroutine(source) else repr(source)
        what = f"`{name}` does not say what it returns: {error}."
        raise MisconfigurationException(f"{what} Annotate it: `def {name}(...) -> MyModule:`.") from error
    return made


def argument_texts(docstring: str) -> dict[str, str]:
    """What a docstring says about each argument, in whatever sections they stand."""
    entry = re.compile(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entry.findall(inspect.cleandoc(docstring))}


def keys_of(classes: dict[str, tuple[Any, str]], kinds: Iterable[type]) -> list[str]:
    """The keys among them whose objects the command line makes itself."""
    found = []
    for key, (given, link_to) in classes.items():
        options = given if isinstance(given, tuple) else (given,)
        if link_to == "AUTOMATIC" and any(issubclass(option, tuple(kinds)) for option in options):
            found.append(key)
    return found
