"""The channel: whole messages in order, nobody waits, and a dead peer is noticed after its last word."""

import socket
import threading
import time

import pytest

from kvengine.channel import Channel
from kvengine.errors import ChannelClosed


@pytest.fixture
def ends():
    left, right = (Channel(end) for end in socket.socketpair())
    yield left, right
    left.close()
    right.close()


def test_messages_arrive_whole_and_in_order(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    left.send(["a", 1])
    left.send({"text": "ü", "none": None})
    assert right.receive() == [["a", 1], {"text": "ü", "none": None}]
    assert right.receive() == []


def test_a_wait_is_never_cut_short(ends: tuple[Channel, Channel]) -> None:
    """Whoever waits for a lease to run out would otherwise spin through its last half millisecond."""
    for wait_s in (0.0001, 0.0004, 0.0014):
        before_s = time.monotonic()
        ends[0].wait(wait_s)
        assert time.monotonic() - before_s >= wait_s


def test_a_sender_never_waits_for_a_reader_that_sleeps(ends: tuple[Channel, Channel]) -> None:
    """More than the kernel buffers is kept and arrives complete once somebody reads."""
    left, right = ends
    sent = [[number, "x" * 5000] for number in range(1000)]
    for message in sent:
        left.send(message)
    assert left.unsent
    received = []
    while len(received) < len(sent):
        received += right.receive()
        left.flush()
    assert received == sent
    assert not left.unsent


def test_the_last_words_of_a_dead_peer_are_heard(ends: tuple[Channel, Channel]) -> None:
    """What was sent before the end is delivered before the end is reported."""
    left, right = ends
    left.send("last words")
    left.close()
    assert right.receive() == ["last words"]
    with pytest.raises(ChannelClosed):
        right.receive()
    with pytest.raises(ChannelClosed):
        right.send("anyone?")


def test_waiting_ends_with_a_message_or_with_the_peer(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    right.wait(0)
    sender = threading.Thread(target=left.send, args=("hello",))
    sender.start()
    right.wait(30)
    sender.join()
    assert right.receive() == ["hello"]
    left.close()
    right.wait(30)
    with pytest.raises(ChannelClosed):
        right.receive()
