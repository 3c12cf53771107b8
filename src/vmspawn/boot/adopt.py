# SPDX-License-Identifier: LGPL-2.1-or-later
"""From what a dead manager left to a machine with a manager: finding the QEMU that outlived it, and connecting."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from errno import EAGAIN, ECONNREFUSED

from ..errors import NotConnected, StartError
from ..helpers.helper import Helper
from ..host import fifos, runtime
from ..host.consolelog import ConsoleLog
from ..host.runtime import MachineDirectory
from ..hotplug import places
from . import state as states
from .config import SHUTDOWN_TIMEOUT, MachineConfig
from .launch import Launched, connect, open_console_log, system_failures
from .state import State

#: Seconds for a monitor to greet while QEMU's process is looked for.
_GREETING_TIMEOUT = 5.0


class Adopted(Launched):
    """A QEMU that another manager started. It is not our child, and it lives on when we let go of it."""

    def __init__(self, state: State, directory: MachineDirectory) -> None:
        config = state.config
        layout = places.layout(config.machine_type, config.hotplug_ports, namespaces=state.binary.namespaces)
        super().__init__(config, state.binary, layout)
        self.directory = directory
        self.accelerator = state.qemu.accelerator
        self.saved = state
        # Those that are gone took QEMU along, or will.
        self.additions.helpers = [
            Helper(each.name, each.what, each.pid, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            for each in state.helpers
            if runtime.start_time(each.pid) == each.started
        ]

    def abandon(self) -> None:
        """Let go of it; if it has ended, remove what it left."""
        if self.pid:
            self.leave()
        else:
            super().abandon()


@system_failures("take over the machine")
def adopt(config: MachineConfig, *, notice: Callable[[str], None] = lambda _: None) -> Adopted:
    """Take over the machine that `config` names; what else it says is about the manager: console and time-outs.

    Raises NotConnected if there is none, StartError if its manager lives, its state cannot be used, or its QEMU is
    gone; what that left is removed then; SystemFailure. Nothing of QEMU was changed.
    """
    directory = MachineDirectory.take_over(config.name or "")
    try:
        state = states.read(directory)
        pid = runtime.running_qemu(directory.path) if state.qemu.pid else _find_started(directory)
    except BaseException:
        directory.close()
        raise
    if not pid:
        directory.remove()
        raise NotConnected(
            f"machine {config.name} has ended while it had no manager; removed what it left", hint="start it again"
        )
    launched = Adopted(state._replace(config=_merged(state.config, config)), directory)
    launched.pid = pid
    try:
        launched.console_log = open_console_log(config.console_log)
        _connect(launched, directory)
    except StartError:
        launched.abandon()
        raise
    except OSError as error:
        launched.abandon()
        if error.errno not in (EAGAIN, ECONNREFUSED):
            raise
        raise StartError(
            f"cannot connect to the monitors of machine {config.name}: {error.strerror}",
            hint=f"does another program hold them? see: fuser {directory.file(runtime.MONITORS[0])}",
        ) from None
    notice(f"took over machine {config.name} (QEMU is process {pid})")
    return launched


def _connect(launched: Adopted, directory: MachineDirectory) -> None:
    """Connect to QEMU's monitors and, as far as it has been ours, its console. Raises OSError."""
    if os.path.exists(directory.file(runtime.QEMU_OUTPUT)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(directory.file(runtime.CONSOLE))
        launched.console = fifos.open_again(directory)
        launched.kept = ConsoleLog.of(launched.pid)
    else:
        launched.config = launched.config._replace(console="native")
    size = [runtime.QEMU_SIZE] if os.path.exists(directory.file(runtime.QEMU_SIZE)) else []
    connect(launched, [*runtime.MONITORS, *size])


def has_orphan(name: str) -> bool:
    """Whether a machine of that name runs without a manager, or its remains lie there."""
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
        qmp_log=given.qmp_log,
    )


def _find_started(directory: MachineDirectory) -> int:
    """The process of a QEMU whose manager died before it could write that down, or 0 if none was started.

    Its monitor tells the thread of a processor, and the kernel whose thread that is.
    """
    if not directory.has_monitor():
        return 0
    deadline = time.monotonic() + _GREETING_TIMEOUT
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connected:
        connected.settimeout(_GREETING_TIMEOUT)
        try:
            connected.connect(directory.socket_address(runtime.MONITORS[0]))
            connected.sendall(b'{"execute":"qmp_capabilities"}{"execute":"query-cpus-fast","id":1}')
            with connected.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    if message.get("id") == 1:
                        return runtime.process_of_thread(int(message["return"][0]["thread-id"]))
                    if time.monotonic() > deadline:
                        break
        except TimeoutError:
            pass
        except OSError:
            return 0  # it has ended meanwhile
    raise StartError(
        f"the QEMU of machine {directory.name} runs, and its monitor gives no answer within {_GREETING_TIMEOUT:g} s",
        hint="another program may hold it",
    )
