"""The engines a run may be started by that ask for more than ranks: reports of progress, and checkpoints of their own.

Nothing here is imported unless such an engine is there: `defaults` looks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen.utilities.lazy import lazy_exports

__all__ = ["KubeflowProgress", "RayTrainEnvironment", "RayTrainReport", "join_ray_train"]

if TYPE_CHECKING:
    from fulmen.integrations.kubeflow import KubeflowProgress
    from fulmen.integrations.ray_train import RayTrainEnvironment, RayTrainReport, join_ray_train
else:
    __getattr__, __dir__ = lazy_exports(__name__)
