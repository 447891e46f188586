"""Requests in flight survive the primary's end. Real frontend, runtime and etcd."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gms_launch.control.client import Etcd
from gms_launch.process import proc
from tests import no_getfd, support
from tests.load import Load
from tests.support import Deployment, eventually, kill

SLOW_TOKENS = {"REFERENCE_TOKEN_SECONDS": "0.02"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path_factory.mktemp("hold"), model, **SLOW_TOKENS) as run:
        yield run


def primary(run: Deployment) -> dict[str, Any]:
    found = run.wait_full()
    cohort: dict[str, Any] = found["cohorts"][found["primary"]]
    life = (cohort["cohort_id"], cohort["incarnation"])
    eventually(lambda: [e for e in run.events("hold_armed") if (e["cohort_id"], e["incarnation"]) == life])
    return cohort


def whole(run: Deployment, kill: Any, failovers: int = 1, tokens: int = 80) -> Load:
    """Every request of a load that `kill(primary)` breaks into is answered, with the undisturbed text."""
    with Load(run.run_file["frontend_url"], streams=12, unary=4, rate=10, tokens=tokens) as load:
        for _ in range(failovers):
            old, released = primary(run), len(run.events("released"))
            load.wait_busy()
            kill(old)
            eventually(lambda n=released: len(run.events("released")) > n)
    assert load.answers and not load.lost, [a.error for a in load.lost][:3]
    assert not load.wrong
    return load


def kill_group(cohort: dict[str, Any]) -> None:
    os.killpg(cohort["ranks"][0]["pgid"], signal.SIGKILL)


def kill_worker(cohort: dict[str, Any]) -> None:
    kill(proc.children(cohort["ranks"][0]["pid"])[0])


@pytest.mark.parametrize("failovers", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_streams_go_on_over_failovers_in_a_row(run: Deployment, failovers: int) -> None:
    before = len(run.events("released"))
    whole(run, kill_group, failovers=failovers, tokens=140 * failovers)
    released = run.events("released")[before:]
    assert len(released) == failovers and all(e["data"]["moved"] for e in released)
    assert sum(e["data"]["connections"] for e in released) > 0, "somebody waited"


def test_streams_go_on_when_a_part_of_the_primary_dies(run: Deployment) -> None:
    whole(run, kill_worker)


def test_streams_go_on_over_kill_primary_which_tells_of_them(run: Deployment) -> None:
    said: list[dict[str, Any]] = []

    def kill(_: dict[str, Any]) -> None:
        done = run.cli("kill-primary", "--json")
        assert done.returncode == 0, done.stderr
        said.append(json.loads(done.stdout))

    whole(run, kill)
    (failover,) = said
    if failover["requests"]["held"] is None:  # the command waits for the count, but not for ever
        told = run.cli("timeline", "--json").stdout
        (failover,) = [f for f in json.loads(told)["failovers"] if f["victim"] == failover["victim"]]
    counted, steps = failover["requests"], failover["steps"]
    assert counted["held"] > 0 and counted["moved"] > 0 and counted["lost"] == 0, counted
    assert counted["gap"] == pytest.approx(steps["first_token"], abs=0.001)
    assert steps["held"] < steps["released"]
    assert steps["registered"] < steps["released"]


def test_streams_of_a_primary_that_hangs_go_on_when_it_is_killed(tmp_path: Path, model: Path) -> None:
    flags = ("--health-interval", "0.3", "--health-timeout", "4")
    with Deployment(tmp_path / "home", model, *flags, **SLOW_TOKENS) as run:
        whole(run, lambda cohort: os.kill(cohort["ranks"][0]["pid"], signal.SIGSTOP))
        hung = run.happened("hung")
        assert [e for e in hung if "has been stopped" in e["detail"] or "no answer" in e["detail"]]


@contextlib.contextmanager
def another_frontend(run: Deployment) -> Iterator[tuple[str, int]]:
    """A second one, as somebody would start it for themselves: its URL and pid."""
    (first,) = [s["pid"] for s in run.status()["nodes"][0]["services"] if s["name"] == "frontend"]
    argv = Path(f"/proc/{first}/cmdline").read_bytes().decode().rstrip("\0").split("\0")
    env = dict(e.split("=", 1) for e in Path(f"/proc/{first}/environ").read_bytes().decode().split("\0") if "=" in e)
    env.pop(proc.TAG_ENV, None)
    port = support.free_port()
    argv[argv.index("--http-port") + 1] = str(port)
    process = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        eventually(lambda: support.complete("127.0.0.1", port, "hello", 2), what="the second frontend serves")
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.kill()
        process.wait()


def test_the_dead_lease_stands_until_a_second_frontend_has_seen_the_successor(run: Deployment) -> None:
    """The second one is frozen over the whole failover, and loses nothing either; the first one's users do not wait."""
    with another_frontend(run) as (url, pid):
        old = primary(run)
        life = (old["cohort_id"], old["incarnation"])

        def of_it(kind: str) -> list[dict[str, Any]]:
            return [e for e in run.events(kind) if (e["cohort_id"], e["incarnation"]) == life]

        first = Load(run.run_file["frontend_url"], streams=4, unary=2, rate=10, tokens=100)
        with Load(url, streams=6, unary=2, tokens=100, timeout=120) as other, first:
            other.wait_busy(1.0)
            first.wait_busy()
            with support.stopped(pid):
                kill_group(old)
                eventually(lambda: of_it("released"))
                served = time.monotonic()
                eventually(lambda: [a for a in list(first.answers) if a.sent > served and not a.error])
                assert not of_it("lease_revoked"), "one frontend has not seen the successor"
            eventually(lambda: of_it("lease_revoked"))
            eventually(lambda: of_it("hold_over"))
        for load in (first, other):
            assert load.answers and not load.lost and not load.wrong, load.said()


def test_a_failover_right_after_etcd_came_back_loses_nothing(run: Deployment) -> None:
    """The frontend takes seconds to find etcd again, and does not hear of the successor until then."""
    restarted = len(run.events("service_restarted"))

    def both(old: dict[str, Any]) -> None:
        (etcd,) = [s["pid"] for s in run.status()["nodes"][0]["services"] if s["name"] == "etcd"]
        os.kill(etcd, signal.SIGKILL)
        eventually(lambda: len(run.events("service_restarted")) > restarted)
        kill_group(old)

    whole(run, both, tokens=300)


def test_an_engine_that_is_told_to_end_is_a_death_like_another(run: Deployment) -> None:
    """It takes its registration away, refuses what is new and finishes what it has, for longer than is waited for.

    Only what comes between that and the registration by our hand may be lost.
    """
    earlier, unregistered = len(run.events("hung")), len(run.events("unregistered"))
    with Load(run.run_file["frontend_url"], streams=12, unary=4, rate=10, tokens=400) as load:
        old = primary(run)
        load.wait_busy(1.0)
        told = time.monotonic()
        os.kill(old["ranks"][0]["pid"], signal.SIGTERM)
        hung, *_ = eventually(lambda: run.events("hung")[earlier:], what="it is dead, although it has not finished")
        assert "has not been registered with Dynamo for 2 s" in hung["detail"]
        eventually(lambda: run.status()["primary"] == 1 - old["cohort_id"], what="another serves")
    event, *_ = run.events("unregistered")[unregistered:]
    again = event["time"] - time.time() + time.monotonic() + 1.5  # until the frontend has heard of it
    assert load.in_flight_at(told, True) and load.in_flight_at(again, False) and not load.wrong
    assert not [a for a in load.lost if not told - 0.1 < a.sent < again], load.said()


def test_an_engine_that_registers_again_by_itself_is_not_killed(run: Deployment) -> None:
    """Put to sleep and woken: its own names in discovery were free for it."""
    old, hung = primary(run), len(run.events("hung"))
    before, unregistered = run.text(), len(run.events("unregistered"))
    pid = old["ranks"][0]["pid"]
    environ = dict(e.split("=", 1) for e in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in e)

    def post(what: str) -> None:
        url = f"http://127.0.0.1:{environ['DYN_SYSTEM_PORT']}/engine/control/{what}"
        with urllib.request.urlopen(urllib.request.Request(url, b"{}", {"Content-Type": "application/json"})) as said:
            assert json.load(said)["status"] == "ok"

    with contextlib.closing(Etcd(run.access)) as etcd:  # quicker than a command: both are there for 2 s

        def registered() -> list[str]:
            return list(etcd.get_prefix("v1/instances/dynamo/backend/generate/"))

        (own,) = registered()
        post("sleep")
        post("wake_up")
        eventually(lambda: len(registered()) == 2, what="registered by our hand too")
        eventually(lambda: registered() == [own], what="and by its own only")
    eventually(lambda: len(run.events("unregistered")) > unregistered)
    assert run.text() == before and len(run.events("hung")) == hung
    assert run.status()["primary"] == old["cohort_id"] and primary(run)["incarnation"] == old["incarnation"]


@pytest.mark.slow
def test_requests_wait_for_longer_than_the_dead_engines_lease(tmp_path: Path, model: Path) -> None:
    """Nobody renews the lease of an engine that is dead, or hangs; without it the frontend ends what waits."""
    flags = ("--dynamo-lease-ttl", "8", "--health-interval", "1", "--health-timeout", "12")
    slow = {**SLOW_TOKENS, "REFERENCE_WAKE_SECONDS": "10"}
    with Deployment(tmp_path / "home", model, *flags, **slow) as run:
        whole(run, kill_group)
        (released,) = run.happened("released")
        assert released["data"]["seconds"] > 9
        whole(run, lambda cohort: os.kill(cohort["ranks"][0]["pid"], signal.SIGSTOP))
        (hung,) = run.happened("hung")
        assert "has been stopped for 12 s" in hung["detail"]


def test_a_promotion_that_fails_and_a_cold_start_are_waited_for(tmp_path: Path, model: Path) -> None:
    """Every second life dies when it wakes: when the only shadow is one, nobody can take the requests for a while."""
    flags = ("--hold-cold-start", "40", "--restart-backoff", "0.2")
    with Deployment(tmp_path / "home", model, *flags, REFERENCE_FAULT="*.2:waking=crash", **SLOW_TOKENS) as run:
        first = primary(run)
        kill_group(first)
        eventually(lambda: run.events("released"), what="the first shadow takes over")
        assert primary(run)["cohort_id"] != first["cohort_id"]
        whole(run, kill_group)
        failed = [e for e in run.events("exit") if (e["cohort_id"], e["incarnation"]) == (first["cohort_id"], 2)]
        assert failed and run.events("held")[1]["time"] < failed[0]["time"] < run.events("released")[-1]["time"]


def test_when_the_first_shadow_dies_as_it_wakes_the_next_one_takes_the_requests(tmp_path: Path, model: Path) -> None:
    flags = ("--shadows", "2", "--promotion-timeout", "60")
    with Deployment(tmp_path / "home", model, *flags, REFERENCE_WAKE_SECONDS="3", **SLOW_TOKENS) as run:
        old, died = primary(run)["cohort_id"], []

        def waking() -> dict[str, Any] | None:
            return next((c for c in run.status()["cohorts"] if c["cohort_id"] != old and c["phase"] == "waking"), None)

        def both(dead: dict[str, Any]) -> None:
            kill_group(dead)
            died.append(eventually(waking, what="a shadow wakes"))
            kill_group(died[0])

        whole(run, both)
        (held,), (released,) = run.events("held"), run.events("released")
        (lost,) = [e for e in run.events("exit") if e["cohort_id"] == died[0]["cohort_id"]]
        assert held["time"] < lost["time"] < released["time"] and released["data"]["moved"]
        assert run.wait_full()["primary"] not in (old, died[0]["cohort_id"])


def sockets_at(port: int) -> set[str]:
    """The inodes of all sockets here whose own port that is, also of those in a dead engine's place."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {row[9] for row in rows if int(row[1].rpartition(":")[2], 16) == port and row[9] != "0"}


def who_has(inodes: set[str]) -> dict[int, set[str]]:
    """Which processes of this machine have these sockets."""
    found: dict[int, set[str]] = {}
    for pid in proc.pids():
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    inode = os.readlink(f"/proc/{pid}/fd/{fd}").removeprefix("socket:[").rstrip("]")
                    if inode in inodes:
                        found.setdefault(pid, set()).add(inode)
    return found


def test_no_process_that_is_started_has_a_socket_that_is_taken_or_held(tmp_path: Path, model: Path) -> None:
    """The agent starts a guard while it holds; the engine was its child before, and the next one comes after."""
    with Deployment(tmp_path / "home", model, REFERENCE_WAKE_SECONDS="5", **SLOW_TOKENS) as run:
        old = primary(run)
        port = int(run.happened("hold_armed")[0]["detail"].rpartition(":")[2])
        seen: list[tuple[set[str], dict[int, set[str]]]] = []

        def guard() -> dict[str, Any]:
            (row,) = [s for s in run.status()["nodes"][0]["services"] if s["name"] == "guard"]
            return dict(row)

        def look(dead: dict[str, Any]) -> None:
            taken = who_has(sockets_at(port))
            assert set(taken) == {run.agent.pid, dead["ranks"][0]["pid"]} and len(taken[run.agent.pid]) == 1
            kill_group(dead)
            eventually(lambda: run.events("held") and len(sockets_at(port)) > 1, what="connections wait")
            first = guard()
            os.kill(first["pid"], signal.SIGKILL)
            eventually(lambda: guard()["pid"] != first["pid"] and guard()["state"] == "ready", what="a new guard")
            inodes = sockets_at(port)
            seen.append((inodes, who_has(inodes)))
            assert not run.events("released"), "it is looked at while it holds"

        whole(run, look)
        ((inodes, found),) = seen
        assert len(inodes) > 1 and found == {run.agent.pid: inodes}
        run.wait_full()
        assert old["cohort_id"] != run.status()["primary"]


def test_without_the_hold_what_is_in_flight_is_lost(tmp_path: Path, model: Path) -> None:
    """What the tests above would see if nothing was held."""
    with Deployment(tmp_path / "home", model, "--migration-limit", "0", **SLOW_TOKENS) as plain:
        found = plain.wait_full()
        with Load(plain.run_file["frontend_url"], streams=12, unary=4, tokens=80) as load:
            load.wait_busy()
            kill_group(found["cohorts"][found["primary"]])
            eventually(lambda: plain.status()["primary"] == 1 - found["primary"])
            eventually(plain.text)
        assert load.lost and not load.wrong
        assert not plain.events("held") and not plain.events("hold_armed")
        plain.happened("lease_revoked")


def test_where_no_descriptor_may_be_taken_it_is_told_and_new_requests_wait_all_the_same(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = [sys.executable, str(Path(no_getfd.__file__)), *support.GMS_LAUNCH]
    monkeypatch.setattr(support, "GMS_LAUNCH", program)
    with Deployment(tmp_path / "home", model, **SLOW_TOKENS) as run:
        found = run.wait_full()
        before = run.text()
        refused, *_ = eventually(lambda: run.events("hold_refused"))
        assert "Operation not permitted" in refused["detail"]
        said = support.gms_launch("doctor", *run.flags, env=run.env)
        assert "pidfd_getfd" in said.stdout and "port is bound instead" in said.stdout
        kill_group(found["cohorts"][found["primary"]])
        run.happened("released")
        run.happened("held")
        assert eventually(run.text) == before


def test_the_frontend_lives_on_in_kv_router_mode(tmp_path: Path, model: Path) -> None:
    """It has a lease of its own among the engines', which must not end with the primary's; new requests are answered.

    What is in flight is lost in this mode, with Dynamo 1.4.2: its router still has the request under its id.
    """
    with Deployment(tmp_path, model, DYN_ROUTER_MODE="kv", DYN_ROUTER_USE_KV_EVENTS="false") as run:
        kill_group(primary(run))
        eventually(lambda: run.events("hold_over"))
        (own,) = run.etcdctl("get", "--prefix", "--keys-only", "v1/instances/dynamo/backend/router-discovery/").split()
        assert int(own.rpartition("/")[2], 16) not in [int(e["detail"], 16) for e in run.events("lease_revoked")]
        run.wait_full()
        assert not run.events("service_exited")
        assert eventually(run.text)
