"""The primary's registration with Dynamo: whose it is, and what follows when it goes away."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support import Deployment, eventually


def lease(run: Deployment) -> str:
    """The lease of the one engine that is registered, in hex."""
    (key,) = [k for k in run.etcdctl("get", "--prefix", "--keys-only", "v1/instances/").split() if "generate" in k]
    return key.rpartition("/")[2]


def life(event: dict[str, Any]) -> tuple[int, int]:
    return event["cohort_id"], event["incarnation"]


def race(run: Deployment) -> bool:
    """One failover; True when the new primary was registered before the old one was seen dead."""
    found = run.wait_full()
    old = found["cohorts"][found["primary"]]
    earlier = len(run.events("registered"))
    victim = (old["cohort_id"], old["incarnation"])
    before, old_lease = run.text(), lease(run)
    os.killpg(old["ranks"][0]["pgid"], signal.SIGKILL)
    exit_ = eventually(lambda: [e for e in run.events("exit") if life(e) == victim])[0]
    registered = eventually(lambda: run.events("registered")[earlier:])[0]
    eventually(lambda: [e for e in run.events("lease_revoked") if life(e) == victim])
    assert eventually(run.text) == before
    assert lease(run) != old_lease
    return bool(registered["time"] < exit_["time"])


def check_leases(run: Deployment, failovers: int) -> None:
    """Each dead life's lease was revoked once, and no other."""
    revoked = [(life(e), e["detail"]) for e in run.events("lease_revoked")]
    assert len(revoked) == len({r[1] for r in revoked}) == len({r[0] for r in revoked}) == failovers, revoked
    primary = run.status()["primary"]
    assert lease(run) not in [r[1] for r in revoked], f"the lease of cohort {primary}, which serves"
    assert not run.events("hung")


def test_the_new_primary_keeps_its_lease_when_the_old_one_is_slow_to_die(tmp_path: Path, model: Path) -> None:
    slow = {"REFERENCE_DYING_GIB": "10", "REFERENCE_LOCK_POLL_SECONDS": "0.02"}
    with Deployment(tmp_path / "home", model, **slow) as run:
        raced = [race(run) for _ in range(3)]
        while not any(raced) and len(raced) < 12:  # which is quicker the machine decides
            raced.append(race(run))
        assert any(raced), "a new primary was registered before the old one was seen dead"
        check_leases(run, len(raced))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thirty_failovers_of_engines_that_are_slow_to_die(tmp_path: Path, model: Path) -> None:
    slow = {"REFERENCE_DYING_GIB": "6", "REFERENCE_LOCK_POLL_SECONDS": "0.02"}
    with Deployment(tmp_path / "home", model, **slow) as run:
        raced = [race(run) for _ in range(30)]
        assert sum(raced) >= 10, f"{sum(raced)} of {len(raced)}"
        check_leases(run, len(raced))


def test_a_primary_that_loses_its_lease_and_lives_on_is_dead(tmp_path: Path, model: Path) -> None:
    """As dynamo.vllm 1.3.1, which logs `Last endpoint completed` and stays."""
    with Deployment(tmp_path / "home", model, REFERENCE_FAULT="*.1:unregistered=hang") as run:
        found = run.wait_full()
        before, primary = run.text(), found["primary"]
        run.etcdctl("lease", "revoke", lease(run))
        why, *_ = eventually(lambda: run.events("hung"))
        assert life(why) == (primary, 1) and "has not been registered with Dynamo for 2 s" in why["detail"]
        assert eventually(run.text) == before
        assert run.wait_full()["primary"] == 1 - primary


def test_a_primary_whose_key_is_deleted_is_dead_although_its_lease_lives(tmp_path: Path, model: Path) -> None:
    with Deployment(tmp_path / "home", model) as run:
        before, primary = run.text(), run.wait_full()["primary"]
        run.etcdctl("del", "--prefix", "v1/instances/")
        why, *_ = eventually(lambda: run.events("hung"))
        assert why["cohort_id"] == primary and "has not been registered with Dynamo for 2 s" in why["detail"]
        assert eventually(run.text) == before
        run.wait_full()
