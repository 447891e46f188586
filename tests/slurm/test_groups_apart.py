"""Two groups of two nodes, each with a model and users of its own: what dies in one, and what the other's users see.

What they must not see is a gap: a pause between two tokens that is longer than such a machine makes by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from gms_launch.engines.reference.demo_model import make
from gms_launch.process import proc
from tests.load import Load
from tests.slurm.lab import Lab
from tests.slurm.moving import routed
from tests.slurm.test_groups import Groups
from tests.support import LONG, eventually

#: Group a has the first two nodes, with the run's services; all faults are in b.
NAMES = ("a", "b")
#: As often as each rank of b dies, as the primary's and as the shadow's.
TIMES = 10
#: How long nothing is done to anybody, to see what this machine makes of it (seconds).
QUIET = 20.0
#: A pause of so many times the longest of the quiet time is a gap; but shorter ones than `SHORT` (seconds) are none.
NOISE, SHORT = 4.0, 3.0
FLAGS = ("--lease-ttl=3", "--node-wait=120", "--restart-limit=100", "--restart-backoff=0.2", "--virtual-gpus=1")
#: A stopped rank is let be: that is what shows that a gap would be seen.
PATIENT = ("--health-timeout=120", "--canary-timeout=120")


class Apart(Groups):
    """`Groups` of which each serves a model of its own, under its own name."""

    def __init__(self, lab: Lab, *flags: str, **environ: str) -> None:
        tables = []
        for seed, name in enumerate(NAMES, 1):
            make(lab.dir / f"apart-{name}", 4, seed)
            said = f'model = "{lab.dir}/apart-{name}"\nserved_model_name = "{name}"\n'
            tables.append(f'[[group]]\nname = "{name}"\nnodes = 2\n{said}')
        file = lab.dir / "apart.toml"
        file.write_text("\n".join(tables))
        super().__init__(lab, lab.dir / "apart-a", f"--config={file}", *FLAGS, *flags, **environ)

    def rank(self, group: str, shadow: bool, rank: int) -> list[proc.ProcessId]:
        """The processes of one rank of a group's primary, or of its shadow."""
        found, index = self.full(group)[group], NAMES.index(group)
        cohort = next(c for c in found["cohorts"] if (c["cohort_id"] != found["primary"]) == shadow)
        tag = (10 * index + cohort["cohort_id"], cohort["incarnation"], 2 * index + rank)
        return [i.identity for i in self.tagged(*tag)]

    def starts(self, group: str) -> int:
        return sum(c["incarnation"] for c in self.groups()[group]["cohorts"])


def send(who: list[proc.ProcessId], number: int) -> None:
    for one in who:
        with contextlib.suppress(ProcessLookupError):
            if proc.alive(one):
                os.kill(one.pid, number)


@dataclass
class Window:
    """A stretch of the test."""

    name: str
    begun: float
    over: float = 0.0

    def longest(self, load: Load) -> float:
        pauses = load.pauses(self.begun, self.over)
        assert pauses, f"{self.name}: nobody got a token"
        high = pauses[int(0.99 * len(pauses))]
        print(f"{self.name}: {self.over - self.begun:.0f} s, pauses p99 {high:.3f} max {pauses[-1]:.3f} s")
        return pauses[-1]


@contextlib.contextmanager
def window(name: str) -> Iterator[Window]:
    one = Window(name, time.monotonic())
    yield one
    one.over = time.monotonic()


@pytest.mark.slow
def test_all_that_dies_in_one_group_is_no_gap_for_the_users_of_the_other() -> None:
    with Lab(4, slurm=False) as lab:
        routed(lab)
        with Apart(lab, *PATIENT, REFERENCE_TOKEN_SECONDS="0.02").hand() as run:
            run.full(*NAMES)
            untouched, url = run.lives("a"), run.run_file()["frontend_url"]
            users = Load(url, 6, 2, 3.0, tokens=40, prompts=4, model="a")
            others = Load(url, 4, 1, 2.0, tokens=40, prompts=4, model="b")
            with users:
                users.wait_busy(1.0)
                with window("nothing happens") as quiet:
                    time.sleep(QUIET)
                with others, window(f"each rank of b is killed {TIMES} times, and of its shadow") as killed:
                    for k in range(TIMES):
                        for shadow in (False, True):
                            for rank in range(2):
                                others.wait_busy(0.3)
                                dead, starts = run.rank("b", shadow, rank), run.starts("b")
                                assert dead, (k, shadow, rank)
                                send(dead, signal.SIGKILL)
                                eventually(lambda n=starts: run.starts("b") > n, LONG, "its cohort was started again")  # type: ignore[misc]
                                run.full("b")
                assert others.lost == [] and others.wrong == [], others.said()
                with window("a node of b is off") as off:
                    lab.node("node4").power_off()
                    eventually(lambda: run.of("b", "node_lost"), LONG)
                    run.processes.pop(3).wait(60)
                    time.sleep(QUIET / 2)
                with window("it comes back") as back:
                    lab.node("node4").start(daemons=False)
                    routed(lab, "node4")
                    run.hand(3)
                    run.full("b")
                assert run.lives("a") == untouched and run.of("a", "kill") == []
                stopped, most = run.rank("a", False, 1), gap(quiet.longest(users))
                with window("a rank of a itself is stopped") as frozen:
                    send(stopped, signal.SIGSTOP)
                    time.sleep(most + 1.0)
                    send(stopped, signal.SIGCONT)
            assert users.lost == [] and users.wrong == [], users.said()
            print(f"a gap is {most:.2f} s")
            for one in (killed, off, back):
                assert one.longest(users) < most, one.name
            assert frozen.longest(users) >= most, "a gap would have been seen"
            assert len(run.of("b", "exit")) >= 4 * TIMES and run.lives("a") == untouched
            assert not run.events("internal_error")


def gap(longest: float) -> float:
    """What a pause must come to, to be none of this machine's own (seconds)."""
    return max(SHORT, NOISE * longest)
