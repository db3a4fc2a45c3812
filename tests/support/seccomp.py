"""A seccomp filter that refuses getsid(2), as a container may have one: for a process and all that it starts."""

from __future__ import annotations

import ctypes
import os
import struct

GETSID = {"x86_64": 124, "aarch64": 156}
"""The system call's number, by the machine's name."""


def refuse_getsid(error: int) -> None:
    """From now on, getsid(2) fails with this errno in this process."""
    number = GETSID[os.uname().machine]
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | error), (0x06, 0, 0, 0x7FFF0000)]
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    kept = ctypes.create_string_buffer(code)
    program = struct.pack("@HP", len(steps), ctypes.addressof(kept))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
    assert libc.prctl(22, 2, ctypes.c_char_p(program), 0, 0) == 0, "PR_SET_SECCOMP"
    try:
        os.getsid(0)
    except OSError as refused:
        assert refused.errno == error
    else:
        raise AssertionError("getsid is not refused")
