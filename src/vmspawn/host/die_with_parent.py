# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes the kernel kill a program when the thread that started it ends, even if SIGKILL ends the thread."""

from __future__ import annotations

import os
import sys

#: Asks the kernel for the signal, and executes the program in its own place. PR_SET_PDEATHSIG is 1 (linux/prctl.h).
#: `preexec_fn` of `subprocess` could do the same, but may deadlock in a process with threads. This text does not need
#: the package, which may have been removed. A Python that was built without libffi has no ctypes: the program can
#: outlive its parent then.
_LAUNCHER = """
import os, signal, sys
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
except ImportError:
    pass
# The parent may have died before.
if os.getppid() == int(sys.argv[1]):
    try:
        os.execv(sys.argv[2], sys.argv[2:])
    except OSError as error:
        sys.exit(f"cannot run {sys.argv[2]}: {error.strerror}")
"""


def command(arguments: list[str]) -> list[str]:
    """Return the command line that executes a program. The calling thread must outlive the program."""
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *arguments]
