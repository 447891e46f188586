"""Runs in containers, started by `submit`: with stand-ins for pyxis and apptainer (tests/standins/containers)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gms_launch.process import proc
from tests.slurm.lab import Lab
from tests.slurm.support import LabRun
from tests.slurm.test_submit import cleared, submit
from tests.support import eventually

CHECKOUT = Path(__file__).parents[2]
STANDINS = CHECKOUT / "tests" / "standins" / "containers"


@pytest.fixture
def image(lab: Lab) -> Iterator[Path]:
    """An image with gms-launch in it, and with neither homes nor models."""
    path = lab.dir / "image"
    system = [d for d in ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc") if os.path.exists(d)]
    path.write_text("\n".join([*system, str(CHECKOUT), sys.base_prefix]))
    yield path
    path.unlink()


def start(run: LabRun, *flags: str) -> str:
    """Submit it with the stand-ins in front, wait until it is full, and return the job's number."""
    done = submit(run, "-N2", "--wait", "--timeout=120", *flags, PATH=f"{STANDINS}:{run.lab.env['PATH']}")
    assert done.returncode == 0, (done, output(run))
    return done.stdout.split()[1]


def output(run: LabRun) -> str:
    return "".join(p.read_text() for p in (run.home.parent / ".jobs" / run.run).glob("slurm-*.out"))


def agents(run: LabRun) -> list[int]:
    """The agents, as this machine numbers them: the parents of their guards."""
    guards = run.tagged("guard")
    return [g.ppid for g in sorted(guards, key=lambda g: (proc.tag_of(g.pid) or "").rpartition("/")[2])]


def test_a_run_with_pyxis(lab: Lab, model: Path, image: Path) -> None:
    run = LabRun(lab, model, "--tp=2")
    try:
        number = start(run, f"--container-image={image}")
        for pid in agents(run):
            assert os.listdir(f"/proc/{pid}/root/tmp") != os.listdir("/tmp"), "it has a root of its own"
            assert not os.path.exists(f"/proc/{pid}/root/var"), "in which only the image is, and what submit mounts"
        before, status = run.text(), run.status()
        assert before and status["redundancy"] == "full"
        run.kill_rank(status["primary"], 1)
        eventually(lambda: run.status()["primary"] == 1 - status["primary"], what="the shadow serves")
        eventually(lambda: run.text() == before)
        eventually(lambda: run.status()["redundancy"] == "full")
        # SIGTERM reaches the agents, which are the tasks themselves.
        assert lab.run(["scancel", number]).returncode == 0
        run.wait_gone()
        eventually(lambda: run.run_file()["ended"])
        assert run.run_file()["exit_code"] == 0 and run.left() == {}, output(run)
    finally:
        cleared(lab, run)


def test_a_run_in_a_pid_namespace(lab: Lab, model: Path, image: Path) -> None:
    """With apptainer: a process in between, and every agent is the first process of its container."""
    run = LabRun(lab, model, "--tp=2")
    try:
        start(run, f"--apptainer={image}")
        before, status = run.text(), run.status()
        for pid in agents(run):
            (numbers,) = [x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("NSpid")]
            assert numbers.split()[-1] == "1"
        leader = lab.node(status["nodes"][0]["host"])
        assert run.run_file()["agent_pid"] == 1, "which on the node is its init: nobody may signal that"

        # Orphans that come to it are collected.
        agent = agents(run)[0]
        enter = ["nsenter", "-t", str(agent), "-p", "-m", "--", "/bin/sh", "-c", "(sleep 2 &)"]
        subprocess.run(enter, check=True)
        (orphan,) = eventually(lambda: sleeping(agent), what="an orphan has come to it")
        eventually(lambda: proc.identity(orphan.pid) != orphan, what="and is collected when it has died")

        run.kill_rank(status["primary"], 1)
        eventually(lambda: run.status()["primary"] == 1 - status["primary"], what="the shadow serves")
        eventually(lambda: run.text() == before)
        eventually(lambda: run.status()["redundancy"] == "full")

        # On the node, outside of the container.
        swept = leader.run(["gms-launch", "sweep"])
        assert swept.returncode == 0 and "nothing to sweep" in swept.stdout, swept
        seen = leader.run(["gms-launch", "status", "--run", run.run, "--json"])
        assert '"redundancy": "full"' in seen.stdout, seen
        down = leader.run(["gms-launch", "down", "--run", run.run])
        assert down.returncode == 0 and "stopped in order" in down.stdout, down
        run.wait_gone()
        assert run.left() == {} and leader.init is not None and proc.alive(leader.init)
    finally:
        cleared(lab, run)


@pytest.mark.slow
def test_an_agent_in_a_pid_namespace_that_hangs_is_ended_from_outside(lab: Lab, model: Path, image: Path) -> None:
    run = LabRun(lab, model, "--tp=2")
    try:
        start(run, f"--apptainer={image}")
        leader = lab.node(run.status()["nodes"][0]["host"])
        agent = proc.identity(agents(run)[0])
        assert agent is not None
        os.kill(agent.pid, 19)
        down = leader.run(["gms-launch", "down", "--run", run.run, "--timeout=2"])
        assert down.returncode == 4 and "did not stop within 2 s and was killed" in down.stderr, down
        assert not proc.alive(agent) and leader.init is not None and proc.alive(leader.init)
        run.wait_gone()
    finally:
        cleared(lab, run)


def sleeping(parent: int) -> list[proc.ProcessId]:
    found = [proc.stat(p) for p in proc.children(parent)]
    return [i.identity for i in found if i is not None and i.comm == "sleep"]


def test_without_a_proc_of_its_own_nothing_is_started(tmp_path: Path, model: Path) -> None:
    argv = ["unshare", "--pid", "--fork", sys.executable, "-m", "gms_launch", "up", "--engine=reference"]
    env = os.environ | {"GMS_LAUNCH_HOME": str(tmp_path)}
    done = subprocess.run([*argv, f"--model={model}"], env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and "/proc shows another pid namespace" in done.stderr, done
    assert "Traceback" not in done.stderr
