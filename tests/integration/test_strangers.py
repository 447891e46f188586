"""What another user of the leader's node can do to a run by the ports on loopback, and what becomes of it.

Each number of the security review and the tests in which its attack is made and fails:

1, 9  sweep as root: test_other_users.py
2  etcd's peer port: here
3  the race at its start: test_control.py (`test_nobody_makes_himself_root_in_etcds_first_moments`,
   `test_a_store_that_knows_somebody_already_is_not_taken`)
4  calls that ask for no login: test_control.py (`test_who_has_no_certificate_of_the_run_is_not_heard`)
5  the engines' system ports: here
6  the ranks' meeting: test_meeting.py; a request sent again: here; ports that others reach: slurm/test_on_the_wire.py
7  what is in clear on the network: slurm/test_on_the_wire.py
8  Python's working directory: test_working_directory.py
10, 11, 14  directories and names: test_other_users.py
12  logins on command lines and in plans: test_secrets.py
13, 15  HTTPS, keys, thresholds: test_front.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gms_launch.run.ports import INCARNATION_STEPS
from tests import documents
from tests.support import LONG, Deployment, eventually, kill, stopped

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root"),
]
STRANGER = 64111
DROP = ("setpriv", "--reuid", str(STRANGER), "--regid", str(STRANGER), "--clear-groups")


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path / "home", model, "--health-interval", "0.5") as deployment:
        yield deployment


def ask(run: Deployment, cohort_id: int, route: str) -> subprocess.Popen[bytes]:
    """Another user posts to a route of an engine's system port, and waits for the answer for as long as it takes."""
    port = run.run_file["ports"]["system"][cohort_id]
    code = (
        "import os, urllib.request as r; assert os.getuid() == " + str(STRANGER) + "; "
        f"r.urlopen(r.Request('http://127.0.0.1:{port}/engine/control/{route}', b'{{}}', "
        "{'content-type': 'application/json'}))"
    )
    # The interpreter of a virtual environment may be where that user cannot look.
    return subprocess.Popen([*DROP, "/usr/bin/python3", "-c", code], cwd="/", stderr=subprocess.DEVNULL)


def test_another_user_gets_no_word_in_at_etcds_ports(run: Deployment) -> None:
    """One raft message to the peer port would make him etcd's root; nobody hears it without a certificate."""
    for name in ("etcd_peer", "etcd"):
        port = run.run_file["ports"][name]
        code = (
            "import os, socket, ssl; assert os.getuid() == " + str(STRANGER) + "; "
            f"s = socket.create_connection(('127.0.0.1', {port}), 20); s.settimeout(20); "
            "s = ssl._create_unverified_context().wrap_socket(s); "
            "s.sendall(b'POST /raft HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'); print('answer', s.recv(99))"
        )
        done = subprocess.run(
            [*DROP, "/usr/bin/python3", "-c", code], cwd="/", capture_output=True, text=True, check=False
        )
        assert (
            "certificate required" in done.stderr or "bad certificate" in done.stderr or "answer b''" in done.stdout
        ), name + done.stdout + done.stderr
    assert run.text()


def hung(run: Deployment) -> list[tuple[int, str]]:
    return [(e["cohort_id"], e["detail"]) for e in run.events("hung")]


def test_a_shadow_that_a_stranger_wakes_is_killed_before_it_is_needed(run: Deployment) -> None:
    before, primary = run.text(), run.status()["primary"]
    shadow, serving = 1 - primary, run.cohort(primary)["ranks"][0]["pid"]
    stranger = ask(run, shadow, "wake_up")
    try:
        eventually(lambda: hung(run), what="it is noticed")
        (who, why), *_ = hung(run)
        assert who == shadow and "woken before its turn" in why
        eventually(lambda: run.cohort(shadow)["incarnation"] == 2, what="another is started")
        found = run.wait_full()
        assert found["primary"] == primary and run.cohort(primary)["ranks"][0]["pid"] == serving
        assert run.text() == before
        assert run.cli("kill-primary").returncode == 0, "and that one takes over"
        assert run.wait_full()["primary"] == shadow and run.text() == before
    finally:
        stranger.kill()
        stranger.wait()


def test_a_primary_that_a_stranger_puts_to_sleep_is_failed_over(run: Deployment) -> None:
    before, primary = run.text(), run.status()["primary"]
    stranger = ask(run, primary, "sleep")
    try:
        eventually(lambda: hung(run), what="it is noticed")
        (who, why), *_ = hung(run)
        assert who == primary and "has not been registered with Dynamo" in why
        assert eventually(run.text) == before
        assert run.wait_full()["primary"] == 1 - primary
    finally:
        stranger.kill()
        stranger.wait()


SQUATTER = """
import os, socket, sys, time
assert os.getuid() == {uid}
while True:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", {port}))
        break
    except OSError:
        listener.close()
        time.sleep(0.001)
listener.listen(64)
print("there", flush=True)
while True:
    connection, _ = listener.accept()
    print("asked", connection.recv(99), flush=True)
    connection.sendall(b"HTTP/1.1 200 OK\\r\\ncontent-length: 2\\r\\n\\r\\n{{}}")
    connection.close()
"""


def test_a_stranger_who_takes_a_dead_engines_system_port_is_asked_nothing(run: Deployment) -> None:
    """His answers would be taken for the next life's: he could have it killed, or hide that it hangs."""
    before, found = run.text(), run.status()
    shadow = 1 - found["primary"]
    port, victim = run.run_file["ports"]["system"][shadow], run.cohort(shadow)["ranks"][0]
    code = SQUATTER.format(uid=STRANGER, port=port)
    stranger = subprocess.Popen([*DROP, "/usr/bin/python3", "-c", code], cwd="/", stdout=subprocess.PIPE, text=True)
    assert stranger.stdout is not None
    try:
        with stopped(run.agent.pid):  # so that nobody is quicker than he
            os.killpg(victim["pgid"], signal.SIGKILL)
            assert stranger.stdout.readline() == "there\n"
        told, *_ = eventually(lambda: run.events("port_taken"))
        assert told["cohort_id"] == shadow and f"system port {port} is in use" in told["detail"]
        eventually(lambda: run.cohort(shadow)["incarnation"] == 2)
        assert run.wait_full()["primary"] == found["primary"]
        environ = Path(f"/proc/{run.cohort(shadow)['ranks'][0]['pid']}/environ").read_bytes().split(b"\0")
        (given,) = [int(e.partition(b"=")[2]) for e in environ if e.startswith(b"DYN_SYSTEM_PORT=")]
        assert given != port
        with urllib.request.urlopen(f"http://127.0.0.1:{given}/health", timeout=60) as answer:
            assert answer.status == 200, "the new life can be asked"
        assert run.cli("kill-primary").returncode == 0, "and it takes over"
        assert run.wait_full()["primary"] == shadow and run.text() == before
        assert not hung(run)
    finally:
        stranger.kill()
        rest, _ = stranger.communicate()
    assert "asked" not in rest


#: Listens on each of the ports, also on those that get free later.
ALL_OF_THEM = """
import os, socket, sys, time
assert os.getuid() == {uid}
wanted, held = set(range({first}, {first} + {count})), []
while True:
    for port in sorted(wanted):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            listener.close()
            continue
        listener.listen()
        held.append(listener)
        wanted.discard(port)
    if not wanted:
        print("there", flush=True)
        sys.stdin.read()
    time.sleep(0.001)
"""


def test_a_stranger_on_all_master_ports_of_a_slot_keeps_it_from_nothing(run: Deployment) -> None:
    """Every start of it would fail, until the slot is given up."""
    before, found = run.text(), run.wait_full()
    shadow = 1 - found["primary"]
    first, victim = run.run_file["ports"]["master_base"] + 100 * shadow, run.cohort(shadow)["ranks"][0]
    code = ALL_OF_THEM.format(uid=STRANGER, first=first, count=INCARNATION_STEPS)
    stranger = subprocess.Popen(
        [*DROP, "/usr/bin/python3", "-c", code], cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert stranger.stdout is not None
    try:
        with stopped(run.agent.pid):  # so that nobody is quicker than he
            os.killpg(victim["pgid"], signal.SIGKILL)
            assert stranger.stdout.readline() == "there\n"
        told, *_ = run.happened("port_taken")
        assert told["cohort_id"] == shadow and f"master ports {first} to" in told["detail"]
        again = run.wait_full()
        assert again["primary"] == found["primary"] and run.cohort(shadow)["incarnation"] == 2
        assert run.text() == before
    finally:
        stranger.kill()
        stranger.communicate()


@pytest.fixture
def brisk(tmp_path: Path, model: Path) -> Iterator[Deployment]:
    """One that soon takes an engine for hung."""
    soon = ("--canary-interval", "0.5", "--canary-timeout", "3", "--promotion-timeout", "5")
    with Deployment(tmp_path / "home", model, *soon) as deployment:
        yield deployment


@pytest.mark.slow
def test_a_stranger_who_takes_the_frontends_port_has_no_engine_taken_for_hung(brisk: Deployment) -> None:
    """He gives no tokens. Nobody but the frontend is asked for one, and that it is away is not the engines' fault."""
    before, first = brisk.text(), brisk.wait_full()
    port = brisk.run_file["ports"]["frontend"]
    (frontend,) = [s for s in first["nodes"][0]["services"] if s["name"] == "frontend"]
    code = SQUATTER.format(uid=STRANGER, port=port)
    stranger = subprocess.Popen([*DROP, "/usr/bin/python3", "-c", code], cwd="/", stdout=subprocess.PIPE, text=True)
    assert stranger.stdout is not None

    def starts() -> int:
        (found,) = [s for s in brisk.status()["nodes"][0]["services"] if s["name"] == "frontend"]
        return int(found["starts"])

    try:
        with stopped(brisk.agent.pid):  # so that nobody is quicker than he
            os.kill(frontend["pid"], signal.SIGKILL)
            assert stranger.stdout.readline() == "there\n"
        # The pauses between these take longer than an engine is given to bring a token.
        eventually(lambda: starts() >= 6, LONG, "it is tried again and again")
        assert not hung(brisk) and brisk.status()["primary"] == first["primary"]
        assert f"a process of uid {STRANGER} listens on port {port}" in json.dumps(brisk.status())
        kill(brisk.cohort(first["primary"])["ranks"][0]["pid"])
        begun = starts()
        eventually(lambda: starts() >= begun + 2, LONG, "longer than a promotion may take")
        promoted = brisk.cohort(1 - first["primary"])
        assert promoted["phase"] == "active" and promoted["incarnation"] == 1
    finally:
        stranger.kill()
        rest, _ = stranger.communicate()
    assert "asked" not in rest
    assert eventually(brisk.text, LONG) == before
    found = brisk.wait_full()
    assert found["primary"] == 1 - first["primary"] and not hung(brisk)


def frames(port: int, act: Callable[[], object]) -> bytes:
    """What is sent to a port of the loopback while `act` runs: its TCP segments' data, as they came."""
    told = bytearray()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)) as wire:
        wire.bind(("lo", 0x0800))
        wire.setblocking(False)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        act()
        while True:
            try:
                packet, address = wire.recvfrom(1 << 17)
            except BlockingIOError:
                return bytes(told)
            if address[2] == socket.PACKET_OUTGOING:
                continue  # each is seen twice on lo
            ip = packet[14:]
            tcp = ip[(ip[0] & 15) * 4 : int.from_bytes(ip[2:4], "big")]
            if ip[9] == socket.IPPROTO_TCP and int.from_bytes(tcp[2:4], "big") == port:
                told += tcp[(tcp[12] >> 4) * 4 :]


def test_a_request_that_is_sent_again_changes_nothing_and_not_from_the_network(run: Deployment) -> None:
    """The request plane asks nobody for a login. It is on one address of the loopback, and an old request is answered
    to the frontend, which no longer waits for it."""
    before, primary = run.text(), run.status()["primary"]
    instance = run.cohort(primary)["ranks"][0]["pid"]
    (port,) = {
        int(found) for found in re.findall(r"127\.0\.0\.1:(\d+)/", run.etcdctl("get", "--prefix", "v1/instances/"))
    }
    told = frames(port, lambda: run.text("a prompt that nobody else uses"))
    assert told, "the request was seen on its way"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), 10)  # any address but that one is the network's as well
    code = (
        "import os, socket, sys; assert os.getuid() == " + str(STRANGER) + "; "
        f"s = socket.create_connection(('127.0.0.1', {port}), 20); s.sendall(sys.stdin.buffer.read()); "
        "s.shutdown(socket.SHUT_WR); s.settimeout(20); print(len(s.recv(1 << 16)))"
    )
    done = subprocess.run(
        [*DROP, "/usr/bin/python3", "-c", code], cwd="/", input=told, capture_output=True, check=False
    )
    assert done.stdout.strip(), f"taken, as docs/security.md says of other users of the node: {done.stderr!r}"
    assert run.text() == before
    found = run.wait_full()
    assert found["primary"] == primary and run.cohort(primary)["ranks"][0]["pid"] == instance
    assert not run.events("hung")


#: Listens as $1, and tells what comes of a connection to that by each of the others; then again with the rules of $0.
FILTERED = """
ip link set lo up
setpriv --reuid $1 --regid $1 --clear-groups /usr/bin/python3 -c "
import socket
with socket.create_server(('127.0.0.1', 7000)) as server:
    print('listens', flush=True)
    while True:
        with server.accept()[0] as connection:
            connection.sendall(b'in')
" | {
    read listens
    for rules in '' "$0"; do
        [ -z "$rules" ] || nft -f "$rules"
        for uid in "$@"; do
            setpriv --reuid $uid --regid $uid --clear-groups /usr/bin/python3 -c "
import socket
try:
    print('$uid', socket.create_connection(('127.0.0.1', 7000), 10).recv(2).decode())
except TimeoutError:
    print('$uid', 'out')
"
        done
    done
    kill 0
}
"""


@pytest.mark.skipif(shutil.which("nft") is None, reason="there is no nft here")
def test_the_filter_of_the_page_closes_a_users_loopback_to_others(tmp_path: Path) -> None:
    (rules,) = (b.text for b in documents.blocks() if "table inet" in b.text)
    file, owner = tmp_path / "rules", STRANGER + 1
    file.write_text(rules.replace("1000", str(owner)))
    done = subprocess.run(
        ["unshare", "-n", "-p", "-f", "--kill-child", "sh", "-c", FILTERED, file, str(owner), str(STRANGER), "0"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        timeout=300,
        start_new_session=True,
    )
    everybody = [f"{owner} in", f"{STRANGER} in", "0 in"]
    filtered = [f"{owner} in", f"{STRANGER} out", "0 in"]
    assert done.stdout.splitlines() == everybody + filtered, done.stdout + done.stderr
