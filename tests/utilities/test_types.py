from fulmen.utilities.types import (
    GradClipAlgorithmType,
    LRSchedulerConfig,
    RunningStage,
    TrainerFn,
    TrainerState,
    TrainerStatus,
)


def test_members_equal_their_value_in_any_case():
    assert TrainerFn.FITTING == "fit" == TrainerFn.FITTING.value
    assert TrainerFn.FITTING == "FIT" and TrainerFn.FITTING != "test"
    assert {TrainerFn.FITTING: 1}["fit"] == 1
    assert TrainerFn("fit") is TrainerFn.FITTING


def test_clipping_algorithms():
    assert [kind.value for kind in GradClipAlgorithmType] == ["value", "norm"]


def test_stages_know_what_they_do():
    evaluating = {stage.value for stage in RunningStage if stage.evaluating}
    assert evaluating == {"validate", "test", "sanity_check"}


def test_the_state_starts_idle_and_ends_stopped():
    state = TrainerState()
    assert (state.status, state.fn, state.stage) == (TrainerStatus.INITIALIZING, None, None)
    assert not state.stopped
    state.status = TrainerStatus.INTERRUPTED
    assert state.stopped and not state.finished


def test_records():
    config = LRSchedulerConfig(scheduler=None)
    assert (config.interval, config.frequency, config.strict, config.reduce_on_plateau) == ("epoch", 1, True, False)
