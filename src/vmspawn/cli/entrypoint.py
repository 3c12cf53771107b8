# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs a command: prepares its standard streams, prints its errors and exits with its status."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable
from errno import EDQUOT, EFBIG, EIO, ENOENT, ENOSPC
from typing import NoReturn

from .. import log
from ..console.streams import ensure_standard_streams
from ..errors import SystemFailure, UsageError, VmspawnError
from ..text import printable
from .spelling import as_option

EXIT_FAILURE = 1
EXIT_USAGE = 2

#: What timeout(1) exits with.
EXIT_TIMED_OUT = 124

#: Errors of a write. One without a file name is standard output's.
_OF_FILES = (EDQUOT, EFBIG, EIO, ENOSPC)

#: The status that a shell reports for a program that SIGINT ended.
EXIT_INTERRUPTED = 130


def complain(program: str, error: VmspawnError) -> None:
    """Print an error as `program: what failed: why`, with the hint below, and options for fields."""
    message, hint = error.spelled(functools.partial(as_option, program))
    # Standard error may be closed.
    with contextlib.suppress(OSError):
        print(f"{program}: {printable(message)}", file=sys.stderr)
        if hint:
            print(f"{' ' * len(program)}  {printable(hint)}", file=sys.stderr)


def run(program: str, work: Callable[[], int]) -> NoReturn:
    """Run a command and exit with the status that `work` returns.

    An error is printed in a line. So is an unexpected OSError; VMSPAWN_LOG=debug shows its traceback.
    """
    ensure_standard_streams()
    # Python has no stream for a closed descriptor, and would print to the wrong one.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The encoding may lack characters, such as the ellipsis.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = _status(work)
    except VmspawnError as error:
        complain(program, error)
        status = EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILURE
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has closed the pipe.
        status = 0
    except OSError as error:
        if log.enabled():
            raise
        complain(program, _explain(error))
        status = EXIT_FAILURE
    try:
        sys.stdout.flush()
    except OSError:
        # The rest of the output is lost; the interpreter must not try to write it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _status(work: Callable[[], int]) -> int:
    try:
        status = work()
    except SystemExit as asked:
        # argparse exits with a number.
        status = int(asked.code or 0)
    sys.stdout.flush()
    return status


def _explain(error: OSError) -> VmspawnError:
    number = error.errno or EIO
    if number == ENOENT and error.filename is None:
        # Of the calls that name no file, getcwd(3) alone fails so.
        return SystemFailure("there is no current directory", number, hint="change to one that exists")
    if number in _OF_FILES and error.filename is None:
        return SystemFailure("cannot write the output", number)
    what = f" {error.filename!r}" if error.filename else ""
    return SystemFailure(f"the system refused{what}", number, hint=f"see where: {log.VARIABLE}=debug")
