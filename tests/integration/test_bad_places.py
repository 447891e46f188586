"""A home and a /dev/shm that are full, read-only, gone or hanging, with a failover in each: the run does not notice.

The home is a small ext4 in a file, which can be all of these; /dev/shm is a small one of a mount namespace of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gms_launch.process import proc
from gms_launch.run.nodedir import user_root
from tests.support import LONG, Deployment, complete, eventually, free_port, gms_launch

MIB = 2**20


def sh(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True, timeout=60)


@pytest.fixture
def small_home(tmp_path: Path) -> Iterator[Path]:
    """A home of 16 MiB of its own."""
    image, home = tmp_path / "home.ext4", tmp_path / "home"
    home.mkdir()
    with open(image, "wb") as file:
        file.truncate(16 * MIB)
    sh("mkfs.ext4", "-q", "-m", "0", str(image))
    sh("mount", "-o", "loop", str(image), str(home))
    try:
        yield home
    finally:
        subprocess.run(["fsfreeze", "-u", str(home)], check=False, capture_output=True)
        sh("umount", "-l", str(home))


def fill(place: Path) -> Path:
    """Take every byte that is left."""
    filler = place / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * MIB) == MIB:
            pass
    with open(filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 1024):
            pass
    return filler


@contextlib.contextmanager
def full(home: Path, run: str) -> Iterator[None]:
    filler = fill(home)
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only(home: Path, run: str) -> Iterator[None]:
    sh("mount", "-o", "remount,ro", str(home))
    try:
        yield
    finally:
        sh("mount", "-o", "remount,rw", str(home))


@contextlib.contextmanager
def gone(home: Path, run: str) -> Iterator[None]:
    (home / run).rename(home / "elsewhere")
    try:
        yield
    finally:
        (home / "elsewhere").rename(home / run)


@contextlib.contextmanager
def slow(home: Path, run: str) -> Iterator[None]:
    sh("fsfreeze", "-f", str(home))
    try:
        yield
    finally:
        sh("fsfreeze", "-u", str(home))


FAULTS: dict[str, Callable[[Path, str], contextlib.AbstractContextManager[None]]] = {
    "full": full,
    "read-only": read_only,
    "gone": gone,
    "slow": slow,
}
#: In these a verb is tried, and a service killed, besides the failover: each fails to write in a way of its own.
THOROUGHLY = ("full", "slow")


def told(run: Deployment, name: str = "run directory") -> str:
    """What `status` says of a directory; empty when it has nothing to say."""
    places = run.status()["nodes"][0]["writing"]
    return next((str(p["state"]) for p in places if p["name"] == name), "")


def states(run: Deployment) -> set[str]:
    """What the journal says of the state of places where the run writes."""
    return {e["detail"].rpartition(" is ")[2].partition(";")[0] for e in run.events("writing")}


def service(run: Deployment, name: str) -> dict[str, Any]:
    return next(s for s in run.status()["nodes"][0]["services"] if s["name"] == name)


def ask(run: Deployment) -> str | None:
    """A completion, found by what is remembered: the run's own record may be gone."""
    host, port = run.status()["frontend_url"].removeprefix("http://").split(":")
    return complete(host, int(port), "hello", 8)


def fail_over(run: Deployment, before: str) -> dict[str, Any]:
    """Kill the primary's process; returns the status once the shadow serves and another one is parked."""
    status = run.wait_full()
    victim = status["primary"]
    os.kill(status["cohorts"][victim]["ranks"][0]["pid"], signal.SIGKILL)
    eventually(lambda: ask(run) == before, what="the shadow serves the same text")
    after = run.wait_full()
    assert after["primary"] != victim
    return after


def test_a_home_that_is_full_read_only_gone_or_hanging_changes_nothing_but_what_is_told(
    small_home: Path, model: Path
) -> None:
    with Deployment(small_home, model) as run:
        run.by_command = True
        before = ask(run)
        assert before
        run.wait_full()
        for name, fault in FAULTS.items():
            with fault(small_home, run.run):
                fail_over(run, before)
                eventually(lambda name=name: told(run) == name, what=f"status says that the home is {name}")
                assert name in run.cli("status").stdout
                if name in THOROUGHLY:
                    done = run.cli("kill-primary", "--json")
                    assert done.returncode == 0, f"{name}: {done.stderr}"
                    assert "first_token" in json.loads(done.stdout)["steps"]
                    eventually(lambda: ask(run) == before)
                    run.wait_full()
                    frontend = service(run, "frontend")
                    os.kill(frontend["pid"], signal.SIGKILL)  # a service, too
                    eventually(lambda old=frontend: service(run, "frontend")["starts"] == old["starts"] + 1)
                    eventually(lambda: ask(run) == before)
            eventually(lambda: told(run) in ("", "well"), what=f"well again after {name}")
            run.wait_full()
            eventually(lambda name=name: {name, "well again"} <= states(run), what=f"the journal has {name}")
        eventually(lambda: len(run.events("first_token")) >= 7, what="what had to wait is written when it can be")
        with slow(small_home, run.run):
            os.kill(run.cohort(0)["ranks"][0]["pid"], signal.SIGKILL)
            eventually(lambda: told(run) == "slow")
            down = run.cli("down")
            assert down.returncode == 0, down.stdout + down.stderr
            assert "nothing of it is alive" in down.stdout
            assert f"the run directory {small_home / run.run} is slow" in down.stdout
            assert run.alive() == []


def test_a_run_that_is_stopped_while_its_home_is_full_ends_as_any_other(small_home: Path, model: Path) -> None:
    with Deployment(small_home, model) as run:
        filler = fill(small_home)
        down = run.cli("down")
        assert down.returncode == 0, down.stderr
        assert "nothing of it is alive" in down.stdout and "is full: its end could not be recorded" in down.stdout
        done = run.cli("wait")
        assert done.returncode == 0, f"the node where it ended knows: {done.stderr}"
        filler.unlink()
        again = run.cli("down")
        assert again.returncode == 0 and "could not be recorded" not in again.stdout
        assert run.run_file["exit_code"] == 0 and run.run_file["nodes"][0]["clean"] is True
        assert not run.node_dir.exists()


def test_a_start_on_a_full_home_says_so(small_home: Path, model: Path) -> None:
    run = Deployment(small_home, model)
    fill(small_home)
    done = run.up()
    assert done.returncode == 3
    assert f"the run directory cannot be made in {small_home}, which is full" in done.stderr
    assert run.alive() == []


class Apart(Deployment):
    """A run in a mount namespace whose /dev/shm has a size."""

    def __init__(self, home: Path, model: Path, size: str, *extra: str) -> None:
        super().__init__(home, model, *extra)
        steps = [f"mount -t tmpfs -o mode=1777,size={size} none /dev/shm", f"mkdir -m 700 {user_root()}", "echo ok"]
        self._holder = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", " && ".join(steps) + "; cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None and self._holder.stdout.readline() == b"ok\n"
        self.shm = Path(f"/proc/{self._holder.pid}/root/dev/shm")
        self.within = ("nsenter", "-t", str(self._holder.pid), "-m", "--")

    def up(self) -> subprocess.CompletedProcess[str]:
        return gms_launch("up", "-d", *self.flags, env=self.env, within=self.within)

    def cli(self, verb: str, *args: str) -> subprocess.CompletedProcess[str]:
        return gms_launch(verb, "--run", self.run, *args, env=self.env, within=self.within)

    def __exit__(self, *_: object) -> None:
        self.cli("down")
        super().__exit__()
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait(60)


def test_a_full_dev_shm_stops_no_failover(tmp_path: Path, model: Path) -> None:
    with Apart(tmp_path / "home", model, "600m") as run:
        before = ask(run)
        assert before
        run.wait_full()
        filler = fill(run.shm)
        assert shutil.disk_usage(run.shm).free == 0
        fail_over(run, before)
        eventually(lambda: told(run, "node directory") == "full")
        assert run.cli("kill-primary").returncode == 0
        eventually(lambda: ask(run) == before)
        run.wait_full()
        filler.unlink()
        eventually(lambda: told(run, "node directory") == "")
        ranks = {c["cohort_id"]: c["ranks"][0]["pgid"] for c in run.status()["cohorts"]}
        directory = run.shm / Path(run.run_file["node_dir"]).relative_to("/dev/shm")
        eventually(lambda: {k: int((directory / f"engine-{k}.pgid").read_text()) for k in ranks} == ranks)


# -- errors of the agent's own -------------------------------------------------------------------------------------


def test_an_agent_without_a_descriptor_left_outlives_it_and_says_so(tmp_path: Path, model: Path) -> None:
    with Deployment(tmp_path / "home", model) as run:
        before = run.text()
        assert before
        status = run.wait_full()
        agent = run.agent.pid
        shadow = status["cohorts"][1 - status["primary"]]["ranks"][0]
        limits = resource.prlimit(agent, resource.RLIMIT_NOFILE)
        resource.prlimit(agent, resource.RLIMIT_NOFILE, (3, limits[1]))
        os.kill(shadow["pid"], signal.SIGKILL)
        eventually(lambda: (found := proc.stat(shadow["pid"])) is None or found.dead)
        for _ in range(50):  # nothing can be told meanwhile, but requests are answered
            assert run.text() == before
        resource.prlimit(agent, resource.RLIMIT_NOFILE, limits)
        eventually(lambda: run.status()["nodes"][0]["internal_errors"], what="it is told")
        eventually(lambda: run.cohort(1 - status["primary"])["incarnation"] == 2, what="the shadow is started again")
        assert run.wait_full()["primary"] == status["primary"], "the primary was not touched"
        assert "internal errors" in run.cli("status").stdout
        assert run.text() == before


def test_an_agent_that_cannot_go_on_ends_the_run_as_failed(tmp_path: Path, model: Path) -> None:
    """Its loop broken for good, by a line before the real command."""
    run = Deployment(tmp_path / "home", model)
    broken = (
        "import sys; from gms_launch.node import agent; from gms_launch.cli.main import main\n"
        "def step(self): raise OSError(5, 'of ours')\n"
        "agent.Agent._step = step; agent.STEP_AGAIN = 0.01; main()"
    )
    argv = [sys.executable, "-c", broken, "up", *run.flags]
    done = subprocess.run(argv, env=run.env, capture_output=True, text=True, timeout=LONG, check=False)
    assert done.returncode == 1, done.stderr
    assert "internal error in the agent: OSError(5, 'of ours')" in done.stderr
    assert run.run_file["exit_code"] == 1 and "of ours" in run.run_file["reason"]
    assert run.run_file["nodes"][0]["clean"] is True
    waited = run.cli("wait")
    assert waited.returncode == 1 and "of ours" in waited.stderr
    assert len(run.events("internal_error")) >= 60
    assert run.alive() == []


def test_an_etcd_of_ones_own_that_does_not_answer_is_named_while_it_is_waited_for(tmp_path: Path, model: Path) -> None:
    silent = f"http://127.0.0.1:{free_port()}"
    env = os.environ | {"GMS_LAUNCH_HOME": str(tmp_path / "home")}
    flags = ["--run", f"t{os.getpid()}e", "--engine", "reference", "--model", str(model), "--service-timeout", "4"]
    done = gms_launch("up", *flags, "--etcd-endpoints", silent, env=env)
    assert done.returncode == 5, done.stderr
    assert f"waiting for etcd to answer at {silent}, for 4 s at most" in done.stdout + done.stderr
    assert not (user_root() / f"t{os.getpid()}e").exists(), "a start that failed leaves nothing"
