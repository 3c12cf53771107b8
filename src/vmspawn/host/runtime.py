# SPDX-License-Identifier: LGPL-2.1-or-later
"""Manages the runtime directory, which has a directory for each machine.

The runtime directory is `$VMSPAWN_RUNTIME_DIR`, else `/run/vmspawn` for root, else `$XDG_RUNTIME_DIR/vmspawn`. A
machine's directory is `NAME/` in it, with mode 0700. The manager holds a flock(2) on the machine's directory as long as
it lives, so an unlocked directory has no manager; its QEMU may still run. Each start imports this module, so it imports
very little.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from typing import Any

from ..aio import sockets
from ..errors import NotConnected, StartError, SystemFailure, UsageError

#: The maximum length of a machine's name, which is used as a host name, in paths and on command lines, as in systemd.
NAME_MAX = 64

_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")

#: Connections that the kernel queues for a busy or starting manager. Beyond them, a non-blocking connect(2) fails.
_BACKLOG = 1024

#: The files of a machine's directory. vmspawn deletes no other files there.
CONTROL = "control"
CONSOLE = "console"
QEMU_INPUT = "qemu-input"
QEMU_OUTPUT = "qemu-output"
QEMU_SIZE = "qemu-console-size"
QEMU_AGENT = "qemu-agent"
STATE = "state.json"
LOG = "qemu.log"
#: The reason for which the watcher ended the machine.
ENDED = "ended"
#: The SSH key of the machine, its public half, and the host keys that its guest has shown. When ssh or ssh-keygen
#: changes the file of host keys, it keeps the old file with the suffix .old.
SSH_KEY = "ssh-key"
SSH_PUBLIC_KEY = "ssh-key.pub"
SSH_KNOWN_HOSTS = "ssh-known-hosts"
#: The seed of cloud-init.
CLOUD_INIT = "cloud-init.iso"
#: The output of a manager in the background.
MANAGER_LOG = "manager.log"
MONITORS = ("qmp-manager", "qmp-sessions", "qmp-bulk")
FILES = (
    CONTROL,
    CONSOLE,
    QEMU_INPUT,
    QEMU_OUTPUT,
    QEMU_SIZE,
    QEMU_AGENT,
    STATE,
    STATE + ".new",
    LOG,
    ENDED,
    MANAGER_LOG,
    SSH_KEY,
    SSH_PUBLIC_KEY,
    SSH_KNOWN_HOSTS,
    SSH_KNOWN_HOSTS + ".old",
    CLOUD_INIT,
    *MONITORS,
)


def runtime_root() -> str:
    """Return the directory that contains the machines' directories.

    Raises UsageError if the environment names no directory.
    """
    if explicit := os.environ.get("VMSPAWN_RUNTIME_DIR"):
        return explicit
    if os.geteuid() == 0:
        return "/run/vmspawn"
    if user := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(user, "vmspawn")
    raise UsageError(
        "no runtime directory: XDG_RUNTIME_DIR is not set", hint="set VMSPAWN_RUNTIME_DIR to a directory that you own"
    )


def prepare_root() -> str:
    """Make the directory that contains the machines' directories, check it, and return its path.

    Raises UsageError if the environment names no directory, StartError if the directory belongs to another user.
    """
    root = runtime_root()
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
        _check_root(root)
    except OSError as error:
        raise StartError(
            f"cannot use the runtime directory {root}: {error.strerror}",
            hint="set VMSPAWN_RUNTIME_DIR to a directory that you own",
        ) from None
    return root


def check_name(name: str) -> str:
    """Return `name` if it is valid for a machine. Raises UsageError if it is not."""
    if not name or len(name) > NAME_MAX or name[0] in ".-" or not _NAME_CHARACTERS.issuperset(name):
        raise UsageError(
            f"invalid machine name {name!r}",
            hint=f"use up to {NAME_MAX} letters, digits, dots, dashes and underscores; begin with a letter or digit",
        )
    return name


class MachineDirectory:
    """One machine's locked directory. Owns its descriptor and the control socket until `remove` or `close`."""

    __slots__ = ("_fd", "_listener", "name", "path")

    def __init__(self, name: str, path: str, fd: int) -> None:
        self.name = name
        self.path = path
        self._fd = fd
        self._listener: socket.socket | None = None

    @classmethod
    def create(cls, name: str) -> MachineDirectory:
        """Make and lock the directory of `name`, and remove the files of a dead manager.

        Raises StartError if a running machine has the name, or the directory belongs to another user.
        """
        path = os.path.join(prepare_root(), check_name(name))
        try:
            fd = _open_locked(path, name)
        except OSError as error:
            raise StartError(f"cannot use the runtime directory {path}: {error.strerror}") from None
        directory = cls(name, path, fd)
        try:
            directory._clean()
        except OSError as error:
            directory.close()
            raise StartError(f"cannot clean the runtime directory {path}: {error.strerror}") from None
        except StartError:
            directory.close()
            raise
        return directory

    @classmethod
    def take_over(cls, name: str) -> MachineDirectory:
        """Lock the directory of a dead manager, remove its control socket, and keep its other files.

        Raises NotConnected if there is no directory, StartError if it has a living manager, or belongs to another user.
        """
        path = os.path.join(runtime_root(), check_name(name))
        try:
            _check_root(runtime_root())
            fd = _open_locked(path, name, create=False)
        except FileNotFoundError:
            raise NotConnected(f"there is no machine named {name}", hint="see: vmctl list") from None
        except OSError as error:
            raise StartError(f"cannot use the runtime directory {path}: {error.strerror}") from None
        directory = cls(name, path, fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(CONTROL, dir_fd=fd)
        return directory

    def __fspath__(self) -> str:
        return self.path

    @property
    def inode(self) -> int:
        """The directory's inode number."""
        return os.fstat(self._fd).st_ino

    def file(self, name: str) -> str:
        """Return the path of a file in the directory."""
        return os.path.join(self.path, name)

    def socket_address(self, name: str) -> str:
        """Return an address for bind(2) and connect(2) that fits into 108 bytes, for paths of any length."""
        return f"/proc/self/fd/{self._fd}/{name}"

    def write(self, name: str, content: bytes) -> None:
        """Replace a file's content atomically, even in a crash."""
        fd = os.open(name + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        try:
            # A nearly full file system writes a part, and reports an error at the next write.
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(name + ".new", name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        os.fsync(self._fd)

    def read(self, name: str) -> bytes:
        """Read a file. Raises OSError."""
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._fd)
        with open(fd, "rb") as file:
            return file.read()

    def has_monitor(self) -> bool:
        """Return whether a QEMU serves the manager's monitor in this directory, even if it has another client."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(self.socket_address(MONITORS[0]))
            except BlockingIOError:
                return True  # the monitor's queue of connections is full
            except OSError:
                return False
            return True

    def listen(self) -> socket.socket:
        """Make the control socket. Clients may call from now on; their calls wait until the manager serves the socket.

        The directory owns the socket until `take_listener`. Raises OSError.
        """
        self._listener = sockets.listen(self.socket_address(CONTROL), _BACKLOG)
        return self._listener

    def take_listener(self) -> socket.socket:
        """Return the control socket, which is made if `listen` was not called. The caller owns it. Raises OSError."""
        taken = self._listener or self.listen()
        self._listener = None
        return taken

    def refuse(self) -> None:
        """Remove a control socket that this manager will not serve, and disconnect the clients that wait."""
        if self._listener is not None:
            os.unlink(CONTROL, dir_fd=self._fd)
            self._close_listener()

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def create_log(self) -> int:
        """Open a new `qemu.log` for appending. The caller owns the descriptor."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        return os.open(LOG, flags, 0o600, dir_fd=self._fd)

    def read_log(self) -> str:
        """Read QEMU's standard error."""
        try:
            with open(self.file(LOG), encoding="utf-8", errors="replace") as log:
                return log.read()
        except OSError:
            return ""

    def read_ended(self) -> str:
        """Read the reason for which the watcher ended the machine. Returns an empty string if it did not end it."""
        try:
            return self.read(ENDED).decode(errors="replace")
        except OSError:
            return ""

    def remove(self) -> None:
        """Delete the directory with vmspawn's files, and unlock it."""
        if self._fd < 0:
            return
        self._unlink_files()
        try:
            os.rmdir(self.path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise
        finally:
            self.close()

    def close(self) -> None:
        """Unlock the directory and keep it."""
        self._close_listener()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _clean(self) -> None:
        pid = running_qemu(self.path)
        # A manager that died while it started QEMU has not recorded QEMU's process id.
        if pid or self.has_monitor():
            process = f" (QEMU is process {pid})" if pid else ""
            raise StartError.with_fields(
                "machine {machine} still runs without its manager{process}",
                hint="adopt it with: vmctl adopt {machine}; or choose another name with {name=}",
                machine=self.name,
                process=process,
            )
        self._unlink_files()

    def _unlink_files(self) -> None:
        for name in FILES:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._fd)


def _open_locked(path: str, name: str, *, create: bool = True) -> int:
    """Lock the directory at `path`, and create it first if `create` is true. The caller owns the descriptor."""
    while True:
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            _check_ours(fd, path)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous owner may have removed the directory between open and lock, so compare path and descriptor.
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                return fd
        except BlockingIOError:
            os.close(fd)
            if not create:
                holder = lock_holder(path)
                who = f"is run by process {holder}" if holder else "has a living manager"
                raise StartError(f"machine {name} {who}", hint=f"see: vmctl status {name}") from None
            raise StartError.with_fields(
                "a machine named {machine} is already running", hint="choose another name with {name=}", machine=name
            ) from None
        except FileNotFoundError:
            if not create:
                os.close(fd)
                raise
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _check_root(root: str) -> None:
    """Raise StartError if another user may write to the machines' directories, whose files vmspawn trusts."""
    found = os.lstat(root)
    if not stat.S_ISDIR(found.st_mode):
        raise StartError(f"the runtime directory {root} is not a directory", hint="it cannot be a symbolic link")
    if found.st_uid != os.geteuid():
        raise StartError(f"the runtime directory {root} belongs to another user", hint="set VMSPAWN_RUNTIME_DIR")
    if stat.S_IMODE(found.st_mode) & 0o022:
        raise StartError(f"other users may write to the runtime directory {root}", hint=f"chmod go-w {root}")


def _check_ours(fd: int, path: str) -> None:
    found = os.fstat(fd)
    if found.st_uid != os.geteuid():
        raise StartError(f"the runtime directory {path} belongs to another user")
    if stat.S_IMODE(found.st_mode) & 0o077:
        os.fchmod(fd, 0o700)


def machine_names() -> list[str]:
    """Return the sorted names of the machines' directories, whether the machines have managers or not.

    Raises UsageError if the environment names no runtime directory, SystemFailure if it cannot be read.
    """
    root = runtime_root()
    try:
        return sorted(name for name in os.listdir(root) if name[0] not in ".-")
    except FileNotFoundError:
        return []  # no machine was started yet
    except OSError as error:
        raise SystemFailure(f"cannot read the runtime directory {root}", error.errno or errno.EIO) from None


def read_state(path: str) -> dict[str, Any]:
    """Return the content of the state.json in a machine's directory. Raises OSError or ValueError."""
    import json

    with open(os.path.join(path, STATE), "rb") as file:
        found = json.load(file)
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found


def running_qemu(path: str) -> int:
    """Return the process id of the QEMU in a directory's state if that process still runs, else 0."""
    try:
        process = read_state(path)["qemu"]
        pid, started = int(process["pid"]), int(process["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return pid if start_time(pid) == started else 0


def is_starting(path: str) -> bool:
    """Return whether the machine with this directory has no QEMU yet, or loads a saved state."""
    try:
        state = read_state(path)
        return not state["qemu"]["pid"] or state.get("loading") is not None
    except (OSError, ValueError, KeyError, TypeError):
        return True


def lock_holder(path: str) -> int:
    """Return the process id of the manager that holds a directory's lock, or 0 if it is not known."""
    try:
        inode = os.stat(path).st_ino
        with open("/proc/locks", "rb") as file:
            locks = [line.split() for line in file]
    except OSError:
        return 0
    for lock in locks:
        # A line is `1: FLOCK ADVISORY WRITE 1234 00:1b:5678 0 EOF`; a waiting lock has an arrow after its number.
        if lock[1] == b"FLOCK" and lock[5].rpartition(b":")[2] == str(inode).encode():
            return max(0, int(lock[4]))
    return 0


def start_time(pid: int) -> int:
    """Return a process's start in clock ticks since boot (proc(5), field 22 of stat), or 0 if it does not exist."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0
    # A zombie has ended, but its parent has not reaped it.
    return 0 if fields[0] == b"Z" else int(fields[19])


#: The states in which a process cannot answer: their letters in proc(5), and their descriptions.
_PROCESS_STATES = {
    "T": "is stopped (as by SIGSTOP)",
    "t": "is stopped by a debugger",
    "D": "waits in the kernel, perhaps for the host's storage",
}


def process_trouble(pid: int) -> str:
    """Return the reason why a process may not answer, to be printed after its name, or an empty string."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return _PROCESS_STATES.get(file.read().rpartition(b")")[2].split()[0].decode(), "")
    except OSError:
        return ""


def process_of_thread(tid: int) -> int:
    """Return the process id of a thread (proc(5), Tgid of status), or 0 if it does not exist."""
    with contextlib.suppress(OSError), open(f"/proc/{tid}/status", "rb") as file:
        return next((int(line.split()[1]) for line in file if line.startswith(b"Tgid:")), 0)
    return 0


def age(started: int) -> float:
    """Return the seconds since a time that `start_time` returned."""
    import time

    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
