"""`python -m gms_launch.gms --device N [--tag T]`: a GMS server for one device, with upstream's flags.

One process serves all tags of a device, which share its memory. `--memory cuda` owns a GPU's, by its index under
CUDA_VISIBLE_DEVICES; `--memory host` makes devices up, and with `--tag` in separate processes each has the whole size
to itself.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import resource
import signal
import sys
from pathlib import Path

from gms_launch.gms.backends import Memory
from gms_launch.gms.backends.host import HostMemory
from gms_launch.gms.devices import TAGS, device_uuid, socket_dir, socket_path
from gms_launch.gms.requests import Room
from gms_launch.gms.server import AlreadyRunningError, SocketServer
from gms_launch.gms.store import LayoutStore


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gms_launch.gms", description=__doc__)
    parser.add_argument("--device", type=int, required=True, help="index of the device")
    parser.add_argument(
        "--tag", action="append", help=f"serve this tag only; may be repeated (default: {', '.join(TAGS)})"
    )
    parser.add_argument("--socket-path", type=Path, help="socket of the one tag served (default: in GMS_SOCKET_DIR)")
    parser.add_argument("--socket-uuid", help="name the sockets by this UUID instead of the device's own")
    parser.add_argument("--memory", choices=["host", "cuda"], help="what kind of memory to own (default: host)")
    parser.add_argument("--device-type", choices=["cuda", "xpu"], help="upstream's word for --memory")
    parser.add_argument("--memory-mib", type=int, default=4096, help="size of the made-up device (MiB)")
    parser.add_argument("--alloc-retry-interval", type=float, default=0.5, help="seconds between attempts when full")
    parser.add_argument("--alloc-retry-timeout", type=float, default=60.0, help="seconds until an allocation fails")
    parser.add_argument("-v", "--verbose", action="store_true", help="log every session's end too")
    options = parser.parse_args(argv)
    if options.device_type == "xpu":
        parser.error("--device-type xpu: there is no XPU backend here; use upstream's server for it")
    if options.device_type and options.memory not in (None, options.device_type):
        parser.error(f"--device-type {options.device_type} and --memory {options.memory} contradict each other")
    options.memory = options.memory or options.device_type or "host"
    options.tag = options.tag or list(TAGS)
    if len(set(options.tag)) != len(options.tag):
        parser.error("--tag values must be unique")
    if options.socket_path and len(options.tag) != 1:
        parser.error("--socket-path needs exactly one --tag")
    if options.socket_path and options.socket_uuid:
        parser.error("--socket-path and --socket-uuid exclude each other")
    if options.device < 0:
        parser.error("--device counts from 0")
    if options.alloc_retry_interval <= 0 or options.alloc_retry_timeout <= 0:
        parser.error("retry times must be above 0")
    return options


def make_memory(options: argparse.Namespace, uuid: str) -> Memory:
    """The memory to own. Raises `CudaError`, also when CUDA's device is not the one that NVML calls `uuid`."""
    if options.memory == "host":
        return HostMemory(options.memory_mib * 1024 * 1024)
    from gms_launch.gms.backends.cuda import CudaError, CudaMemory

    memory = CudaMemory(options.device)
    if memory.uuid.partition("-")[2] != uuid.partition("-")[2]:
        raise CudaError(
            "cuDeviceGetUuid",
            "another device",
            f"device {options.device} is {memory.uuid} to CUDA and {uuid} to NVML; set CUDA_DEVICE_ORDER=PCI_BUS_ID",
        )
    return memory


def raise_descriptor_limit() -> None:
    """Allow this process as many descriptors as it may have: an allocation can take one for as long as it lives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as exc:
        logging.warning("the limit of %d descriptors stays: %s", soft, exc)


async def serve(options: argparse.Namespace) -> None:
    uuid = device_uuid(options.memory, options.device)
    memory, room = make_memory(options, uuid), Room()
    servers = []
    for tag in options.tag:
        path = options.socket_path or socket_path(socket_dir(), options.socket_uuid or uuid, tag)
        server = SocketServer(
            path, LayoutStore(memory), room, options.alloc_retry_interval, options.alloc_retry_timeout
        )
        server.bind()
        servers.append(server)
        mib = memory.total >> 20
        logging.info(
            "GMS tag %s of device %d (%s, %s, %d MiB): %s", tag, options.device, uuid, options.memory, mib, path
        )
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, stop.set)
    tasks = [loop.create_task(server.serve()) for server in servers]
    stopping = loop.create_task(stop.wait())
    try:
        # A socket that nobody serves any more must not look like a server that is merely slow.
        done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopping}:
            task.result()
            raise RuntimeError("a socket is not served any more")
    finally:
        for task, server in zip(tasks, servers, strict=True):
            task.cancel()
            server.close()


def main() -> None:
    options = parse(sys.argv[1:])
    logging.basicConfig(
        level=logging.DEBUG if options.verbose else logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    raise_descriptor_limit()
    try:
        asyncio.run(serve(options))
    except (AlreadyRunningError, OSError, LookupError) as exc:
        sys.exit(f"gms: {exc}")
    except Exception as exc:
        if options.memory == "cuda":
            sys.exit(f"gms: {type(exc).__name__}: {exc}")
        raise


if __name__ == "__main__":
    main()
