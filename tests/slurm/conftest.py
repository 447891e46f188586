"""The labs that tests share or break."""

from __future__ import annotations

from collections.abc import Iterator

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
