"""A whole deployment on one node with real parts: failovers, faults, and what the verbs say."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gms_launch.control.client import Etcd
from gms_launch.process import proc
from tests.support import GMS_LAUNCH, LONG, Deployment, eventually, flock_holders, freeze, gms_launch, kill, stopped


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path / "home", model) as deployment:
        yield deployment


def loads(run: Deployment) -> int:
    """How often weights were read from disk, as the engines' own loader counts it."""
    return sum(len(f.read_text().splitlines()) for f in run.node_dir.glob("disk_loads_*"))


def kill_from_outside(run: Deployment, cohort_id: int) -> int:
    """SIGKILL a cohort's process group as a fault would; returns its pid, which is dead afterwards."""
    rank = run.cohort(cohort_id)["ranks"][0]
    who = proc.identity(rank["pid"])
    assert who is not None
    os.killpg(rank["pgid"], signal.SIGKILL)
    eventually(lambda: not proc.alive(who))
    return int(rank["pid"])


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("failovers", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_failovers_in_a_row(run: Deployment, failovers: int) -> None:
    before = run.text()
    assert before
    inode = (run.node_dir / "failover.lock").stat().st_ino
    for number in range(failovers):
        victim = run.status()["primary"]
        done = run.cli("kill-primary", "--json")
        assert done.returncode == 0, done.stderr
        failover = json.loads(done.stdout)
        assert failover["victim"]["cohort_id"] == victim
        assert {"detected", "dead", "lock", "awake", "registered", "first_token"} <= set(failover["steps"])
        assert run.text() == before, f"failover {number}"
        status = run.wait_full()
        assert status["primary"] != victim
        pgid = int((run.node_dir / f"engine-{victim}.pgid").read_text())
        assert pgid == status["cohorts"][victim]["ranks"][0]["pgid"]
    assert loads(run) == 1
    assert next(g["loads"] for g in run.status()["nodes"][0]["gms"] if g["tag"] == "weights") == 1
    assert (run.node_dir / "failover.lock").stat().st_ino == inode, "the lock is made once"
    assert sum(c["incarnation"] for c in run.status()["cohorts"]) == failovers + 2
    assert len(run.timeline(failovers)) == failovers
    etcd = Etcd(run.access)
    eventually(
        lambda: etcd.get_prefix(f"/gms-launch/{run.run}/ended/") == {}, what="no word is left of lives long gone"
    )
    etcd.close()
    node_dir = run.node_dir
    assert run.cli("down").returncode == 0
    assert run.alive() == []
    assert not node_dir.exists()


def test_a_primary_killed_from_outside_is_replaced_and_rearmed(run: Deployment) -> None:
    before = run.text()
    victim = run.status()["primary"]
    kill_from_outside(run, victim)
    eventually(lambda: run.text() == before)
    assert run.wait_full()["primary"] != victim
    eventually(lambda: run.status()["nodes"][0]["lock_holder"] == f"cohort {1 - victim}", what="it is told who has it")
    assert run.happened("exit")[0]["detail"].startswith("killed by SIGKILL")
    eventually(lambda: len(run.events("lease_revoked")) == 1)


def test_a_worker_that_dies_takes_its_whole_cohort_with_it(tmp_path: Path, model: Path) -> None:
    """Long before the engine's own monitor would see it: until then the dead engine keeps the lock."""
    with Deployment(tmp_path / "home", model, REFERENCE_MONITOR_SECONDS="60") as run:
        before = run.text()
        victim = run.status()["primary"]
        leader = run.cohort(victim)["ranks"][0]["pid"]
        (worker,) = proc.children(leader)
        kill(worker)
        eventually(lambda: run.status()["primary"] == 1 - victim)
        assert run.wait_full()["cohorts"][victim]["incarnation"] == 2
        assert run.text() == before
        (seen,) = eventually(lambda: [e for e in run.events("exit") if e["data"].get("role") == "primary"])
        assert f"its process {worker} " in seen["detail"]


def test_a_shadow_that_dies_is_rearmed_and_the_primary_is_not_touched(run: Deployment) -> None:
    primary = run.status()["primary"]
    pid = run.cohort(primary)["ranks"][0]["pid"]
    kill_from_outside(run, 1 - primary)
    eventually(lambda: run.cohort(1 - primary)["incarnation"] == 2)
    status = run.wait_full()
    assert status["primary"] == primary
    assert status["cohorts"][primary]["ranks"][0]["pid"] == pid


def strays(run: Deployment, cohort_id: int, life: int) -> list[proc.Stat]:
    """The strays of a life, which only their command line names."""
    mark = f"stray-of-{run.run}/{cohort_id}/{life}/0"
    found = [i for pid in proc.pids() if mark in proc.command_line(pid) and (i := proc.stat(pid)) is not None]
    return [i for i in found if not i.dead]


def test_a_stray_that_holds_the_lock_is_found_and_promotion_goes_on(tmp_path: Path, model: Path) -> None:
    # A child that left group and session and inherited the lock's descriptor keeps the flock after its parent's death.
    with Deployment(tmp_path / "home", model, REFERENCE_STRAY="1") as run:
        before = run.text()
        victim = run.status()["primary"]
        tag = f"{run.run}/{victim}/1"
        pgid = run.cohort(victim)["ranks"][0]["pgid"]
        stray = next(i for i, _ in proc.tagged(tag) if i.pgid != pgid)
        assert run.cli("kill-primary").returncode == 0
        assert not proc.alive(stray.identity)
        assert run.text() == before
        eventually(lambda: run.events("dead"))
        assert str(stray.pid) in run.happened("dead")[0]["detail"]
        run.wait_full()


@pytest.mark.parametrize("kind", ["hard", "unlocked"])
def test_a_stray_without_group_session_and_environment_is_found(tmp_path: Path, model: Path, kind: str) -> None:
    """Double fork, setsid, empty environment: descent shows whose it is, and its descriptor that it has the lock."""
    with Deployment(tmp_path / "home", model, REFERENCE_STRAY=kind) as run:
        before = run.text()
        victim = run.wait_full()["primary"]
        (stray,) = strays(run, victim, 1)
        pgid, lock = run.cohort(victim)["ranks"][0]["pgid"], run.node_dir / "failover.lock"
        assert stray.pgid != pgid and stray.session != pgid and proc.tag_of(stray.pid) is None
        assert (stray.pid in {i.pid for i in proc.lock_keepers([lock])}) == (kind == "hard")
        kill_from_outside(run, victim)
        eventually(lambda: run.text() == before)
        eventually(lambda: run.events("fenced"))
        assert not proc.alive(stray.identity), "it was not fenced before the stray was dead"
        assert f"{stray.pid} (" in run.happened("dead")[0]["detail"] and "os.fork" in run.happened("dead")[0]["detail"]
        assert run.wait_full()["primary"] == 1 - victim
        (second,) = strays(run, 1 - victim, 1)
        if kind == "hard":
            # The agent is killed: the lock tells its guard.
            os.kill(run.agent.pid, signal.SIGKILL)
            eventually(lambda: not proc.alive(second.identity))
            eventually(lambda: not proc.tagged(f"{run.run}/guard"))
            down = run.cli("down")
            assert down.returncode == 0 and "nothing with its tag or its lock is alive" in down.stdout
        else:
            down = run.cli("down")
            assert down.returncode == 0 and "nothing of it is alive" in down.stdout
            assert not proc.alive(second.identity)


def test_kill_primary_is_refused_without_a_parked_shadow(tmp_path: Path, model: Path) -> None:
    with Deployment(tmp_path / "home", model, "--shadows", "0") as run:
        before = run.text()
        pid = run.cohort(0)["ranks"][0]["pid"]
        done = run.cli("kill-primary")
        assert done.returncode == 3
        assert "no shadow is parked" in done.stderr
        assert run.cohort(0)["ranks"][0]["pid"] == pid
        assert run.text() == before
        # Forced, it is an outage until the only cohort has started again.
        done = run.cli("kill-primary", "--force", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["promoted"] == {"cohort_id": 0, "incarnation": 2}
        assert run.text() == before


def test_agent_killed_in_the_middle_of_a_failover_leaves_nothing(tmp_path: Path, model: Path) -> None:
    with Deployment(tmp_path / "home", model, REFERENCE_WAKE_SECONDS="5") as run:
        victim = run.status()["primary"]
        os.killpg(run.cohort(victim)["ranks"][0]["pgid"], signal.SIGKILL)
        eventually(lambda: run.events("exit"), what="the failover has begun")
        os.kill(run.agent.pid, signal.SIGKILL)
        assert not run.events("first_token")[1:], "it was in the middle"
        eventually(lambda: run.alive() == [], what="nothing outlives the agent")
        assert run.cli("status").returncode == 5
        down = run.cli("down")
        assert down.returncode == 0, down.stderr
        assert not run.node_dir.exists()


def test_sweep_clears_a_dead_run_and_spares_a_live_one(run: Deployment, tmp_path: Path, model: Path) -> None:
    with Deployment(tmp_path / "other", model, REFERENCE_STRAY="hard") as dead:
        (stray,) = strays(dead, dead.status()["primary"], 1)
        # Without its guard, so that there is something to find; and stopped, so that it starts no other.
        freeze(dead.agent.pid)
        for info, _ in proc.tagged(f"{dead.run}/guard"):
            kill(info.pid)
            eventually(lambda who=info.identity: not proc.alive(who))
        os.kill(dead.agent.pid, signal.SIGKILL)
        eventually(lambda: not proc.alive(dead.agent))
        node_dir = dead.node_dir
        assert proc.alive(stray.identity), "a process that left its session outlives its engine when nobody looks"
        dry = gms_launch("sweep", "--dry-run", env=dead.env).stdout
        assert dead.run in dry and run.run not in dry
        assert gms_launch("sweep", "--run", dead.run, env=dead.env).returncode == 0
        assert dead.alive() == [] and not proc.alive(stray.identity) and not node_dir.exists()
        assert run.text() and run.status()["redundancy"] == "full"


def test_a_dead_gms_leaves_the_primary_serving_without_redundancy(run: Deployment) -> None:
    before = run.text()
    gms = next(s for s in run.status()["nodes"][0]["services"] if s["name"] == "gms-0")
    os.kill(gms["pid"], signal.SIGKILL)
    eventually(lambda: run.status()["redundancy"] == "none")
    assert run.text() == before
    eventually(lambda: {g["state"] for g in run.status()["nodes"][0]["gms"]} == {"DOWN"})


def test_two_deployments_side_by_side(tmp_path: Path, model: Path) -> None:
    home = tmp_path / "home"
    with Deployment(home, model) as one, Deployment(home, model) as two:
        assert one.run_file["frontend_url"] != two.run_file["frontend_url"]
        text = one.text()
        assert text and two.text() == text
        ambiguous = gms_launch("status", env=one.env)
        assert ambiguous.returncode == 2
        assert one.run in ambiguous.stderr and two.run in ambiguous.stderr
        untouched = two.status()["cohorts"]
        assert one.cli("kill-primary").returncode == 0
        assert one.cli("down").returncode == 0
        assert two.text() == text
        assert [c["ranks"][0]["pid"] for c in two.status()["cohorts"]] == [c["ranks"][0]["pid"] for c in untouched]


def test_a_shadow_that_dies_while_starting_fails_up_long_before_its_deadline(tmp_path: Path, model: Path) -> None:
    run = Deployment(tmp_path / "home", model, "--start-timeout", "1000", REFERENCE_FAULT="1.1:starting")
    done = run.up()  # which ends after much less than that, or else this fails
    assert done.returncode == 1
    assert "cohort 1 did not come up" in done.stderr
    assert "crash at starting, as REFERENCE_FAULT says" in done.stderr
    assert run.alive() == []
    assert not Path(run.node_dir).exists()


def test_etcd_that_dies_is_back_before_anybody_minds(run: Deployment) -> None:
    before = run.text()
    etcd = next(s for s in run.status()["nodes"][0]["services"] if s["name"] == "etcd")
    pids = [c["ranks"][0]["pid"] for c in run.status()["cohorts"]]
    os.kill(etcd["pid"], signal.SIGKILL)
    eventually(lambda: run.events("service_restarted"))
    # The first answer of the new etcd may come before the agent's word of it.
    eventually(lambda: [s["starts"] for s in run.status()["nodes"][0]["services"] if s["name"] == "etcd"] == [2])
    status = run.wait_full()
    assert [c["ranks"][0]["pid"] for c in status["cohorts"]] == pids, "no engine was touched"
    assert run.text() == before
    assert run.cli("kill-primary").returncode == 0, "and failover still works"
    assert run.text() == before


def test_nats_and_frontend_are_restarted_and_cohorts_not_touched(run: Deployment) -> None:
    before = run.text()
    pids = [c["ranks"][0]["pid"] for c in run.status()["cohorts"]]
    for name in ("nats", "frontend"):
        service = next(s for s in run.status()["nodes"][0]["services"] if s["name"] == name)
        os.kill(service["pid"], signal.SIGKILL)
        eventually(lambda name=name: any(e["detail"].startswith(name) for e in run.events("service_restarted")))
    eventually(lambda: run.text() == before)
    assert [c["ranks"][0]["pid"] for c in run.status()["cohorts"]] == pids


def test_without_nats(tmp_path: Path, model: Path) -> None:
    with Deployment(tmp_path / "home", model, "--no-nats", NATS_SERVER="") as run:
        assert "nats" not in [s["name"] for s in run.status()["nodes"][0]["services"]]
        before = run.text()
        assert before
        assert run.cli("kill-primary").returncode == 0
        assert run.text() == before


def test_two_gpus_give_the_same_text_as_one(run: Deployment, tmp_path: Path, model: Path) -> None:
    with Deployment(tmp_path / "two", model, "--tp", "2", "--virtual-gpus", "2") as two:
        assert two.text() == run.text()
        assert loads(two) == 2, "once a GPU"
        assert two.cli("kill-primary").returncode == 0
        assert two.text() == run.text()


def test_one_wrong_byte_in_the_mapped_weights_changes_the_answer(run: Deployment) -> None:
    before = run.text()
    gms = next(s for s in run.status()["nodes"][0]["services"] if s["name"] == "gms-0")
    memory = [path for path, name in descriptors(gms["pid"]).items() if "memfd:gms" in name]
    (weights,) = [f for f in memory if f.stat().st_size == 8 * 1024 * 1024]  # the KV is twice as large
    with open(weights, "r+b", buffering=0) as file:
        file.seek(123_457)
        byte = file.read(1)
        file.seek(123_457)
        file.write(bytes([byte[0] ^ 1]))
        assert run.text() not in (None, before)
        file.seek(123_457)
        file.write(byte)
    assert run.text() == before


def test_down_stops_a_run_whose_agent_hangs(run: Deployment) -> None:
    agent = run.agent
    with stopped(agent.pid):
        done = run.cli("down", "--timeout", "0.5")
        assert done.returncode == 4
        assert "did not stop within 0.5 s and was killed" in done.stderr
        eventually(lambda: not proc.alive(agent))
    assert run.cli("down").returncode == 0
    assert run.alive() == []


def test_the_run_is_found_and_its_verbs_answer(run: Deployment) -> None:
    alone = gms_launch("status", env=run.env)
    assert alone.returncode == 0 and run.run in alone.stdout and "redundancy full" in alone.stdout
    assert "cohort-0.1" in run.cli("logs").stdout
    assert "waiting for lock" in run.cli("logs", "cohort-1", "-n", "0").stdout
    run.happened("first_token")
    assert "first_token" in run.cli("timeline", "--events").stdout
    assert "has had no failover" in run.cli("timeline").stdout
    assert gms_launch("up", "-d", *run.flags, env=run.env).returncode == 3
    assert gms_launch("status", "--run", "nobody", env=run.env).returncode == 5
    assert run.cli("kill-primary", "--scope", "rank:7").returncode == 2
    assert gms_launch("sweep", "--dry-run", env=run.env).stdout.count(run.run) == 0, "a live run is not swept"
    assert (run.home / run.run / "credentials.json").stat().st_mode & 0o077 == 0
    assert run.node_dir.stat().st_mode & 0o777 == 0o700
    (lock,) = flock_holders(str(run.node_dir / "failover.lock"))
    assert lock == run.cohort(run.status()["primary"])["ranks"][0]["pid"]


def descriptors(pid: int) -> dict[Path, str]:
    """What a process has open; it may close some of it while we look."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found[path] = os.readlink(path)
    return found


def test_nothing_listens_beyond_the_loopback(run: Deployment) -> None:
    files = [name for i, _ in proc.tagged(run.run) for name in descriptors(i.pid).values()]
    inodes = {name[8:-1] for name in files if name.startswith("socket:")}
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ours = [fields[1] for fields in listening if fields[3] == "0A" and fields[9] in inodes]
    assert len(ours) >= 5
    assert [a for a in ours if not a.startswith("0100007F")] == []


def test_terminated_in_the_foreground_it_ends_in_order(tmp_path: Path, model: Path) -> None:
    run = Deployment(tmp_path / "home", model)
    agent = subprocess.Popen([*GMS_LAUNCH, "up", *run.flags], env=run.env, stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: (run.home / run.run / "events.jsonl").exists() and run.events("redundancy"), LONG)
        run.wait_full()
        agent.send_signal(signal.SIGINT)
        _, err = agent.communicate(timeout=LONG)
    finally:
        agent.kill()
    assert agent.returncode == 0, err
    assert "stopping: signal SIGINT" in err
    kinds = [(e["kind"], e["cohort_id"]) for e in run.events() if e["kind"] in ("dead", "lock")]
    primary = next(c for k, c in kinds if k == "lock")
    assert kinds[-2:] == [("dead", 1 - primary), ("dead", primary)], "the standby first, so that none is promoted"
    eventually(lambda: run.alive() == [], what="the guard ends after its agent")


@pytest.mark.parametrize("listener", ["does not read", "is gone"])
def test_an_agent_goes_on_when_nobody_reads_what_it_says(tmp_path: Path, model: Path, listener: str) -> None:
    """A terminal that was stopped with Ctrl-S, a pager that waits, a `| head` that has ended."""
    run = Deployment(tmp_path / "home", model)
    reader, writer = os.pipe()
    if listener == "is gone":
        os.close(reader)
    else:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        filled = os.write(writer, b"x" * fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ))  # full: the next write blocks
    argv = [*GMS_LAUNCH, "up", *run.flags]
    agent = subprocess.Popen(argv, env=run.env, stdout=writer, stderr=writer, start_new_session=True)
    os.close(writer)
    try:
        eventually(lambda: run.cli("status").returncode == 0, LONG)
        found = run.wait_full()
        os.killpg(found["cohorts"][found["primary"]]["ranks"][0]["pgid"], signal.SIGKILL)
        eventually(lambda: [e for e in run.events("first_token") if e["cohort_id"] != found["primary"]], LONG)
        assert run.wait_full()["primary"] != found["primary"]
        assert run.cli("down").returncode == 0
        assert agent.wait(LONG) == 0
        assert "ready: http" in (run.home / run.run / "logs" / "agent.log").read_text(), "it had something to say"
        if listener == "does not read":
            assert os.read(reader, 1 << 20) == b"x" * filled, "and not a word of it got through"
    finally:
        run.__exit__()
        agent.kill()
        agent.wait()
        if listener == "does not read":
            os.close(reader)


def test_up_under_the_name_of_a_run_whose_agent_was_killed(tmp_path: Path, model: Path) -> None:
    """As a requeued job does, which keeps its number: etcd's old data is of another start."""
    extra = ["--health-interval", "0.1"]
    with Deployment(tmp_path / "home", model, *extra, REFERENCE_START_SECONDS="4") as run:
        before = run.text()
        left = run.node_dir / "left-by-the-first"
        left.write_text("")
        # Of the start: /health is a 503 until an engine is parked, and each of them a red line in its log.
        log = (run.home / run.run / "logs" / "node0" / "cohort-0.1.log").read_text()
        assert 1 <= sum("503" in line for line in log.splitlines()) <= 12, log
        os.kill(run.agent.pid, signal.SIGKILL)
        eventually(lambda: run.alive() == [], what="everything dies with the agent")
        assert (run.node_dir / "etcd").is_dir()
        done = run.up()
        assert done.returncode == 0, done.stdout + done.stderr
        assert run.text() == before and not left.exists()
