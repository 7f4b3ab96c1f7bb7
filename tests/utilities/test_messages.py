"""What users get to read: errors, suggestions, and messages from one process only."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import fulmen
from fulmen.utilities.errors import (
    LightningDeprecationWarning,
    PossibleUserWarning,
    explain,
    find_nearest_name,
    suggest_name,
)
from fulmen.utilities.optional import import_optional, is_installed
from fulmen.utilities.rank_zero import (
    WarningCache,
    rank_prefixed_message,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
    warn_once,
)


@pytest.fixture
def as_rank_one(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(Path(fulmen.__file__).parents[1]), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)


def test_a_message_has_its_parts_as_sentences():
    assert explain("`x=3` is odd", "Pairs are needed.", "Use 2") == "`x=3` is odd. Pairs are needed. Use 2."
    assert explain("Is `x` there?", fix="  Look: ") == "Is `x` there? Look:"
    assert explain("`x` is missing.") == "`x` is missing."


def test_the_closest_spelling_is_suggested_in_any_case():
    assert find_nearest_name("DPP", ["ddp", "fsdp"]) == "ddp"
    assert suggest_name("max_epoch", ["max_epochs", "min_steps"]) == " Did you mean `max_epochs`?"
    assert suggest_name("zzz", ["max_epochs"]) == ""


def test_other_ranks_get_the_default():
    @rank_zero_only
    def answer():
        return 42

    assert answer() == 42
    rank_zero_only.rank = 1
    try:
        assert answer() is None
        assert rank_zero_only(lambda: 42, default=7)() == 7
    finally:
        rank_zero_only.rank = 0


def test_other_ranks_are_silent(as_rank_one, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rank_zero_warn("not heard")
        rank_zero_deprecation("not heard")
    rank_zero_info("not heard")
    assert not caplog.records


def test_an_unknown_rank_is_an_error(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", None)
    with pytest.raises(RuntimeError, match="rank"):
        rank_zero_only(print)()


def test_the_rank_comes_from_the_launcher():
    code = "from fulmen.utilities.rank_zero import rank_zero_only; print(rank_zero_only.rank)"
    assert run_python(code, RANK="3").stdout.strip() == "3"


def test_warnings_point_at_the_line_of_the_caller():
    cache = WarningCache()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rank_zero_warn("a")
        rank_zero_deprecation("b")
        cache.warn("c", category=PossibleUserWarning)
        warn_once("d, and never again")
    assert {warning.filename for warning in caught} == {__file__}
    categories = [UserWarning, LightningDeprecationWarning, PossibleUserWarning, UserWarning]
    assert [warning.category for warning in caught] == categories


def test_log_records_name_the_caller(caplog):
    with caplog.at_level(logging.INFO, logger="fulmen"):
        rank_zero_info("hello")
    assert [record.pathname for record in caplog.records] == [__file__]


def test_a_cached_warning_is_said_once():
    cache = WarningCache()
    with pytest.warns(UserWarning, match="once") as caught:
        cache.warn("once")
        cache.warn("once")
    assert len(caught) == 1
    assert "once" in cache


def test_info_reaches_the_console_until_logging_is_configured():
    code = "from fulmen.utilities import rank_zero_info; {}; rank_zero_info('hello')"
    assert run_python(code.format("pass")).stderr == "hello\n"
    assert run_python(code.format("import logging; logging.basicConfig(level=20)")).stderr == "INFO:fulmen:hello\n"


def test_deprecations_are_shown_and_possible_mistakes_can_be_silenced():
    # The texts are made from parts: since Python 3.13, a warning shows the source of `-c` code.
    code = (
        "from fulmen.utilities.rank_zero import *\n"
        "from fulmen.utilities.errors import PossibleUserWarning\n"
        "rank_zero_deprecation('ol' + 'd'); rank_zero_warn('may' + 'be', category=PossibleUserWarning)"
    )
    heard = run_python(code).stderr
    assert "old" in heard and "maybe" in heard
    for off in ("off", "0"):
        heard = run_python(code, POSSIBLE_USER_WARNINGS=off).stderr
        assert "old" in heard and "maybe" not in heard


def test_the_rank_goes_before_the_message():
    assert rank_prefixed_message("done", 2) == "[rank: 2] done"
    assert rank_prefixed_message("done", None) == "done"


def test_optional_packages_are_found_by_name_and_version():
    assert is_installed("torch") and is_installed("torch", ">=2.0")
    assert not is_installed("torch", ">=1000.1") and not is_installed("no_such_package")
    assert import_optional("json", "here").dumps([1]) == "[1]"


def test_a_missing_package_comes_with_the_line_that_installs_it():
    with pytest.raises(ModuleNotFoundError, match=r'no_such_package.*to draw.*pip install "no_such_package"'):
        import_optional("no_such_package", "to draw")
    with pytest.raises(ModuleNotFoundError, match=r'no version >=1000 is.*pip install "torch>=1000"'):
        import_optional("torch", "to draw", minimum=">=1000")
