"""No port goes to two, and each is one that its owner may have."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace

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


def test_replicas_meet_beside_the_master_ports_and_each_has_a_port_of_nixls() -> None:
    found = ports.layout(resolve({"shadows": "2", "dp": "4"}, {}), lambda port: port != 8285)
    masters = {found.master(k, n) for k in range(3) for n in range(1, 200)}
    assert not masters & {ports.rpc(port) for port in masters}
    assert len({ports.rpc(port) for port in masters}) == len(masters)
    assert found.nixl == (8280, 8286, 8290), "4 beside each other"


def test_groups_of_one_node_have_ranges_of_their_own_however_many_cohorts_and_replicas_each_has() -> None:
    """Also where the first number was fixed: it is taken by the run's own groups, and by nobody else."""
    fixed = {"vllm_port": "21000", "nixl_port": "8280"}
    sizes = [("2", "8"), ("1", "1"), ("3", "2")]
    several = [resolve({"shadows": s, "dp": dp} | fixed, {}) for s, dp in sizes]
    made = ports.of_groups(ports.layout(several[0], lambda _: True), [(s, k, {}) for k, s in enumerate(several)], _any)
    assert [p for own in made for p in own.vllm] == [21000 + 100 * k for k in range(3 + 2 + 4)]
    assert [own.nixl for own in made] == [(8280, 8288, 8296), (8304, 8305), (8314, 8316, 8318, 8320)]


def _any(port: int) -> bool:
    return True


def test_taken_ports_are_passed_over_and_nothing_is_given_twice() -> None:
    taken = {8000, 8080, 2379, 29500}
    found = ports.layout(resolve({"shadows": "2"}, {}), lambda p: p not in taken)
    given = [found.frontend, found.etcd, found.etcd_peer, found.nats, *found.system, *found.nixl, *found.vllm]
    assert len(set(given)) == len(given)
    assert not taken & set(given)
    assert found.master_base == 29800


def test_with_replicas_the_ports_beside_the_master_ports_are_free_too() -> None:
    beside = 29500 + ports.INCARNATION_STEPS
    found = [ports.layout(resolve({"dp": dp}, {}), lambda p: p != beside).master_base for dp in ("1", "2")]
    assert found == [29500, 29700]
    groups = [(resolve({"dp": dp}, {}), k, {}) for k, dp in enumerate(("2", "1"))]
    run = ports.layout(resolve({}, {}), _any)
    assert [own.master_base for own in ports.of_groups(run, groups, lambda p: p != beside)] == [29700, 29900]


@pytest.fixture
def base() -> Iterator[int]:
    """The first of a slot's master ports, on nobody's."""
    held = ports.Reservation("127.0.0.1", name="gms-launch-tests")
    found = next(p for p in range(13000, 20000, 100) if all(map(held.free, range(p, p + 100))))
    yield found
    held.close()


@contextlib.contextmanager
def squatted(numbers: Iterable[int]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for number in numbers:
            stack.enter_context(socket.create_server(("127.0.0.1", number)))
        yield


def test_a_life_meets_elsewhere_when_its_slots_range_is_taken(base: int) -> None:
    """Whoever has it all would have every start of that slot fail, until it is given up."""
    given = replace(ports.layout(resolve({}, {}), _any), master_base=base)
    steps = ports.INCARNATION_STEPS
    assert ports.meeting(given, 0, 1, 1, "127.0.0.1") == base
    with squatted([base]):
        assert ports.meeting(given, 0, 1, 1, "127.0.0.1") == base + 1
    with squatted([base + steps]):
        assert ports.meeting(given, 0, 1, 1, "127.0.0.1") == base
        assert ports.meeting(given, 0, 1, 2, "127.0.0.1") == base + 1, "its replicas meet beside it"
    with squatted(range(base, base + steps)):
        found = ports.meeting(given, 0, 1, 1, "127.0.0.1")
        assert found not in range(base, base + 100) and ports.is_free("127.0.0.1", found)
    with squatted(range(base + steps, base + 2 * steps)):
        assert ports.meeting(given, 0, 1, 2, "127.0.0.1") not in range(base, base + 100)


def test_a_life_has_others_in_place_of_its_slots_ports_that_are_taken(base: int) -> None:
    slots = {"system": (base, base + 1), "nixl": (base + 2, base + 5), "extra": {"kv": (base + 8, base + 9)}}
    given = replace(ports.layout(resolve({}, {}), _any), **slots)  # type: ignore[arg-type]
    assert ports.of_a_life(given, 1, 3, "127.0.0.1") == (given, [])
    with squatted([base + 7, base + 9]):
        found, told = ports.of_a_life(given, 1, 3, "127.0.0.1")
    assert told == [f"NIXL port {base + 5}", f"port kv of the engine file {base + 9}"]
    assert found.nixl[0] == base + 2 and found.extra["kv"][0] == base + 8, "another slot's stay"
    assert not {found.nixl[1], found.extra["kv"][1]} & set(range(base, base + 100))
    with squatted([base]):
        found, told = ports.system_of_a_life(given, 0, "127.0.0.1")
    assert told == [f"system port {base}"] and found.system[0] != base and found.system[1] == base + 1


def test_a_fixed_port_is_not_moved() -> None:
    with pytest.raises(UsageError, match=r"frontend_port 9000 is in use .*from --frontend-port"):
        ports.layout(resolve({"frontend_port": "9000"}, {}), lambda p: p != 9000)


def test_a_reservation_keeps_others_out_before_anything_listens() -> None:
    one, two = ports.Reservation("127.0.0.1"), ports.Reservation("127.0.0.1")
    port = free_port()
    assert one.free(port) and one.free(port)
    assert not two.free(port)
    one.close()
    assert two.free(port)
    two.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_is_kept_out_too_until_we_end() -> None:
    ours, port = ports.Reservation("127.0.0.1"), free_port()

    def free_for_another() -> bool:
        code = (
            "import os, sys\nfrom gms_launch.run import ports\nos.setuid(65534)\n"
            f"sys.exit(not ports.Reservation('127.0.0.1').free({port}))"
        )
        return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    assert free_for_another(), "and it lets go by its death"
    assert ours.free(port)
    assert not free_for_another()
    ours.close()
    assert free_for_another()


def test_a_port_that_somebody_listens_on_is_not_free() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert not ports.is_free("127.0.0.1", listener.getsockname()[1])


def test_a_port_in_use_is_not_held() -> None:
    ours = ports.Reservation("127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not ours.free(port)
    assert ports.Reservation("127.0.0.1").free(port)
