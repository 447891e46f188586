"""Faults that are no plain death: hangs, promotions that fail, starts that fail, GMS and etcd. One deployment each."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gms_launch.control.client import AlarmedError, Etcd, etcd3
from gms_launch.process import proc
from gms_launch.run.credentials import DYNAMO
from gms_launch.run.rundir import RunDir
from tests.support import LONG, Deployment, etcdctl, eventually, freeze, stopped

Deploy = Callable[..., Deployment]
QUICK = ("--health-interval", "0.2", "--health-timeout", "5")


@pytest.fixture
def deploy(tmp_path: Path, model: Path) -> Iterator[Deploy]:
    """Start a deployment with more flags and environment; all are ended."""
    with contextlib.ExitStack() as stack:
        yield lambda *flags, **env: stack.enter_context(Deployment(tmp_path / "home", model, *flags, **env))


def rank(run: Deployment, cohort_id: int) -> dict[str, Any]:
    found: dict[str, Any] = run.cohort(cohort_id)["ranks"][0]
    return found


def service(run: Deployment, name: str) -> dict[str, Any]:
    return next(s for s in run.status()["nodes"][0]["services"] if s["name"] == name)


# -- hangs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whom", ["main", "worker"])
def test_a_stopped_process_of_the_primary_is_a_dead_primary(deploy: Deploy, whom: str) -> None:
    run = deploy(*QUICK)
    before, primary = run.text(), run.wait_full()["primary"]
    pid = rank(run, primary)["pid"]
    victim = pid if whom == "main" else proc.children(pid)[0]
    os.kill(victim, signal.SIGSTOP)
    eventually(lambda: proc.stat(victim).state == "T")  # type: ignore[union-attr]
    eventually(lambda: run.text() == before)
    assert run.wait_full()["primary"] == 1 - primary
    why = run.happened("hung")[0]["detail"]
    assert f"process {victim} has been stopped for 5 s" in why or "no answer on its system port" in why


def test_a_primary_that_serves_no_tokens_is_killed_although_it_lives_and_answers(deploy: Deploy) -> None:
    run = deploy("--canary-interval", "1", "--canary-timeout", "8")
    before, primary = run.text(), run.wait_full()["primary"]
    wedge = run.node_dir / f"wedge-{primary}-1"
    wedge.touch()
    assert run.cohort(primary)["phase"] == "active"
    eventually(lambda: run.status()["primary"] == 1 - primary)
    eventually(lambda: run.text() == before)
    killed = [e["detail"] for e in run.events("kill") if e["cohort_id"] == primary]
    assert any("no token for 8 s (canary_timeout)" in k for k in killed), killed
    run.wait_full()


def test_without_a_canary_nobody_is_killed_for_it(deploy: Deploy) -> None:
    run = deploy("--no-canary", "--canary-interval", "1", "--canary-timeout", "2")
    primary = run.wait_full()["primary"]
    (run.node_dir / f"wedge-{primary}-1").touch()
    assert run.text(timeout=5.0) is None, "for longer than both deadlines nobody is answered, and nothing happens"
    assert run.status()["primary"] == primary and not run.events("kill")


#: Our own request waits for half of the difference, which is less than a token of 3.5 s takes.
SLOW = ("--canary-interval", "6", "--canary-timeout", "12")


def test_a_slow_engine_at_full_load_is_not_killed(deploy: Deploy) -> None:
    """Each token takes longer than our own request would wait for it: only the users' tokens show that it lives."""
    run = deploy(*SLOW, *QUICK, REFERENCE_TOKEN_SECONDS="3.5")
    stop = threading.Event()
    answered: list[str | None] = []

    def load(later: float) -> None:
        stop.wait(later)
        while not stop.is_set():
            answered.append(run.text(tokens=2, timeout=LONG))

    threads = [threading.Thread(target=load, args=(k / 8,)) for k in range(24)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: len(answered) >= 72, LONG, "three rounds of requests, which take longer than the deadline")
        incarnations = [c["incarnation"] for c in run.status()["cohorts"]]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert all(answered)
    assert incarnations == [1, 1] and not run.events("kill") and not run.events("exit")


def test_the_same_engine_without_load_is_killed_since_its_token_comes_too_late(deploy: Deploy) -> None:
    """What the test above would see if users' tokens did not count."""
    run = deploy(*SLOW, *QUICK, REFERENCE_TOKEN_SECONDS="3.5")
    eventually(lambda: any("no token for 12 s" in e["detail"] for e in run.events("kill")))


# -- promotions that fail ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hang", "error", "crash"])
def test_a_promotion_that_fails_while_it_wakes_goes_to_the_next_shadow(deploy: Deploy, kind: str) -> None:
    """First lives are up before anything fails; then the shadows' second lives fail to wake."""
    flags = ("--shadows", "2", "--promotion-timeout", "8", "--restart-backoff", "0.2")
    run = deploy(*flags, REFERENCE_FAULT=f"*.2:waking={kind}", REFERENCE_MONITOR_SECONDS="0.2")
    before, primary = run.text(), run.wait_full()["primary"]
    parked = [k for k in range(3) if k != primary]
    for k in parked:
        os.killpg(rank(run, k)["pgid"], signal.SIGKILL)
    for k in parked:
        eventually(lambda k=k: run.cohort(k)["incarnation"] == 2 and run.cohort(k)["phase"] == "parked", LONG)
    os.killpg(rank(run, primary)["pgid"], signal.SIGKILL)
    assert eventually(run.text, LONG) == before
    failed = {(e["cohort_id"], e["incarnation"]) for e in run.events("lock")} & {(k, 2) for k in range(3)}
    assert failed, "at least one of them had the lock and failed"
    run.wait_full()


def test_an_endpoint_that_registers_broken_is_not_taken_for_a_promotion(deploy: Deploy) -> None:
    """Registered, healthy, and every request an error: upstream has been seen to do that after a failed wake."""
    run = deploy("--promotion-timeout", "8", "--restart-backoff", "0.2", REFERENCE_FAULT="*.2:tokens=error")
    before, primary = run.text(), run.wait_full()["primary"]
    shadow = 1 - primary
    os.killpg(rank(run, shadow)["pgid"], signal.SIGKILL)
    eventually(lambda: run.cohort(shadow)["incarnation"] == 2 and run.cohort(shadow)["phase"] == "parked", LONG)
    os.killpg(rank(run, primary)["pgid"], signal.SIGKILL)
    over, *_ = run.happened("hold_over")
    assert over["data"]["lost"] == 0, "what failed was gms-launch's own, and no user had asked"
    assert eventually(run.text, LONG) == before
    reasons = [e["detail"] for e in run.events("kill") if (e["cohort_id"], e["incarnation"]) == (shadow, 2)]
    assert any("no token within 8 s of the lock" in r for r in reasons), reasons


# -- starts that fail ----------------------------------------------------------------------------------------------


def start_fails(tmp_path: Path, model: Path, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    run = Deployment(tmp_path / "home", model, *flags, **env)
    done = run.up()
    assert run.alive() == [], "nothing is left"
    return done


def test_a_writer_that_dies_before_its_commit_ends_the_first_start_with_its_log(tmp_path: Path, model: Path) -> None:
    done = start_fails(tmp_path, model, REFERENCE_FAULT="0.1:before_commit=error", REFERENCE_MONITOR_SECONDS="0")
    assert done.returncode == 1
    assert "cohort 0 did not come up" in done.stderr and "InjectedError: error at before_commit" in done.stderr


def test_a_writer_that_dies_later_comes_back_as_the_writer_and_shadows_wait(deploy: Deploy) -> None:
    """The group starts cold on a new GMS, and the writer's second life dies before its commit: the third loads."""
    fault = "0.2:before_commit"
    run = deploy("--restart-backoff", "0.2", REFERENCE_FAULT=fault, REFERENCE_MONITOR_SECONDS="0.1")
    before = run.text()
    os.kill(service(run, "gms-0")["pid"], signal.SIGKILL)
    eventually(lambda: run.status()["redundancy"] == "none")
    assert run.cli("kill-primary", "--force").returncode in (0, 4)
    assert eventually(run.text, LONG) == before
    run.wait_full()
    lives = {(e["cohort_id"], e["incarnation"]) for e in run.events("started")}
    assert (0, 3) in lives and (0, 4) not in lives
    assert run.cohort(1)["incarnation"] == 2, "the shadow waited for the writer and was not started again"


def test_weights_that_do_not_fit_are_said_so(tmp_path: Path, model: Path) -> None:
    done = start_fails(tmp_path, model, "--virtual-gpu-mib", "4", "--start-timeout", "8")
    assert done.returncode == 2
    assert "8 MiB of weights on each GPU" in done.stderr and "made-up device" in done.stderr


def test_a_rendezvous_port_that_is_taken_is_passed_over(deploy: Deploy) -> None:
    run = deploy()
    shadow = 1 - run.wait_full()["primary"]
    base = run.run_file["ports"]["master_base"]
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", base + 100 * shadow + 1))  # the next life's, were it free
        squatter.listen()
        os.killpg(rank(run, shadow)["pgid"], signal.SIGKILL)
        eventually(lambda: run.cohort(shadow)["incarnation"] == 2)
        run.wait_full()
        command = proc.command_line(rank(run, shadow)["pid"])
        assert f"--master-port {base + 100 * shadow + 2}" in command


def test_an_engine_that_never_parks_ends_the_start_at_its_deadline(tmp_path: Path, model: Path) -> None:
    done = start_fails(tmp_path, model, "--start-timeout", "3", REFERENCE_FAULT="1.1:starting=hang")
    assert done.returncode == 4
    assert "not parked within 3 s (start_timeout)" in done.stderr


def wrong_dtype(file: Path) -> None:
    """Say in the header that the tensors are of a type that there is not."""
    data = bytearray(file.read_bytes())
    assert b'"F32"' in data
    file.write_bytes(data.replace(b'"F32"', b'"F33"'))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "has no weights"),
        (lambda d: os.truncate(d / "model.safetensors", 5000), "is cut off"),
        (lambda d: wrong_dtype(d / "model.safetensors"), "its weights cannot be read"),
        (lambda d: (d / "config.json").write_text("{"), "config.json"),
    ],
    ids=["missing", "truncated", "dtype", "config"],
)
def test_a_spoilt_model_is_named(tmp_path: Path, model: Path, spoil: Callable[[Path], object], says: str) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    spoil(copy)
    done = start_fails(tmp_path, copy, REFERENCE_MONITOR_SECONDS="0")
    assert done.returncode in (1, 2), done.stderr
    assert says in done.stderr, done.stderr[-2000:]


def test_a_shadow_that_can_never_park_is_given_up_and_the_primary_serves_on(deploy: Deploy) -> None:
    fault = ",".join(f"1.{k}:starting" for k in range(2, 9))
    flags = ("--restart-backoff", "0.1", "--restart-limit", "2", "--restart-window", "25")
    run = deploy(*flags, REFERENCE_FAULT=fault, REFERENCE_MONITOR_SECONDS="0.1")
    status = run.wait_full()
    if status["primary"] == 1:
        assert run.cli("kill-primary").returncode == 0
    else:
        os.killpg(rank(run, 1)["pgid"], signal.SIGKILL)
    eventually(lambda: (slot := run.cohort(1))["failed_starts"] >= 1 and slot["last_exit"], LONG)
    seen = eventually(lambda: (found := run.status())["cohorts"][1]["given_up"] and found, LONG)
    assert seen["redundancy"] == "none" and run.text()
    assert "2 starts failed within 25 s" in seen["cohorts"][1]["why"]
    event, *_ = run.happened("given_up")  # a slow machine may see the budget heal and run out again by now
    agent_log, last = run.home / run.run / "logs" / "agent.log", "crash at starting, as REFERENCE_FAULT says"
    eventually(lambda: last in agent_log.read_text(), what="the last log lines are told")
    eventually(lambda: run.cohort(1)["incarnation"] > event["incarnation"], LONG, "the budget heals")


# -- GMS -----------------------------------------------------------------------------------------------------------


def test_after_the_loss_of_gms_the_primarys_end_starts_the_group_cold(deploy: Deploy) -> None:
    run = deploy()
    before, status = run.text(), run.wait_full()
    os.kill(service(run, "gms-0")["pid"], signal.SIGKILL)
    eventually(lambda: run.status()["redundancy"] == "none")
    assert run.text() == before, "the primary serves on what it has mapped"
    assert run.cli("kill-primary").returncode == 3, "refused, since no shadow could take over"
    os.killpg(rank(run, status["primary"])["pgid"], signal.SIGKILL)
    assert eventually(run.text, LONG) == before
    after = run.wait_full()
    assert {c["incarnation"] for c in after["cohorts"]} == {2}
    assert service(run, "gms-0")["starts"] == 2

    def loads() -> list[int]:
        return [g["loads"] for g in run.status()["nodes"][0]["gms"] if g["tag"] == "weights"]

    eventually(lambda: loads() == [1], what="by the new server's own count, when it was asked next")
    assert run.cli("kill-primary").returncode == 0, "and failover works again"


def test_a_frozen_gms_does_not_disturb_the_primary(deploy: Deploy) -> None:
    run = deploy()
    before, primary = run.text(), run.wait_full()["primary"]
    pid = service(run, "gms-0")["pid"]
    with stopped(pid):
        eventually(lambda: proc.stat(pid).state == "T")  # type: ignore[union-attr]
        for verb in ("kill-primary", "switch-over", "roll"):  # at once: it has not missed three looks yet
            refused = run.cli(verb)
            assert refused.returncode == 3, f"{verb}: {refused.stdout}{refused.stderr}"
            assert "GMS on" in refused.stderr and ("does not answer now" in refused.stderr or "gone" in refused.stderr)
        assert run.text() == before
        eventually(lambda: {g["state"] for g in run.status()["nodes"][0]["gms"]} == {"DOWN"}, what="taken for gone")
        eventually(lambda: run.status()["redundancy"] == "none")
        told = [e["detail"].partition(": ") for e in run.happened("gms_silent")]
        assert {why for *_, why in told} == {"no answer to 3 looks in a row"}
        assert {what for whats, *_ in told for what in whats.split(", ")} <= {"gpu 0 weights", "gpu 0 kv_cache"}
        assert "`gms-launch kill-primary --force`" in run.cli("logs", "agent").stdout
        assert run.text() == before
    assert run.status()["primary"] == primary and run.wait_full()


# -- etcd ----------------------------------------------------------------------------------------------------------


def test_a_frozen_etcd_is_restarted_before_anybody_minds(deploy: Deploy) -> None:
    run = deploy()
    before = run.text()
    pids = [rank(run, k)["pid"] for k in (0, 1)]
    os.kill(service(run, "etcd")["pid"], signal.SIGSTOP)
    eventually(lambda: run.events("service_restarted"))
    gone, *_ = run.happened("service_exited")
    assert "no answer for 3 s" in gone["detail"]
    run.wait_full()
    assert [rank(run, k)["pid"] for k in (0, 1)] == pids, "no engine was touched"
    assert run.text() == before
    assert run.cli("kill-primary").returncode == 0


def test_an_etcd_that_is_away_for_longer_than_the_leases_ends_the_engines_and_they_come_back(
    deploy: Deploy, tmp_path: Path
) -> None:
    """20 s without etcd: every engine ends itself, and the run is whole again a little later, same text.

    The frontend's lease is longer: what it watches comes before its lease when etcd is back, with pauses that grow.
    """
    real, broken = shutil.which("etcd"), tmp_path / "broken"
    wrapper = tmp_path / "etcd"
    wrapper.write_text(f'#!/bin/sh\ntest -e {broken} && exit 1\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    run = deploy("--etcd-bin", str(wrapper), "--dynamo-lease-ttl", "5", "--service-timeout", "60")
    before = run.text()
    pids, front = [rank(run, k)["pid"] for k in (0, 1)], proc.identity(service(run, "frontend")["pid"])
    broken.touch()
    os.kill(service(run, "etcd")["pid"], signal.SIGKILL)
    time.sleep(10.0)
    # When etcd goes, more than 22 are left of its lease of 45 s, and of an engine's 5 at most.
    assert front is not None and proc.alive(front), "the frontend ended as early as the engines"
    eventually(lambda: not any(proc.stat(p) for p in pids), LONG, "the engines end when their leases do")
    time.sleep(10.0)  # the rest of the 20 s
    broken.unlink()
    assert eventually(run.text, LONG) == before
    run.wait_full()


def test_an_etcd_that_cannot_be_brought_back_ends_the_run_with_its_log(deploy: Deploy, tmp_path: Path) -> None:
    """A full disk looks like this: etcd says so and exits, again and again."""
    real, broken = shutil.which("etcd"), tmp_path / "broken"
    wrapper = tmp_path / "etcd"
    said = "write /data: no space left on device"
    wrapper.write_text(f'#!/bin/sh\ntest -e {broken} && echo "{said}" && exit 1\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    run = deploy("--etcd-bin", str(wrapper), "--service-timeout", "15")
    broken.touch()
    os.kill(service(run, "etcd")["pid"], signal.SIGKILL)
    eventually(lambda: "ended" in run.run_file and run.run_file["ended"], LONG)
    found = run.run_file
    assert found["exit_code"] == 1
    assert "etcd could not be brought back" in found["reason"] and said in found["reason"]
    eventually(lambda: run.alive() == [])


def test_an_etcd_whose_history_fills_its_quota_is_told_and_makes_room_and_failovers_go_on(deploy: Deploy) -> None:
    """Really filled: one key, put until etcd refuses. What it holds now is small, so forgetting is enough."""
    run = deploy()
    before, pid = run.text(), service(run, "etcd")["pid"]
    fill(run, lambda _: "/junk/same")
    assert run.happened("etcd_alarm")[0]["detail"] == "NOSPACE"
    eventually(lambda: run.events("etcd_alarm_over"), what="room was made")
    assert "alarm" not in run.etcdctl("alarm", "list")
    eventually(lambda: run.status()["alarms"] == [])
    assert run.cli("kill-primary").returncode == 0
    assert run.wait_full() and run.text() == before
    assert service(run, "etcd")["pid"] == pid, "no restart"
    assert run.events("service_exited") == []


@pytest.mark.slow
def test_an_etcd_that_stays_full_is_told_and_serves_on_and_is_well_when_there_is_room(deploy: Deploy) -> None:
    """Filled by what is not history. A failover comes as far as to an engine that cannot register until there is room;
    what could not be written meanwhile is written then."""
    run = deploy()
    before, pid = run.text(), service(run, "etcd")["pid"]
    fill(run, lambda k: f"/junk/{k}")
    assert run.status()["alarms"] == ["NOSPACE"]
    shown = run.cli("status").stdout
    assert "etcd has raised the alarm NOSPACE" in shown
    assert run.text() == before, "who serves serves on"
    victim = run.status()["primary"]
    os.killpg(run.cohort(victim)["ranks"][0]["pgid"], signal.SIGKILL)
    eventually(lambda: [e for e in run.events("lock") if e["cohort_id"] != victim], what="the shadow has the lock")
    assert run.status()["alarms"] == ["NOSPACE"]
    run.etcdctl("del", "--prefix", "/junk/")
    eventually(lambda: run.events("etcd_alarm_over"), LONG, "room was made")
    assert eventually(run.text, LONG) == before
    run.wait_full()
    assert service(run, "etcd")["pid"] == pid, "no restart"
    assert [e for e in run.events("service_exited") if "etcd" in e["detail"]] == []


def test_an_etcd_that_takes_its_data_for_corrupt_is_told_and_not_started_again(deploy: Deploy) -> None:
    """The alarm is armed by etcd's own call. etcd refuses writes then, and to be asked whether it is well."""
    run = deploy()
    before, pid = run.text(), service(run, "etcd")["pid"]
    with closing(Etcd(run.access)) as etcd:
        corrupt = etcd3.etcdrpc.AlarmRequest.AlarmAction.Value("ACTIVATE"), etcd3.etcdrpc.AlarmType.Value("CORRUPT")
        over = etcd3.etcdrpc.AlarmRequest.AlarmAction.Value("DEACTIVATE"), corrupt[1]
        member = etcd.call(
            lambda c: c.maintenancestub.Status(etcd3.etcdrpc.StatusRequest(), timeout=5.0)
        ).header.member_id

        def say(action: int, alarm: int) -> None:
            request = etcd3.etcdrpc.AlarmRequest(action=action, memberID=member, alarm=alarm)
            etcd.call(lambda c: c.maintenancestub.Alarm(request, timeout=5.0))

        say(*corrupt)
        eventually(lambda: [e["detail"] for e in run.events("etcd_alarm")] == ["CORRUPT"])
        eventually(lambda: run.status()["alarms"] == ["CORRUPT"])
        assert "etcd has raised the alarm CORRUPT" in run.cli("status").stdout
        with pytest.raises(AlarmedError, match="corrupt cluster"):
            etcd.put("/junk", b"")
        time.sleep(5.0)  # more than the liveness of 3 s, in which an etcd that is taken for hung is killed
        assert run.events("service_exited") == []
        assert run.text() == before
        say(*over)
    eventually(lambda: run.events("etcd_alarm_over"))
    assert run.wait_full() and service(run, "etcd")["pid"] == pid
    assert run.cli("kill-primary").returncode == 0


def fill(run: Deployment, key: Callable[[int], str]) -> None:
    """Put until etcd refuses, and its alarm is told."""
    with closing(Etcd(run.access)) as etcd, contextlib.suppress(AlarmedError):
        for k in range(200):
            etcd.put(key(k), bytes(1_000_000))
        pytest.fail("etcd took it all")
    eventually(lambda: run.events("etcd_alarm"), what="the alarm is told")


def test_a_wiped_etcd_is_filled_again(deploy: Deploy) -> None:
    run = deploy("--dynamo-lease-ttl", "5")
    before = run.text()
    etcd = service(run, "etcd")["pid"]
    data = run.node_dir / "etcd"
    assert data.is_dir()
    freeze(etcd)
    shutil.rmtree(data)
    os.kill(etcd, signal.SIGKILL)
    eventually(lambda: run.events("service_restarted"))
    # Every Dynamo process ends when what it had of its lease is over: the engines soon, the frontend when this is over.
    eventually(
        lambda: min(c["incarnation"] for c in run.status()["cohorts"]) >= 2, LONG, "the engines were started again"
    )
    assert eventually(run.text, LONG) == before
    found = run.wait_full()
    assert min(c["incarnation"] for c in found["cohorts"]) >= 2
    dynamo = RunDir(run.home / run.run).credentials().access(run.access.endpoints, DYNAMO)
    assert "permission denied" in etcdctl(dynamo, "get", "--prefix", "/gms-launch/").stderr, "who may what is known"
    assert run.cli("kill-primary").returncode == 0
    assert eventually(run.text, LONG) == before
