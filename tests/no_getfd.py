"""`python no_getfd.py PROGRAM ARGS`: run a program in which pidfd_getfd(2) is refused, as a container's filter may.

A seccomp filter, which children inherit and nobody can take off again.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

PIDFD_GETFD = 438
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LOAD_NUMBER = struct.pack("HBBI", 0x20, 0, 0, 0)  # the number of the system call
IF_GETFD = struct.pack("HBBI", 0x15, 0, 1, PIDFD_GETFD)  # if it is this one go on, else skip one
REFUSE = struct.pack("HBBI", 0x06, 0, 0, 0x00050000 | 1)  # EPERM
ALLOW = struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def refuse() -> None:
    """Refuse it from now on, to this process and its children."""
    libc = ctypes.CDLL(None, use_errno=True)
    code = LOAD_NUMBER + IF_GETFD + REFUSE + ALLOW
    program = Program(4, code)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    refuse()
    os.execvp(sys.argv[1], sys.argv[1:])
