# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts the built-in guest from a snapshot of a booted guest, the *warm snapshot* (`warm=True`).

The first start makes the snapshot (`warm_maker.py`); other starts at the same time wait for it. The cache keeps it
under a key, the fingerprint of everything that the snapshot depends on: QEMU's binary, the accelerator and processor,
the guest's kernel and initramfs, this package, and the machine's configuration without the fields that may differ
between copies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator

from ..aio.programs import check_cancelled
from ..boot.config import MachineConfig
from ..boot.launch import system_failures
from ..boot.plan import Choices, Reporter, choose
from ..boot.started import Started
from ..cache import cache_directory
from ..errors import NoSuchSnapshot, StartError
from ..fingerprint import fingerprint_strings
from ..host import runtime
from ..images.snapshot_files import MANIFEST
from ..version import VERSION
from .directory import CONSOLE, OpenSnapshot
from .fork import start_copy

#: Snapshots that are kept in the cache. Each takes as much space as its guest has used of its memory, about 100 MB.
_KEPT = 8

#: Fields that may differ between a copy and its source.
_OWN = (
    *("name", "console", "console_log", "qmp_log", "qemu", "kvm", "shutdown_timeout", "time_limit", "registration"),
    *("die_with_program", "die_with_parent", "warm"),
)

#: The fields of /proc/cpuinfo that differ between the processors of one host, or change with time.
_VARYING = ("processor", "cpu MHz", "bogomips", "core id", "physical id", "apicid", "initial apicid", "siblings")

#: Seconds between two checks whether another process has made the snapshot.
_LOCK_INTERVAL = 0.05


@system_failures("start the machine")
def start(
    config: MachineConfig,
    *,
    notice: Callable[[str], None] = lambda _: None,
    detail: Callable[[str], None] = lambda _: None,
    on_begin: Callable[[], None] = lambda: None,
) -> Started:
    """Start a machine from its warm snapshot, with the arguments of `launch`. Raises what `launch` and `fork` raise."""
    runtime.prepare_root()
    chosen = choose(config, Reporter(notice, detail))
    if chosen.why_emulated:
        detail(f"no KVM ({chosen.why_emulated}), so the guest is emulated and slow")
    path = os.path.join(directory(), key(chosen))
    with contextlib.closing(_opened(path, chosen.config, notice)) as snapshot:
        with open(os.path.join(path, CONSOLE), "rb") as file:
            shown = file.read()
        return start_copy(snapshot, chosen.config, None, on_begin=on_begin, shown=shown)


def directory() -> str:
    """Return the directory of all warm snapshots."""
    return os.path.join(cache_directory(), "warm")


# The key.


def key(chosen: Choices) -> str:
    """Return the name of the warm snapshot for a configuration: a fingerprint of everything that it depends on."""
    assert chosen.kernel is not None
    files = (os.path.realpath(chosen.binary.path), chosen.kernel.path, chosen.kernel.initrd or "")
    parts = [VERSION, *_package(), repr(shape(chosen.config)), chosen.accelerator, repr(chosen.binary)]
    parts += [_identity(path) for path in files if path]
    if chosen.accelerator == "kvm":
        parts += [os.uname().release, _processor()]
    return fingerprint_strings(parts)


def shape(config: MachineConfig) -> MachineConfig:
    """Return the configuration without the fields that may differ between a copy and its source."""
    default = MachineConfig()
    own = {name: getattr(default, name) for name in _OWN}
    terminal = config.terminal._replace(rows=0, columns=0) if config.terminal is not None else None
    return config._replace(**own, terminal=terminal, ram=config.ram_bytes)


def _package() -> list[str]:
    """Return the identities of this package's files: another version may write another command line."""
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return [
        _identity(os.path.join(folder, name))
        for folder, _, names in sorted(os.walk(home))
        for name in sorted(names)
        if name.endswith(".py")
    ]


def _identity(path: str) -> str:
    found = os.stat(path)
    return f"{path} {found.st_size} {found.st_mtime_ns}"


def _processor() -> str:
    """Return the lines of /proc/cpuinfo about the first processor, without the fields that vary."""
    with open("/proc/cpuinfo") as file:
        lines = file.read().partition("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.partition("\t")[0].strip() not in _VARYING)


# The snapshot.


def _opened(path: str, config: MachineConfig, notice: Callable[[str], None]) -> OpenSnapshot:
    """Open a warm snapshot, which is made first if it does not exist. Raises StartError."""
    found = _open(path, notice)
    if found is None:
        os.makedirs(directory(), mode=0o700, exist_ok=True)
        with _locked(path + ".lock") as lock:
            # Another process may have made it meanwhile.
            found = _open(path, notice)
            if found is None:
                _make(path, config, notice, lock)
                found = OpenSnapshot(os.path.basename(path), directory())
    # `_remove_oldest` compares this time.
    os.utime(path)
    return found


def _open(path: str, notice: Callable[[str], None]) -> OpenSnapshot | None:
    try:
        return OpenSnapshot(os.path.basename(path), directory())
    except NoSuchSnapshot:
        return None
    except StartError as error:
        notice(f"cannot use the booted guest in the cache, booting it again: {error}")
        return None


@contextlib.contextmanager
def _locked(path: str) -> Iterator[int]:
    """Hold a lock file; yields its descriptor. Raises Cancelled if the work of this thread is cancelled."""
    fd = _lock(path)
    try:
        yield fd
    finally:
        os.close(fd)


def _lock(path: str) -> int:
    """Lock a file; returns its descriptor. Starts again if another process has removed the file meanwhile."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _wait_for_lock(fd)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(fd)):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _wait_for_lock(fd: int) -> None:
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            check_cancelled()
            time.sleep(_LOCK_INTERVAL)


def _make(path: str, config: MachineConfig, notice: Callable[[str], None], lock: int) -> None:
    """Make a warm snapshot at a path. Raises StartError."""
    from .warm_maker import run_maker, scratch_prefix

    notice("booting the built-in guest once, for this warm start and later ones")
    _remove_oldest()
    for name in os.listdir(directory()):
        # Remove an unusable snapshot and the directories of killed makers. No maker runs: this process has the lock.
        if name == os.path.basename(path) or name.startswith(scratch_prefix(path)):
            shutil.rmtree(os.path.join(directory(), name), ignore_errors=True)
    run_maker(path, shape(config)._replace(qemu=config.qemu, kvm=config.kvm), lock)


def _remove_oldest() -> None:
    """Make room for another snapshot."""
    found = []
    for entry in os.scandir(directory()):
        with contextlib.suppress(OSError):
            os.stat(os.path.join(entry.path, MANIFEST))
            found.append((entry.stat().st_mtime, entry.path))
    for _, path in sorted(found, reverse=True)[_KEPT - 1 :]:
        with contextlib.suppress(OSError):
            fd = os.open(os.path.join(path, MANIFEST), os.O_RDONLY | os.O_CLOEXEC)
            try:
                # Each QEMU that uses it has a shared lock.
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)
            _remove_lock(path + ".lock")


def _remove_lock(path: str) -> None:
    """Remove a lock file. Raises OSError if another process has locked it."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    finally:
        os.close(fd)
