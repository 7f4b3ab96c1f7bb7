"""`ServableModule`: what a module needs to know so that it can be asked over HTTP."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class ServableModule(ABC, nn.Module):
    """A base class beside `LightningModule` for modules that are served.

    A request is JSON: its "body" has arguments of `serve_step` by name. Deserializers make tensors of them, `serve_step`
    computes, and serializers make JSON of its results again.

    Examples:
        >>> import torch
        >>> from fulmen.demos import BoringModel
        >>> class Servable(BoringModel, ServableModule):
        ...     def configure_payload(self):
        ...         return {"body": {"x": [[0.0] * 32]}}
        ...     def configure_serialization(self):
        ...         return {"x": torch.tensor}, {"output": Tensor.tolist}
        ...     def serve_step(self, x):
        ...         return {"output": torch.zeros_like(self(x))}
        ...     def configure_response(self):
        ...         return {"output": [[0.0, 0.0]]}
        >>> servable = Servable()
    """

    @abstractmethod
    def configure_payload(self) -> dict[str, Any]:
        """A request to try: a dictionary whose "body" holds arguments of `serve_step`, as JSON can."""

    @abstractmethod
    def configure_serialization(self) -> tuple[dict[str, Callable[[Any], Any]], dict[str, Callable[[Any], Any]]]:
        """How values change between JSON and tensors.

        Returns:
            By name of an argument, what makes it of its JSON; and by name of a result, what makes JSON of it.
        """

    @abstractmethod
    def serve_step(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """Computes the answer to a request, without gradients and in eval mode; arguments come by name.

        Returns:
            The results by name.
        """

    @abstractmethod
    def configure_response(self) -> dict[str, Any]:
        """The answer that `configure_payload` must get, as JSON."""
