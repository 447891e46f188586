"""What settings must not say together: each rule with the reason, as one message. Pure.

Types, ranges and choices of a single setting are `resolve.parse`'s business. docs/failure-policy.md lists the rules
between deadlines.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gms_launch.errors import UsageError
from gms_launch.numbers import numbered
from gms_launch.settings import arguments
from gms_launch.urls import hidden, is_loopback

if TYPE_CHECKING:
    from gms_launch.settings.declared import Settings

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,19}\Z")


#: A node that is cut off, and its guard, have killed what runs there so long after its lease is over (seconds).
LEAST_SPARE_WAIT = 3.0
#: A part of the names by which Dynamo's processes find each other: dots and slashes separate parts.
NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\Z")
#: A part of a host's name between two dots. No underscore is allowed there by the standard, and some sites have one.
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\Z")
#: What the resolver takes for an address though it is none of the usual form: 0, 127.1, 0x7f000001.
_NUMERIC = re.compile(r"[0-9]+|0[xX][0-9a-fA-F]*")
#: Distance between the first ports of two cohorts, as upstream staggers them.
COHORT_STRIDE = 100


def longest_liveness(lease_ttl: float) -> float:
    """Seconds that etcd may be silent before its restart, if Dynamo's leases of `lease_ttl` seconds are to outlive it.

    Dynamo sends a heartbeat when half of a lease is over (runtime's etcd/lease.rs), so half of one may be left when
    etcd falls silent. Noticing takes half as long again in the worst case, the restart a second.
    """
    return (lease_ttl / 2 - 1) / 1.5


def unprintable(text: str) -> str:
    """What keeps `text` out of paths, logs and command lines: a control character, or bytes that are no UTF-8.

    Empty when nothing does.
    """
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u2029" for c in text):
        return "a control character"
    return "what is no UTF-8" if any("\ud800" <= c <= "\udfff" for c in text) else ""


def host_problem(host: str) -> str:
    """Why `host` can be no name and no address of a host, in a few words; empty when it can."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        return "it is a multicast address" if address.is_multicast else ""
    if not host.isascii():
        return "names with other letters are written as xn--..."
    labels = host.removesuffix(".").split(".")
    if len(host) > 253 or not all(map(_LABEL.match, labels)):
        return "it is neither a name nor an address"
    return "it is no address" if _NUMERIC.fullmatch(labels[-1]) else ""


def check_spares(s: Settings) -> None:
    """Raise `UsageError` when all nodes would be spares."""
    if s.spares >= s.nnodes:
        raise UsageError(f"--spares {s.spares} of {numbered(s.nnodes, 'node')} leaves none for an engine")


def check(s: Settings) -> None:
    """Raise `UsageError` for the first contradiction between settings."""
    if s.run_id and not RUN_ID.match(s.run_id):
        raise UsageError(
            f"run_id {shortened(s.run_id)}: use 1-20 letters, digits, dots, dashes or underscores, starting with a "
            "letter or digit (it becomes part of socket paths, which are short)"
        )
    if s.node_rank >= s.nnodes:
        raise UsageError(f"node_rank {s.node_rank} does not exist with nnodes {s.nnodes}: ranks count from 0")
    if s.was_set("nnodes"):  # else the job or --hosts will say how many there are
        check_spares(s)
    if s.spares and s.spare_wait < LEAST_SPARE_WAIT:
        raise UsageError(
            f"spare_wait {s.spare_wait:g} s is below {LEAST_SPARE_WAIT:g} s: a node that is cut off would not have "
            "killed its ranks before a spare takes its place"
        )
    if s.spares and s.node_wait < s.lease_ttl + s.spare_wait:
        raise UsageError(
            f"node_wait {s.node_wait:g} s is shorter than lease_ttl + spare_wait ({s.lease_ttl + s.spare_wait:g} s): "
            "the run would end before a spare takes a lost node's place"
        )
    if not s.grouped and s.world % s.serving_nodes:
        times = (f" times pp {s.pp}" if s.pp > 1 else "") + (f" times dp {s.dp}" if s.dp > 1 else "")
        spare = f" that are no spares ({s.spares} of {s.nnodes} are)" if s.spares else ""
        raise UsageError(f"tp {s.tp}{times} cannot be spread evenly over {numbered(s.serving_nodes, 'node')}{spare}")
    if not s.grouped and s.dp > 1 and s.dp % s.serving_nodes:
        raise UsageError(
            f"dp {s.dp} cannot be spread evenly over {numbered(s.serving_nodes, 'node')}: a replica has all its GPUs "
            "on one node, and every node as many replicas"
        )
    if s.dp_lb == "hybrid" and s.dp == 1:
        raise UsageError(f"dp_lb hybrid (from {s.sources.get('dp_lb')}) is about several replicas, and dp is 1")
    if s.dp_lb == "hybrid" and s.activation != "agent":
        raise UsageError(
            f"dp_lb hybrid (from {s.sources.get('dp_lb')}) needs --activation agent: with a lock on each node that "
            "whoever tries first has, one cohort could win on one node and another on the next"
        )
    if not s.nats and s.event_plane == "nats":
        raise UsageError("--event-plane nats needs NATS, and --no-nats switches it off")
    if not s.nats and s.nats_server:
        raise UsageError("--nats-server names a NATS to use, and --no-nats switches NATS off")
    if s.restart_backoff > s.restart_backoff_max:
        raise UsageError(
            f"restart_backoff {s.restart_backoff:g} s is longer than restart_backoff_max {s.restart_backoff_max:g} s"
        )
    if s.health_timeout < 2 * s.health_interval:
        raise UsageError(
            f"health_timeout {s.health_timeout:g} s is shorter than two health_intervals ({s.health_interval:g} s): "
            "one late answer would look like a hang"
        )
    if s.canary_timeout < 2 * s.canary_interval:
        raise UsageError(
            f"canary_timeout {s.canary_timeout:g} s is shorter than two canary_intervals ({s.canary_interval:g} s): "
            "one unanswered request would look like a hang"
        )
    if s.service_liveness > longest_liveness(s.dynamo_lease_ttl):
        raise UsageError(
            f"service_liveness {s.service_liveness:g} s is more than the {longest_liveness(s.dynamo_lease_ttl):.1f} s "
            f"that dynamo_lease_ttl {s.dynamo_lease_ttl:g} s leaves: Dynamo's processes would exit before a silent etcd"
            " could be back"
        )
    if s.lease_ttl < 2:
        raise UsageError(f"lease_ttl {s.lease_ttl:g} s: below 2 s an ordinary pause would look like a lost node")
    if s.kill_wait < 2:
        raise UsageError(f"kill_wait {s.kill_wait:g} s: an orderly stop of engines, services and etcd needs 2 s")
    if s.was_set("stop_timeout") and s.stop_timeout > 0.5 * s.kill_wait:
        raise UsageError(
            f"stop_timeout {s.stop_timeout:g} s is more than half of kill_wait {s.kill_wait:g} s "
            f"(from {s.sources.get('kill_wait', 'the default')}): what follows the engines would be cut off"
        )
    if s.node_wait < 2 * s.lease_ttl:
        raise UsageError(
            f"node_wait {s.node_wait:g} s is shorter than two leases (lease_ttl {s.lease_ttl:g} s): "
            "a node could not be back before it is given up"
        )
    if s.hosts and s.was_set("node_rank"):
        raise UsageError("--hosts starts every agent itself; node_rank (from " + s.sources["node_rank"] + ") names one")
    if s.dynamo_lease_ttl < 5:
        raise UsageError(
            f"dynamo_lease_ttl {s.dynamo_lease_ttl:g} s: every Dynamo process exits when etcd is away for longer, "
            "and restarting etcd takes up to 2 s; use 5 or more"
        )
    if s.etcd_endpoints and s.was_set("etcd_members") and s.etcd_members != "auto":
        raise UsageError("--etcd-members is about an etcd of the run's own, and --etcd-endpoints names another")
    if not NAMESPACE.match(s.namespace):
        raise UsageError(
            f"namespace {shortened(s.namespace)}: use letters, digits, dashes and underscores (no dots or slashes)"
        )
    for url in s.etcd_endpoints.split(",") if s.etcd_endpoints else ():
        _check_url("--etcd-endpoints", url.strip(), ("http", "https"), "http://HOST:2379")
        if "@" in url:
            raise UsageError(
                f"--etcd-endpoints {shortened(hidden(url.strip()))} holds a login, and nobody here asks an etcd with a "
                "password: leave it out"
            )
    _check_tls(s, "etcd", s.etcd_endpoints.split(",") if s.etcd_endpoints else [], "https")
    _check_tls(s, "nats", [s.nats_server] if s.nats_server else [], "tls")
    if s.nats_server:
        _check_url("--nats-server", s.nats_server, ("nats", "tls", "ws", "wss"), "nats://HOST:4222")
    _check_hosts(s)
    _check_frontend(s)
    _check_ports(s)
    if s.engine_file and s.engine != "command":
        raise UsageError(f"--engine-file describes the engine `command`, and --engine is {s.engine}")
    if s.dp > 1 and any(arguments.has(s.engine_args, flag) for flag in ("--data-parallel-size", "-dp")):
        raise UsageError(
            f"engine argument --data-parallel-size 1, and dp {s.dp} (from {s.sources.get('dp')}); leave one out"
        )
    if s.engine != "command" and (wrong := arguments.problem(s.engine_args)):
        raise UsageError(wrong)


def _check_hosts(s: Settings) -> None:
    for name, host in ("leader_addr", s.leader_addr), ("frontend_host", s.frontend_host):
        if host and (why := host_problem(host)):
            raise UsageError(f"{name} {shortened(host)}: {why}")
    if s.leader_addr in ("", "0.0.0.0", "255.255.255.255") or ":" in s.leader_addr:
        raise UsageError(
            f"leader_addr {s.leader_addr!r} is no IPv4 address of one node: give a name or an address by which the "
            "others reach the leader"
        )


def shortened(text: str, longest: int = 120) -> str:
    """`text` in quotes for a message, its end left out when it is long."""
    return repr(text) if len(text) <= longest else repr(text[:longest]) + "..."


def _check_frontend(s: Settings) -> None:
    """Who may come in, and how."""
    if s.api_key_file and s.open_frontend:
        raise UsageError("--api-key-file asks clients for a key, and --open-frontend for none; leave one out")
    if bool(s.tls_cert) != bool(s.tls_key):
        there, absent = ("tls_cert", "tls_key") if s.tls_cert else ("tls_key", "tls_cert")
        raise UsageError(f"{there} (from {s.sources[there]}) needs --{absent.replace('_', '-')} too")
    if s.frontend_host and not is_loopback(s.frontend_host) and not s.api_key_file and not s.open_frontend:
        raise UsageError(
            f"frontend_host {s.frontend_host} (from {s.sources['frontend_host']}) lets everybody in who reaches it, "
            "and no key is asked for; ask for one (--api-key-file FILE), or leave it out and stay on loopback (ssh -L "
            "reaches that), or say --open-frontend if everybody may use the model"
        )


def _check_tls(s: Settings, server: str, urls: Sequence[str], scheme: str) -> None:
    """The files by which we speak TLS to a server of the user's own."""
    where = {"etcd": "--etcd-endpoints", "nats": "--nats-server"}[server]
    secure = [url.strip().startswith(f"{scheme}://") for url in urls]
    if server == "etcd" and any(secure) and not all(secure):
        raise UsageError(f"{where} has https and other URLs in it: one etcd speaks TLS everywhere or nowhere")
    given = [name for name in (f"{server}_ca", f"{server}_cert", f"{server}_key") if getattr(s, name)]
    if given and not all(secure or [False]):
        raise UsageError(
            f"{given[0]} (from {s.sources.get(given[0])}) is for a server of your own that speaks TLS: give its URL "
            f"with {where} {scheme}://..."
        )
    cert, key = f"{server}_cert", f"{server}_key"
    if bool(getattr(s, cert)) != bool(getattr(s, key)):
        there, absent = (cert, key) if getattr(s, cert) else (key, cert)
        raise UsageError(f"{there} (from {s.sources.get(there)}) needs --{absent.replace('_', '-')} too")


def _check_url(flag: str, text: str, schemes: tuple[str, ...], example: str) -> None:
    """The message must not hold the login that the URL may have."""
    why = "is no URL"
    try:
        parts = urlsplit(text)
        good = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", text)
        if good and (wrong := host_problem(parts.hostname or "")):
            good, why = False, f"has no host that can be: {wrong}"
        if good and re.search("[?#]", text):
            good, why = False, "has something after a ? or #, which nobody here reads"
    except ValueError:  # a port that is none, a bracket that is not closed
        good = False
    if not good:
        raise UsageError(f"{flag} {shortened(hidden(text))} {why}; expected something like {example}")


def _ranges(s: Settings) -> Mapping[str, Iterable[int]]:
    """Every port that follows from a setting, by the setting."""
    services = ("frontend", "frontend_inner", "etcd", "etcd_peer", "etcd_proxy", "nats", "word")
    single = [f"{name}_port" for name in services]
    cohorts, wide = s.cohorts, COHORT_STRIDE * s.cohorts
    found = {name: range(getattr(s, name), getattr(s, name) + 1) for name in single}
    if s.metrics_port:
        found["metrics_port"] = range(s.metrics_port, s.metrics_port + 1)
    return found | {
        "system_port": range(s.system_port, s.system_port + cohorts),
        "nixl_port": range(s.nixl_port, s.nixl_port + cohorts * s.dp),
        "vllm_port": range(s.vllm_port, s.vllm_port + wide),
        "master_port": range(s.master_port, s.master_port + wide),
    }


def _check_ports(s: Settings) -> None:
    """Two settings that were both given, and share a port. Those that were not given are moved."""
    seen: dict[int, str] = {}
    for name, taken in _ranges(s).items():
        for port in taken if s.was_set(name) else ():
            if port in seen:
                raise UsageError(f"{seen[port]} and {name} are both {port}{_counted(s, seen[port], name)}")
            seen[port] = name


def _counted(s: Settings, *names: str) -> str:
    """Says of names that stand for several ports which these are; empty when none does."""
    found = {name: _ranges(s)[name] for name in names}
    said = [f"{n} is {min(r)} to {max(r)}" for n, r in found.items() if min(r) != max(r)]
    return f" ({', '.join(said)}, with {numbered(s.cohorts, 'cohort')})" if said else ""
