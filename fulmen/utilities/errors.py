"""Exception and warning classes, and suggestions for names that nobody knows."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterable


class MisconfigurationException(Exception):
    """The user's code or arguments ask for something that cannot work."""


class SIGTERMException(SystemExit):
    """Raised inside the loops when the process was told to end; plug-ins may react in ``on_exception``."""


class PossibleUserWarning(UserWarning):
    """Something that is probably, but not certainly, a mistake."""


class LightningDeprecationWarning(DeprecationWarning):
    """A use that still works today and will be removed."""


# Python hides deprecations outside of `__main__`; ours are meant for users. A filter added later by the user wins.
warnings.simplefilter("default", category=LightningDeprecationWarning)


def disable_possible_user_warnings(module: str = "") -> None:
    """Hide each `PossibleUserWarning` from modules that match; ``POSSIBLE_USER_WARNINGS=off`` hides it from all."""
    warnings.filterwarnings("ignore", module=module, category=PossibleUserWarning)


if os.environ.get("POSSIBLE_USER_WARNINGS", "").lower() in ("0", "off"):
    disable_possible_user_warnings()


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice spelled most like ``name``, or None when nothing comes close."""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[found[0]] if found else None


def suggestion(name: str, choices: Iterable[str]) -> str:
    """A sentence to append to an error about an unknown name (with its leading space), or an empty string."""
    found = nearest(name, choices)
    return f" Did you mean `{found}`?" if found else ""
