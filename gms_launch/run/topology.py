"""Who is this node: rank, number of nodes, leader, addresses.

`from_slurm` reads what Slurm says (the last source of settings); `discover` decides from the resolved settings. What
it does not do: talk to the other nodes.
"""

from __future__ import annotations

import fcntl
import ipaddress
import re
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gms_launch.errors import UsageError
from gms_launch.numbers import count, numbered
from gms_launch.settings.declared import MOST_NODES, Settings
from gms_launch.settings.rules import shortened


@dataclass(frozen=True)
class Topology:
    """This node's place in the run. `address` is what other nodes reach it by; `host` is for people and `srun -w`.

    Spares do not count in `nnodes`: their node ranks come behind.
    """

    node_rank: int
    nnodes: int
    host: str
    address: str
    leader_address: str

    @property
    def is_leader(self) -> bool:
        return self.node_rank == 0


#: Of node lists: names, ranges and users and ports of --hosts. What else a node set understands, nobody means.
_NODELIST = re.compile(r"[A-Za-z0-9._@:,/\[\]-]*")


# -- Slurm ---------------------------------------------------------------------------------------------------------


def from_slurm(environ: Mapping[str, str], hands_off: bool = False) -> dict[str, Any]:
    """Settings that follow from Slurm's variables: nnodes, node_rank, leader_addr, and GPUs. Empty outside of Slurm.

    Where gms-launch.sbatch gives each node a step of its own, GL_NODES has the nodes of the run.
    `hands_off`: the user gave the node rank, so Slurm's idea of it is neither used nor judged. Raises `UsageError` for
    a step that cannot be a run: several tasks on a node, or a shell that is no task of a step at all.
    """
    job = environ.get("SLURM_JOB_ID")
    if not job or hands_off:
        return {}
    if "SLURM_STEP_ID" not in environ:
        return _batch_shell(job, environ)
    nodes = expand(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", ""))
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    tasks = len(nodes) if tasks is None else tasks
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    per_node = [int(n) for n in re.findall(r"([0-9]{1,9})(?:\(x[0-9]+\))?(?:,|$)", counts)]
    if tasks > len(nodes) or max(per_node, default=1) > 1:
        raise UsageError(
            f"step {job}.{environ['SLURM_STEP_ID']} has {numbered(tasks, 'task')} on {numbered(len(nodes), 'node')}; "
            "one agent runs on each node: srun --ntasks-per-node=1 gms-launch up"
        )
    rank = _number(environ, "SLURM_NODEID") or 0
    name = environ.get("SLURMD_NODENAME")
    several = expand(environ["GL_NODES"]) if environ.get("GL_NODES") and len(nodes) == 1 else []
    if name in several:
        nodes, rank = several, several.index(name)
    if rank >= len(nodes) or (name and name != nodes[rank]):
        raise UsageError(
            f"Slurm calls this node {name}, number {rank}, and its node list is {','.join(nodes)}; "
            "start the step without an own order of hosts (--distribution=arbitrary, SLURM_HOSTFILE)"
        )
    # Of a single node too: on its loopback nobody at the login node would reach the run.
    found: dict[str, Any] = {"nnodes": len(nodes), "node_rank": rank, "leader_addr": nodes[0]}
    return found | _gpus(environ, len(nodes))


def _batch_shell(job: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """A batch script or an salloc shell: good for one node, and only on that node."""
    nodes = _number(environ, "SLURM_JOB_NUM_NODES", "SLURM_NNODES") or 1
    if nodes > 1 or "SLURMD_NODENAME" not in environ:
        raise UsageError(
            f"this shell belongs to job {job} and is not a task on its nodes; start one agent on each node with "
            "`srun --ntasks-per-node=1 gms-launch up`, or say --nnodes and --node-rank"
        )
    return _gpus(environ, 1)


def _number(environ: Mapping[str, str], *names: str) -> int | None:
    """The first of the variables that is set; None when none is. Raises `UsageError` for one that is no number."""
    for name in names:
        if text := environ.get(name):
            if (number := count(text)) is None:
                raise UsageError(
                    f"{name} is {shortened(text)}, and Slurm would have put a number there; unset it, or say "
                    "--nnodes and --node-rank"
                )
            return number
    return None


def _gpus(environ: Mapping[str, str], nnodes: int) -> dict[str, Any]:
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    number = count(gpus) or 0
    found: dict[str, Any] = {"tp": nnodes * (number or 1)}
    if number:
        found["virtual_gpus"] = min(number, 16)
    return found


def expand(nodelist: str) -> list[str]:
    """The hosts of a nodelist such as `node[1-3,7],login`, in Slurm's order. Raises `UsageError`."""
    if not _NODELIST.fullmatch(nodelist):
        raise UsageError(f"node list {shortened(nodelist)} cannot be read: expected something like node[1-3,7],login")
    # Part by part: a node set sorts, and Slurm counts its nodes in the order of its own list.
    parts = re.split(r",(?![^\[]*\])", nodelist)
    # Counted first: a node set holds every number of a range.
    if sum(map(_size, parts)) > MOST_NODES:
        raise UsageError(f"node list {shortened(nodelist)} names more than {MOST_NODES} nodes")
    from ClusterShell.NodeSet import NodeSet, NodeSetException

    try:
        return [name for part in parts for name in NodeSet(part, autostep=None, resolver=None)]
    except (NodeSetException, ValueError) as exc:
        raise UsageError(f"node list {shortened(nodelist)} cannot be read: {exc}") from None


def _size(part: str) -> int:
    """How many nodes a part of a nodelist names, at most: the product of its brackets' numbers."""
    size = 1
    for bracket in re.findall(r"\[([^\]]*)\]", part):
        size *= sum(_span(numbers.partition("/")[0]) for numbers in bracket.split(","))
    return size


def _span(numbers: str) -> int:
    first, dash, last = numbers.partition("-")
    if any(n.isdigit() and count(n) is None for n in (first, last)):
        return MOST_NODES + 1  # more digits than anybody counts
    low, high = count(first), count(last if dash else first)
    return 1 if low is None or high is None else max(1, high - low + 1)  # what is no range is refused when it is read


# -- addresses -----------------------------------------------------------------------------------------------------


def discover(settings: Settings) -> Topology:
    """Find this node's place. Raises `UsageError` when the leader or the shared network cannot be told."""
    host = socket.gethostname().partition(".")[0]
    own = addresses()
    chosen = _of_interface(settings.interface, own) if settings.interface else ""
    leader = resolve(settings.leader_addr)
    if settings.node_rank == 0:
        address = chosen or _leader_address(settings, leader, own, host)
        return Topology(0, settings.serving_nodes, host, address, address)
    if not settings.was_set("leader_addr"):
        raise UsageError(f"node {settings.node_rank} of {settings.nnodes} needs --leader-addr (or LEADER_ADDR)")
    # --interface lo says that all nodes of the run are on this machine.
    if ipaddress.ip_address(leader).is_loopback and not (chosen and ipaddress.ip_address(chosen).is_loopback):
        raise UsageError(
            f"leader_addr {settings.leader_addr!r} is {leader} on this node ({host}), its own loopback; "
            "give a name or an address by which every node reaches the leader"
        )
    address = chosen or route_to(leader)
    return Topology(settings.node_rank, settings.serving_nodes, host, address, leader)


def at_leader(found: Topology, leader_address: str, chosen: bool) -> Topology:
    """The same node, once the leader has said which address it serves on. `chosen`: --interface fixed our own."""
    address = found.address if chosen else route_to(leader_address)
    return Topology(found.node_rank, found.nnodes, found.host, address, leader_address)


def _leader_address(settings: Settings, leader: str, own: Mapping[str, str], host: str) -> str:
    """The address that the leader serves on: the one of the network that the nodes share."""
    if settings.nnodes == 1:
        return leader
    if ipaddress.ip_address(leader).is_loopback:
        # /etc/hosts often gives a machine's own name a loopback address, which no other node reaches.
        outside = {name: a for name, a in own.items() if not ipaddress.ip_address(a).is_loopback}
        if not settings.was_set("leader_addr"):
            raise UsageError(
                f"{settings.nnodes} nodes need --leader-addr (or LEADER_ADDR): how the others reach this one"
            )
        if len(outside) == 1:
            return next(iter(outside.values()))
        raise UsageError(
            f"leader_addr {settings.leader_addr!r} is {leader} on this node ({host}), which no other node reaches; "
            f"say which network the nodes share with --interface: {_listed(outside)}"
        )
    if leader not in own.values():
        raise UsageError(
            f"leader_addr {settings.leader_addr!r} is {leader}, which this node ({host}) does not have: "
            f"{_listed(own)}; node rank 0 must run on the leader"
        )
    return leader


def _of_interface(name: str, own: Mapping[str, str]) -> str:
    if name not in own:
        raise UsageError(f"interface {name!r} has no IPv4 address on {socket.gethostname()}; there are {_listed(own)}")
    return own[name]


def _listed(own: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {address}" for name, address in own.items()) or "none"


def addresses() -> dict[str, str]:
    """The IPv4 address of every interface of this node that has one."""
    siocgifaddr = 0x8915
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe, siocgifaddr, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # no IPv4 address
            found[name] = socket.inet_ntoa(reply[20:24])
    return found


def route_to(address: str) -> str:
    """This node's own address on the way to `address`. Raises `UsageError` when there is no way."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # a datagram socket sends nothing here
            return str(probe.getsockname()[0])
        except OSError as exc:
            raise UsageError(
                f"this node ({socket.gethostname()}) has no route to the leader {address}: {exc.strerror}"
            ) from None


def must_be_ours(address: str, setting: str) -> None:
    """Raise `UsageError` unless this node can listen on `address`, which may be a name or empty."""
    if not address:
        return
    try:
        found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(found[0], found[1]) as probe:
            probe.bind(found[4])
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else exc
        raise UsageError(
            f"{setting} {address}: this node ({socket.gethostname()}) cannot listen there ({why}); it has "
            + _listed(addresses())
        ) from None


def resolve(name: str) -> str:
    """The address of a host name. Raises `UsageError`."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else exc
        raise UsageError(f"leader_addr {shortened(name)} has no address: {why}") from None
