"""`gms-launch doctor`: what would stop `up` on this node, each with what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata

from gms_launch.cli.plan import layout, memory
from gms_launch.control.access import Access
from gms_launch.engines import installed
from gms_launch.engines.base import LOOPBACK
from gms_launch.errors import LaunchError
from gms_launch.gms import gpus
from gms_launch.gms.devices import CUDA_ORDER
from gms_launch.numbers import numbered
from gms_launch.process import listener, places
from gms_launch.run import model as models
from gms_launch.run import outside, parts, placement, ports, topology
from gms_launch.run.fit import GIB
from gms_launch.run.nodedir import LOCAL_ROOT, must_be_writable, user_root, wanting
from gms_launch.run.plan import Layout
from gms_launch.run.rundir import home
from gms_launch.run.topology import Topology
from gms_launch.services import certificate, etcd
from gms_launch.services.base import NotReadyError, find_binary
from gms_launch.settings.declared import Settings


def main(settings: Settings, as_json: bool) -> None:
    checks = examine(settings)
    failed = [name for name, ok, _ in checks if not ok]
    if as_json:
        rows = [{"check": name, "ok": ok, "detail": detail} for name, ok, detail in checks]
        print(json.dumps({"schema": 1, "ok": not failed, "checks": rows}, indent=1))
    else:
        for name, ok, detail in checks:
            print(f"{'ok  ' if ok else 'FAIL'}  {name:<20} {detail}")
    if failed:
        raise LaunchError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


def named(check: str, mine: Layout) -> str:
    """A check, of a group where there are some."""
    return f"{mine.group}: {check}" if mine.group else check


def _whatever_the_place(settings: Settings) -> Layout:
    """The layout of this node, also where its place in the run cannot be told, as the check of it says."""
    try:
        return layout(settings)
    except LaunchError:
        return layout(settings, Topology(settings.node_rank, settings.serving_nodes, "", LOOPBACK, LOOPBACK))


def examine(settings: Settings) -> list[tuple[str, bool, str]]:
    """Every check as (name, passed, detail). None of them starts or changes anything that stays."""
    python = settings.python or sys.executable
    checks: list[tuple[str, bool, str]] = []

    def check(name: str, look: Callable[[], str]) -> None:
        try:
            checks.append((name, True, look()))
        except (LaunchError, NotReadyError, OSError) as exc:
            same = next((other for other, ok, detail in checks if not ok and detail == str(exc)), "")
            checks.append((name, False, f"not looked at, for what {same} says" if same else str(exc)))

    def interpreter() -> str:
        if why := installed.unusable(settings.python):
            raise LaunchError(f"--python {why}")
        return python

    def modules(*names: str) -> str:
        if missing := installed.look(settings.python, names).missing:
            raise LaunchError(f"{python} cannot import {', '.join(missing)}")
        return f"{python} has {', '.join(names)}"

    def where() -> str:
        found = whole
        parts.check(found)
        gpus_here, rank = len(found.devices()), found.home.node_rank
        here = [p for p in parts.placed(found) if rank in p.nodes]
        said = (f"{p.group.name} on {placement.span(p.gpus)} of {gpus_here}" for p in here)
        return ", ".join(said) or f"none on node {rank}"

    def engine(mine: Layout) -> str:
        if problems := mine.engine.problems(mine.settings):
            raise LaunchError(problems[0])
        return mine.engine.describe(mine.settings)

    def model(mine: Layout) -> str:
        models.check(mine.settings)
        if mine.gms_memory == "host":
            models.check_memory(mine.settings)
        return mine.settings.model

    def gms_devices(mine: Layout) -> str:
        found = mine
        kind, devices = found.gms_kind, found.devices()
        if not devices:
            raise LaunchError(gpus.none_visible())
        names = ", ".join(f"{d.uuid} {d.memory >> 20} MiB" for d in devices)
        return f"{kind} server, {found.gms_memory} memory: {names}"

    def driver() -> str:
        if found := gpus.problem():
            return f"none ({found}); engines that need no GPU run all the same"
        return "; ".join(
            f"{g.name} {g.uuid}, {g.used >> 20} of {g.total >> 20} MiB used, mode {g.mode}"
            + (f", held by {', '.join(str(pid) for pid, _ in g.processes)}" if g.processes else "")
            for g in gpus.look()
        )

    def same_gpu() -> str:
        code = (
            "import sys\nsys.path[:] = filter(None, sys.path)\nfrom gms_launch.gms.backends import cuda\ncuda.init()\n"
            "print(*[cuda.device_uuid(k) for k in range(int(sys.argv[1]))])"
        )
        wanted = [d.uuid for d in layout(settings).devices()]
        done = subprocess.run(
            [python, "-c", code, str(len(wanted))],
            capture_output=True,
            text=True,
            env=os.environ | CUDA_ORDER,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise LaunchError(f"CUDA does not start: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        seen = done.stdout.split()
        if [s.partition("-")[2] for s in seen] != [w.partition("-")[2] for w in wanted]:
            raise LaunchError(
                f"CUDA numbers the GPUs {seen}, NVML {wanted}: sockets would name others than engines use"
            )
        return f"CUDA and NVML agree on {numbered(len(wanted), 'GPU')}"

    def room(mine: Layout) -> str:
        found = memory(mine.settings)
        if found is None or found.problem:
            raise LaunchError(found.problem if found else gpus.none_visible())
        return (
            f"{found.most / GIB:.1f} of {found.total / GIB:.1f} GiB when all engines are there (`plan` has the table)"
        )

    def place() -> str:
        found = topology.discover(settings)
        if found.node_rank >= found.nnodes:
            return f"node {found.node_rank}, a spare, leader {found.leader_address}"
        return f"node {found.node_rank} of {found.nnodes}, leader {found.leader_address}"

    def fixed_ports() -> str:
        address = topology.discover(settings).address  # this node's own: nobody can bind another's
        topology.must_be_ours(settings.frontend_host, "--frontend-host")
        found = ports.layout(settings, lambda p: ports.is_free(address, p))
        return f"frontend {found.frontend}, etcd {found.etcd}, nats {found.nats}"

    def shared() -> str:
        places.check(home(), "GMS_LAUNCH_HOME")
        must_be_writable(home(), "GMS_LAUNCH_HOME")
        places.check(layout(settings).cache_dir, "--cache-dir", private=True)
        home().mkdir(parents=True, exist_ok=True)
        if not os.access(home(), os.W_OK):
            raise LaunchError(f"{home()} is not writable; set GMS_LAUNCH_HOME")
        return f"{home()}, {shutil.disk_usage(home()).free >> 30} GiB free"

    def local() -> str:
        user_root()
        free = shutil.disk_usage(LOCAL_ROOT).free
        if why := wanting(layout(settings).local_room):
            raise LaunchError(why)
        layout(settings).node_dir.check()
        layout(settings).node_dir.usable()
        return f"{user_root()}, {free >> 20} MiB free"

    def in_flight() -> str:
        if not settings.migration_limit:
            return "end with their engine (migration_limit 0)"
        if why := listener.refused():
            return f"{why}: a dead engine's port is bound instead, and requests of that moment may be lost"
        return f"move to the next engine, at most {numbered(settings.migration_limit, 'time')}"

    def proxy() -> str:
        return layout(settings).front.described()

    def certified() -> str:
        certificate.check(settings.tls_cert, settings.tls_key)
        return f"{settings.tls_cert}, with its key {settings.tls_key}"

    def several() -> str:
        (service,) = layout(settings).store.near_services()
        return f"{service.command.argv[0]}, which leads Dynamo's processes to a member of etcd that lives"

    def own_etcd() -> str:
        found = outside.pem(settings)
        assert found is not None
        etcd.probe(Access(outside.endpoints(settings), found.ca, found.cert, found.key))
        return f"{settings.etcd_endpoints} answers"

    def own_nats() -> str:
        outside.check(settings)
        return outside.ask_nats(settings)

    check("topology", place)
    whole = _whatever_the_place(settings)
    own = [whole]
    if settings.grouped:
        check("groups", where)
        try:
            own = list(parts.with_groups(whole, lambda _: True).groups)
        except LaunchError:
            own = []  # they do not fit, as was just said
    check("python", interpreter)
    for mine in own:
        check(named("model", mine), partial(model, mine))
        check(named("engine", mine), partial(engine, mine))
    check("frontend", lambda: modules("dynamo.frontend"))
    check("requests in flight", in_flight)
    check("driver", driver)
    fine = True
    for mine in own:
        check(named("gms", mine), partial(gms_devices, mine))
        fine = fine and checks[-1][1]
    if fine and whole.gms_memory == "cuda":
        check("gpu identity", same_gpu)
        for mine in own:
            if mine.settings.engine == "vllm":
                check(named("gpu memory", mine), partial(room, mine))
    if settings.etcd_endpoints:
        check("etcd", own_etcd)
    else:
        check("etcd", lambda: find_binary("etcd_bin", settings.etcd_bin, "etcd", "etcd-server"))
    if settings.nats_server:
        check("nats", own_nats)
    elif settings.nats:
        check("nats", lambda: find_binary("nats_bin", settings.nats_bin, "nats-server", "nats-server"))
    if settings.api_key_file:
        check("proxy", proxy)
    if settings.tls_cert:
        check("certificate", certified)
    check("ports", fixed_ports)
    check("run directory", shared)
    check("node-local directory", local)
    if not settings.etcd_endpoints and settings.members(settings.serving_nodes) > 1:
        check("haproxy", several)
    check("etcd3", lambda: f"etcd3 {metadata.version('etcd3')}, protobuf {metadata.version('protobuf')}")
    return checks
