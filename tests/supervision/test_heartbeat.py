"""The connections between watchdogs: what strangers say ends nothing, and any number of descriptors is heard."""

import json
import os
import resource
import socket
import sys
import time

import pytest
import torch

from fulmen.supervision.failure_detector import FailureDetector
from fulmen.supervision.heartbeat import MAX_MESSAGE_BYTES, MAX_STRANGERS, StatusChannel
from fulmen.supervision.messages import FailureKind, Heartbeat, Verdict

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")


def open_channels(size=2):
    store = torch.distributed.HashStore()
    return [StatusChannel(rank, store, "127.0.0.1") for rank in range(size)]


def exchange_all(*found):
    for _ in range(10):
        for channel in found:
            channel.poll_connections(0.005)


def stranger(channel):
    return socket.create_connection(("127.0.0.1", channel.listener.getsockname()[1]))


def line(*message):
    return json.dumps(message).encode() + b"\n"


def hello(rank, token):
    return line("hello", [rank, token])


GONE = Verdict(1, FailureKind.GONE, "is gone")
NOISE = {
    "not JSON": b"GET / HTTP/1.1\r\n\r\n",
    "no text": bytes(range(256)) + b"\n",
    "deep": b"[" * 100_000 + b"\n",
    "deep and short": b"[" * 250 + b"\n",
    "long number": b"9" * 200 + b"\n",
    "endless": b"x" * 1_000_000,
    "other shapes": b'1\nnull\n"hello"\n[]\n["hello"]\n["hello", 1, 2]\n{"hello": 1}\n[["hello"], 1]\n[{}, []]\n',
    "an empty line": b"\n\n\n",
    "verdict": line("verdict", vars(GONE)),
    "wrong hellos": b"".join(
        line("hello", value)
        for value in (None, 1, [], [1], ["1", "x"], [True, "x"], [1, None], [1, "\ud800"], [1, "é"])
    ),
    "a guess": hello(1, "0" * 32),
}


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE.keys())
def test_what_a_stranger_says_is_dropped(noise):
    first, second = open_channels()
    exchange_all(first, second)
    with stranger(first) as connection:
        connection.setblocking(False)
        for part in (noise[:100], noise[100:]):
            try:
                connection.sendall(part)
            except OSError:  # it was dropped, or does not read on
                pass
            exchange_all(first)
    exchange_all(first)
    assert not first.strangers and len(first.peers) == 1
    assert "verdict" not in first.values and not first.gone
    second.publish_value("verdict", GONE)
    exchange_all(first, second)
    assert first.verdict == second.verdict == GONE
    for channel in (first, second):
        channel.close()


def test_a_process_says_the_secret_and_comes_once():
    first, second = open_channels()
    exchange_all(first, second)
    with stranger(first) as again, stranger(first) as zero, stranger(first) as third:
        again.sendall(hello(1, first.token) + line("location/1", "wrong"))
        zero.sendall(hello(0, first.token) + line("location/0", "wrong"))
        third.sendall(hello(2, first.token) + line("location/2", "right"))
        exchange_all(first)
        assert sorted(first.ranks.values()) == [1, 2]
        assert {key: value for key, value in first.values.items() if "location" in key} == {"location/2": "right"}
        third.sendall(b"no JSON\n" + line("location/2", "later"))  # one bad line of a process is that line only
        exchange_all(first)
        assert first.values["location/2"] == "later" and not first.gone
        third.sendall(b"x" * (MAX_MESSAGE_BYTES // 64))
        exchange_all(first)
        assert not first.gone
    exchange_all(first)
    assert first.gone == {2}
    for channel in (first, second):
        channel.close()


def test_silent_strangers_do_not_use_up_what_is_there():
    first, _ = found = open_channels()
    silent = []
    for _ in range(MAX_STRANGERS + 20):
        silent.append(stranger(first))
        exchange_all(first)
    assert len(first.strangers) <= MAX_STRANGERS
    first.strangers.update(dict.fromkeys(first.strangers, time.monotonic() - 1))  # none spoke in time
    exchange_all(first)
    assert not first.strangers and len(first.peers) == 1
    for one in (*silent, *found):
        one.close()


def test_more_than_1024_descriptors_are_heard():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1300:
        pytest.skip("this machine allows no more")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1300), hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        first, second = open_channels()
        assert first.listener.fileno() > 1024
        exchange_all(first, second)
        second.publish_value("verdict", GONE)
        exchange_all(first, second)
        assert first.verdict == GONE
        first.read_remaining(1)
        second.close()
        exchange_all(first)
        assert first.gone == {1}
        first.close()
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_where_rank_0_cannot_listen_the_others_do_not_wait():
    store = torch.distributed.HashStore()
    with pytest.raises(OSError):
        StatusChannel(0, store, "nowhere.invalid")
    with pytest.raises(OSError, match="could not listen"):
        StatusChannel(1, store, "127.0.0.1")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_is_not_over_before_the_others_were_heard_of(rank):
    found = open_channels()
    exchange_all(*found)
    mine, other = found[rank], found[1 - rank]
    detector = FailureDetector(mine, 2, patience_s=100.0, describe_exit=lambda rank: "")
    mine.publish_value(f"heartbeat/{rank}", Heartbeat(done=True))
    assert not detector.all_done(), "the other one may only be slow to say that it is there"
    for done in (False, True):
        other.publish_value(f"heartbeat/{1 - rank}", Heartbeat(done=done))
        exchange_all(*found)
        assert detector.all_done() == done
    never = FailureDetector(open_channels()[0], 2, patience_s=0.0, describe_exit=lambda rank: "")
    assert never.all_done(), "a rank that could not connect is not waited for"
