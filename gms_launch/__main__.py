"""Where the process begins: `python -m gms_launch` and the `gms-launch` command.

Ctrl-C while the rest is imported is no error of ours: it ends the process at once, with 130 and without a word.
"""

import os
import sys


def _cwd() -> str:
    try:
        return os.getcwd()
    except OSError:  # removed
        return ""


# `python -m` looks into the working directory first, and others may have put files there. (-P keeps it out from the
# beginning, and so does the command `gms-launch`: what is called gms_launch there has won already.)
if __name__ == "__main__" and not getattr(sys.flags, "safe_path", False) and sys.path[:1] == [_cwd()]:
    del sys.path[0]

import signal  # noqa: E402 - from where it belongs
from types import FrameType  # noqa: E402


def _at_once(_: int, __: FrameType | None) -> None:
    os._exit(128 + signal.SIGINT)


# One that is ignored, as in a script's background, stays so.
_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _ours:
    signal.signal(signal.SIGINT, _at_once)


def main() -> None:
    """The command line."""
    from gms_launch.cli.main import main as run

    if _ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
