"""Where Dynamo's processes listen for each other, on a node of which other nodes lead groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from gms_launch.engines.base import LOOPBACK, Reach
from gms_launch.errors import UsageError
from gms_launch.run import reach, topology
from gms_launch.run.topology import Topology

HOME = Topology(0, 4, "n0", "10.0.0.1", "10.0.0.1")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A node's network: which interfaces have IPv6 too, and by which address the default route goes."""
    network: dict[str, object] = {"ipv6": set(), "default": ""}

    def route(address: str) -> str:
        if not network["default"]:
            raise UsageError("no route")
        return str(network["default"])

    monkeypatch.setattr(topology, "addresses", lambda: {"lo": LOOPBACK, "eth0": "10.0.0.1", "ib0": "10.1.0.1"})
    monkeypatch.setattr(topology, "route_to", route)
    monkeypatch.setattr(reach, "_has_ipv6", lambda name: name in network["ipv6"])  # type: ignore[operator]
    return network


def test_nobody_else_has_to_reach_them() -> None:
    assert reach.of(HOME, wide=False) == Reach(LOOPBACK, "lo")


def test_nodes_on_one_loopback() -> None:
    assert reach.of(Topology(0, 4, "n0", LOOPBACK, LOOPBACK), wide=True) == Reach(LOOPBACK, "lo")


def test_the_interface_is_named(host: dict[str, object]) -> None:
    assert reach.of(HOME, wide=True) == Reach("10.0.0.1", "eth0")


def test_an_interface_whose_last_address_is_another(host: dict[str, object]) -> None:
    host |= {"ipv6": {"eth0"}, "default": "10.0.0.1"}
    assert reach.of(HOME, wide=True) == Reach("10.0.0.1", ""), "the default route leads there"
    for default in ("", "10.1.0.1"):
        host["default"] = default
        with pytest.raises(UsageError, match=r"can be told so by an interface's name only: eth0 has IPv6"):
            reach.of(HOME, wide=True)


def test_only_the_frontends_node_takes_answers(host: dict[str, object]) -> None:
    host["ipv6"] = {"eth0"}
    assert reach.of(Topology(2, 4, "n2", "10.0.0.3", "10.0.0.1"), wide=True) == Reach("10.0.0.3", "lo")


def test_ipv6_is_seen_by_the_kernels_own_table() -> None:
    table = Path("/proc/net/if_inet6")
    names = {line.split()[-1] for line in table.read_text().splitlines()} if table.exists() else set()
    assert all(reach._has_ipv6(name) for name in names)
    assert not reach._has_ipv6("nosuch0")
