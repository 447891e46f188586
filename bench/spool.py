"""What a line of a child's log costs: into memory with a copy made (as runs do it), to a file, through a pipe.

    python -m bench.spool [--lines 200000] [--directory ~/]

A child writes lines of 200 bytes, unbuffered, as engines do. Told are microseconds a line for the child, and the
processor time of whoever copies or reads. The directory is where the copy and the file are: give a shared home to see
what that costs.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from bench.stopping import stoppable
from gms_launch.spool.writer import Writer

CHILD = """
import os, sys, time
line, lines = b"x" * 199 + b"\\n", int(sys.argv[1])
begun = time.perf_counter()
for _ in range(lines):
    os.write(1, line)
print(f"{(time.perf_counter() - begun) / lines * 1e6:.2f}", file=sys.stderr)
"""


def child(out: int, lines: int) -> float:
    """Microseconds a line."""
    argv = [sys.executable, "-c", CHILD, str(lines)]
    return float(subprocess.run(argv, stdout=out, stderr=subprocess.PIPE, check=True, text=True).stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=200000)
    parser.add_argument("--directory", type=Path, default=None)
    options = parser.parse_args()
    print(
        f"{platform.node()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {options.lines} lines of 200 bytes"
    )

    def own() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        place = Path(name)
        writer = Writer(place, place, place, 1 << 40)
        before = own()
        each = child(writer.output(place / "a.log").fd, options.lines)
        wrong = writer.close(60.0)
        print(
            f"memory and a copy  {each:6.2f} us a line, copying {(own() - before) / options.lines * 1e6:.2f} us {wrong}"
        )
        with open(place / "b.log", "ab") as file:
            print(f"a file             {child(file.fileno(), options.lines):6.2f} us a line")
        reader, end = os.pipe()

        def read() -> None:
            with open(place / "c.log", "ab", buffering=0) as copy:
                while data := os.read(reader, 65536):
                    copy.write(data)

        before = own()
        thread = threading.Thread(target=read)
        thread.start()
        each = child(end, options.lines)
        os.close(end)
        thread.join()
        os.close(reader)
        print(f"a pipe and a reader {each:5.2f} us a line, reading {(own() - before) / options.lines * 1e6:.2f} us")


if __name__ == "__main__":
    stoppable(main)
