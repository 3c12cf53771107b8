# SPDX-License-Identifier: LGPL-2.1-or-later
"""Takes over a QEMU whose manager died: finds the process, reads the state, and connects."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from errno import EAGAIN, ECONNREFUSED

from ..aio import sockets
from ..errors import NotConnected, StartError
from ..helpers.helper import Helper
from ..host import fifos, runtime
from ..host.consolelog import ConsoleLog
from ..host.runtime import MachineDirectory
from ..hotplug import places
from ..timeouts import ADOPT_GREETING_TIMEOUT, SHUTDOWN_TIMEOUT
from .config import MachineConfig
from .diagnose import no_answer
from .launch import open_transcript, system_failures
from .started import Adopted, SharedConsole, Started, connect, connect_monitors, share_console
from .state import State, read


@system_failures("adopt the machine")
def adopt(config: MachineConfig) -> Started:
    """Take over the machine that `config` names.

    The new manager takes its console and its QMP log from `config`, its timeouts too if `config` sets them, and all
    other settings from the machine's state. Nothing in QEMU is changed.

    Raises NotConnected if there is no machine of that name. If the machine's QEMU has ended, removes the machine's
    directory and raises NotConnected. Raises StartError if the machine's manager lives or the machine's state cannot
    be used, and SystemFailure.
    """
    with ExitStack() as undo:
        directory = MachineDirectory.take_over(config.name or "")
        undo.callback(directory.close)
        state = read(directory)
        pid = runtime.running_qemu(directory.path) if state.qemu.pid else _find_started(directory)
        if not pid:
            directory.remove()
            raise NotConnected(
                f"machine {config.name} has ended while it had no manager; its files were removed",
                hint="start it again",
            )
        with _explain_refusal(directory, pid):
            started = _connect(state, pid, config, directory, undo)
        undo.pop_all()
    return started


def _connect(state: State, pid: int, given: MachineConfig, directory: MachineDirectory, undo: ExitStack) -> Started:
    """Connect to QEMU's monitors, and to its console if the console is shared. Raises StartError, OSError."""
    config = _merged(state.config, given)
    transcript = open_transcript(given.console_log, undo)
    shared = _console(directory, pid, undo)
    helpers = tuple(_helpers(state, undo))
    has_size_port = os.path.exists(directory.file(runtime.QEMU_SIZE))
    return Started(
        Adopted(state),
        config if shared is not None else config._replace(console="native"),
        state.binary,
        state.qemu.accelerator,
        places.layout(config.machine_type, config.hotplug_ports, namespaces=state.binary.has_namespaces),
        directory,
        pid,
        connect_monitors(directory, undo),
        connect(directory, runtime.QEMU_SIZE, undo) if has_size_port else None,
        shared,
        transcript,
        helpers,
        state.fork,
    )


def _console(directory: MachineDirectory, pid: int, undo: ExitStack) -> SharedConsole | None:
    if not os.path.exists(directory.file(runtime.QEMU_OUTPUT)):
        return None
    with contextlib.suppress(FileNotFoundError):
        os.unlink(directory.file(runtime.CONSOLE))
    return share_console(directory, fifos.open_again(directory), ConsoleLog.of(pid), undo)


def _helpers(state: State, undo: ExitStack) -> Iterator[Helper]:
    """Yield the helpers. One that has ended has the process id 0; QEMU continues without it."""
    for each in state.helpers:
        pid = each.pid if each.pid and runtime.start_time(each.pid) == each.started else 0
        # The log of a helper ends with the manager that started it.
        helper = Helper(each.name, each.what, pid, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        undo.callback(helper.leave)
        yield helper


@contextlib.contextmanager
def _explain_refusal(directory: MachineDirectory, pid: int) -> Iterator[None]:
    """Explain why a monitor accepts no connection."""
    try:
        yield
    except OSError as error:
        if error.errno not in (EAGAIN, ECONNREFUSED):
            raise
        if trouble := runtime.process_trouble(pid):
            raise no_answer(directory.name, pid, trouble) from None
        raise StartError(
            f"cannot connect to the monitors of machine {directory.name}: {error.strerror}",
            hint=f"does another program hold them? see: fuser {directory.file(runtime.MONITORS[0])}",
        ) from None


def has_orphan(name: str) -> bool:
    """Return whether a machine of this name runs without a manager, even if its state does not name its QEMU."""
    try:
        directory = MachineDirectory.take_over(name)
    except (NotConnected, StartError):
        return False
    try:
        return bool(runtime.running_qemu(directory.path)) or directory.has_monitor()
    finally:
        directory.close()


def _merged(saved: MachineConfig, given: MachineConfig) -> MachineConfig:
    timeout = saved.shutdown_timeout if given.shutdown_timeout == SHUTDOWN_TIMEOUT else given.shutdown_timeout
    return saved._replace(
        console=given.console,
        terminal=given.terminal,
        console_log=given.console_log,
        shutdown_timeout=timeout,
        time_limit=saved.time_limit if given.time_limit is None else given.time_limit,
        qmp_log=given.qmp_log,
    )


def _find_started(directory: MachineDirectory) -> int:
    """Return the process id of a QEMU whose manager died before it recorded the id, or 0 if QEMU was not started.

    The monitor reports the thread of a virtual processor; the kernel reports the process of that thread.
    """
    if not directory.has_monitor():
        return 0
    try:
        thread = _ask_for_thread(directory.socket_address(runtime.MONITORS[0]))
    except TimeoutError:
        thread = 0
    except OSError:
        return 0  # QEMU has ended meanwhile
    if thread:
        return runtime.process_of_thread(thread)
    raise StartError(
        f"QEMU of machine {directory.name} runs, but its monitor did not answer within {ADOPT_GREETING_TIMEOUT:g} s",
        hint=f"does another program hold the monitor? see: fuser {directory.file(runtime.MONITORS[0])}",
    )


def _ask_for_thread(monitor: str) -> int:
    """Ask QEMU's monitor for the thread id of a virtual processor.

    Returns 0 if QEMU disconnects, or only sends other lines until the timeout. Raises TimeoutError, OSError.
    """
    deadline = time.monotonic() + ADOPT_GREETING_TIMEOUT
    with sockets.connect(monitor, timeout=ADOPT_GREETING_TIMEOUT) as connected, connected.makefile("rb") as lines:
        connected.settimeout(ADOPT_GREETING_TIMEOUT)
        connected.sendall(b'{"execute":"qmp_capabilities"}{"execute":"query-cpus-fast","id":1}')
        for line in lines:
            message = json.loads(line)
            if message.get("id") == 1:
                return int(message["return"][0]["thread-id"])
            if time.monotonic() > deadline:
                break
    return 0
