"""Where the process begins: `python -m gms_launch` and the `gms-launch` command.

Ctrl-C while the rest is imported is no error of ours: it ends the process at once, with 130 and without a word.
"""

import os
import signal
from types import FrameType


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
