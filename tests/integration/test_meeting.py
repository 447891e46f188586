"""Strangers at the port where the reference engine's ranks meet: they do not get in, and keep nobody out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from gms_launch.engines.reference import meeting
from gms_launch.engines.reference.args import EngineConfig
from gms_launch.engines.reference.group import Leader, Peer
from gms_launch.engines.reference.leader import _listen
from gms_launch.engines.reference.meeting import Handshake

SECRET = os.urandom(32)
WORKER = """
import sys
from gms_launch.engines.reference.group import serve_worker
port, rank, secret = int(sys.argv[1]), int(sys.argv[2]), bytes.fromhex(sys.stdin.readline())
print("running", flush=True)
serve_worker("127.0.0.1", port, rank, secret, lambda message: {"rank": rank, **message})
"""


class Worker:
    """A real worker's end in a process of its own."""

    def __init__(self, port: int, rank: int, secret: bytes = SECRET) -> None:
        argv = [sys.executable, "-c", WORKER, str(port), str(rank)]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(secret.hex() + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "running\n"

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def descriptors() -> Iterator[None]:
    """As many as an agent gives its engines: both ends of the strangers' connections are in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_strangers_do_not_keep_the_ranks_from_meeting(descriptors: None) -> None:
    async def scene() -> None:
        leader = Leader(2, SECRET)
        port = await leader.listen("127.0.0.1", 0)
        with contextlib.ExitStack() as strangers:
            for k in range(500):
                _, line = await asyncio.open_connection("127.0.0.1", port)
                strangers.callback(line.transport.abort)
                if k % 3 == 1:
                    line.write(b"POST / HTTP/1.1\r\ncontent-length: 4294967295\r\n\r\n")
                elif k % 3 == 2:
                    line.write(Handshake(b"a guess").call())
            with Worker(port, 0), Worker(port, 1), Worker(port, 1, b"a guess"):
                await asyncio.wait_for(leader.everybody(), 60)
                found = await asyncio.wait_for(leader.all(op="x"), 60)
        assert [f["rank"] for f in found] == [0, 1]

    asyncio.run(scene())


def test_a_second_rank_of_a_number_and_a_copy_of_what_was_said_are_refused() -> None:
    async def scene() -> None:
        leader = Leader(1, SECRET)
        port = await leader.listen("127.0.0.1", 0)
        heard: list[bytes] = []

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            """A wire that somebody listens to: all that the worker says is kept."""
            back, forth = await asyncio.open_connection("127.0.0.1", port)

            async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, keep: bool) -> None:
                while data := await source.read(4096):
                    if keep:
                        heard.append(data)
                    sink.write(data)

            await asyncio.gather(pump(reader, forth, True), pump(back, writer, False))

        wire = await asyncio.start_server(relay, "127.0.0.1", 0)
        with Worker(wire.sockets[0].getsockname()[1], 0):
            await asyncio.wait_for(leader.everybody(), 60)
            assert await asyncio.wait_for(leader.all(op="x"), 60) == [{"rank": 0, "op": "x"}]
            assert SECRET not in b"".join(heard)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"".join(heard))
            assert len(await reader.read()) <= meeting.ANSWER, "nothing but a new number, and the end"
            with Worker(port, 0):
                for _ in range(20):
                    assert await asyncio.wait_for(leader.all(op="y"), 60) == [{"rank": 0, "op": "y"}]
        wire.close()

    asyncio.run(scene())


def test_another_nodes_leader_rank_has_the_workers_asked_by_the_first_and_steps_wait_for_all() -> None:
    async def scene() -> None:
        leader, peer, stranger = Leader(2, SECRET, peers=2), Peer(3, SECRET), Peer(2, b"a guess")
        port = await leader.listen("127.0.0.1", 0)
        with Worker(port, 0), Worker(port, 1):
            await asyncio.wait_for(peer.join("127.0.0.1", port), 60)
            await asyncio.wait_for(peer.everybody(), 60)
            assert await asyncio.wait_for(peer.some(range(1, 2), op="load"), 60) == [{"rank": 1, "op": "load"}]
            await leader.some(range(1), op="wake")
            steps = [asyncio.ensure_future(one.some(range(2), op="steps")) for one in (leader, peer)]
            assert not (await asyncio.wait(steps, timeout=0.2))[0], "one of the workers sleeps"
            await peer.some(range(1, 2), op="wake")
            both = [{"rank": 0, "op": "steps"}, {"rank": 1, "op": "steps"}]
            assert await asyncio.wait_for(asyncio.gather(*steps), 60) == [both, both]
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(stranger.join("127.0.0.1", port), 0.5)

    asyncio.run(scene())


def test_a_worker_does_not_believe_who_squats_its_leaders_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        port = squatter.getsockname()[1]
        with Worker(port, 0):
            squatter.settimeout(60)
            for _ in range(2):  # it comes again, and each time leaves
                line, _ = squatter.accept()
                with line:
                    line.settimeout(60)
                    assert len(line.recv(4096)) == meeting.CALL
                    line.sendall(bytes(meeting.ANSWER))
                    assert line.recv(4096) == b"", "it has said nothing that is worth anything"


def test_on_one_node_another_port_does_where_somebody_has_the_one_of_the_command_line() -> None:
    """He can read it there before it is bound; the workers of other nodes have nothing else to go by."""

    def config(port: int, several: bool) -> EngineConfig:
        return cast(EngineConfig, SimpleNamespace(master_port=port, several_nodes=several))

    async def scene() -> None:
        with socket.create_server(("127.0.0.1", 0)) as squatter:
            taken = squatter.getsockname()[1]
            leader = Leader(1, SECRET)
            port = await _listen(leader, "127.0.0.1", config(taken, False))
            assert port != taken
            with Worker(port, 0):
                await asyncio.wait_for(leader.everybody(), 60)
            with pytest.raises(OSError, match="in use"):
                await _listen(Leader(1, SECRET), "127.0.0.1", config(taken, True))
        assert await _listen(Leader(1, SECRET), "127.0.0.1", config(taken, True)) == taken

    asyncio.run(scene())
