"""`gms-launch submit` at a login node: what is saved, what runs, and how a job ends at its time limit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gms_launch.process import proc
from tests.slurm.lab import Lab
from tests.slurm.support import LabRun
from tests.slurm.test_manners import job
from tests.support import LONG, eventually, free_port

WAIT = ("--wait", "--timeout=240")


def submit(run: LabRun, *flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """The verb, typed in a shell that has more in its environment than the job is meant to have."""
    own = ["--run", run.run, "--engine", "reference", "--model", str(run.model), "--served-model-name", "tiny"]
    own += [] if run.closed else ["--open-frontend"]  # it is asked from the login node
    return run.lab.run(["gms-launch", "submit", *own, *run.flags, *flags], env=environ, timeout=300)


def groups(run: LabRun) -> dict[str, dict[str, Any]]:
    return {g["name"]: g for g in run.status()["groups"]}


def ranks(group: dict[str, Any]) -> list[tuple[int, int]]:
    return [(c["incarnation"], r["pid"]) for c in group["cohorts"] for r in c["ranks"]]


def at_the_limit(lab: Lab, number: str) -> None:
    """What `--signal=B:USR1@...` makes Slurm do before the time limit."""
    assert lab.run(["scancel", "--batch", "--signal=USR1", number]).returncode == 0


def cleared(lab: Lab, *runs: LabRun) -> None:
    lab.run(["scancel", "--me"])
    for run in runs:
        run.__exit__()
    eventually(lab.all_idle, LONG)


def test_what_was_settled_here_is_what_runs_there(lab: Lab, model: Path) -> None:
    run = LabRun(lab, model, "--lease-ttl=2")
    saved = run.home.parent / ".jobs" / run.run
    try:
        shown = submit(run, "-N2", "--dry-run", GMS_LAUNCH_SHADOWS="2")
        assert "#SBATCH --nodes=2" in shown.stdout and "shadows = 2" in shown.stdout, shown
        assert not saved.exists()
        done = submit(run, "-N2", "--requeue=1", *WAIT, GMS_LAUNCH_SHADOWS="2", GMS_LAUNCH_NATS="0")
        assert done.returncode == 0 and "ready: http" in done.stdout and "machine: ssh " in done.stdout, done
        number = done.stdout.split()[1]
        assert "shadows = 2" in (saved / "settings.toml").read_text()
        assert run.run_file()["settings"]["shadows"] == 2 and not run.run_file()["settings"]["nats"]

        at_the_limit(lab, number)
        # It goes back to the queue, where Slurm keeps it for two minutes.
        eventually(lambda: job(lab, number)["Restarts"] == "1" and job(lab, number)["JobState"] == "PENDING", LONG)
        assert run.run_file()["exit_code"] == 0 and run.left() == {}
        assert "the time limit is near" in (saved / f"slurm-{number}.out").read_text()
    finally:
        cleared(lab, run)


@pytest.fixture
def routed() -> Iterator[Lab]:
    """Two nodes, of which the first has a default route: Dynamo's frontend takes answers there, where there is IPv6."""
    with Lab(nodes=2) as made:
        made.node("node1").run(["ip", "route", "add", "default", "via", f"{made.net}.254"], check=True)
        yield made


def test_a_job_of_groups_outlives_an_agent_and_the_other_groups_serve_on(routed: Lab, model: Path) -> None:
    lab = routed
    run = LabRun(lab, model, "--lease-ttl=2", "--groups=2", "--node-wait=300")
    try:
        done = submit(run, "-N2", "--gpus-per-node=1", *WAIT)
        assert done.returncode == 0, done
        number = done.stdout.split()[1]
        before = groups(run)
        host = run.status()["nodes"][1]["host"]
        found = lab.node(host).pids("gms-launch", "python", "python3")
        (agent,) = (pid for pid in found if "up" in proc.command_line(pid).split())
        os.kill(agent, signal.SIGKILL)
        eventually(lambda: groups(run)["g1"]["redundancy"] == "down", LONG, "the lost agent's group")
        eventually(lambda: 1 in run.status()["missing_nodes"], LONG)
        after = groups(run)["g0"]
        assert after["redundancy"] == "full" and ranks(after) == ranks(before["g0"])
        eventually(run.text, LONG, "an answer, once nothing is sent to the other any more")
        assert not run.events("stopping") and job(lab, number)["JobState"] == "RUNNING"
        eventually(lambda: groups(run)["g1"]["redundancy"] == "full", LONG, "with the agent that the script starts")
        assert ranks(groups(run)["g0"]) == ranks(before["g0"])
        run.cli("down")
        eventually(lambda: job(lab, number)["JobState"] not in ("RUNNING", "COMPLETING"), LONG)
    finally:
        cleared(lab, run)


@pytest.mark.slow
def test_a_node_of_a_job_of_groups_is_rebooted_and_comes_back(routed: Lab, model: Path) -> None:
    """srun ends the step that a rebooted node has lost, for all nodes of the step: so each has one of its own."""
    lab = routed
    run = LabRun(lab, model, "--lease-ttl=2", "--groups=2", "--node-wait=300")
    try:
        done = submit(run, "-N2", "--gpus-per-node=1", *WAIT)
        assert done.returncode == 0, done
        number, before = done.stdout.split()[1], groups(run)
        lab.node("node2").power_off()
        eventually(lambda: groups(run)["g1"]["redundancy"] == "down", LONG, "the lost node's group")
        lab.node("node2").start()
        eventually(lambda: groups(run)["g1"]["redundancy"] == "full", LONG, "it is back")
        said = (Path(lab.env["GMS_LAUNCH_HOME"]) / ".jobs" / run.run / f"slurm-{number}.out").read_text()
        assert "io error and missing step" in said and "starting another" in said, said
        assert ranks(groups(run)["g0"]) == ranks(before["g0"])
        assert run.cli("down").returncode == 0
        eventually(lambda: job(lab, number)["JobState"] == "COMPLETED", LONG, "the run's own exit code")
    finally:
        cleared(lab, run)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("least", [1, 2])
def test_a_node_of_a_job_of_groups_stays_away_and_min_groups_decides(model: Path, least: int) -> None:
    """Two groups of two nodes. With one left the job goes on where one is enough, and ends with 4 where it is not."""
    with Lab(nodes=4, slurmd_timeout=20) as lab:
        for node in lab.nodes.values():
            node.run(["ip", "route", "add", "default", "via", f"{lab.net}.254"], check=True)
        run = LabRun(lab, model, "--lease-ttl=2", "--groups=2", "--node-wait=10", f"--min-groups={least}")
        try:
            done = submit(run, "-N4", "--gpus-per-node=1", *WAIT)
            assert done.returncode == 0, done
            number, before = done.stdout.split()[1], groups(run)
            lost = before["g1"]["nodes"][1]["host"]
            assert [len(g["nodes"]) for g in before.values()] == [2, 2] and lost == "node4"
            lab.node(lost).power_off()
            eventually(lambda: run.events("group_over"), LONG, "it was waited for long enough")
            (over,) = run.events("group_over")
            assert over["group"] == "g1" and "did not come back within 10 s" in over["detail"], over
            if least == 2:
                eventually(lambda: run.run_file()["ended"], LONG, "the run's end")
                found = run.run_file()
                assert found["exit_code"] == 4 and "1 group of 2 can still serve, and 2 must" in found["reason"], found
                eventually(lambda: job(lab, number)["JobState"] not in ("RUNNING", "COMPLETING"), LONG, "the job's end")
                assert job(lab, number)["ExitCode"] == "4:0", job(lab, number)
                return
            eventually(lambda: "down" in lab.run(["sinfo", "-h", "-n", lost, "-o", "%t"]).stdout, LONG, "Slurm knows")
            assert job(lab, number)["JobState"] == "RUNNING" and not run.events("stopping")
            assert groups(run)["g1"]["over"] and ranks(groups(run)["g0"]) == ranks(before["g0"]) and run.text()
            run.cli("down")
            eventually(lambda: job(lab, number)["JobState"] not in ("RUNNING", "COMPLETING"), LONG)
        finally:
            lab.node("node4").start()
            cleared(lab, run)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_of_the_queue_comes_up_again_as_often_as_it_may(lab: Lab, model: Path) -> None:
    run = LabRun(lab, model)
    try:
        done = submit(run, "-N2", "--requeue=1", "--lease-ttl=2", *WAIT)
        assert done.returncode == 0, done
        number, first = done.stdout.split()[1], run.run_file()["attempt"]
        at_the_limit(lab, number)
        eventually(lambda: run.run_file()["attempt"] != first, 240, "the job is started again")
        eventually(lambda: '"redundancy": "full"' in run.cli("status", "--json").stdout, LONG)
        at_the_limit(lab, number)
        eventually(lambda: job(lab, number)["JobState"] == "COMPLETED", LONG)
        assert run.run_file()["exit_code"] == 0 and run.left() == {}
        output = (run.home.parent / ".jobs" / run.run / f"slurm-{number}.out").read_text()
        assert output.count("the time limit is near") == 2, "the first life's output is still there"
    finally:
        cleared(lab, run)


def test_the_ssh_line_leads_to_a_frontend_on_loopback(lab: Lab, model: Path, ssh_home: Path) -> None:
    run = LabRun(lab, model)
    run.closed = True
    try:
        done = submit(run, "-N1", "--lease-ttl=2", *WAIT)
        found = re.search(r"machine: ssh -J \S+ -L (\d+):127.0.0.1:\1 (\S+)\n", done.stdout)
        assert found, done
        # This machine is the login node that is jumped over; the port may be somebody else's here.
        own = free_port()
        ssh = ["ssh", "-F", f"{ssh_home}/.ssh/config", "-o", f"UserKnownHostsFile={ssh_home}/.ssh/known_hosts", "-N"]
        tunnel = lab.popen([*ssh, "-L", f"{own}:127.0.0.1:{found[1]}", found[2]], env={})
        try:
            answer = eventually(lambda: asked(f"http://127.0.0.1:{own}/v1/models"), LONG)
            assert json.loads(answer)["data"][0]["id"] == "tiny"
        finally:
            tunnel.kill()
            tunnel.wait()
    finally:
        cleared(lab, run)


def asked(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def test_an_array_is_a_run_for_each_task(lab: Lab, model: Path) -> None:
    run, one, two = (LabRun(lab, model) for _ in range(3))
    one.run, two.run = f"{run.run}-1", f"{run.run}-2"
    try:
        done = submit(run, "-N1", "--array=1-2", "--lease-ttl=2", "--sbatch=--comment=of two words")
        assert done.returncode == 0, done
        told = lab.run(["squeue", "-h", "-j", done.stdout.split()[1], "-o", "%k"])
        assert set(told.stdout.splitlines()) == {"of two words"}, told
        for task in (one, two):
            eventually(lambda task=task: (task.home / "run.json").exists(), LONG)
            task.processes = [subprocess.Popen(["sleep", "infinity"], text=True)]
            task.wait_full()
        assert one.run_file()["slurm"] != two.run_file()["slurm"]
    finally:
        for task in (one, two):
            for process in task.processes:
                process.kill()
        cleared(lab, one, two)


def test_the_next_job_serves_before_this_one_stops(lab: Lab, model: Path) -> None:
    run, after = LabRun(lab, model), LabRun(lab, model)
    after.run = f"{run.run}.1"
    try:
        done = submit(run, "-N1", "--successor=2", "--lease-ttl=2", *WAIT)
        assert done.returncode == 0, done
        number = done.stdout.split()[1]
        at_the_limit(lab, number)
        eventually(lambda: run.run_file()["ended"], LONG)
        eventually(lambda: job(lab, number)["JobState"] == "COMPLETED", LONG)
        full = eventually(lambda: [e["time"] for e in after.events("redundancy") if e["detail"] == "full"])[0]
        assert full < run.run_file()["ended"]
        assert after.text() and after.run_file()["ended"] is None
    finally:
        cleared(lab, run, after)


def test_what_slurm_refuses_is_told_and_nothing_else_happens(lab: Lab, model: Path) -> None:
    run = LabRun(lab, model)
    done = submit(run, "-N1", "-p", "no-such-partition")
    assert done.returncode == 3 and "sbatch refused" in done.stderr and "partition" in done.stderr, done
    # What the shell says to sbatch counts, and is overruled by what is typed.
    done = submit(run, "-N1", SBATCH_PARTITION="no-such-partition")
    assert done.returncode == 3 and "partition" in done.stderr, done
    done = submit(run, "-N1", "-p", "lab", "--dry-run", SBATCH_PARTITION="elsewhere", SBATCH_ACCOUNT="us")
    assert "--partition=lab\n" in done.stdout and "elsewhere" not in done.stdout and "--account=us\n" in done.stdout, (
        done
    )
    # A name that a job in the queue has: that job would read what is saved now.
    saved = run.home.parent / ".jobs" / run.run / "settings.toml"
    number = submit(run, "-N1", "--shadows=2", "--sbatch=--hold").stdout.split()[1]
    done = submit(run, "-N1", "--shadows=3")
    assert done.returncode == 3 and f"is job {number} already, which is pending" in done.stderr, done
    assert "shadows = 2" in saved.read_text()
    assert lab.run(["scancel", number]).returncode == 0
    assert submit(run, "-N1", "--hosts=a,b").returncode == 2
    assert submit(run, "-N2", "--tp=3").returncode == 2
    done = submit(run, "-N1", "--sbatch=:")
    assert done.returncode == 2 and "heterogeneous" in done.stderr, done
