"""Where loaders come from: the call's arguments, the datamodule or the module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fulmen.data.loaders import record_arguments
from fulmen.utilities.errors import MisconfigurationException, explain
from fulmen.utilities.introspection import overrides_method
from fulmen.utilities.rank_zero import warn_once

KINDS = ("train", "val", "test", "predict")


@dataclass
class Source:
    """Who gives the loaders of one kind: an argument of the call, or a hook of the datamodule or the module."""

    hook_name: str
    owner: object
    base: type
    argument: object
    verb: str
    beside_module: bool
    watch: Callable[[Any], None] | None = None  # is told of what was given, each time

    @property
    def display_name(self) -> str:
        """Where the loaders come from, for messages."""
        if self.argument is None:
            return f"`{self.hook_name}` of `{type(self.owner).__name__}`"
        name = f"{self.hook_name}s" if self.verb == "fit" else "dataloaders"
        return f"argument `{name}` of `Trainer.{self.verb}`"

    def is_defined(self) -> bool:
        """Was the argument given, or does the owner implement the hook?"""
        return self.argument is not None or overrides_method(self.owner, self.hook_name, self.base)

    def request_loaders(self) -> Any:
        """The loader or loaders as the user gave them; a hook is called anew each time."""
        given = self._ask_owner()
        if self.watch is not None:
            self.watch(given)
        return given

    def _ask_owner(self) -> Any:
        if self.argument is not None:
            return self.argument
        if self.is_defined():
            with record_arguments():
                return getattr(self.owner, self.hook_name)()
        owner = type(self.owner).__name__
        what = f"`{self.hook_name}` must be implemented for `Trainer.{self.verb}`, and `{owner}` does not do so."
        why = "Beside a datamodule, the loaders of the module are not used." if self.beside_module else ""
        fix = f"Write `def {self.hook_name}(self): return DataLoader(...)`, or give loaders to `Trainer.{self.verb}`."
        raise MisconfigurationException(explain(what, why, fix))


class Sources:
    """Who gives which loaders and batch hooks in this call of the Trainer; a hook of the base class does not count."""

    def __init__(self, module_base: type, datamodule_base: type) -> None:
        self.module_base = module_base
        self.datamodule_base = datamodule_base
        self._sources: dict[str, Source] = {}

    def attach_data(self, module: object, *, datamodule: object = None, verb: str = "fit", **given: Any) -> None:
        """Note what ``Trainer.<verb>`` was given, loaders by kind; beside a datamodule, those of the module are not used."""
        beside = datamodule is not None
        owner, base = (datamodule, self.datamodule_base) if beside else (module, self.module_base)
        for kind in KINDS:
            self._sources[kind] = Source(f"{kind}_dataloader", owner, base, given.get(kind), verb, beside)

    def watched_by(self, watch: Callable[[Any], None]) -> Sources:
        """The same sources, of which ``watch`` is told whatever loaders they give."""
        watched = Sources(self.module_base, self.datamodule_base)
        watched._sources = {kind: replace(source, watch=watch) for kind, source in self._sources.items()}
        return watched

    def source_of(self, kind: str) -> Source:
        """Who gives the loaders of ``"train"``, ``"val"``, ``"test"`` or ``"predict"``."""
        return self._sources[kind]

    def transfer_owner(self, hook_name: str, module: object, datamodule: object = None) -> Any:
        """The object whose batch-transfer hook runs: the datamodule if it overrides the hook, else the module."""
        in_module = overrides_method(module, hook_name, self.module_base)
        if overrides_method(datamodule, hook_name, self.datamodule_base):
            if in_module:
                warn_once(
                    f"`{hook_name}` is overridden in both `LightningModule` and `LightningDataModule`: the latter's is used."
                )
            return datamodule
        if in_module and datamodule is not None:
            warn_once(f"`{hook_name}` of the module is used, because the datamodule does not define it.")
        return module

    def prepare_data(self, module: Any, datamodule: Any = None, *, local_rank: int = 0, global_rank: int = 0) -> None:
        """Let datamodule and module prepare their data, in one process of each node or of all, as each of them wants."""
        for owner, base in ((datamodule, self.datamodule_base), (module, self.module_base)):
            if overrides_method(owner, "prepare_data", base):
                rank = local_rank if owner.prepare_data_per_node else global_rank
                if rank == 0:
                    owner.prepare_data()
