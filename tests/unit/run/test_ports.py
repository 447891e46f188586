"""Which port goes to whom."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from gms_launch.errors import UsageError
from gms_launch.run import ports
from gms_launch.settings.resolve import resolve
from tests.support import free_port


def test_wanted_ports_are_taken_when_free() -> None:
    found = ports.layout(resolve({}, {}), lambda _: True)
    assert (found.frontend, found.etcd, found.nats, found.system) == (8000, 2379, 4222, (8080, 8081))
    assert [found.master(0, 1), found.master(1, 1), found.master(1, 3)] == [29500, 29600, 29602]


def test_lives_take_turns_and_never_meet_another_cohorts_ports() -> None:
    found = ports.layout(resolve({"shadows": "3"}, {}), lambda _: True)
    used = {k: {found.master(k, n) for n in range(1, 500)} for k in range(4)}
    assert all(len(u) == ports.INCARNATION_STEPS for u in used.values())
    assert len(set.union(*used.values())) == 4 * ports.INCARNATION_STEPS


def test_taken_ports_are_passed_over_and_nothing_is_given_twice() -> None:
    taken = {8000, 8080, 2379, 29500}
    found = ports.layout(resolve({"shadows": "2"}, {}), lambda p: p not in taken)
    given = [found.frontend, found.etcd, found.etcd_peer, found.nats, *found.system, *found.nixl, *found.vllm]
    assert len(set(given)) == len(given)
    assert not taken & set(given)
    assert found.master_base == 29800


def test_a_fixed_port_is_not_moved() -> None:
    with pytest.raises(UsageError, match=r"frontend_port 9000 is in use .*from --frontend-port"):
        ports.layout(resolve({"frontend_port": "9000"}, {}), lambda p: p != 9000)


def test_a_reservation_keeps_others_out_before_anything_listens(tmp_path: Path) -> None:
    one, two = ports.Reservation(tmp_path, "127.0.0.1"), ports.Reservation(tmp_path, "127.0.0.1")
    port = free_port()
    assert one.free(port) and one.free(port)
    assert not two.free(port)
    one.close()
    assert two.free(port)


def test_a_port_that_somebody_listens_on_is_not_free() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert not ports.is_free("127.0.0.1", listener.getsockname()[1])


def test_reservations_leave_no_files(tmp_path: Path) -> None:
    first, port = ports.Reservation(tmp_path, "127.0.0.1"), free_port()
    assert first.free(port)
    assert len(list(tmp_path.iterdir())) == 1
    second = ports.Reservation(tmp_path, "127.0.0.1")
    assert not second.free(port), "what another holds is not cleared away"
    first.close()
    assert list(tmp_path.iterdir()) == []
    assert second.free(port)
    second.close()
    (tmp_path / "12345-1").touch()  # of one that was killed
    ports.Reservation(tmp_path, "127.0.0.1")
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_leaves_no_file(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert not ports.Reservation(tmp_path, "127.0.0.1").free(taken.getsockname()[1])
    assert list(tmp_path.iterdir()) == []
