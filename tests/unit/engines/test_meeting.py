"""The meeting of a cohort's ranks: who is believed, and what of a line that was heard is good for another time."""

from __future__ import annotations

import pytest

from gms_launch.engines.reference import meeting
from gms_launch.engines.reference.meeting import Handshake, StrangerError, Voice

SECRET = b"of this life"
Met = tuple[int, Voice, Voice, Voice, Voice]


def meet(rank: int = 3, leaders: bytes = SECRET, workers: bytes = SECRET) -> Met:
    """The rank and the four ends of a line's two voices."""
    leader, worker = Handshake(leaders), Handshake(workers)
    claim, up, down = worker.claim(leader.answer(worker.call()), rank)
    number, to, of = leader.joined(claim)
    return number, to, down, up, of


def test_both_ends_know_each_other_and_what_is_said_comes_in_order() -> None:
    number, to, down, up, of = meet()
    assert number == 3
    for sender, receiver in ((to, down), (up, of)):
        for body in (b"first", b"", b"third"):
            receiver.check(body, sender.mark(body))


def test_a_leader_without_the_secret_learns_nothing_and_a_worker_without_it_is_not_let_in() -> None:
    with pytest.raises(StrangerError):
        meet(leaders=b"a guess")  # the worker has sent a number by chance, and goes
    leader, worker = Handshake(SECRET), Handshake(SECRET)
    claim, _, _ = worker.claim(leader.answer(worker.call()), 0)
    for spoilt in (claim[:-1] + bytes([claim[-1] ^ 1]), b"\0\0\0\1" + claim[4:], bytes(meeting.CLAIM)):
        with pytest.raises(StrangerError):
            leader.joined(spoilt)
    with pytest.raises(StrangerError):
        Handshake(SECRET).answer(b"GET / HTTP/1.1\r\n" + bytes(16))


def test_what_was_heard_once_is_good_for_nothing() -> None:
    leader, worker = Handshake(SECRET), Handshake(SECRET)
    call = worker.call()
    answer = leader.answer(call)
    claim, _, _ = worker.claim(answer, 0)
    again = Handshake(SECRET)
    again.answer(call)
    with pytest.raises(StrangerError):
        again.joined(claim)  # to another leader, or the same one at another time
    with pytest.raises(StrangerError):
        Handshake(SECRET).claim(answer, 0)  # to another worker
    proof = answer[meeting.NONCE :]
    with pytest.raises(StrangerError):
        leader.joined(claim[:4] + proof)  # the leader's own proof, sent back


@pytest.mark.parametrize("what", ["repeated", "left out", "changed", "the other way"])
def test_a_line_is_its_own(what: str) -> None:
    _, to, down, _, of = meet()
    first, second = to.mark(b"one"), to.mark(b"two")
    if what == "left out":
        with pytest.raises(StrangerError):
            down.check(b"two", second)
        return
    if what == "the other way":
        with pytest.raises(StrangerError):
            of.check(b"one", first)
        return
    down.check(b"one", first)
    with pytest.raises(StrangerError):
        down.check(b"one" if what == "repeated" else b"twp", first if what == "repeated" else second)
