"""`Loop`: what the loops share, which is how they are pickled and copied."""

from __future__ import annotations

from typing import Any, ClassVar


class Loop:
    """A loop whose copies are as it was made, but for the attributes in `lasting`.

    What a run binds (hooks, feeds, loaders) cannot be pickled, and the next run binds its own.
    """

    lasting: ClassVar[tuple[str, ...]] = ()
    _made_with: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        self._made_with = args, kwargs
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*self.lasting, "_made_with")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        args, kwargs = state["_made_with"]
        type(self).__init__(self, *args, **kwargs)
        vars(self).update(state)
