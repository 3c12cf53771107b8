# SPDX-License-Identifier: LGPL-2.1-or-later
"""Launches QEMU from a checked configuration, synchronously and with few imports.

The manager imports the rest of its modules while QEMU starts.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from ..aio.sockets import listen
from ..errors import StartError, SystemFailure
from ..host import consolelog, fifos, runtime, scope
from ..host.consolelog import ConsoleLog
from ..host.descriptor import Descriptor
from ..host.runtime import MachineDirectory
from ..host.spawn import kill_child, spawn
from ..log import debug
from . import cloud_init, console, ssh_key
from .commandline import Inherited, command_line
from .config import MachineConfig
from .directory import make_directory
from .disks import open_boot_disks
from .extras import Owned
from .plan import Plan, Reporter, choose, make_plan
from .started import Incoming, Launched, SharedConsole, Started, connect, connect_monitors, share_console
from .state import SavedQemu, SavedSessions, boot_storage, open_journal

#: The backlog of QEMU's sockets. There is one connection, and another one after an adoption.
_BACKLOG = 4

#: The capacity in bytes of a virtio console's output pipe: the maximum without privileges. QEMU drops the excess.
_VIRTIO_CAPACITY = 1 << 20

_DESCRIPTOR = "^/proc/self/fd(/[0-9]+)?/?"

#: Hints for limits that a start may reach. vmspawn raises soft limits by itself.
_HINTS = {
    errno.EMFILE: "raise the hard limit of open files (ulimit -Hn)",
    errno.EFBIG: "raise the limit of the size of files (ulimit -f)",
}


@contextlib.contextmanager
def system_failures(what: str) -> Iterator[None]:
    """Raise SystemFailure for an OSError that no option caused, such as a lack of descriptors, memory or disk space."""
    try:
        yield
    except OSError as error:
        # A machine's directory is opened once, and its files have paths below that descriptor.
        name = re.sub(_DESCRIPTOR, "", str(error.filename or ""))
        where = f" ({name})" if name else ""
        number = error.errno or errno.EIO
        raise SystemFailure(f"cannot {what}{where}", number, hint=_HINTS.get(number, "")) from None


@system_failures("start the machine")
def launch(
    config: MachineConfig,
    *,
    notice: Callable[[str], None] = lambda _: None,
    detail: Callable[[str], None] = lambda _: None,
    on_begin: Callable[[], None] = lambda: None,
) -> Started:
    """Launch QEMU.

    `notice` is called with lines that every user should see, `detail` with lines of verbose output. `on_begin` is
    called after the steps that may take long, before the first step that has to be undone.

    Raises StartError, SystemFailure, UsageError, NotInstalled or an error of `open_boot_disks`. A start that fails
    leaves nothing behind.
    """
    check_display(config)
    runtime.prepare_root()
    report = Reporter(notice, detail)
    chosen = choose(config, report)
    on_begin()
    with ExitStack() as undo:
        owned = Owned(undo, undo.enter_context(ExitStack()))
        transcript = open_transcript(config.console_log, undo)
        directory, watcher = make_directory(config, undo)
        ssh_key.make(config, directory)
        chosen = chosen._replace(config=cloud_init.with_seed(chosen.config, directory))
        disks = open_boot_disks(chosen.config, chosen.layout, directory.path)
        for each in disks:
            owned.lent.callback(each.close)
        if chosen.why_emulated:
            notice(f"no KVM ({chosen.why_emulated}), so the guest is emulated and slow")
        plan = make_plan(chosen, disks, directory, report, owned)
        started = start(plan, directory, transcript, owned)._replace(watcher=watcher)
        owned.lent.close()
        undo.pop_all()
    return started


def check_display(config: MachineConfig) -> None:
    """Raise StartError if the console is a window and there is no display to show it."""
    if config.console == "gui" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise StartError.with_fields(
            "{console=gui} needs a display, and neither DISPLAY nor WAYLAND_DISPLAY is set",
            hint="start the machine in a graphical session, or use another {console=}",
        )


def open_transcript(path: str | None, undo: ExitStack) -> Descriptor | None:
    """Open the file that the console is appended to, if the user wants one. Raises StartError."""
    if path is None:
        return None
    try:
        # O_NONBLOCK, so that opening a FIFO does not wait for its reader.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError.with_fields(
            "cannot use {console_log={path}}: {reason}", path=path, reason=error.strerror
        ) from None
    file = Descriptor(fd)
    undo.callback(file.close)
    if not stat.S_ISREG(os.fstat(fd).st_mode) and os.path.realpath(path) != os.devnull:
        raise StartError.with_fields("cannot use {console_log={path}}: not a regular file", path=path)
    return file


#: A function that writes QEMU's command line.
CommandLineWriter = Callable[[Plan, Inherited], list[str]]


def start(
    plan: Plan,
    directory: MachineDirectory,
    transcript: Descriptor | None,
    owned: Owned,
    *,
    line: CommandLineWriter = command_line,
    incoming: Incoming | None = None,
) -> Started:
    """Start QEMU. `line` writes its command line; `incoming` is the state that QEMU loads instead of booting.

    Raises StartError, OSError.
    """
    config = plan.config
    # QEMU inherits listening sockets, so vmspawn can connect before QEMU is up.
    names = [*runtime.MONITORS]
    names += [runtime.QEMU_SIZE] if console.has_size_port(config) else []
    names += [runtime.QEMU_AGENT] if config.agent else []
    listeners = {
        name: owned.lent.enter_context(listen(directory.socket_address(name), _BACKLOG)).fileno() for name in names
    }
    log = ConsoleLog.make() if console.is_logged(config) else None
    if log is not None:
        owned.undo.callback(log.close)
    # The state is also written before QEMU is started, so that the next manager finds QEMU if this one dies now.
    _write_state(plan, directory, 0, incoming)
    pid, shared = _spawn(plan, directory, listeners, log, owned, line)
    _write_state(plan, directory, pid, incoming)
    return Started(
        Launched(plan.disks, plan.is_bios_boot, incoming, plan.attachments),
        config,
        plan.binary,
        plan.accelerator,
        plan.layout,
        directory,
        pid,
        # vmspawn still has the listening sockets, so this succeeds even if QEMU has ended already.
        connect_monitors(directory, owned.undo),
        connect(directory, runtime.QEMU_SIZE, owned.undo) if runtime.QEMU_SIZE in names else None,
        shared,
        transcript,
        plan.extras.helpers,
        plan.fork,
    )


def _spawn(
    plan: Plan,
    directory: MachineDirectory,
    listeners: dict[str, int],
    log: ConsoleLog | None,
    owned: Owned,
    line: CommandLineWriter,
) -> tuple[int, SharedConsole | None]:
    """Start QEMU. Returns its process id, and the manager's end of the console if the console is shared."""
    config = plan.config
    monitors = {name: listeners[name] for name in runtime.MONITORS}
    size, agent = (listeners.get(name, -1) for name in (runtime.QEMU_SIZE, runtime.QEMU_AGENT))
    inherited = Inherited(monitors, size, agent, log.fd if log is not None else -1)
    arguments = [*scope.prefix(config.registration, config.name or ""), *line(plan, inherited)]
    debug(f"runs {' '.join(arguments)}")
    keep = [*listeners.values(), *(fd for each in plan.disks for fd in each.descriptors), *plan.extras.descriptors]
    errors = owned.lend(directory.create_log())
    shared, streams = None, (0, 1)
    if console.is_shared(config):
        pipes = fifos.make(directory, capacity=_VIRTIO_CAPACITY if config.console_transport == "virtio" else 0)
        streams = (owned.lend(pipes.qemu_input), owned.lend(pipes.qemu_output))
        shared = share_console(directory, (pipes.typed, pipes.shown), log, owned.undo)
    with consolelog.bounded() if log is not None else contextlib.nullcontext():
        pid = spawn(arguments, keep=[*keep, log.fd] if log is not None else keep, log=errors, streams=streams)
    owned.undo.callback(kill_child, pid)
    return pid, shared


def _write_state(plan: Plan, directory: MachineDirectory, pid: int, incoming: Incoming | None) -> None:
    qemu = SavedQemu(pid, runtime.start_time(pid), plan.accelerator)
    journal = open_journal(directory, plan.config, plan.binary, qemu, plan.extras.helpers, plan.fork)
    journal.add_section("sessions", SavedSessions().to_json)
    if incoming is not None:
        journal.add_section("loading", incoming.record.to_json)
    for name, section in plan.attachments.items():
        journal.add_section(name, lambda section=section: json.dumps(section))  # type: ignore[misc]
    least = int(plan.attachments.get("storage", {}).get("next", 0))
    journal.add_section("storage", lambda: boot_storage(plan.disks, least))
    journal.write()
