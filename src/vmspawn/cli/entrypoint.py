# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs a command: prepares its standard streams, prints its errors and exits with its status."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import signal
import sys
from collections.abc import Callable
from errno import EDQUOT, EFBIG, EIO, ENOENT, ENOSPC
from typing import TYPE_CHECKING, NoReturn

from .. import log
from ..console.streams import ensure_standard_streams
from ..errors import SystemFailure, UsageError, VmspawnError
from ..text import printable
from .spelling import as_option

if TYPE_CHECKING:
    from types import FrameType

EXIT_FAILURE = 1
EXIT_USAGE = 2

#: The exit status for a time limit, as in timeout(1).
EXIT_TIMED_OUT = 124

#: The exit status for failures of vmctl itself, where it otherwise exits with a command's status, as in docker(1).
EXIT_OWN_FAILURE = 125

#: Error numbers of write(2). An OSError with one of these numbers and no file name is a failure of standard output.
_WRITE_ERRORS = (EDQUOT, EFBIG, EIO, ENOSPC)

#: The exit status for SIGINT, as in a shell.
EXIT_INTERRUPTED = 130


def complain(program: str, error: VmspawnError) -> None:
    """Print an error and its hint, with fields spelled as options: `program: what failed: why`."""
    message, hint = error.spelled(functools.partial(as_option, program))
    # Standard error may be closed.
    with contextlib.suppress(OSError):
        print(f"{program}: {printable(message)}", file=sys.stderr)
        if hint:
            print(f"{' ' * len(program)}  {printable(hint)}", file=sys.stderr)


def run(program: str, work: Callable[[], int]) -> NoReturn:
    """Run a command and exit with the status that `work` returns.

    An error is printed as one line, even an unexpected OSError. VMSPAWN_LOG=debug shows the traceback.
    """
    ensure_standard_streams()
    # Python sets a stream to None if its descriptor is closed at startup.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The locale's encoding may lack characters such as the ellipsis.
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
        # The rest of the output is lost. The interpreter must not try to flush it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def exit_on_signals() -> None:
    """Make SIGTERM and SIGHUP raise SystemExit, so that the program cleans up. Signals that are ignored stay so."""

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)


def _status(work: Callable[[], int]) -> int:
    # The entry point has set SIG_DFL. Only `work` has something to undo after SIGINT.
    is_default = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    try:
        if is_default:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = work()
        sys.stdout.flush()
    except SystemExit as asked:
        # argparse calls sys.exit with a number.
        status = int(asked.code or 0)
        sys.stdout.flush()
    finally:
        if is_default:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    return status


def _explain(error: OSError) -> VmspawnError:
    number = error.errno or EIO
    if number == ENOENT and error.filename is None:
        # getcwd(3) is the only call without a file name that fails with ENOENT.
        return SystemFailure("the current directory was removed", number, hint="change to another directory")
    if number in _WRITE_ERRORS and error.filename is None:
        return SystemFailure("cannot write the output", number)
    what = f" {error.filename!r}" if error.filename else ""
    return SystemFailure(f"a system call failed{what}", number, hint=f"for a traceback, set {log.VARIABLE}=debug")
