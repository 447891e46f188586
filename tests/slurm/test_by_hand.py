"""The same deployment without Slurm: agents by hand with the recipe's variables, or by SSH."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from gms_launch.process import proc
from tests.slurm.lab import Lab
from tests.slurm.support import LabRun
from tests.support import LONG, CommandLines, NatsServer, eventually, kill


def test_by_hand_with_node_rank_on_three_nodes(bare_lab: Lab, model: Path) -> None:
    with LabRun(bare_lab, model).hand() as run:
        before = run.text()
        assert before
        victim = run.kill_rank(run.wait_full()["primary"], 2)
        eventually(lambda: run.text(2.0) == before)
        run.wait_dead(*victim)
        run.wait_full()
        (etcd,) = run.on_node(0, "etcd")
        listening = bare_lab.node("node1").run(["ss", "-Htln"]).stdout.split("\n")
        addresses = {line.split()[3].rpartition(":")[0] for line in listening if line}
        assert "0.0.0.0" not in addresses and "*" not in addresses and "[::]" not in addresses, listening
        assert proc.alive(etcd.identity)
        assert run.cli("down").returncode == 0
        assert run.exit_codes() == [0, 0, 0]
        assert run.left() == {}


def test_agents_that_come_in_any_order_and_late(bare_lab: Lab, model: Path) -> None:
    run = LabRun(bare_lab, model).hand(2).hand(0)
    eventually(lambda: "2 of 3 nodes are here" in run.output())
    assert not run.engines() and not run.tagged("gms-0"), "nothing is started before all are here"
    run.hand(1)
    with run:
        assert run.text()


def test_without_a_run_id_the_nodes_agree_on_one(bare_lab: Lab, model: Path) -> None:
    run = LabRun(bare_lab, model, nodes=["node1", "node2"])
    run.run = bare_lab.node("node1").address
    up = run.up()
    run.up = lambda *_: [a for a in up if a not in ("--run-id", run.run)]  # type: ignore[method-assign]
    with run.hand():
        assert run.text()


def test_agents_on_one_machine(bare_lab: Lab, model: Path) -> None:
    """Two nodes of a run may share everything: host name, /dev/shm, processes, here their network too."""
    run = LabRun(bare_lab, model, nodes=["node1", "node1"])
    with run.hand():
        before = run.text()
        victim = run.kill_rank(run.status()["primary"], 1)
        eventually(lambda: run.text(2.0) == before)
        run.wait_dead(*victim)
        run.wait_full()
        assert run.cli("down").returncode == 0
        eventually(lambda: run.left() == {})


def test_doctor_on_a_node_that_is_not_the_leader(bare_lab: Lab, model: Path) -> None:
    place = ["--nnodes", "2", "--node-rank", "1", "--leader-addr", bare_lab.node("node1").address]
    flags = LabRun(bare_lab, model).up()[2:]
    done = bare_lab.node("node2").run(["gms-launch", "doctor", *flags, *place])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "node 1 of 2" in done.stdout and "ok    ports" in done.stdout


# -- nodes that do not fit together ----------------------------------------------------------------------------------

SITE = """
import sys
if "up" in sys.argv:
    {code}
"""


def refused(run: LabRun, says: str) -> None:
    """Every agent ends with code 2 and the same reason, and nothing but etcd was ever started."""
    assert set(run.exit_codes()) == {2}, run.output()
    assert says in run.output()
    assert not run.events("started") and not (run.home / "logs" / "node1" / "gms-0.1.log").exists()
    assert run.left() == {}


def two_of_three(run: LabRun) -> LabRun:
    """Nodes 0 and 2, waiting for node 1: one that began after the others' end would wait for another start."""
    run.hand(0, 2)
    eventually(lambda: "2 of 3 nodes are here" in run.output())
    return run


def test_settings_that_differ(bare_lab: Lab, model: Path) -> None:
    run = two_of_three(LabRun(bare_lab, model)).hand(1, GMS_LAUNCH_SHADOWS="2")
    refused(run, "node 1 (node2) has other settings than node 0 (node1): shadows is 2 here and 1 there")


def test_gpus_that_differ(bare_lab: Lab, model: Path) -> None:
    run = two_of_three(LabRun(bare_lab, model, "--tp=3")).hand(1, GMS_LAUNCH_VIRTUAL_GPUS="2")
    refused(run, "node 1 (node2) has 2 GPUs, node 0 (node1) has 1")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import gms_launch; gms_launch.__version__ = '9.9'", "this node has gms-launch 9.9, the leader node1 has"),
        ("import time; now = time.time; time.time = lambda: now() + 60", "the clock of node 1 (node2) is at least"),
    ],
)
def test_versions_and_clocks_that_differ(bare_lab: Lab, model: Path, tmp_path: Path, code: str, says: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE.format(code=code))
    run = two_of_three(LabRun(bare_lab, model)).hand(1, PYTHONPATH=str(tmp_path))
    refused(run, says)


def test_a_node_rank_given_twice(bare_lab: Lab, model: Path) -> None:
    run = LabRun(bare_lab, model).hand(0, 1)
    eventually(lambda: "2 of 3 nodes are here" in run.output())
    run.nodes[1] = "node3"  # told to be number 1 as well
    run.hand(1)
    refused(run, "node rank 1 is taken by node2")


def test_a_rank_given_twice_does_not_disturb_a_run_that_is_up(bare_lab: Lab, model: Path) -> None:
    with LabRun(bare_lab, model, nodes=["node1", "node2"]).hand() as run:
        serving = {i.identity for i in run.engines()}
        run.nodes = ["node1", "node3"]
        run.hand(1)
        late = run.processes.pop()
        assert late.wait(LONG) == 2
        second_leader = LabRun(bare_lab, model, nodes=["node3", "node2"])
        second_leader.run = run.run
        second_leader.hand(0)
        assert second_leader.exit_codes() == [3], "the name is taken"
        assert f"run {run.run} is already up" in second_leader.output()
        assert {i.identity for i in run.engines()} == serving
        assert run.text()
        run.nodes = ["node1", "node2"]


def test_a_leader_that_never_comes(bare_lab: Lab, model: Path) -> None:
    run = LabRun(bare_lab, model, "--lease-ttl=2", "--node-wait=4").hand(1)
    assert run.exit_codes() == [4]
    assert "the leader was not found within 4 s (node_wait)" in run.output()


def test_a_node_that_never_comes(bare_lab: Lab, model: Path) -> None:
    run = LabRun(bare_lab, model, "--lease-ttl=2", "--node-wait=20").hand(0, 1)
    assert run.exit_codes() == [4, 4]
    assert "2 of 3 nodes came within 20 s (node_wait); missing node ranks: 2" in run.output()
    assert run.left() == {}


def test_a_node_that_cannot_start_ends_the_run_with_its_reason(bare_lab: Lab, model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text('#!/bin/sh\ncase "$*" in *gms_launch.gms*) echo no GMS today; exit 7;; esac\nexec python "$@"\n')
    broken.chmod(0o755)
    run = two_of_three(LabRun(bare_lab, model)).hand(1, GMS_LAUNCH_PYTHON=str(broken))
    assert set(run.exit_codes()) == {1}, run.output()
    assert "node 1 (node2): gms-0 ended while it was starting (exit code 7)" in run.output()
    assert "no GMS today" in run.output()
    assert run.left() == {}


# -- SSH -----------------------------------------------------------------------------------------------------------


def by_ssh(lab: Lab, model: Path, home: Path, hosts: str = "node[1-3]", *flags: str) -> LabRun:
    """The model's path is relative: the agents run where the command does."""
    run = LabRun(lab, Path(model.name), *flags)
    run._log = open(run.log_path, "w")  # noqa: SIM115
    options = {"cwd": model.parent, "stdout": run._log, "stderr": run._log}
    run.processes = [lab.popen(run.up("--hosts", hosts), env={"HOME": str(home)}, **options)]
    return run


def test_by_ssh(lab: Lab, model: Path, ssh_home: Path) -> None:
    with by_ssh(lab, model, ssh_home) as run:
        before = run.text()
        assert before
        victim = run.kill_rank(run.status()["primary"], 2)
        eventually(lambda: run.text(2.0) == before)
        run.wait_dead(*victim)
        run.wait_full()
        run.processes[0].send_signal(signal.SIGINT)
        assert run.exit_codes() == [0], run.output()
        assert "node3: " in run.output() and "ready: " in run.output()
        assert run.left() == {}


def test_nothing_outlives_the_command_that_started_it_by_ssh(lab: Lab, model: Path, ssh_home: Path) -> None:
    with by_ssh(lab, model, ssh_home) as run:
        os.killpg(run.processes[0].pid, signal.SIGKILL)
        run.wait_gone()
        eventually(lambda: run.left() == {})
        logs = "".join(p.read_text() for p in run.home.glob("logs/**/agent.log"))
        assert "the command that started this agent is gone" in logs


@pytest.mark.slow
def test_a_connection_that_breaks_costs_its_groups_alone(lab: Lab, model: Path, ssh_home: Path) -> None:
    """Another agent is started there by itself; what is on the other hosts is not touched."""
    node = lab.node("node1")
    node.run(["ip", "route", "replace", "default", "via", f"{lab.net}.254"], check=True)
    try:
        flags = ("--groups=3", "--virtual-gpus=1", "--lease-ttl=2", "--node-wait=300")
        with by_ssh(lab, model, ssh_home, "node[1-3]", *flags) as run:
            before = run.text()
            groups = {g["name"]: g for g in run.status()["groups"]}
            others = [[c["ranks"][0]["pid"] for c in groups[name]["cohorts"]] for name in ("g0", "g2")]
            old = run.engines(1)
            session = proc.stat(run.agents()[1])
            while session is not None and not session.comm.startswith("sshd"):
                session = proc.stat(session.ppid)
            assert session is not None
            os.kill(session.pid, signal.SIGKILL)
            eventually(
                lambda: not any(proc.alive(i.identity) for i in old), LONG, "the agent ends all that it has there"
            )
            eventually(lambda: "its agent is lost" in run.output(), LONG)
            assert run.text() == before
            run.wait_full()
            assert "node2: another agent was started" in run.output()
            groups = {g["name"]: g for g in run.status()["groups"]}
            assert others == [[c["ranks"][0]["pid"] for c in groups[name]["cohorts"]] for name in ("g0", "g2")]
            run.processes[0].send_signal(signal.SIGINT)
            assert run.exit_codes() == [0], run.output()
            assert run.left() == {}
    finally:
        node.run(["ip", "route", "del", "default"], check=True)


def test_in_the_background_by_ssh(lab: Lab, model: Path, ssh_home: Path) -> None:
    run = LabRun(lab, model)
    env = {"HOME": str(ssh_home)}
    done = lab.run([*run.up("--hosts", "node1,node2"), "-d"], env=env)
    try:
        assert done.returncode == 0, done.stderr
        assert run.text()
        run.nodes = ["node1", "node2"]
    finally:
        assert run.cli("down").returncode == 0
    assert run.left() == {}


def test_a_secret_reaches_agents_by_ssh_and_nobody_else(lab: Lab, model: Path, ssh_home: Path, fast_dir: Path) -> None:
    nats = NatsServer(fast_dir, address=f"{lab.net}.254")
    server = lab.popen(nats.argv)
    run = LabRun(lab, model, "--event-plane=nats")
    env = {"HOME": str(ssh_home), "NATS_SERVER": nats.url}
    try:
        with CommandLines(nats.password) as lines:
            done = lab.run([*run.up("--hosts", "node1,node2"), "-d"], env=env)
            try:
                assert done.returncode == 0, done.stderr
                assert run.text()
                assert "Client connection created" in nats.log.read_text()
                assert "authentication error" not in nats.log.read_text()
            finally:
                assert run.cli("down").returncode == 0
        assert not lines.seen
        told = [p for p in run.home.rglob("*") if p.is_file() and nats.password.encode() in p.read_bytes()]
        assert not told and nats.password not in done.stdout + done.stderr
    finally:
        server.kill()
        server.wait()


def test_hosts_that_cannot_be_reached_are_named_and_nothing_is_started(lab: Lab, model: Path, ssh_home: Path) -> None:
    known = ssh_home / ".ssh" / "known_hosts"
    lines = known.read_text().splitlines(keepends=True)
    other = (lab.dir / "etc" / "id_ed25519.pub").read_text().split()[:2]
    known.write_text(lines[0] + f"{lab.node('node2').address} {' '.join(other)}\n")
    run = by_ssh(lab, model, ssh_home, "node1,node2,node3,nobody@nowhere.invalid")
    assert run.exit_codes() == [5]
    out = run.output()
    assert "node2: its host key is not the one in known_hosts" in out
    assert "node3: its host key is not in known_hosts" in out
    assert "nobody@nowhere.invalid: " in out
    assert "nothing was started" in out and "node1: " not in out
    assert not run.home.exists() and not run.tagged()


def test_an_agent_that_fails_on_one_host_is_named_and_the_others_stop(lab: Lab, model: Path, ssh_home: Path) -> None:
    run = by_ssh(lab, model, ssh_home, "node[1-3]", "--virtual-gpus=1", "--tp=6")
    assert run.exit_codes() == [2]
    assert "tp 6 (from --tp) over 3 nodes is 2 GPUs on each; this node has 1" in run.output()
    assert not run.tagged()


def test_down_by_ssh_clears_nodes_whose_agents_are_dead(lab: Lab, model: Path, ssh_home: Path) -> None:
    with by_ssh(lab, model, ssh_home) as run:
        run.processes[0].send_signal(signal.SIGSTOP)  # it must not tell the agents anything
        agents = run.agents()
        assert len(agents) == 3
        for agent in agents:
            kill(agent)
        run.wait_gone()
        assert set(run.left()) == {"node1", "node2", "node3"}, "files"
        down = lab.run(["gms-launch", "down", "--run", run.run], env={"HOME": str(ssh_home)})
        assert down.returncode == 0, down.stdout + down.stderr
        assert down.stdout.count("nothing with its tag or its lock is alive") == 3, "no agent is left to say more"
        assert run.left() == {}
        run.processes[0].send_signal(signal.SIGCONT)
