"""Fixtures that unit and integration tests share."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.support import STANDING, EtcdServer, eventually


def pytest_configure() -> None:
    """A shell's background jobs ignore SIGINT, and so would everything that tests start and interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure shows how every run stood that is still up; one that its test has ended by now has printed it."""
    report = yield
    if report.failed:
        report.sections += [(f"a run of {item.name}", run.told()) for run in STANDING]
    return report


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 8 MiB."""
    from gms_launch.engines.reference.demo_model import make

    directory = tmp_path_factory.mktemp("model")
    make(directory, 8)
    return directory


@pytest.fixture
def fast_dir() -> Iterator[Path]:
    """A directory in memory with a short path, for sockets and for etcd's fsync."""
    with tempfile.TemporaryDirectory(prefix="gl-", dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def etcd(fast_dir: Path) -> Iterator[EtcdServer]:
    server = EtcdServer(fast_dir).start()
    try:
        eventually(server.listens, what="etcd listens")
        yield server
    finally:
        server.kill()
