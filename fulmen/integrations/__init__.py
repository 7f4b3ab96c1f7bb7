"""The engines a run may be started by that ask for more than ranks: reports of progress, and checkpoints of their own.

Nothing here is imported unless such an engine is there: `defaults` looks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__all__ = ["KubeflowProgress"]

if TYPE_CHECKING:
    from fulmen.integrations.kubeflow import KubeflowProgress
else:
    __getattr__, __dir__ = lazy_exports(__name__)
