import functools
import math

import pytest

from fulmen.callbacks.callback import Callback
from fulmen.utilities.introspection import is_overridden, num_positional, overrides_method, takes_argument


class Base:
    def hook(self, batch, batch_idx): ...


class Same(Base): ...


class Own(Base):
    def hook(self, batch): ...


def test_only_a_body_of_its_own_counts_as_overridden():
    assert not overrides_method(Same(), "hook", Base)
    assert overrides_method(Own(), "hook", Base)
    assert not overrides_method(None, "hook", Base)
    assert not overrides_method(Own(), "missing", Base)


def test_functions_on_the_instance_count():
    instance = Same()
    instance.hook = lambda batch: None
    assert overrides_method(instance, "hook", Base)
    instance.hook = None
    assert not overrides_method(instance, "hook", Base)
    instance.hook = functools.partial(Base.hook, instance)
    assert not overrides_method(instance, "hook", Base)


def test_the_public_question_finds_the_class_to_compare_with():
    class Mine(Callback):
        def on_fit_start(self, trainer, pl_module): ...

    assert is_overridden("on_fit_start", Mine())
    assert not is_overridden("on_fit_end", Mine())
    assert not is_overridden("no_such_hook", Mine())
    assert not is_overridden("on_fit_start", None)
    assert is_overridden("hook", Own(), Base)
    with pytest.raises(ValueError, match="parent"):
        is_overridden("hook", Own())


def test_what_a_function_accepts():
    assert takes_argument(Own().hook, "batch") and not takes_argument(Own().hook, "batch_idx")
    assert takes_argument(lambda **kwargs: 0, "anything") and not takes_argument(lambda **k: 0, "a", explicit=True)
    assert num_positional(Base().hook) == 2
    assert num_positional(lambda *args: 0) == math.inf
