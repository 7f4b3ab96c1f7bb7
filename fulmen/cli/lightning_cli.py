"""`LightningCLI`: reads a configuration, makes a module, a datamodule and a Trainer of it, and runs what was asked for."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import yaml
from jsonargparse import Namespace
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fulmen.callbacks.callback import Callback
from fulmen.checkpoint.load import read_checkpoint
from fulmen.checkpoint.rebuild import import_class
from fulmen.cli.classes import RememberingInstantiator, as_class_path, instantiate_class, instantiate_config
from fulmen.cli.parser import ConfigFile, LightningArgumentParser, as_class, keys_of
from fulmen.cli.save_config import SaveConfigCallback, dump_options
from fulmen.cli.types import ArgsType, LRSchedulerTypeTuple, LRSchedulerTypeUnion, ReduceLROnPlateau
from fulmen.datamodule import LightningDataModule
from fulmen.module import LightningModule
from fulmen.trainer import Trainer
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.introspection import is_overridden
from fulmen.utilities.rank_zero import rank_zero_warn
from fulmen.utilities.seed import seed_everything


class LightningCLI:
    """A command line for a module and a datamodule: every argument of their constructors and of the Trainer's is an option.

    Making the object does everything: it reads options, files and environment variables, makes the objects, and calls
    the method of the Trainer that the user named.

    Arguments: what is run
        model_class: A `LightningModule` class, or a function whose return annotation is one. None lets the user choose
            any subclass with `--model=path.of.Class`.
        datamodule_class: The same for a `LightningDataModule`; None makes it optional, too.
        trainer_class: A `Trainer` class, or a function whose return annotation is one.
        run: Take one of the commands fit, validate, test and predict and run it; False only makes the objects.
        args: A list of options, or a dict or `Namespace` of values, instead of `sys.argv`.

    Arguments: how it is made
        save_config_callback: Keeps the configuration of each run; None for none.
        save_config_kwargs: Arguments of that callback.
        trainer_defaults: Arguments of the Trainer that the user may change; its "callbacks" are always added.
        seed_everything_default: The default of `--seed_everything`: a seed, True for `PL_GLOBAL_SEED` or 0, False for
            none.
        parser_kwargs: Arguments of the parser; under the name of a command, those of the command's parser.
        parser_class: The class of the parsers.
        subclass_mode_model: Let the user choose a subclass of `model_class`.
        subclass_mode_data: Let the user choose a subclass of `datamodule_class`.
        auto_configure_optimizers: Add `--optimizer` and `--lr_scheduler`, which take the place of the module's
            `configure_optimizers` when they are used.
        load_from_checkpoint_support: Let `save_hyperparameters` keep nested objects as class paths and arguments.

    Examples:
        >>> cli = LightningCLI(LightningModule, run=False, args=["--trainer.max_epochs=3", "--seed_everything=7"])
        >>> cli.trainer.max_epochs, cli.config.seed_everything
        (3, 7)
    """

    def __init__(
        self, model_class: type[LightningModule] | Callable[..., LightningModule] | None = None,
        datamodule_class: type[LightningDataModule] | Callable[..., LightningDataModule] | None = None,
        save_config_callback: type[SaveConfigCallback] | None = SaveConfigCallback,
        save_config_kwargs: dict[str, Any] | None = None,
        trainer_class: type[Trainer] | Callable[..., Trainer] = Trainer,
        trainer_defaults: dict[str, Any] | None = None, seed_everything_default: bool | int = True,
        parser_kwargs: dict[str, Any] | dict[str, dict[str, Any]] | None = None,
        parser_class: type[LightningArgumentParser] = LightningArgumentParser, subclass_mode_model: bool = False,
        subclass_mode_data: bool = False, args: ArgsType = None, run: bool = True,
        auto_configure_optimizers: bool = True, load_from_checkpoint_support: bool = True,
    ) -> None:  # fmt: skip
        self.save_config_callback = save_config_callback
        self.save_config_kwargs = save_config_kwargs or {}
        self.trainer_class = trainer_class
        self.trainer_defaults = trainer_defaults or {}
        self.seed_everything_default = seed_everything_default
        self.parser_kwargs = parser_kwargs or {}
        self.parser_class = parser_class
        self.auto_configure_optimizers = auto_configure_optimizers
        self.model_class = model_class or LightningModule
        self.datamodule_class = datamodule_class or LightningDataModule
        self.subclass_mode_model = model_class is None or subclass_mode_model
        self.subclass_mode_data = datamodule_class is None or subclass_mode_data
        self._datamodule_is_optional = datamodule_class is None
        self._method_arguments: dict[str, list[str]] = {}
        self._instantiators: list[tuple[Any, type, bool]] = []

        self.config_dump: dict[str, Any] = {}
        self.setup_parser(run, *self._split_parser_kwargs())
        self.parse_arguments(self.parser, args)
        self._read_hparams_of_checkpoint()
        self.subcommand: str | None = self.config["subcommand"] if run else None
        self._make_and_run(load_from_checkpoint_support)

    def _make_and_run(self, remember_config: bool) -> None:
        self._seed_generators()
        if remember_config:
            self._dump_config()
            self._remember_hparams()
        self.before_instantiate_classes()
        self.instantiate_classes()
        self.after_instantiate_classes()
        if self.subcommand:
            self._run_subcommand(self.subcommand)

    # ------------------------------------------------------------------ the parser

    def _split_parser_kwargs(self) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Those of the main parser, and those of the commands by their names."""
        commands = self.subcommands()
        main = {name: value for name, value in self.parser_kwargs.items() if name not in commands}
        by_command = {name: value for name, value in self.parser_kwargs.items() if name in commands}
        return main, by_command

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that has nothing but `--config`; `kwargs` are those of its class."""
        kwargs.setdefault("dump_header", [f"fulmen=={importlib.import_module('fulmen').__version__}"])
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ConfigFile, help="Path to a configuration file in json or yaml format."
        )
        return parser

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, dict[str, Any]]
    ) -> None:
        """Makes `self.parser`: with commands, or with all arguments itself."""
        self.parser = self.init_parser(**main_kwargs)
        if add_subcommands:
            self._add_subcommands(subparser_kwargs)
        else:
            self._add_arguments(self.parser)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--seed_everything`."""
        parser.add_argument(
            "--seed_everything",
            type=bool | int,
            default=self.seed_everything_default,
            help="An integer seeds python, numpy and torch before anything is made. True takes the seed of the "
            "environment variable PL_GLOBAL_SEED, or 0; false seeds nothing.",
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the arguments of the Trainer, the module and the datamodule."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        presets = {f"trainer.{name}": value for name, value in self.trainer_defaults.items() if name != "callbacks"}
        parser.set_defaults(presets)
        parser.add_lightning_class_args(self.model_class, "model", subclass_mode=self.subclass_mode_model)
        required = not self._datamodule_is_optional
        parser.add_lightning_class_args(self.datamodule_class, "data", self.subclass_mode_data, required)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """For subclasses: add arguments of your own, and link arguments to each other."""

    def _add_arguments(self, parser: LightningArgumentParser) -> None:
        self.add_default_arguments_to_parser(parser)
        self.add_core_arguments_to_parser(parser)
        self.add_arguments_to_parser(parser)
        if self.auto_configure_optimizers:
            if not parser.optimizer_keys:
                parser.add_optimizer_args((Optimizer,))
            if not parser.lr_scheduler_keys:
                parser.add_lr_scheduler_args(LRSchedulerTypeTuple)
        self.link_optimizers_and_lr_schedulers(parser)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The methods of the Trainer that are commands, each with the arguments that are no options."""
        evaluation = {"model", "dataloaders", "datamodule"}
        fit = {"model", "train_dataloaders", "val_dataloaders", "datamodule"}
        return {"fit": fit, "validate": evaluation, "test": set(evaluation), "predict": set(evaluation)}

    def _add_subcommands(self, subparser_kwargs: dict[str, dict[str, Any]]) -> None:
        commands = self.parser.add_subcommands()
        trainer_class = as_class(self.trainer_class)
        for name, hidden in self.subcommands().items():
            parser = self.init_parser(**subparser_kwargs.get(name, {}))
            self._add_arguments(parser)
            added = parser.add_method_arguments(trainer_class, name, skip=set(hidden))
            self._method_arguments[name] = list(added)
            self.parser.command_parsers[name] = parser
            commands.add_subcommand(name, parser, help=first_sentence(getattr(trainer_class, name)))

    @staticmethod
    def link_optimizers_and_lr_schedulers(parser: LightningArgumentParser) -> None:
        """Links what was added with `link_to=...`; the argument of the module gets a dict for `instantiate_class`."""
        for key, (given, link_to) in {**parser.optimizer_keys, **parser.lr_scheduler_keys}.items():
            if link_to == "AUTOMATIC":
                continue
            if isinstance(given, tuple):
                parser.link_arguments(key, link_to)
            else:
                parser.link_arguments(key, link_to, compute_fn=functools.partial(as_class_path, given))

    # ------------------------------------------------------------------ the configuration

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Makes `self.config`, from the arguments of the program or from `args`."""
        if args is not None and len(sys.argv) > 1:
            rank_zero_warn(
                "LightningCLI's args parameter is for calling it from Python, as if from a shell. To prevent mistakes "
                "it should not be given beside command line arguments, got: "
                f"sys.argv[1:]={sys.argv[1:]}, args={args}."
            )
        if isinstance(args, (dict, Namespace)):
            self.config: Namespace = parser.parse_object(args)
        else:
            self.config = parser.parse_args(args)

    def _read_hparams_of_checkpoint(self) -> None:
        """The hyper-parameters stored in `--ckpt_path` become those of the model."""
        command = self.config.get("subcommand")
        file = self.config[command].get("ckpt_path") if command else None
        if not file or not os.path.isfile(file):
            return
        stored = dict(read_checkpoint(file, "cpu", None).get(LightningModule.CHECKPOINT_HYPER_PARAMS_KEY) or {})
        stored.pop("_instantiator", None)
        if not stored:
            return
        path = stored.pop("_class_path", None)
        stored = own_arguments(self.model_class if path is None else import_class(path), stored)
        if path is not None:
            stored = {"class_path": path, "dict_kwargs": stored}
        given = self._model_arguments_given(command)
        try:
            self.config = self.parser.parse_object({command: {"model": stored}}, self.config)
        except SystemExit:
            sys.stderr.write(f"Parsing of ckpt_path hyperparameters failed! They are those in {os.fspath(file)!r}.\n")
            raise
        new = self.config[command].get("model")
        for name, value in given.items():
            if (stored_value := new.get(name, new.get(f"init_args.{name}"))) != value:
                what = f"`--model.{name}={value}` is replaced by {stored_value!r}"
                rank_zero_warn(f"{what}, which the checkpoint of `--ckpt_path` was made with.")

    def _model_arguments_given(self, command: str) -> dict[str, Any]:
        """The arguments of the model that are neither defaults nor filled in by links, by name."""
        parser = self.parser.command_parsers[command]
        options = dump_options(parser)
        text = parser.dump(self.config[command], skip_default=True, skip_link_targets=True, **options)
        written = (yaml.safe_load(text) or {}).get("model") or {}
        model = self.config[command].get("model")
        if model is not None and "class_path" in model:
            written = written.get("init_args") or {}
            model = model.get("init_args")
        values = {} if model is None else vars(model)
        return {name: values[name] for name in written if not isinstance(values.get(name, Namespace()), Namespace)}

    def _seed_generators(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        seed = config.get("seed_everything", False)
        if seed is False:
            return
        config["seed_everything"] = (
            seed_everything(workers=True) if seed is True else seed_everything(seed, workers=True)
        )

    def _dump_config(self) -> None:
        text = self.parser.dump(self.config, skip_link_targets=False, **dump_options(self.parser))
        dump = yaml.safe_load(text)
        self.config_dump = dump[self.subcommand] if self.subcommand else dump

    def _remember_hparams(self) -> None:
        """Makes `save_hyperparameters` keep the configuration of the model and of the datamodule."""
        for key, cls, subclasses in (
            ("model", self.model_class, self.subclass_mode_model),
            ("data", self.datamodule_class, self.subclass_mode_data),
        ):
            if inspect.isclass(cls):
                maker = RememberingInstantiator(self.config_dump.get(key) or {})
                self._instantiators.append((maker, cls, subclasses))

    def _get(self, config: Namespace, key: str, default: object = None) -> Any:
        """The value in the part of the configuration that belongs to the command."""
        return config.get(key if self.subcommand is None else f"{self.subcommand}.{key}", default)

    # ------------------------------------------------------------------ the objects

    def before_instantiate_classes(self) -> None:
        """For subclasses: runs before objects are made."""

    def instantiate_classes(self) -> None:
        """Makes `config_init`, `datamodule`, `model` and `trainer`."""
        self.config_init: Namespace = instantiate_config(self.parser, self.config, self._instantiators)
        self.datamodule: LightningDataModule | None = self._get(self.config_init, "data")
        self.model: LightningModule = self._get(self.config_init, "model")
        self._configure_optimizers_of_model()
        self.trainer: Trainer = self.instantiate_trainer()

    def after_instantiate_classes(self) -> None:
        """For subclasses: runs when the objects are made."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer of the configuration; `kwargs` replace arguments of it."""
        config = self._get(self.config_init, "trainer")
        arguments = {**(vars(config) if config is not None else {}), **kwargs}
        chosen = [self._get(self.config_init, key) for key in self._parser.callback_keys]
        forced = [callback for callback in chosen if callback is not None]  # those that need not be given
        if "callbacks" in arguments:
            arguments["callbacks"] = [*as_list(arguments["callbacks"]), *self._added_callbacks(arguments, forced)]
        else:
            name = as_class(self.trainer_class).__qualname__
            rank_zero_warn(f"The `{name}` class does not expose the `callbacks` argument so they will not be included.")
        return self.trainer_class(**arguments)

    def _added_callbacks(self, arguments: Mapping[str, Any], forced: list[Callback]) -> list[Callback]:
        """Those that the program adds to those of the configuration."""
        added = [*forced, *as_list(self.trainer_defaults.get("callbacks"))]
        if self.save_config_callback is not None and not arguments.get("fast_dev_run"):
            config = self.config if self.subcommand is None else self.config[self.subcommand]
            added.append(self.save_config_callback(self._parser, config, **self.save_config_kwargs))
        return added

    @property
    def _parser(self) -> LightningArgumentParser:
        """The parser of the command."""
        return self.parser if self.subcommand is None else self.parser.command_parsers[self.subcommand]

    # ------------------------------------------------------------------ optimizers

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: LRSchedulerTypeUnion | None = None
    ) -> Any:
        """What the module's `configure_optimizers` returns when `--optimizer` was given.

        Arguments:
            lightning_module: The module.
            optimizer: The optimizer of all its parameters.
            lr_scheduler: The scheduler of `--lr_scheduler`.
        """
        if lr_scheduler is None:
            return optimizer
        if isinstance(lr_scheduler, ReduceLROnPlateau):
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": lr_scheduler, "monitor": lr_scheduler.monitor},
            }
        return [optimizer], [lr_scheduler]

    def _configure_optimizers_of_model(self) -> None:
        """Gives the module a `configure_optimizers` that returns what the user asked for on the command line."""
        if not self.auto_configure_optimizers:
            return
        parser = self._parser
        optimizers = keys_of(parser.optimizer_keys, (Optimizer,))
        schedulers = keys_of(parser.lr_scheduler_keys, (LRScheduler, ReduceLROnPlateau))
        if not optimizers:
            return
        if len(optimizers) > 1 or len(schedulers) > 1:
            raise MisconfigurationException(
                f"`{type(self).__name__}` expects at most one optimizer and one lr_scheduler to be 'AUTOMATIC', but "
                f"found {optimizers + schedulers}. With several, link them to arguments of the module "
                "(`link_to='model.NAME'`), and make them in its `configure_optimizers` with `instantiate_class`."
            )
        optimizer_init = self._init_of(optimizers[0], parser.optimizer_keys)
        scheduler_init = self._init_of(schedulers[0], parser.lr_scheduler_keys) if schedulers else None
        if not optimizer_init:
            if scheduler_init:
                rank_zero_warn(f"`--{schedulers[0]}` has no effect without `--{optimizers[0]}`. Add that.")
            return
        if is_overridden("configure_optimizers", self.model):
            name = f"{type(self.model).__name__}.configure_optimizers"
            rank_zero_warn(f"`{name}` will be overridden by `{type(self).__name__}.configure_optimizers`.")
        optimizer = instantiate_class(self.model.parameters(), optimizer_init)
        scheduler = instantiate_class(optimizer, scheduler_init) if scheduler_init else None
        function = functools.partial(self.configure_optimizers, optimizer=optimizer, lr_scheduler=scheduler)
        functools.update_wrapper(function, self.configure_optimizers)
        self.model.configure_optimizers = MethodType(function, self.model)  # type: ignore[method-assign]

    def _init_of(self, key: str, classes: dict[str, tuple[Any, str]]) -> Mapping[str, Any] | None:
        """Class path and arguments of an optimizer or a scheduler, None if the user asks for none."""
        given = self._get(self.config_init, key)
        fixed = classes[key][0]
        return given if isinstance(fixed, tuple) else as_class_path(fixed, given)

    # ------------------------------------------------------------------ the run

    def _run_subcommand(self, name: str) -> None:
        """Runs the command: the method of this class if it has one of that name, else that of the Trainer."""
        self._call_own_method(f"before_{name}")
        run = getattr(self, name, None) or getattr(self.trainer, name)
        config = self.config_init[name]
        arguments = {key: config[key] for key in self._method_arguments[name] if key in config}
        arguments["model"] = self.model
        if self.datamodule is not None:
            arguments["datamodule"] = self.datamodule
        run(**arguments)
        self._call_own_method(f"after_{name}")

    def _call_own_method(self, name: str) -> None:
        method = getattr(self, name, None)
        if callable(method):
            method()


def own_arguments(source: Callable[..., Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that only base classes take: their constructors are called by that of the class."""
    own = inspect.signature(source).parameters.values()
    if not inspect.isclass(source) or any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
        return dict(stored)
    constructors = [vars(base)["__init__"] for base in source.__mro__[1:] if "__init__" in vars(base)]
    of_bases = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
    names = {parameter.name for parameter in own}
    return {name: value for name, value in stored.items() if name in names or name not in of_bases}


def as_list(value: object) -> list[Any]:
    """None is nothing, and one object is a list of it."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def first_sentence(function: Callable[..., Any]) -> str:
    """The first paragraph of a function's docstring, for a help text."""
    paragraph = (inspect.getdoc(function) or "").split("\n\n")[0]
    return " ".join(paragraph.split())
