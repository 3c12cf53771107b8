# SPDX-License-Identifier: LGPL-2.1-or-later
"""Taking over a machine whose manager died: vmspawn's options for it, and `vmctl adopt`, which starts a manager."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..boot.config import MachineConfig
from ..boot.launch import launch
from ..errors import NotConnected, StartError, Timeout, UsageError
from ..host import runtime

if TYPE_CHECKING:
    from ..boot.launch import Launched

#: Seconds that a manager in the background has to take a machine over.
_ADOPT_TIMEOUT = 45.0

# What vmspawn says in front of its errors on standard error.
_PREFIX = "vmspawn: "


def add_options(group: Any) -> None:
    """vmspawn's options for adopting."""
    choice = group.add_mutually_exclusive_group()
    choice.add_argument("--adopt", action="store_true", help="take over the machine -M, whose manager died")
    choice.add_argument(
        "--adopt-or-start", action="store_true", help="take it over if it runs without a manager, else start it"
    )
    # For whoever starts us in the background: a byte comes here once the machine is up.
    group.add_argument("--ready-fd", metavar="FD", type=int, help=argparse.SUPPRESS)


#: What may be said of a machine that is taken over; the rest was settled when it was started.
_BESIDE_ADOPT = ("adopt", "machine", "console", "log", "qmp_log", "shutdown_timeout", "quiet", "verbose")


def refuse_others(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raise UsageError if `--adopt` is given with an option that is for starting a machine."""
    for action in (action for action in parser._actions if action.help != argparse.SUPPRESS):
        value = getattr(options, action.dest, action.default)
        if action.dest in _BESIDE_ADOPT or value == action.default or (action.nargs == 0 and value != action.const):
            continue
        name = action.option_strings[-1] + ("" if action.nargs == 0 else "=")
        raise UsageError(
            f"--adopt takes a machine over as it is, and {name} is for one that starts",
            hint="leave out one of them, or use --adopt-or-start",
        )


def parse(options: argparse.Namespace, console: str) -> MachineConfig:
    """Which machine is to be adopted, and how it is to be managed. Raises UsageError."""
    if options.machine is None:
        raise UsageError("--adopt needs to know which machine", hint="name it with --machine=; see: vmctl list")
    if options.kernel_arguments:
        raise UsageError(
            f"--adopt starts no kernel that could be told {options.kernel_arguments[0]}", hint="leave that out"
        )
    name = runtime.check_name(options.machine)
    return MachineConfig(
        name=name,
        console=console,
        console_log=None if options.log is None else os.path.abspath(options.log),
        shutdown_timeout=options.shutdown_timeout,
        qmp_log=options.qmp_log,
    )


def is_wanted(options: argparse.Namespace, config: MachineConfig) -> bool:
    """Whether to adopt the machine, or start it."""
    if not options.adopt_or_start:
        return bool(options.adopt)
    from ..boot.adopt import has_orphan

    return has_orphan(config.name or "")


def begin(
    options: argparse.Namespace,
    config: MachineConfig,
    notice: Callable[[str], None],
    detail: Callable[[str], None],
    hold_signals: Callable[[], None],
) -> Launched:
    """Start the machine, or take it over. Raises what `launch` and `adopt` raise."""
    if is_wanted(options, config):
        from ..boot.adopt import adopt

        hold_signals()
        return adopt(config, notice=notice)
    return launch(config, notice=notice, detail=detail, begin=hold_signals)


def ready(options: argparse.Namespace) -> Callable[[], None]:
    """What to call once the machine is up."""

    def tell() -> None:
        if options.ready_fd is not None:
            os.write(options.ready_fd, b"\n")
            os.close(options.ready_fd)

    return tell


# vmctl's part.


def run(options: argparse.Namespace) -> None:
    """`vmctl adopt`: start a manager in the background, and wait until it has the machine."""
    name = runtime.check_name(options.machine)
    folder = os.path.join(runtime.runtime_root(), name)
    timeout = _ADOPT_TIMEOUT if options.timeout is None else options.timeout
    try:
        log = os.open(
            os.path.join(folder, runtime.MANAGER_LOG), os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
    except FileNotFoundError:
        raise NotConnected(f"there is no machine named {name}", hint="see: vmctl list") from None
    except OSError as error:
        raise StartError(f"cannot use the runtime directory {folder}: {error.strerror}") from None
    start = os.fstat(log).st_size
    waiting, telling = os.pipe()
    try:
        pid = _start(name, log, telling)
        os.close(telling)
        telling = -1
        if not select.select([waiting], [], [], timeout)[0]:
            raise Timeout(f"the manager of {name} (process {pid}) has not taken it over within {timeout:g} s")
        if not os.read(waiting, 1):
            os.waitpid(pid, 0)
            raise _failure(os.pread(log, 1 << 16, start).decode(errors="replace"))
    finally:
        for fd in (log, waiting, telling):
            if fd >= 0:
                os.close(fd)
    if not options.quiet and options.json == "off":
        print(f"Adopted {name}")


def _start(name: str, log: int, telling: int) -> int:
    """Start a manager that outlives us, and return its process id. It inherits `log` and `telling` and nothing else."""
    actions: list[tuple[object, ...]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, log, 2),
        # Duplicating a descriptor onto itself makes it inheritable in the child alone.
        (os.POSIX_SPAWN_DUP2, telling, telling),
    ]
    arguments = ["--adopt", f"--machine={name}", "--console=headless", f"--ready-fd={telling}"]
    command = [sys.executable, "-m", "vmspawn.cli.spawn", *arguments]
    return os.posix_spawn(sys.executable, command, os.environ, file_actions=actions, setsid=True)


def _failure(said: str) -> StartError:
    """The error of a manager that gave up, from what it printed."""
    lines = [line for line in said.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if line.startswith(_PREFIX):
            hint = lines[number + 1].strip() if number + 1 < len(lines) else ""
            return StartError(line.removeprefix(_PREFIX), hint=hint)
    return StartError(lines[-1] if lines else "the manager ended without a word")
