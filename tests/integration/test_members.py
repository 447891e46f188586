"""A run whose etcd has three members: what the loss of one costs those who are not on its node."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gms_launch.control import cluster
from gms_launch.control.client import Etcd
from gms_launch.errors import NoContactError
from gms_launch.process import proc
from tests.integration.test_groups import Grouped
from tests.load import Load
from tests.support import LONG, PATIENCE, complete, etcdctl, eventually, free_port, kill

NAMES = ("g0", "g1", "g2")


class Three(Grouped):
    """A group on each of three nodes, and a member of etcd too."""

    nodes = 3
    said = ""

    def up(self) -> subprocess.CompletedProcess[str]:
        """The first node's, whose words `said` are."""
        done = super().up()
        self.said = done.stdout
        return done

    def services(self, node_rank: int) -> dict[str, dict[str, Any]]:
        node = next((n for n in self.status()["nodes"] if n["node_rank"] == node_rank), {"services": []})
        return {s["name"]: s for s in node["services"]}

    def missing(self) -> list[int]:
        """The nodes without a record, asked of the members that are left."""
        one = Etcd(self.access, brisk=True)
        try:
            keys = {n: f"/gms-launch/{self.run}/nodes/{n}" for n in range(self.nodes)}
            return [n for n, key in keys.items() if one.get(key, retry=PATIENCE) is None]
        finally:
            one.close()

    def leads(self) -> int:
        """The node whose member leads etcd."""

        def look() -> list[int]:
            access = self.access
            found = []
            for number, url in enumerate(self.run_file["etcd_endpoints"]):
                one = Etcd(type(access)((url,), access.ca, access.cert, access.key), timeout=0.5)
                try:
                    found += [number] if cluster.standing(one).leads else []
                except NoContactError:
                    pass
                finally:
                    one.close()
            return found

        return int(eventually(look, LONG, "etcd has a leader")[0])

    def led_by_another(self) -> int:
        """See that etcd is not led by the first node's member; returns whose it is."""

        def moved() -> int:
            if (leads := self.leads()) == 0:
                etcdctl(self.access, "move-leader", f"{self.members()[f'{self.run}-1'].id:x}")
            return leads

        return eventually(moved, LONG, "another leads")

    def members(self) -> dict[str, cluster.Member]:
        one = Etcd(self.access, brisk=True)
        try:
            return {m.name: m for m in cluster.members(one, retry=PATIENCE)}
        finally:
            one.close()

    def standing(self, *names: str) -> dict[str, list[tuple[int, int, int]]]:
        return {name: self.lives(name) for name in names}


@pytest.fixture
def three(tmp_path: Path, model: Path) -> Iterator[Three]:
    ports = ["--frontend-port", str(free_port())]
    flags = ("--virtual-gpus", "1", "--groups", "3", "--etcd-members", "auto", "--node-wait", "200", *ports)
    with Three(tmp_path, model, *flags) as run:
        yield run


def test_a_member_that_dies_or_freezes_costs_nobody_anything(three: Three) -> None:
    run = three
    run.full(*NAMES)
    assert len(run.run_file["etcd_endpoints"]) == 3
    eventually(lambda: not any(m.learner for m in run.members().values()), what="all have a vote")
    before, lives = run.members(), run.standing(*NAMES)
    front = run.services(0)["frontend"]["pid"]
    with Load(run.run_file["frontend_url"], streams=4, unary=2, tokens=30) as load:
        for how in (signal.SIGKILL, signal.SIGSTOP):
            load.wait_busy(1.0)
            victim = run.leads()
            service = run.services(victim)["etcd"]
            kill(service["pid"], how)

            def again(victim: int = victim, starts: int = service["starts"]) -> bool:
                found = run.services(victim).get("etcd", {})
                return found.get("starts", 0) > starts and found["state"] == "ready"

            eventually(again, LONG, f"node {victim}'s member is back after {how.name}")
            load.wait_busy(1.0)
        for how in (signal.SIGKILL, signal.SIGSTOP):  # what leads the frontend and an engine to a member
            service = run.services(0)["etcd-proxy"]
            kill(service["pid"], how)
            started = lambda starts=service["starts"]: run.services(0)["etcd-proxy"]["starts"] > starts  # noqa: E731
            eventually(started, LONG, f"node 0's proxy is back after {how.name}")
            load.wait_busy(1.0)
    assert load.lost == [] and load.wrong == [], load.said()
    assert run.members() == before, "on its data it is the same member"
    assert run.standing(*NAMES) == lives and run.services(0)["frontend"]["pid"] == front
    told = eventually(lambda: found if len(found := run.events("service_exited")) >= 4 else [], what="all is told")
    assert {e["detail"].split()[0] for e in told} == {"etcd", "etcd-proxy"}, told


def test_a_node_with_the_leader_of_etcd_is_lost_and_comes_back_empty(three: Three) -> None:
    run = three
    run.full(*NAMES)
    lost = run.led_by_another()
    group, others = f"g{lost}", [n for n in NAMES if n != f"g{lost}"]
    before, lives = run.members(), run.standing(*others)
    front = run.services(0)["frontend"]["pid"]
    kill(run.agent_of(lost))
    eventually(lambda: run.status()["missing_nodes"] == [lost], LONG, "its lease is over")
    eventually(lambda: run.groups()[group]["redundancy"] != "full", LONG)
    assert run.standing(*others) == lives, "engines elsewhere were not touched"
    eventually(run.text, LONG, "and serve, once nothing is sent to those that are lost any more")
    assert run.node(lost).returncode == 0
    run.full(*NAMES)
    eventually(lambda: not any(m.learner for m in run.members().values()), LONG, "all have a vote")
    after = run.members()
    name = f"{run.run}-{lost}"
    assert set(after) == set(before)
    assert after[name].id != before[name].id, "its place was given up, and it took a new one"
    assert {n: m.id for n, m in after.items() if n != name} == {n: m.id for n, m in before.items() if n != name}
    assert run.standing(*others) == lives and run.services(0)["frontend"]["pid"] == front
    # Its vote counts: without another member the two that are left decide.
    third = next(n for n in (1, 2) if n != lost)
    kill(run.services(third)["etcd"]["pid"], signal.SIGSTOP)
    assert run.cli("kill-primary", "--group", "g0").returncode == 0
    run.full(*NAMES)


def test_nothing_is_left_of_three_members(three: Three) -> None:
    """The leader of etcd leaves beside another, who needs one for its own leave and for its last word."""
    run = three
    run.full(*NAMES)
    run.led_by_another()
    pids = [run.services(n)["etcd"]["pid"] for n in range(3)]
    identities = [who for pid in pids if (who := proc.identity(pid)) is not None]
    assert len(identities) == 3
    done = run.cli("down")
    assert done.returncode == 0 and done.stdout.count("nothing of it is alive") == 3, done.stdout
    assert not any(map(proc.alive, identities))
    ended = json.loads((run.home / run.run / "run.json").read_text())
    assert ended["exit_code"] == 0 and len(ended["nodes"]) == 3


@pytest.mark.slow
def test_a_run_that_has_lost_a_member_ends_without_waiting_for_it(three: Three) -> None:
    """Of two that are left neither can decide alone: the one that ends first must have said its last word by then."""
    run = three
    run.full(*NAMES)
    run.led_by_another()
    kill(run.agent_of(2))
    eventually(lambda: run.status()["missing_nodes"] == [2], LONG, "its lease is over")
    begun = time.monotonic()
    done = run.cli("down")
    print(f"down after {time.monotonic() - begun:.1f} s")
    assert done.returncode == 0, done.stdout + done.stderr
    ended = {n["node_rank"]: n for n in json.loads((run.home / run.run / "run.json").read_text())["nodes"]}
    assert ended[1]["clean"] and ended[1]["by_agent"], "the other one's word was heard"


@pytest.mark.slow
def test_without_the_first_node_another_leads_and_the_others_stay(tmp_path: Path, model: Path) -> None:
    ports = ["--frontend-port", str(free_port())]
    flags = ("--virtual-gpus", "1", "--groups", "3", "--etcd-members", "3", "--node-wait", "20", *ports)
    flags += ("--dynamo-lease-ttl", "5")
    with Three(tmp_path, model, *flags) as run:
        run.full(*NAMES)
        others = [who for n in ("g1", "g2") for _, _, pid in run.lives(n) if (who := proc.identity(pid)) is not None]
        assert len(others) == 4
        agents = [who for n in (1, 2) if (who := proc.identity(run.agent_of(n))) is not None]
        proxies = {n: run.services(n)["etcd-proxy"]["starts"] for n in (1, 2)}
        kill(run.agent_of(0))
        gone = time.monotonic()
        eventually(lambda: run.missing() == [0], LONG, "its lease is over")
        eventually(lambda: run.run_file["leader_rank"] == 1, LONG, "the next one leads")
        while time.monotonic() < gone + 25:  # and longer than node_wait
            assert all(map(proc.alive, [*others, *agents])), "neither their leases nor their agents' are lost"
            time.sleep(0.2)
        assert run.run_file["ended"] is None
        assert {n: run.services(n)["etcd-proxy"]["starts"] for n in (1, 2)} == proxies, "nor led elsewhere"
        assert len(run.run_file["etcd_endpoints"]) == 3


def asked(url: str, prompt: str = "hello", timeout: float = 60.0) -> str | None:
    """A completion by one of several ways in; None when that one has none."""
    host, port = url.removeprefix("http://").split(":")
    return complete(host, int(port), prompt, 8, timeout)


def refused(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as tried:
        return tried.connect_ex((host, int(port))) == errno.ECONNREFUSED


@pytest.fixture
def fronts(tmp_path: Path, model: Path) -> Iterator[Three]:
    flags = ("--virtual-gpus", "1", "--groups", "3", "--etcd-members", "3", "--frontends", "auto", "--node-wait", "200")
    with Three(tmp_path, model, *flags) as run:
        run.full(*NAMES)
        eventually(lambda: len(run.run_file["frontend_urls"]) == 3, LONG, "all are in run.json")
        yield run


def test_each_of_several_frontends_serves_and_a_client_of_two_has_one_that_answers(fronts: Three) -> None:
    run = fronts
    urls = run.run_file["frontend_urls"]
    assert len(set(urls)) == 3 and urls[0] == run.run_file["frontend_url"]
    eventually(lambda: run.status()["frontend_urls"] == urls)
    assert all(url in run.cli("status").stdout for url in urls)
    ready = next(line for line in run.said.splitlines() if "ready: http" in line)
    assert all(f"{url}/v1/completions (only on " in ready for url in urls), ready
    text = run.text()
    for url in urls:
        eventually(lambda url=url: asked(url) == text, LONG, url)  # type: ignore[misc]
    lives = run.standing(*NAMES)
    for victim in (0, 2):
        service = run.services(victim)["frontend"]
        kill(service["pid"])
        for _ in range(10):
            assert text in (asked(urls[victim]), asked(urls[1])), "one of two answers"

        def again(victim: int = victim, starts: int = service["starts"]) -> bool:
            return run.services(victim)["frontend"]["starts"] > starts and asked(urls[victim]) == text

        eventually(again, LONG, "it is back")
    assert run.standing(*NAMES) == lives
    # A failover is seen by all of them.
    assert run.cli("kill-primary", "--group", "g1").returncode == 0
    run.full(*NAMES)
    for url in urls:
        for _ in range(4):
            assert asked(url) == text


def example(word: str, urls: list[str], port: int) -> str:
    """The guide's configuration of a load balancer in which `word` is, with these addresses."""
    page = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    text = next(block for block in page.split("```text\n")[1:] if word in block.partition("```")[0]).partition("```")[0]
    for number, url in enumerate(urls, 1):
        assert f"10.0.0.{number}:8000" in text
        text = text.replace(f"10.0.0.{number}:8000", url.removeprefix("http://"))
    return text.replace("0.0.0.0:9000", f"127.0.0.1:{port}")


@pytest.mark.slow
def test_load_balancers_before_several_frontends_as_the_guide_has_them(fronts: Three, tmp_path: Path) -> None:
    run = fronts
    urls, text = run.run_file["frontend_urls"], run.text()
    ports = {"haproxy": free_port(), "nginx": free_port()}
    (tmp_path / "haproxy.cfg").write_text(example("backend frontends", urls, ports["haproxy"]))
    own = f"pid {tmp_path}/nginx.pid;\nerror_log stderr;\n"  # where Debian's would write
    logless = example("upstream frontends", urls, ports["nginx"]).replace("http {", "http {\n  access_log off;", 1)
    (tmp_path / "nginx.conf").write_text(own + logless)
    argvs = (
        ["haproxy", "-db", "-f", str(tmp_path / "haproxy.cfg")],
        ["nginx", "-g", "daemon off;", "-c", str(tmp_path / "nginx.conf")],
    )
    path = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    running = [subprocess.Popen(argv, env=path) for argv in argvs]
    try:
        for port in ports.values():
            eventually(lambda port=port: asked(f"http://127.0.0.1:{port}") == text, LONG)  # type: ignore[misc]
        for victim in range(3):
            before = run.services(victim)["frontend"]
            kill(before["pid"])
            # What comes while the kernel ends it breaks with it: its port is open for some milliseconds more.
            eventually(lambda victim=victim: refused(urls[victim]), what="nobody listens there")  # type: ignore[misc]
            for _ in range(6):
                assert asked(f"http://127.0.0.1:{ports['haproxy']}", timeout=60.0) == text, "another one answers"
            for _ in range(6):  # it may ask one that is up again and knows no model yet, as the guide says
                through = f"http://127.0.0.1:{ports['nginx']}"
                eventually(lambda through=through: asked(through, timeout=60.0) == text, LONG)  # type: ignore[misc]

            def again(victim: int = victim, starts: int = before["starts"]) -> bool:
                return run.services(victim)["frontend"]["starts"] > starts and asked(urls[victim]) == text

            eventually(again, LONG, "it is back")
    finally:
        for process in running:
            process.terminate()
            process.wait()


def test_only_the_first_node_is_told_of_nats(three: Three) -> None:
    run = three
    run.full(*NAMES)
    assert run.services(0)["nats"]["state"] == "ready"
    for name in ("g1", "g2"):
        for _, _, pid in run.lives(name):
            names = {pair.partition("=")[0] for pair in proc_environ(pid)}
            assert "ETCD_ENDPOINTS" in names and not any(n.startswith("NATS") for n in names), names


def proc_environ(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")
