"""Import what an engine needs, wait to be told a life, and become its engine: the same process, as if started cold.

    python warm_child.py FD PADDING MODULE...

FD is one end of a socket; the agent has the other. This end says `r` when everything is imported and `h` when asked
whether it is there; then it gets the life as one JSON object (`argv`, `env`, `cwd`) with the descriptor of the life's
output, and runs the module that argv names, in this process. Nothing is forked: threads and locks that an import has
made would not survive that, and CUDA does not either.

PADDING is room for the engine's command line, which takes the place of this one, so that `ps` shows what runs; the tag
in the environment is replaced in the same way, since that is where the agent and its guard look for it.

Run by its path, by the engine's interpreter, which need not have gms-launch. Standard library only.
"""

import array
import ctypes
import importlib
import json
import os
import runpy
import socket
import sys
import tempfile
from typing import Any

TAG = b"GMS_LAUNCH_TAG="
#: Open in every process that has used CUDA, and in none that has only asked NVML.
UVM = "/dev/nvidia-uvm"


def main() -> None:
    line = socket.socket(fileno=int(sys.argv[1]))
    modules = sys.argv[3:]
    _show([sys.executable, *sys.argv[:2], *modules])
    if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
        del sys.path[0]  # our neighbours, which are no modules (Python 3.10)
    for name in modules:
        importlib.import_module(name)
    if opened := uses_gpu():
        sys.exit(f"gms-launch: importing {' '.join(modules)} opened {opened}: no engine may start from here")
    line.sendall(b"r")
    while (asked := line.recv(1)) == b"?":
        line.sendall(b"h")
    if asked != b"!":
        return  # the agent is gone, or wants no more of us
    life = _life(line)
    line.close()
    _become(life)
    # `python -P -m MODULE ARGS`, or `python interpreter.py MODULE ARGS`, which does the same.
    at = life["argv"].index("-m") + 1 if "-m" in life["argv"][:3] else 2
    module, sys.argv[1:] = life["argv"][at], life["argv"][at + 1 :]
    # Its file stands in front of its arguments, as after `python -m`.
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def uses_gpu() -> str:
    """What this process has open that only a user of CUDA has; empty for nothing."""
    for fd in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{fd}") == UVM:
                return UVM
        except OSError:
            continue  # the listing itself
    return ""


def _life(line: socket.socket) -> dict[str, Any]:
    """The life, with its output as descriptors 1 and 2."""
    output = array.array("i")
    data, ancillary, _, _ = line.recvmsg(8, socket.CMSG_SPACE(output.itemsize))
    for level, kind, value in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            output.frombytes(value[: output.itemsize])
    while len(data) < 8:
        data += _more(line, 8 - len(data))
    size, text = int.from_bytes(data, "big"), b""
    while len(text) < size:
        text += _more(line, size - len(text))
    sys.stdout.flush()
    sys.stderr.flush()
    for stream in (1, 2):
        os.dup2(output[0], stream)
    os.close(output[0])
    life: dict[str, Any] = json.loads(text)
    return life


def _more(line: socket.socket, most: int) -> bytes:
    data = line.recv(min(most, 1 << 16))
    if not data:
        sys.exit("gms-launch: the agent hung up in the middle of a life")
    return data


def _become(life: dict[str, Any]) -> None:
    """Take on a life's name, environment and place."""
    _retag(life["env"][TAG[:-1].decode()].encode())
    _show(life["argv"])
    os.environ.clear()
    os.environ.update(life["env"])
    os.chdir(life["cwd"])
    sys.orig_argv[:] = life["argv"]
    tempfile.tempdir = None  # remembered from TMPDIR, which is another now


def _area(first: int) -> tuple[int, int]:
    """A part of this process's memory by its field in /proc/self/stat: 48 the command line, 50 the environment."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return int(fields[first - 3]), int(fields[first - 2])


def _show(argv: list[str]) -> None:
    """Be called that by `ps`, as far as there is room."""
    start, end = _area(48)
    text = b"\0".join(os.fsencode(word) for word in argv) + b"\0"
    ctypes.memmove(start, text[: end - start - 1].ljust(end - start, b"\0"), end - start)


def _retag(tag: bytes) -> None:
    """Replace the tag that this process was started with, where the kernel shows it."""
    start, end = _area(50)
    shown = b"\0" + ctypes.string_at(start, end - start)
    at = shown.index(b"\0" + TAG) + len(TAG)
    room = shown.index(b"\0", at + 1) - at - 1
    if len(tag) > room:
        sys.exit(f"gms-launch: no room for the tag {tag.decode()}")
    ctypes.memmove(start + at, tag.ljust(room, b"\0"), room)


if __name__ == "__main__":
    main()
