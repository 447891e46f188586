"""Run a module without looking into the working directory for what it imports: others may have put files there.

`python -m` looks there first. From Python 3.11 on `-P` forbids it. 3.10 knows no such switch, so it runs this file by
its path, which takes the first entry off the list and then does as -m would.
"""

from __future__ import annotations

import sys


def module(python: str, name: str, *args: str, version: tuple[int, ...] = sys.version_info[:2]) -> tuple[str, ...]:
    """The command line that runs a module; `version` is that of `python`."""
    how = (python, "-P", "-m") if version >= (3, 11) else (python, __file__)
    return (*how, name, *args)


#: In the environment of what imports further on: an engine starts processes of its own. Python 3.10 does not read it.
SAFE = {"PYTHONSAFEPATH": "1"}


def _run() -> None:
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the directory of this file: our rooms, which are no modules
    import runpy

    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run()
