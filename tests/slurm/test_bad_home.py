"""A shared home that is full, read-only, hanging or gone, under Slurm: a failover in each takes its usual course."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gms_launch.process import proc
from tests.integration.test_bad_places import FAULTS
from tests.slurm.lab import Lab, sh
from tests.slurm.support import LabRun
from tests.support import LONG, complete, eventually


class SmallHomeLab(Lab):
    """Its home is an ext4 of 16 MiB."""

    def _write_files(self) -> None:
        super()._write_files()
        image = self.dir / "home.ext4"
        with open(image, "wb") as file:
            file.truncate(16 * 2**20)
        sh("mkfs.ext4", "-q", "-m", "0", str(image))
        sh("mount", "-o", "loop", str(image), str(self.dir / "home"))

    def close(self) -> None:
        home = str(self.dir / "home")
        subprocess.run(["fsfreeze", "-u", home], check=False, capture_output=True)
        with contextlib.suppress(RuntimeError):
            sh("umount", "-l", home)
        super().close()


@pytest.fixture
def small_home_lab() -> Iterator[Lab]:
    with SmallHomeLab(nodes=2) as made:
        yield made


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_shared_home_in_trouble_changes_no_failover(small_home_lab: Lab, model: Path) -> None:
    home = small_home_lab.dir / "home"
    leader = small_home_lab.node("node1")
    with LabRun(small_home_lab, model) as run:
        host, port = run.run_file()["frontend_url"].removeprefix("http://").split(":")
        before = run.text()
        assert before

        def verb(*argv: str) -> subprocess.CompletedProcess[str]:
            """On the leader's node: a home that is gone shows no run to any other."""
            return leader.run(["gms-launch", argv[0], "--run", run.run, *argv[1:]])

        def status() -> dict[str, Any]:
            found: dict[str, Any] = json.loads(verb("status", "--json").stdout)
            return found

        def told() -> set[str]:
            """What the nodes' agents say of the home."""
            return {p["state"] for n in status()["nodes"] for p in n["writing"] if p["name"] == "run directory"}

        def serves() -> bool:
            return complete(host, int(port), "hello", 8, 2.0) == before

        def full() -> bool:
            return bool(status()["redundancy"] == "full")

        for number, (name, fault) in enumerate(FAULTS.items()):
            with fault(home, run.run):
                primary = status()["primary"]
                victims = run.on_node(number % 2, primary)
                os.killpg(victims[0].pgid, signal.SIGKILL)
                eventually(serves, what=f"the shadow serves while the home is {name}")
                eventually(lambda name=name: name in told(), what=f"status says that the home is {name}")
                eventually(full, LONG, f"re-armed while the home is {name}")
                assert not any(proc.alive(v.identity) for v in victims) and status()["primary"] == 1 - primary
                if name in ("gone", "slow"):  # to the verb the others are the same as on one node
                    done = verb("kill-primary")
                    assert done.returncode == 0, f"{name}: {done.stderr}"
                    eventually(serves)
                    eventually(full, LONG, f"re-armed again while the home is {name}")
            eventually(lambda: told() <= {"well"}, what=f"well again after {name}")
        eventually(lambda: len(run.events("first_token")) >= 7)
        with FAULTS["gone"](home, run.run):
            down = verb("down")
            assert down.returncode == 0, down.stdout + down.stderr
            assert all(f"node {k} node{k + 1}: nothing of it is alive" in down.stdout for k in range(2))
            assert "is gone: its end could not be recorded" in down.stdout
        run.wait_gone()
        assert verb("down").returncode == 0
        assert run.run_file()["exit_code"] == 0, "now that it can be, it is recorded"
        assert run.left() == {}


def test_an_etcd_that_cannot_come_back_ends_the_run_everywhere_and_is_told(lab: Lab, model: Path) -> None:
    """Nobody can be told through etcd then: the other nodes read it in run.json, long before node_wait is over."""
    flags = ("--service-timeout=15", "--node-wait=300")
    with LabRun(lab, model, *flags, nodes=lab.names[:2]) as run:
        leader = lab.node("node1")
        assert leader.init is not None
        data = Path(f"/proc/{leader.init.pid}/root{run.run_file()['node_dir']}") / "etcd" / "member"
        (etcd,) = run.tagged("etcd")
        shutil.rmtree(data)
        data.write_text("")  # no directory can be made there; a log alone that is lost it begins anew
        os.kill(etcd.pid, signal.SIGKILL)
        end = eventually(lambda: (found := run.run_file())["ended"] and found, LONG, "run.json tells the end")
        assert end["exit_code"] == 1 and "etcd could not be brought back" in end["reason"]
        assert not run.events("service_restarted"), "it never came back"
        run.wait_gone()
        assert all(code != 0 for code in run.exit_codes())
        waited = run.cli("wait")
        assert waited.returncode == 1 and "etcd could not be brought back" in waited.stderr
