"""What is private in the API and used by programs and libraries all the same: which of it there is here, and how far."""

from __future__ import annotations

from typing import NamedTuple

from fulmen.compat.private_names import PLACES


class Grade(NamedTuple):
    """How far a private name is served.

    Attributes:
        grade: "full", "read-only" (what is written to it, or made of it, does not reach fulmen) or "absent".
        note: what is different, or the public way.
    """

    grade: str
    note: str = ""


MADE_BY_STRATEGIES = "for `isinstance`; made by strategies, from arguments of their own"
MADE_BY_LOOPS = "for `isinstance`; made by the Trainer, from arguments of their own"
NOTES: dict[str, Grade] = {
    "fabric.strategies.launchers.multiprocessing._MultiProcessingLauncher": Grade("read-only", MADE_BY_STRATEGIES),
    "fabric.strategies.launchers.subprocess_script._SubprocessScriptLauncher": Grade("read-only", MADE_BY_STRATEGIES),
    "fabric.utilities.load._NotYetLoadedTensor": Grade("read-only", "no tensor is one: they read their file when used"),
    "loops.fetchers._DataFetcher": Grade("read-only", MADE_BY_LOOPS),
    "loops.fetchers._DataLoaderIterDataFetcher": Grade("read-only", MADE_BY_LOOPS),
    "loops.fetchers._PrefetchDataFetcher": Grade("read-only", MADE_BY_LOOPS),
    "loops.optimization.automatic._AutomaticOptimization": Grade("read-only", MADE_BY_LOOPS),
    "loops.optimization.manual._ManualOptimization": Grade("read-only", MADE_BY_LOOPS),
    "strategies.launchers._MultiProcessingLauncher": Grade("read-only", MADE_BY_STRATEGIES),
    "strategies.launchers._SubprocessScriptLauncher": Grade("read-only", MADE_BY_STRATEGIES),
    "trainer.connectors.data_connector._DataLoaderSource": Grade("read-only", MADE_BY_LOOPS),
    "trainer.connectors.logger_connector.result._ResultCollection": Grade("read-only", MADE_BY_LOOPS),
    "trainer.connectors.logger_connector.result._ResultMetric": Grade("read-only", MADE_BY_LOOPS),
    "trainer.connectors.signal_connector._SignalConnector": Grade("read-only", MADE_BY_LOOPS),
}

GRADES: dict[str, Grade] = {name: NOTES.get(name, Grade("full")) for name in PLACES}
