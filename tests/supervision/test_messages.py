"""What arrives from other processes is read strictly: exactly the fields and types of a message, or nothing."""

import json
import time
from dataclasses import replace

import pytest
import torch

from fulmen.supervision.failure_detector import FailureDetector
from fulmen.supervision.heartbeat import StatusChannel
from fulmen.supervision.messages import VALUE_TYPES, FailureKind, Heartbeat, ThreadState, Verdict, parse_value

BEAT = Heartbeat(ThreadState.ASLEEP, "", "script.py:3 in f", 7, 1.5, 2.5, "stack", 12, "host", False, "train")
VERDICT = Verdict(3, FailureKind.RAISED, "failed", "stack", 1, 0, "host", 12, 3)


def sent(message):
    """As JSON that has travelled."""
    return json.loads(json.dumps(message, default=vars))


@pytest.mark.parametrize("message", [BEAT, VERDICT])
def test_a_message_arrives_as_it_was_sent(message):
    assert parse_value(type(message), sent(message)) == message


@pytest.mark.parametrize(
    "changed",
    [
        {"rank": "3"}, {"rank": True}, {"rank": 3.0}, {"rank": None}, {"kind": "unheard of"}, {"kind": []}, {"text": 1},
        {"more": 1},
    ],
)  # fmt: skip
def test_a_verdict_of_another_shape_is_none(changed):
    assert parse_value(Verdict, {**sent(VERDICT), **changed}) is None
    assert parse_value(Verdict, {"rank": 3}) is None
    assert parse_value(Verdict, [3]) is None
    assert parse_value(VALUE_TYPES["signal"], "15") is None
    assert parse_value(VALUE_TYPES["reported"], 1) is None


def exchange_all(*channels):
    for _ in range(10):
        for channel in channels:
            channel.poll_connections(0.005)


def test_values_of_unknown_keys_and_shapes_are_dropped_and_block_nothing():
    store = torch.distributed.HashStore()
    first, second = (StatusChannel(rank, store, "127.0.0.1") for rank in range(2))
    for key, value in {"verdict": {"rank": 1}, "heartbeat/1": "no beat", "signal": True, "anything": 1}.items():
        second.publish_value(key, value)
    exchange_all(first, second)
    assert not first.values and not first.gone
    second.publish_value("verdict", VERDICT)
    exchange_all(first, second)
    assert first.verdict == second.verdict == VERDICT
    first.close()
    second.close()


WAITING = Heartbeat(ThreadState.WAITING, unchanged_s=20.0, host="elsewhere")
ASLEEP = replace(WAITING, state=ThreadState.ASLEEP)


@pytest.mark.parametrize(
    ("beats", "rank", "kind"),
    [
        ([WAITING, ASLEEP], 1, FailureKind.STALLED),
        ([ASLEEP, WAITING], 0, FailureKind.STALLED),
        ([WAITING, replace(WAITING, done=True)], 1, FailureKind.DONE),
        ([WAITING, replace(WAITING, collective="barrier")], 1, FailureKind.DEADLOCK),
        ([WAITING, WAITING], None, None),
        ([WAITING, replace(WAITING, state=ThreadState.OUTSIDE)], None, None),
        ([WAITING, replace(WAITING, state=ThreadState.BUSY)], None, None),
    ],
)
def test_the_rank_that_others_wait_for_is_found(beats, rank, kind):
    channel = StatusChannel(0, torch.distributed.HashStore(), "127.0.0.1")
    detector = FailureDetector(channel, 2, patience_s=10.0, describe_exit=lambda rank: "")
    for number, beat in enumerate(beats):
        channel.publish_value(f"heartbeat/{number}", beat)
    found = detector.find_failure()
    channel.close()
    assert (found and found.rank, found and found.kind) == (rank, kind)


def test_a_process_that_has_ended_is_named_with_how_it_ended():
    channel = StatusChannel(0, torch.distributed.HashStore(), "127.0.0.1")
    detector = FailureDetector(channel, 2, patience_s=10.0, describe_exit=lambda rank: "was ended by SIGKILL")
    channel.publish_value("heartbeat/1", Heartbeat(pid=12, host="elsewhere", position="train, epoch 0, batch 3"))
    assert detector.find_failure() is None
    channel.gone.add(1)
    found = detector.find_failure()
    text = "its process 12 was ended by SIGKILL (out of memory?). Last seen in train, epoch 0, batch 3."
    assert found is not None and found.reason == f"Rank 1 is gone: {text}"
    channel.gone.clear()
    detector.heard[1] = time.monotonic() - 200
    found = detector.find_failure()
    assert found is not None and "its machine elsewhere cannot be reached" in found.text
    channel.close()
