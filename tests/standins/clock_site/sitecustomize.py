"""A clock on the wall that a test can set: `time.time` of every Python process with this directory in PYTHONPATH.

CLOCK_FILE holds how many seconds it is ahead. For Python code alone: libfaketime bends sleeps and waits too, and a time
namespace leaves the clock on the wall as it is. grpc is told the real time, since its deadlines are compared with the
machine's clock outside of Python.
"""

import os
import sys
import time

_real, _file = time.time, os.environ.get("CLOCK_FILE", "")


def _time() -> float:
    if sys._getframe(1).f_globals.get("__name__", "").startswith("grpc"):
        return _real()
    try:
        with open(_file) as file:
            return _real() + float(file.read() or 0.0)
    except OSError:
        return _real()


if _file:
    time.time = _time
