"""The labs that tests share or break."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.lab import Lab


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Three nodes under Slurm. For tests that leave the nodes as they were."""
    with Lab(nodes=3) as made:
        yield made


@pytest.fixture
def fragile_lab() -> Iterator[Lab]:
    """Three nodes under Slurm, for a test that breaks them: it takes a node that is silent for 20 s for dead."""
    with Lab(nodes=3, slurmd_timeout=20) as made:
        yield made


@pytest.fixture
def bare_lab() -> Iterator[Lab]:
    """Three nodes without Slurm and SSH: for runs by hand."""
    with Lab(nodes=3, slurm=False) as made:
        yield made


@pytest.fixture
def ssh_home(lab: Lab, tmp_path: Path) -> Path:
    """A user's home whose SSH knows the lab's nodes and their host key."""
    ssh = tmp_path / "home" / ".ssh"
    ssh.mkdir(parents=True, mode=0o700)
    key = (lab.dir / "etc" / "ssh_host_ed25519_key.pub").read_text()
    (ssh / "known_hosts").write_text("".join(f"{n.address} {key}" for n in lab.nodes.values()))
    entries = [f"Host {n.name}\n  HostName {n.address}\n" for n in lab.nodes.values()]
    (ssh / "config").write_text("".join(entries) + f"Host *\n  User root\n  IdentityFile {lab.dir}/etc/id_ed25519\n")
    return ssh.parent
