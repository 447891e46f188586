"""Every port that the launcher hands out.

`layout` is pure: it gives each purpose its port, taking the wanted number where `free` says it is free and the next
free one where it is not. `Reservation` keeps two runs on a node, of whichever users, from choosing the same numbers
before either has bound them. Ports that the user fixed are never moved: if one is taken, that is an error.
"""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gms_launch.errors import UsageError
from gms_launch.settings.declared import Settings
from gms_launch.settings.rules import COHORT_STRIDE

#: Incarnations of a cohort take turns on this many master ports, so that one in TIME_WAIT is not met again soon.
INCARNATION_STEPS = 50


@dataclass(frozen=True)
class Ports:
    """The ports of one run on the leader node; per cohort where the name says so. `extra` are an engine's own."""

    frontend: int
    etcd: int
    etcd_peer: int
    nats: int
    master_base: int
    system: tuple[int, ...]
    nixl: tuple[int, ...]
    vllm: tuple[int, ...]
    word: int
    #: Dynamo's frontend, on loopback behind the proxy; 0 where there is none.
    frontend_inner: int = 0
    #: Where Dynamo's processes of a node find an etcd of several members; 0 where it has one.
    etcd_proxy: int = 0
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def master(self, cohort_id: int, incarnation: int) -> int:
        """Where the ranks of that life of the cohort meet."""
        return self.master_base + COHORT_STRIDE * cohort_id + (incarnation - 1) % INCARNATION_STEPS


class _Chooser:
    """Hands out ports, none of them twice."""

    def __init__(self, settings: Settings, free: Callable[[int], bool], taken: set[int] | None = None) -> None:
        """`taken` is shared between those who choose on one node."""
        self._settings, self._free = settings, free
        self._taken = set() if taken is None else taken

    def usable(self, port: int) -> bool:
        return port not in self._taken and port <= 65535 and self._free(port)

    def _all(self, port: int, width: int) -> bool:
        return all(self.usable(port + k) for k in range(width))

    def one(self, name: str, wanted: int, width: int = 1) -> int:
        """The first of `width` ports beside each other."""
        if self._settings.was_set(name) and not self._all(wanted, width):
            raise UsageError(
                f"{name} {wanted} is in use on this node (from {self._settings.sources[name]}); "
                "stop what listens there, or the run that has reserved it, or choose another port"
            )
        for port in range(wanted, min(wanted + 2000, 65536)):
            if self._all(port, width):
                self._taken.update(range(port, port + width))
                return port
        raise UsageError(f"{name}: no free port from {wanted} on")


def moved(settings: Settings, chosen: Ports) -> str:
    """The services' ports that are not the wanted ones, for people; empty when none had to be moved."""
    names = ("frontend", "etcd", "etcd_peer", "nats")
    pairs = [(n, getattr(settings, f"{n}_port"), getattr(chosen, n)) for n in names]
    return ", ".join(f"{name} {port} instead of {wanted}" for name, wanted, port in pairs if port != wanted)


def follow(
    settings: Settings,
    leaders: Mapping[str, Any],
    free: Callable[[int], bool],
    extra: Mapping[str, int] | None = None,
    member: bool = False,
    front: bool = False,
    near: bool = False,
) -> Ports:
    """The ports of a node that is not the leader: its engines' own from this node, everything else the leader's.

    `member`: it has a member of etcd too; `front`: and a frontend; `near`: and a proxy of etcd's.
    """
    one = _Chooser(settings, free).one
    cohorts = range(settings.cohorts)
    leaders = dict(leaders)
    if front:
        leaders["frontend"] = one("frontend_port", settings.frontend_port)
        if settings.api_key_file:
            leaders["frontend_inner"] = one("frontend_inner_port", settings.frontend_inner_port)
    if member:
        leaders = {**leaders, "etcd": one("etcd_port", settings.etcd_port)}
        leaders["etcd_peer"] = one("etcd_peer_port", settings.etcd_peer_port)
    if near:
        leaders["etcd_proxy"] = one("etcd_proxy_port", settings.etcd_proxy_port)
    own: dict[str, Any] = {
        "nixl": _nixl(one, settings, settings.nixl_port),
        "vllm": tuple(one("vllm_port", settings.vllm_port + COHORT_STRIDE * k) for k in cohorts),
        "word": one("word_port", settings.word_port),
    }
    if settings.hybrid:
        own["system"] = tuple(one("system_port", settings.system_port + k) for k in cohorts)
    return Ports(**{**leaders, "system": tuple(leaders["system"]), **own, "extra": _extra(one, extra, cohorts)})


def _nixl(one: Callable[[str, int, int], int], s: Settings, first: int) -> tuple[int, ...]:
    """Each cohort's first port of NIXL: every replica of it adds its number."""
    return tuple(one("nixl_port", first + s.dp * k, s.dp) for k in range(s.cohorts))


def rpc(master_port: int) -> int:
    """Where the replicas of a life meet: beside where its ranks do, in the part of the range that no master port is."""
    return master_port + INCARNATION_STEPS


def _meetings(base: int, s: Settings) -> list[int]:
    """Where the ranks of each cohort's first life meet, and its replicas."""
    masters = [base + COHORT_STRIDE * k for k in range(s.cohorts)]
    return masters + ([rpc(port) for port in masters] if s.dp > 1 else [])


def _extra(one: Callable[[str, int], int], first: Mapping[str, int] | None, cohorts: range) -> dict[str, Any]:
    return {
        name: tuple(one(f"port {name} of the engine file", port + k) for k in cohorts)
        for name, port in (first or {}).items()
    }


def layout(settings: Settings, free: Callable[[int], bool], extra: Mapping[str, int] | None = None) -> Ports:
    """Give every purpose a port. Raises `UsageError` if a port the user fixed is taken or none is left.

    `extra` are an engine's own, by name: the wanted port of cohort 0.
    """
    chooser = _Chooser(settings, free)
    one, usable = chooser.one, chooser.usable
    frontend = one("frontend_port", settings.frontend_port)
    inner = one("frontend_inner_port", settings.frontend_inner_port) if settings.api_key_file else 0
    etcd = one("etcd_port", settings.etcd_port)
    peer = one("etcd_peer_port", settings.etcd_peer_port)
    several = not settings.etcd_endpoints and settings.members(settings.serving_nodes) > 1
    near = one("etcd_proxy_port", settings.etcd_proxy_port) if several else 0
    nats = one("nats_port", settings.nats_port)
    cohorts = range(settings.cohorts)
    system = tuple(one("system_port", settings.system_port + k) for k in cohorts)
    nixl = _nixl(one, settings, settings.nixl_port)
    vllm = tuple(one("vllm_port", settings.vllm_port + COHORT_STRIDE * k) for k in cohorts)
    word = one("word_port", settings.word_port)
    own = _extra(one, extra, cohorts)
    span = COHORT_STRIDE * settings.cohorts
    base = settings.master_port
    while True:
        if base + span > 65535:
            raise UsageError(f"master_port: no free range of {span} ports from {settings.master_port} on")
        if all(map(usable, _meetings(base, settings))):
            break
        if settings.was_set("master_port"):
            raise UsageError(f"master_port {settings.master_port}: it or a port of its range is in use on this node")
        base += span
    return Ports(frontend, etcd, peer, nats, base, system, nixl, vllm, word, inner, near, own)


def of_groups(
    run: Ports, wanted: Sequence[tuple[Settings, int, Mapping[str, int]]], free: Callable[[int], bool]
) -> list[Ports]:
    """The ports of this node's groups in a run that has `run`: each given as its settings, its number on this node and
    the first of its engine's own ports. Raises `UsageError`.
    """
    taken = {run.frontend, run.etcd, run.etcd_peer, run.nats, run.word, run.frontend_inner, run.etcd_proxy}
    made = []
    ranges = replicas = 0  # what the groups before this one have taken
    for s, seat, extra in wanted:
        chooser = _Chooser(s, free, taken)
        cohorts, span = range(s.cohorts), COHORT_STRIDE * s.cohorts
        system = tuple(chooser.one("system_port", s.system_port + 10 * seat + k) for k in cohorts)
        nixl = _nixl(chooser.one, s, s.nixl_port + replicas)
        vllm = tuple(chooser.one("vllm_port", s.vllm_port + COHORT_STRIDE * (ranges + k)) for k in cohorts)
        ranges, replicas = ranges + s.cohorts, replicas + max(10, s.dp * s.cohorts)
        own = _extra(chooser.one, {name: first + 10 * seat for name, first in extra.items()}, cohorts)
        base = s.master_port + span * seat
        while not all(map(chooser.usable, _meetings(base, s))):
            base += span
            if base + span > 65535:
                raise UsageError(f"master_port: no free range of {span} ports from {s.master_port} on")
        taken |= {base + COHORT_STRIDE * k for k in cohorts}
        made.append(replace(run, master_base=base, system=system, nixl=nixl, vllm=vllm, extra=own))
    return made


def is_free(address: str, port: int) -> bool:
    """True when `port` can be bound on `address` right now."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def all_free(addresses: Sequence[str], ports: Iterable[int]) -> bool:
    """True when each of these can be bound on each of the addresses right now."""
    return all(is_free(address, port) for port in ports for address in addresses)


def out_of_the_way(*addresses: str, beside: Sequence[int] = (0,)) -> int:
    """A free port that nobody can foresee, for what found its own taken; within what Dynamo reads as a port (16 bits
    with a sign). Those so far `beside` it are free too. Raises `OSError` when none was found.
    """
    for port in random.sample(range(20000, 32000), 100):
        if all_free(addresses, (port + k for k in beside)):
            return port
    raise OSError(errno.EADDRINUSE, f"no free port on {' and '.join(addresses)}")


def meeting(given: Ports, cohort_id: int, incarnation: int, dp: int, *addresses: str) -> int:
    """The master port of a life: the next of its slot's range where nobody listens, nor, with replicas, beside it; if
    all of them are taken, one that nobody can foresee. Raises `OSError` when there is none.
    """
    beside = (0, INCARNATION_STEPS) if dp > 1 else (0,)
    for step in range(INCARNATION_STEPS):
        port = given.master(cohort_id, incarnation + step)
        if all_free(addresses, (port + k for k in beside)):
            return port
    return out_of_the_way(*addresses, beside=beside)


def of_a_life(given: Ports, cohort_id: int, dp: int, *addresses: str) -> tuple[Ports, list[str]]:
    """The ports with which a life of a cohort is started, and in words which of its slot's were taken meanwhile: those
    are others, which nobody can foresee. vLLM's range is not among them: it takes the next that is free by itself.
    """
    told = []

    def own(name: str, numbers: tuple[int, ...], width: int = 1) -> tuple[int, ...]:
        first = numbers[cohort_id]
        if all_free(addresses, range(first, first + width)):
            return numbers
        try:
            other = out_of_the_way(*addresses, beside=range(width))
        except OSError:
            return numbers
        told.append(f"{name} {first}")
        return _put(numbers, cohort_id, other)

    found = replace(
        given,
        nixl=own("NIXL port", given.nixl, dp),
        extra={name: own(f"port {name} of the engine file", numbers) for name, numbers in given.extra.items()},
    )
    return found, told


def _put(numbers: tuple[int, ...], place: int, number: int) -> tuple[int, ...]:
    return (*numbers[:place], number, *numbers[place + 1 :])


def system_of_a_life(given: Ports, cohort_id: int, address: str) -> tuple[Ports, list[str]]:
    """The same of the port where a life is asked how it is. Raises `OSError` when there is no other."""
    port = given.system[cohort_id]
    if is_free(address, port):
        return given, []
    return replace(given, system=_put(given.system, cohort_id, out_of_the_way(address))), [f"system port {port}"]


class Reservation:
    """Holds on the ports that this process chose, let go by `close` or by its death.

    A hold is a Unix socket bound to an abstract name, on which nobody listens. Such names belong to the network
    namespace, as ports do: they keep out every user and container that shares the ports, and leave nothing behind.
    """

    def __init__(self, *addresses: str, name: str = "gms-launch") -> None:
        self._addresses = dict.fromkeys(addresses)
        self._name = name
        self._held: dict[int, socket.socket] = {}

    def free(self, port: int) -> bool:
        """True when `port` is free and now reserved for us."""
        if port in self._held:
            return True
        hold = socket.socket(socket.AF_UNIX)
        try:
            hold.bind(f"\0{self._name}-port-{port}")
        except OSError as exc:
            hold.close()
            if exc.errno != errno.EADDRINUSE:
                raise
            return False
        if not all(is_free(address, port) for address in self._addresses):
            hold.close()
            return False
        self._held[port] = hold
        return True

    def close(self) -> None:
        for hold in self._held.values():
            hold.close()
        self._held.clear()
