import pytest

from fulmen.utilities.types import (
    GradClipAlgorithmType,
    LightningEnum,
    LRSchedulerConfig,
    RunningStage,
    Stateful,
    TrainerFn,
    TrainerState,
    TrainerStatus,
)


def test_members_equal_their_value_in_any_case():
    assert TrainerFn.FITTING == "fit" == TrainerFn.FITTING.value
    assert TrainerFn.FITTING == "FIT" and TrainerFn.FITTING != "test"
    assert {TrainerFn.FITTING: 1}["fit"] == 1
    assert TrainerFn("fit") is TrainerFn.FITTING


def test_members_are_found_by_name_or_value():
    class Mode(LightningEnum):
        FAST_ONE = "quick"

    assert Mode.from_str("fast-one") is Mode.FAST_ONE
    assert Mode.from_str("Quick", source="value") is Mode.FAST_ONE
    assert Mode.try_from_str("nope", source="any") is None
    with pytest.raises(ValueError, match="FAST_ON.*Did you mean `FAST_ONE`"):
        Mode.from_str("FAST_ON")


def test_clipping_algorithms():
    assert GradClipAlgorithmType.supported_types() == ["value", "norm"]
    assert GradClipAlgorithmType.supported_type("norm") and not GradClipAlgorithmType.supported_type("other")


def test_stages_know_what_they_do():
    evaluating = {stage.value for stage in RunningStage if stage.evaluating}
    assert evaluating == {"validate", "test", "sanity_check"}
    assert [stage.dataloader_prefix for stage in RunningStage] == ["train", "val", "val", "test", "predict"]


def test_the_state_starts_idle_and_ends_stopped():
    state = TrainerState()
    assert (state.status, state.fn, state.stage) == (TrainerStatus.INITIALIZING, None, None)
    assert not state.stopped
    state.status = TrainerStatus.INTERRUPTED
    assert state.stopped and not state.finished


def test_records():
    config = LRSchedulerConfig(scheduler=None)
    assert (config.interval, config.frequency, config.strict, config.reduce_on_plateau) == ("epoch", 1, True, False)

    class Counter:
        def state_dict(self): ...

        def load_state_dict(self, state_dict): ...

    assert isinstance(Counter(), Stateful) and not isinstance(object(), Stateful)
