"""The word of a life's end: who is believed, and what a guard does with it."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from gms_launch.process import deputy, proc, word
from gms_launch.process.deputy import Deputy, Duty, Leash, others
from gms_launch.process.proc import ProcessId
from gms_launch.process.word import Word
from tests.support import eventually

KEY = word.secret("password", "attempt")


def test_only_who_has_the_key_of_this_attempt_is_believed() -> None:
    said = Word(1, 7, 3)
    data = word.seal(said, KEY)
    assert word.unseal(data, KEY) == said
    for other in (word.secret("password", "another attempt"), word.secret("guess", "attempt"), b""):
        assert word.unseal(data, other) is None
    for spoilt in (b"", b" ", data[:-1], data + b"0", data.replace(b" 7 ", b" 8 "), os.urandom(64), b"\xff" * 200):
        assert word.unseal(spoilt, KEY) is None


def test_words_pass_over_what_is_not_one() -> None:
    with word.listen("127.0.0.1", 0) as line, word.listen("127.0.0.1", 0) as sender:
        here = line.getsockname()
        sender.sendto(b"x" * 4000, here)
        word.say(sender, Word(0, 2, 1), KEY, [here, ("127.0.0.1", 1), here])
        assert word.hear(line, KEY) == [Word(0, 2, 1)] * 2
        assert word.hear(line, KEY) == []


def test_who_floods_the_port_does_not_keep_the_reader() -> None:
    with word.listen("127.0.0.1", 0) as line, word.listen("127.0.0.1", 0) as sender:
        for k in range(30):
            word.say(sender, Word(0, k, 1), b"a guess" if k % 2 else KEY, [line.getsockname()])
        heard = [[w.incarnation for w in word.hear(line, KEY, 10)] for _ in range(4)]
        assert heard == [list(range(k, k + 10, 2)) for k in (0, 10, 20)] + [[]]


class Guarded:
    """A deputy in a thread, with a process of a life to look after."""

    def __init__(self) -> None:
        self.line = word.listen("127.0.0.1", 0)
        self.peer = word.listen("127.0.0.1", 0)
        theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.leash = Leash(ours)
        self.run = f"word{os.getpid()}"
        self.deputy = Deputy(self.run, 4, theirs, self.line)
        self.thread = threading.Thread(target=self.deputy.serve)
        self.thread.start()
        self.child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"],
            start_new_session=True,
            env=os.environ | {proc.TAG_ENV: f"{self.run}/0/1/4"},
        )
        found = proc.identity(self.child.pid)
        assert found is not None
        self.who: ProcessId = found

    def duty(self, ranks: dict[tuple[int, int], ProcessId]) -> None:
        self.leash.tell(Duty(ranks, ((0, (self.peer.getsockname(),)),), KEY))

    def hear(self, *words: Word, key: bytes = KEY) -> None:
        for said in words:
            word.say(self.peer, said, key, [self.line.getsockname()])

    def close(self) -> None:
        self.leash.close()
        self.thread.join(60)
        assert not self.thread.is_alive(), "it goes with its agent"
        self.child.kill()
        self.child.wait()
        self.line.close()
        self.peer.close()


@pytest.fixture
def guarded() -> Iterator[Guarded]:
    made = Guarded()
    yield made
    made.close()


def test_a_deputy_kills_what_has_ended_when_its_agent_does_not(guarded: Guarded) -> None:
    guarded.duty({(0, 1): guarded.who})
    guarded.hear(Word(0, 1, 2), key=b"stranger")
    guarded.hear(Word(1, 1, 2), Word(0, 2, 2))  # other lives
    eventually(lambda: word_read(guarded), what="it has looked at them")
    assert guarded.child.poll() is None
    guarded.hear(Word(0, 1, 2))
    assert guarded.child.wait(60) == -9
    eventually(lambda: list(guarded.leash.acted()) == [(0, 1)])
    assert word.hear(guarded.peer, KEY) == [], "who was told does not tell it back"


def word_read(guarded: Guarded) -> bool:
    """True when no datagram waits in the socket."""
    try:
        guarded.line.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    return False


def test_a_deputy_tells_the_others_of_an_end_that_only_it_has_seen(guarded: Guarded) -> None:
    guarded.duty({(0, 1): guarded.who})
    guarded.child.kill()
    eventually(lambda: word.hear(guarded.peer, KEY) == [Word(0, 1, 4)])


def test_a_deputy_leaves_alone_what_its_agent_takes_care_of(guarded: Guarded) -> None:
    guarded.duty({(0, 1): guarded.who})
    guarded.child.kill()
    guarded.duty({})
    guarded.hear(Word(0, 1, 2))
    word.hear(guarded.line, KEY)  # as the agent does
    time.sleep(2 * deputy.PATIENCE)  # nothing is to happen
    assert word.hear(guarded.peer, KEY) == [] and list(guarded.leash.acted()) == []


def test_a_deputy_says_that_its_agent_is_dead_to_whom_it_concerns(guarded: Guarded) -> None:
    leader = (guarded.peer.getsockname(),)
    guarded.leash.tell(Duty({(0, 1): guarded.who}, (), KEY, 0.0, leader, 77))
    guarded.leash.close()
    heard: list[Word] = []
    eventually(lambda: heard.extend(word.hear(guarded.peer, KEY)) or heard, what="the word")  # type: ignore[func-returns-value]
    assert heard == [Word(word.AGENT, 77, 4)]
    assert guarded.child.poll() is None, "what is left is the guard's"


def test_a_deputy_says_that_what_lives_beside_a_dead_agent_ends(guarded: Guarded) -> None:
    guarded.duty({(0, 1): guarded.who, (1, 3): guarded.who})
    guarded.leash.close()
    guarded.thread.join(60)
    assert word.hear(guarded.peer, KEY) == [Word(0, 1, 4), Word(1, 3, 4)]


def test_a_life_that_begins_as_another_ends_is_not_taken_for_it(guarded: Guarded) -> None:
    """Its descriptor has the other's number, and the deputy was too busy to look in between."""
    second = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        began = proc.identity(second.pid)
        assert began is not None
        guarded.duty({(0, 1): guarded.who})
        eventually(lambda: (0, 1) in guarded.deputy._watched)
        number = guarded.deputy._watched[0, 1]
        busy = Busy(guarded.deputy._poller)
        guarded.deputy._poller = busy  # type: ignore[assignment]
        guarded.hear(Word(9, 9, 9))  # it comes round
        assert busy.waits.wait(60)
        guarded.child.kill()
        guarded.child.wait()
        guarded.duty({(0, 2): began})
        busy.goes_on.set()
        eventually(lambda: guarded.deputy._watched == {(0, 2): number}, what="the same number")
        time.sleep(2 * deputy.PATIENCE)  # nothing is to happen
        assert second.poll() is None and list(guarded.leash.acted()) == []
    finally:
        second.kill()
        second.wait()


class Busy:
    """A poller for somebody who looks late: waits before its next look until it `goes_on`."""

    def __init__(self, poller: select.poll) -> None:
        self._poller = poller
        self.waits, self.goes_on = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._poller, name)

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        self.waits.set()
        self.goes_on.wait()
        return self._poller.poll(timeout)


def test_an_agent_that_ends_in_order_is_not_called_dead(guarded: Guarded) -> None:
    leader = (guarded.peer.getsockname(),)
    guarded.leash.tell(Duty({(0, 1): guarded.who}, (), KEY, 0.0, leader, 77))
    guarded.leash.tell(Duty({}))
    guarded.leash.close()
    guarded.thread.join(60)
    assert word.hear(guarded.peer, KEY) == []


def test_a_word_goes_to_the_nodes_of_its_group_alone() -> None:
    first, second = (("10.0.0.2", 1),), (("10.0.0.3", 1),)
    groups = ((0, first), (20, second))
    assert [others(groups, k) for k in (0, 9, 20, 21)] == [first, first, second, second]
    assert others((), 3) == ()
    assert Duty.decode(Duty({}, groups, KEY, 1.5, first, 7).encode()) == Duty({}, groups, KEY, 1.5, first, 7)
