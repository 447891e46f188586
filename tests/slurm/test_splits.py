"""The network falls apart for 20 s: who has no majority of etcd's members ends its ranks, and nobody is two."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from gms_launch.control import terms
from gms_launch.process import proc
from tests.load import Either
from tests.slurm.lab import Lab
from tests.slurm.moving import NAMES, Actives, Led, Pair, routed
from tests.slurm.support import since
from tests.slurm.test_leads import FLAGS
from tests.support import LONG, eventually

#: As long as a split lasts (seconds), and the lease of these runs.
SPLIT, LEASE = 20.0, 3.0
#: What a busy machine may take to kill what is to be dead by then (seconds).
BUSY = 6.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cut", "ended", "whole"),
    [
        # Members of etcd are on nodes 1 to 3; group a is on nodes 1 and 2, b on 3 and 4, node 5 is the spare.
        (("node1", "node2"), ("node3", "node4", "node5"), "a"),
        (("node3", "node4"), ("node3", "node4"), "a"),
        (("node1", "node4"), ("node1", "node4"), ""),
    ],
    ids=["two have the majority", "two are without the run's leader", "two have the run's leader"],
)
def test_two_against_three(cut: tuple[str, ...], ended: tuple[str, ...], whole: str) -> None:
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(5, slurm=False))
        routed(lab)
        run = stack.enter_context(Pair(lab))
        run.whole()
        actives = stack.enter_context(Actives(run))
        lives, old = run.lives(whole) if whole else [], run.engines_at(*ended)
        assert len(old) >= 4 and run.leader() == 0
        fronts = [f"http://{host}:{port}" for host, port in run.fronts()]
        load = None
        if whole:
            load = stack.enter_context(Either((fronts[0], fronts[2]), 4, 1, 3.0, tokens=30, prompts=4, model=whole))
            load.wait_busy(1.0)
        begun = time.monotonic()
        lab.split(*cut)
        try:
            eventually(lambda: not any(map(proc.alive, old)), LONG, "the minority ends its ranks")
            took = since(begun)
            print(f"{', '.join(ended)}: {len(old)} processes dead {took:.1f} s after the split")
            assert took < terms.silence(LEASE) + BUSY
            while since(begun) < SPLIT:
                assert not run.engines_at(*ended), "and starts none"
                time.sleep(0.2)
        finally:
            lab.heal(*cut)
        healed = time.monotonic()
        run.whole()
        print(f"whole {since(healed):.1f} s after it healed; node {run.leader()} leads")
        assert actives.looks > 50 and not actives.broken
        if load is not None:
            load.wait_busy(1.0)
            assert run.lives(whole) == lives, "nobody noticed"
            assert load.lost == [] and load.wrong == [], load.said()
            print(f"{whole}: {load.said()}, {len(load.retried)} asked twice")
        assert all(run.lives(name) for name in NAMES) and not run.events("internal_error")


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["node1", "node3"])
def test_one_against_two(model: Path, cut: str) -> None:
    with Lab(3, slurm=False) as lab:
        routed(lab)
        with Led(lab, model, *FLAGS).hand() as run:
            names = ("g0", "g1", "g2")
            run.full(*names)
            number = int(cut[-1]) - 1
            others = [n for n in names if n != f"g{number}"]
            lives, old = {n: run.lives(n) for n in others}, run.engines_at(cut)
            assert old and run.leader() == 0
            begun = time.monotonic()
            lab.split(cut)
            try:
                eventually(lambda: not any(map(proc.alive, old)), LONG, "it ends its ranks")
                took = since(begun)
                print(f"{cut}: {len(old)} processes dead {took:.1f} s after the split")
                assert took < terms.silence(LEASE) + BUSY
                while since(begun) < SPLIT:
                    assert not run.engines_at(cut), "and starts none"
                    time.sleep(0.2)
                assert run.leader() == (1 if number == 0 else 0)
            finally:
                lab.heal(cut)
            run.full(*names)
            assert {n: run.lives(n) for n in others} == lives, "nobody noticed"
            assert run.leader() == (1 if number == 0 else 0) and not run.events("internal_error")
