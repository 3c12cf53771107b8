# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the commands begin and end: their standard streams, their exit status, and the lines for what went wrong."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable
from errno import EDQUOT, EFBIG, EIO, ENOSPC
from typing import NoReturn

from .. import log
from ..console.streams import ensure_standard_streams
from ..errors import SystemFailure, UsageError, VmspawnError
from ..text import printable
from .spelling import as_option

EXIT_FAILURE = 1
EXIT_USAGE = 2

#: Errors of files that are written. The output is the one without a name to tell.
_OF_FILES = (EDQUOT, EFBIG, EIO, ENOSPC)

#: As a shell has it for a program that SIGINT ended.
EXIT_INTERRUPTED = 130


def complain(program: str, error: VmspawnError) -> None:
    """Print an error as `program: what failed: why`, and what to do about it below."""
    message, hint = error.spelled(functools.partial(as_option, program))
    # Nobody may hear it.
    with contextlib.suppress(OSError):
        print(f"{program}: {printable(message)}", file=sys.stderr)
        if hint:
            print(f"{' ' * len(program)}  {printable(hint)}", file=sys.stderr)


def run(program: str, work: Callable[[], int]) -> NoReturn:
    """Do what the command is for, which returns its exit status, and exit.

    Whatever goes wrong is said in a line. So is what the system refuses where nobody expects it, and with
    VMSPAWN_LOG=debug where that was.
    """
    ensure_standard_streams()
    # Python has no streams for descriptors that were closed, and prints to the wrong one then.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Its encoding need not have all that there is, an ellipsis for one.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = _status(work)
    except VmspawnError as error:
        complain(program, error)
        status = EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILURE
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        status = 0
    except OSError as error:
        if log.enabled():
            raise
        complain(program, _explain(error))
        status = EXIT_FAILURE
    try:
        sys.stdout.flush()
    except OSError:
        # What is still to be written has nowhere to go; the interpreter must not try once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _status(work: Callable[[], int]) -> int:
    try:
        status = work()
    except SystemExit as asked:
        # It is argparse that asks, with a number.
        status = int(asked.code or 0)
    sys.stdout.flush()
    return status


def _explain(error: OSError) -> VmspawnError:
    number = error.errno or EIO
    if number in _OF_FILES and error.filename is None:
        return SystemFailure("cannot write the output", number)
    what = f" {error.filename!r}" if error.filename else ""
    return SystemFailure(f"the system refused{what}", number, hint=f"see where: {log.VARIABLE}=debug")
