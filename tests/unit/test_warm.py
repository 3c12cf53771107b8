# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the key of a warm snapshot, which changes with everything that it depends on, and the locks of the cache."""

import fcntl
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.commands import DEADLINE
from tests.machines import links_of
from vmspawn import MachineConfig, UsageError
from vmspawn.boot.config import ConsoleTerminal, check_config
from vmspawn.boot.plan import Choices, Kernel
from vmspawn.boot.qemu import QemuBinary
from vmspawn.hotplug import places
from vmspawn.snapshots import warm

BINARY = QemuBinary("/bin/true", (7, 2, 0), "x86_64", False, False, True)


def choices(accelerator: str = "tcg", binary: QemuBinary = BINARY, **options: Any) -> Choices:
    config = check_config(MachineConfig(guest="builtin", warm=True)._replace(**options))
    kernel = Kernel("/bin/sh", "/bin/cat", ())
    return Choices(config, binary, accelerator, "", places.layout("q35", None, namespaces=False), kernel)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "other"},
        {"console": "headless", "console_log": "/tmp/log"},
        {"shutdown_timeout": 3.0, "time_limit": 5.0},
        {"die_with_program": True},
        {"ram": 256 << 20},
        {"qemu": "/usr/bin/qemu-system-x86_64"},
    ],
)
def test_options_that_copies_may_differ_in_do_not_change_the_key(options: dict[str, Any]) -> None:
    assert warm.key(choices(**options)) == warm.key(choices())


@pytest.mark.parametrize(
    "options",
    [
        {"ram": 512 << 20},
        {"cpus": 2},
        {"machine_type": "pc"},
        {"hotplug_ports": 3},
        {"kernel_arguments": ("debug",)},
        {"network_user": True},
        {"agent": False},
        {"console_transport": "virtio"},
        {"uuid": "6ba7b810-9dad-11d1-80b4-00c04fd430c8"},
        {"vendor_strings": ("x",)},
        {"terminal": ConsoleTerminal("xterm", 24, 80)},
        {"accelerator": "kvm"},
        {"binary": BINARY._replace(version=(7, 2, 1))},
        {"binary": BINARY._replace(path="/bin/false")},
    ],
)
def test_everything_else_changes_the_key(options: dict[str, Any]) -> None:
    assert warm.key(choices(**options)) != warm.key(choices())


def test_the_size_of_a_window_does_not_change_the_key() -> None:
    small, large = ConsoleTerminal("xterm", 24, 80), ConsoleTerminal("xterm", 50, 200)
    assert warm.key(choices(terminal=small)) == warm.key(choices(terminal=large))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guest": None, "image": "a.raw"}, "warm=True needs guest='builtin'"),
        ({"image": "a.raw"}, "warm=True does not work with image="),
        ({"qemu_arguments": ("-device", "x")}, "warm=True does not work with qemu_arguments="),
        ({"console": "native"}, "warm=True does not work with console='native'"),
    ],
)
def test_options_that_a_copy_cannot_have_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_config(MachineConfig(guest="builtin", warm=True)._replace(**options))


def flock(path: Path, kind: int) -> int:
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def times_open(path: Path) -> int:
    """Return the number of this process's descriptors of a file."""
    return links_of(os.getpid()).count(str(path))


def test_a_removed_lock_file_is_not_a_lock(tmp_path: Path) -> None:
    """Otherwise, another process could lock a new file of the same name, and both would make the snapshot."""
    path = tmp_path / "key.lock"
    is_locked, is_done = threading.Event(), threading.Event()

    def lock() -> None:
        with warm._locked(str(path)):
            is_locked.set()
            is_done.wait(DEADLINE)

    with warm._locked(str(path)):
        waiter = threading.Thread(target=lock, daemon=True)
        waiter.start()
        deadline = time.monotonic() + DEADLINE
        while times_open(path) < 2:
            assert time.monotonic() < deadline, "the thread has not opened the file"
            time.sleep(0.01)
        path.unlink()
    try:
        assert is_locked.wait(DEADLINE)
        with pytest.raises(BlockingIOError):
            flock(path, fcntl.LOCK_EX)
    finally:
        is_done.set()
        waiter.join(DEADLINE)


def test_the_oldest_snapshots_are_removed_unless_they_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMSPAWN_CACHE_DIR", str(tmp_path))
    cached = tmp_path / "warm"
    for number in range(12):
        (cached / f"key{number}").mkdir(parents=True)
        (cached / f"key{number}" / "manifest.json").touch()
        (cached / f"key{number}.lock").touch()
        os.utime(cached / f"key{number}", (number, number))
    used = flock(cached / "key1" / "manifest.json", fcntl.LOCK_SH)
    made = flock(cached / "key2.lock", fcntl.LOCK_EX)
    warm._remove_oldest()
    os.close(used)
    os.close(made)
    kept = {each.name for each in cached.iterdir()}
    keys = {"key1", *(f"key{number}" for number in range(5, 12))}
    assert kept == keys | {f"{key}.lock" for key in keys} | {"key2.lock"}
