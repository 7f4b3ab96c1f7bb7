from fulmen.utilities import FLOAT16_EPSILON, FLOAT32_EPSILON, FLOAT64_EPSILON
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


def test_a_status_tells_whether_the_run_is_over():
    assert [status.stopped for status in TrainerStatus] == [False, False, True, True]


def test_distances_of_floats_are_those_of_torch():
    assert (FLOAT16_EPSILON, FLOAT32_EPSILON, FLOAT64_EPSILON) == (2**-10, 2**-23, 2**-52)
