# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a checked configuration to a running QEMU, synchronously and with as few imports as that needs.

QEMU takes a moment to start in any case; whatever the manager still has to import, it imports meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from .. import log as log_to
from ..aio.sockets import listen
from ..errors import StartError, SystemFailure, VmspawnError
from ..host import consolelog, fifos, runtime, scope
from ..host.consolelog import ConsoleLog
from ..host.fifos import ConsolePipes
from ..host.runtime import MachineDirectory
from ..hotplug import places
from . import console
from . import state as states
from .commandline import Boot, BootDisk, Inherited, command_line
from .config import MachineConfig
from .disks import open_boot_disks, without_effect
from .extras import Additions
from .plan import complete, prepare
from .qemu import QemuBinary, choose_accelerator, find_qemu
from .state import SavedQemu, State, StateFile

if TYPE_CHECKING:
    from ..guest.builtin import BuiltinGuest

#: Signals that ask for an end. The command blocks them from the first moment until its supervisor listens to them.
END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

# What QEMU gets with its default action, whatever we make of it.
_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGTSTP, signal.SIGUSR1, signal.SIGUSR2, *END_SIGNALS)

# Connections to one of QEMU's sockets that wait; there is one, and another after a change of managers.
_BACKLOG = 4

# Bytes of output that a virtio console has room for; QEMU drops what does not fit. The most that anybody may ask for.
_VIRTIO_CAPACITY = 1 << 20

# Clients of the console that wait while we are busy.
_CLIENTS_BACKLOG = 64

#: Of our environment QEMU gets what it can use, and nothing that may be secret or change what it loads.
ENVIRONMENT = ("PATH", "HOME", "LANG", "TMPDIR", "XDG_RUNTIME_DIR", "DISPLAY", "XAUTHORITY", "WAYLAND_DISPLAY")

#: What QEMU is told beside that. Without a session bus its GTK would start one, and the sandbox kill it for that.
OVERRIDES = {"DBUS_SESSION_BUS_ADDRESS": "disabled:"}


class Launched:
    """A QEMU that has just been started, and all that belongs to it.

    Owns the directory, the process, and our connected ends of its sockets, until somebody takes them; `abandon` ends
    and removes what is still there.
    """

    def __init__(self, config: MachineConfig, binary: QemuBinary, layout: places.Layout) -> None:
        self.config = config
        self.binary = binary
        self.layout = layout
        self.accelerator = ""
        self.directory: MachineDirectory | None = None
        self.boot_disks: tuple[BootDisk, ...] = ()
        self.sockets: dict[str, socket.socket] = {}
        self.additions = Additions()
        #: Our ends of the console's pipes, for what is typed and what is shown, or nothing.
        self.console: tuple[int, ...] = ()
        #: QEMU's log of the console, if that is shared.
        self.kept: ConsoleLog | None = None
        #: The file of `--log=`, or -1.
        self.console_log = -1
        self.pid = 0
        #: What the last manager wrote down, if this one takes over from it.
        self.saved: State | None = None

    def leave(self) -> None:
        """Let go of a QEMU that runs on, and its helpers, for another manager to take over. May be called again."""
        self._close_sockets()
        if self.directory is not None:
            self.directory.close()
            self.directory = None

    def abandon(self) -> None:
        """Kill QEMU if it runs, close every descriptor and remove the directory. May be called again."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        self._close_sockets()
        self.additions.end_helpers()
        if self.directory is not None:
            self.directory.remove()
            self.directory = None

    def _close_sockets(self) -> None:
        for connected in self.sockets.values():
            connected.close()
        self.sockets.clear()
        for fd in self.console:
            os.close(fd)
        self.console = ()
        if self.kept is not None:
            self.kept.close()
            self.kept = None
        if self.console_log >= 0:
            os.close(self.console_log)
            self.console_log = -1
        self.close_images()
        self.additions.close()

    def close_images(self) -> None:
        """Close our descriptors of the boot disks; QEMU has its own by then."""
        for each in self.boot_disks:
            each.close()


@contextlib.contextmanager
def system_failures(what: str) -> Iterator[None]:
    """What no option is to blame for, as one line: no descriptors, no memory, no room."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise SystemFailure(f"cannot {what}{where}", error.errno or errno.EIO) from None


@system_failures("start the machine")
def launch(
    config: MachineConfig,
    *,
    notice: Callable[[str], None] = lambda _: None,
    detail: Callable[[str], None] = lambda _: None,
    begin: Callable[[], None] = lambda: None,
) -> Launched:
    """Start QEMU. `notice` is told, in one line, what the user would want to know of how it is started, and `detail`
    what only one who looks closely would. `begin` is called ahead of all that would have to be undone; the built-in
    guest may have been built by then, which takes long.

    Raises StartError, SystemFailure, UsageError or what the disks raise; nothing is left behind then.
    """
    _check_display(config)
    config = complete(config)
    for line in without_effect(config):
        notice(line)
    binary = find_qemu(config.qemu, config.machine_type)
    layout = places.layout(config.machine_type, config.hotplug_ports, namespaces=binary.namespaces)
    launched = Launched(config, binary, layout)
    try:
        accelerator, why = choose_accelerator(config.kvm, binary.architecture)
        launched.accelerator = accelerator
        boot = _boot(config, binary.architecture, notice)
        begin()
        launched.console_log = open_console_log(config.console_log)
        launched.directory = MachineDirectory.create(config.name or "")
        launched.boot_disks = open_boot_disks(config, layout, launched.directory.path)
        if why:
            notice(f"no KVM ({why}), so the guest is emulated and slow")
        if boot is None:
            launched.additions.vendor_strings += console.vendor_strings(config)
        boot = prepare(launched, boot, console.kernel_arguments(config), notice, detail)
        _start(launched, boot)
    except BaseException:
        launched.abandon()
        raise
    return launched


def _check_display(config: MachineConfig) -> None:
    if config.console == "gui" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise StartError(
            "--console=gui needs a display, and neither DISPLAY nor WAYLAND_DISPLAY is set",
            hint="start it in a graphical session, or use another --console=",
        )


def _boot(config: MachineConfig, architecture: str, notice: Callable[[str], None]) -> Boot | None:
    console_arguments = console.kernel_arguments(config)
    if config.guest:
        guest = _builtin_guest(architecture, notice)
        return Boot(guest.kernel, guest.initrd, (*console_arguments, *guest.arguments, *config.kernel_arguments))
    if config.linux is None:
        return None
    _check_readable("--linux=", config.linux)
    if config.initrd:
        _check_readable("--initrd=", config.initrd)
    return Boot(config.linux, config.initrd, (*console_arguments, *config.kernel_arguments))


def _builtin_guest(architecture: str, notice: Callable[[str], None]) -> BuiltinGuest:
    from ..guest import builtin

    if guest := builtin.find(architecture):
        return guest
    from ..guest.build import build

    return build(architecture, progress=notice)


def _check_readable(option: str, path: str) -> None:
    """QEMU reads these by path; say what is wrong before it does."""
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise StartError(f"cannot use {option}{path}: the file is empty")
    except OSError as error:
        raise StartError(f"cannot use {option}{path}: {error.strerror}") from None


def open_console_log(path: str | None) -> int:
    """Open the console's transcript for appending; the caller owns the descriptor. -1 if none is wanted."""
    if path is None:
        return -1
    try:
        # Not to wait for the reader of a pipe.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(f"cannot use --log={path}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode) and os.path.realpath(path) != os.devnull:
        os.close(fd)
        raise StartError(f"cannot use --log={path}: not a regular file")
    return fd


def _start(launched: Launched, boot: Boot | None) -> None:
    directory = launched.directory
    assert directory is not None
    # QEMU inherits them listening, so that we can connect at once, without waiting for it to come up.
    names = [*runtime.MONITORS, *([runtime.QEMU_SIZE] if console.has_size_port(launched.config) else ())]
    listeners = {name: listen(directory.socket_address(name), _BACKLOG) for name in names}
    log = directory.create_log()
    try:
        if console.is_logged(launched.config):
            launched.kept = ConsoleLog.make()
        kept = [launched.kept.fd] if launched.kept else []
        monitors = {name: listeners[name].fileno() for name in runtime.MONITORS}
        arguments = command_line(
            launched.binary,
            launched.config,
            launched.accelerator,
            launched.layout,
            boot,
            launched.boot_disks,
            Inherited(
                monitors, listeners[runtime.QEMU_SIZE].fileno() if runtime.QEMU_SIZE in names else -1, *(kept or [-1])
            ),
            launched.additions,
        )
        arguments[:0] = scope.prefix(launched.config.registration, launched.config.name or "")
        images = [fd for each in launched.boot_disks for fd in each.descriptors]
        keep = [
            *(listener.fileno() for listener in listeners.values()),
            *images,
            *launched.additions.descriptors,
            *kept,
        ]
        log_to.debug(f"runs {' '.join(arguments)}")
        # Ahead of the start, so that a QEMU whose manager dies in between can be found.
        _write_state(launched)
        if console.is_shared(launched.config):
            _spawn_with_pipes(launched, arguments, keep, log)
        else:
            launched.pid = spawn(arguments, keep=keep, log=log, streams=(0, 1))
        _write_state(launched)
        connect(launched, names)
    finally:
        os.close(log)
        for listener in listeners.values():
            listener.close()
    launched.close_images()
    launched.additions.close()


def _write_state(launched: Launched) -> None:
    assert launched.directory is not None
    qemu = SavedQemu(launched.pid, runtime.start_time(launched.pid), launched.accelerator)
    file = StateFile(launched.directory, launched.config, launched.binary, qemu, launched.additions.helpers)
    file.write(states.boot_storage(launched.boot_disks))


def _spawn_with_pipes(launched: Launched, arguments: list[str], keep: list[int], log: int) -> None:
    """Start QEMU with the console's pipes as its standard streams."""
    assert launched.directory is not None
    capacity = _VIRTIO_CAPACITY if launched.config.console_transport == "virtio" else 0
    pipes: ConsolePipes = fifos.make(launched.directory, capacity=capacity)
    launched.console = (pipes.typed, pipes.shown)
    try:
        with consolelog.bounded() if launched.kept else contextlib.nullcontext():
            launched.pid = spawn(arguments, keep=keep, log=log, streams=(pipes.qemu_input, pipes.qemu_output))
    finally:
        os.close(pipes.qemu_input)
        os.close(pipes.qemu_output)


def connect(launched: Launched, names: Sequence[str]) -> None:
    """Connect to QEMU's sockets of these names; at its start while we still hold their listening ends, so that it
    cannot fail for QEMU's haste. Raises OSError.

    What our own clients connect to, to see the console, listens from now on as well.
    """
    assert launched.directory is not None
    if launched.console:
        address = launched.directory.socket_address(runtime.CONSOLE)
        launched.sockets[runtime.CONSOLE] = listen(address, _CLIENTS_BACKLOG)
    for name in names:
        launched.sockets[name] = connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Not blocking, so that where others wait for the same socket, we are told.
        connected.setblocking(False)
        connected.connect(launched.directory.socket_address(name))


def spawn(arguments: list[str], *, keep: list[int], log: int, streams: tuple[int, int] | None = None) -> int:
    """Start a program that outlives us if we die: a session of its own, and errors to a log.

    `streams` become its standard input and output, which are nothing and the log otherwise. It inherits exactly `keep`
    beside them, as the numbers they have here. All stay the caller's. Returns its process id.
    """
    actions: list[tuple[object, ...]] = [
        (os.POSIX_SPAWN_DUP2, streams[0], 0) if streams else (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, streams[1] if streams else log, 1),
        (os.POSIX_SPAWN_DUP2, log, 2),
    ]
    # Duplicating a descriptor onto itself makes it inheritable in the child alone.
    actions += [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in keep]
    actions += [(os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable() if fd not in keep]
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    environment |= OVERRIDES
    try:
        return os.posix_spawn(
            arguments[0],
            arguments,
            environment,
            file_actions=actions,
            setsid=True,
            setsigmask=[],
            setsigdef=_DEFAULT_SIGNALS,
        )
    except OSError as error:
        raise StartError(f"cannot run QEMU {arguments[0]}: {os.strerror(error.errno or errno.ENOEXEC)}") from None


def _inheritable() -> list[int]:
    """Descriptors above the standard ones that whoever started us left open for children."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if (fd := int(name)) > 2 and os.get_inheritable(fd):
                found.append(fd)
        except OSError:
            pass  # the descriptor of the listing itself
    return found


def explain_failure(launched: Launched, end: str, log: str) -> VmspawnError:
    """Why QEMU ended before it was up, from how it did and what it printed, in the user's words where we know them."""
    lines = [line for line in log.strip().splitlines() if line.strip() and "warning:" not in line]
    if not lines:
        return StartError(f"QEMU {end} as soon as it was started, without a word", hint="is something killing it?")
    blamed = next((each for each in launched.boot_disks if _mentions(log, each)), None)
    if "lock" in log and "Failed to get" in log and blamed is not None:
        return StartError(
            f"cannot use {blamed.disk.path}: another process uses the image (QEMU could not lock it)",
            hint="shut down the other machine, or give this one a copy",
        )
    message = lines[0].partition("qemu-system-")[2].partition(": ")[2] or lines[0]
    if blamed is not None:
        message = f"{blamed.disk.path}: {message.rpartition('}: ')[2]}"
    return StartError(f"QEMU could not start: {message}")


def _mentions(log: str, each: BootDisk) -> bool:
    names = (each.image.file_node, each.image.format_node, each.identifiers.pivot, f"fdset/{each.image.fdset}")
    return any(re.search(rf"\b{re.escape(name)}\b", log) for name in names)
