# SPDX-License-Identifier: LGPL-2.1-or-later
"""Boots a Debian tree with the newest systemd and QEMU as a container with its own PID 1: the box.

The tests of `interop` run systemd's own clients in the box, against machines that vmspawn runs there. `./dev box run`
opens a shell in it. The box needs root for namespaces and mounts. Its mounts and processes end with it.
"""

import argparse
import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmspawn.errors import GuestError
from vmspawn.guest.build import build

PROJECT = Path(__file__).parents[2]

#: The directory of the tree, which takes minutes to make. All checkouts share it.
TREE = Path(
    os.environ.get("VMSPAWN_BOX_TREE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "vmspawn-box")
)

SUITE = "forky"
PACKAGES = (
    "systemd",
    "systemd-container",
    "qemu-system-x86",
    "qemu-system-arm",
    "qemu-utils",
    "virtiofsd",
    "ovmf",
    "dbus",
    "python3",
    "busybox-static",
    "zstd",
    "fdisk",
    "syslinux",
    "syslinux-common",
    "mtools",
    "dosfstools",
    "e2fsprogs",
    "cpio",
    "groff",
    "jq",
    "openssh-client",
)

#: Seconds within which a box must boot (it takes three), within which a command in it must end by default, and within
#: which debootstrap or pip must end.
BOOT_TIMEOUT = 90.0
RUN_TIMEOUT = 60.0
MAKE_TIMEOUT = 1800.0

#: Ends the box when the process that booted it is killed.
_DIE_WITH_PARENT = ("setpriv", "--pdeathsig=KILL", "--")

#: The beginnings of the names of development dependencies that no test imports.
_NOT_NEEDED = ("mypy", "ruff", "types-")


class BoxError(Exception):
    """The box could not be made or booted. The message has the reason."""


def reason_unavailable() -> str:
    """Return the reason why a box cannot run on this host, or an empty string."""
    if os.geteuid() != 0:
        return "the box needs root"
    for program in ("unshare", "nsenter", "setpriv", "chroot", "mount"):
        if not shutil.which(program):
            return f"the box needs {program}"
    if "overlay" not in Path("/proc/filesystems").read_text().split():
        return "this kernel has no overlay file system"
    if _cgroup_root() is None:
        return "this host has no writable cgroup2 hierarchy"
    if not is_made():
        return f"there is no tree at {TREE}; make it with: ./dev box make"
    return ""


def is_made() -> bool:
    """Return whether the tree exists."""
    return (TREE / "usr/lib/systemd/systemd").exists()


def make() -> None:
    """Build the tree with debootstrap, from the mirror that this host's apt uses. Raises BoxError."""
    if TREE.exists():
        raise BoxError(f"there is a box already, in {TREE}; to make another, first: rm -r {TREE}")
    debootstrap = shutil.which("debootstrap")
    if debootstrap is None:
        raise BoxError("debootstrap is not installed")
    partial = TREE.with_name(TREE.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    scripts = Path("/usr/share/debootstrap/scripts")
    script = next((str(scripts / name) for name in (SUITE, "sid") if (scripts / name).exists()), SUITE)
    command = [debootstrap, "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(partial), mirror()]
    done = subprocess.run([*command, script], stdin=subprocess.DEVNULL, timeout=MAKE_TIMEOUT, check=False)
    if done.returncode != 0:
        raise BoxError(f"debootstrap failed; its incomplete tree is in {partial}")
    partial.rename(TREE)


def mirror() -> str:
    """Return the first Debian mirror in apt's configuration. Raises BoxError."""
    for path in (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")):
        for line in path.read_text().splitlines() if path.exists() else ():
            words = line.split()
            if words[:1] == ["URIs:"]:
                return words[1]
            if words[:1] == ["deb"]:
                return next(word for word in words[1:] if "://" in word)
    raise BoxError("apt has no source from which to build a Debian tree")


def _cgroup_root() -> Path | None:
    for candidate in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")):
        if (candidate / "cgroup.procs").exists() and os.access(candidate, os.W_OK):
            return candidate
    return None


def _python_packages() -> Path:
    """Return the directory of packages for the box's Python. Fetches them if the version or the list has changed."""
    version = subprocess.run(
        ["chroot", str(TREE), "python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        capture_output=True,
        text=True,
        check=True,
        timeout=RUN_TIMEOUT,
    ).stdout.strip()
    project: dict[str, Any] = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    wanted = [each for each in wanted if not each.startswith(_NOT_NEEDED)]
    target = PROJECT / ".cache" / "box" / f"python{version}"
    stamp = target / "vmspawn-packages"
    if stamp.exists() and stamp.read_text() == "\n".join(wanted):
        return target
    shutil.rmtree(target, ignore_errors=True)
    digits = version.replace(".", "")
    options = ["--only-binary=:all:", "--implementation=cp", f"--python-version={version}"]
    options += [f"--abi={abi}" for abi in (f"cp{digits}", "abi3", "none")]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
    done = subprocess.run(
        [*command, *options, f"--target={target}", *wanted],
        capture_output=True,
        text=True,
        timeout=MAKE_TIMEOUT,
        check=False,
    )
    if done.returncode != 0:
        raise BoxError(f"pip could not install for the box's Python: {done.stderr.strip().splitlines()[-1]}")
    stamp.write_text("\n".join(wanted))
    return target


class Box:
    """A booted box. Owns the process that holds its namespaces; `close` ends all processes in it."""

    def __init__(self) -> None:
        if reason := reason_unavailable():
            raise BoxError(reason)
        self._python = _python_packages()
        self._state = Path(tempfile.mkdtemp(prefix="vmspawn-box-"))
        self._cgroup = self._make_cgroup()
        self._holder: subprocess.Popen[bytes] | None = None
        self.pid = 0
        try:
            self._boot()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Box":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_cgroup(self) -> Path:
        root = _cgroup_root()
        assert root is not None
        folder = root / self._state.name
        folder.mkdir()
        return folder

    def _boot(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.bind(str(self._state / "notify"))
            self._holder = self._start()
            self._await_ready(ready)
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        self.pid = int(children[0])

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {
            "PATH": os.environ["PATH"],
            "TREE": str(TREE),
            "STATE": str(self._state),
            "PROJECT": str(PROJECT),
            "PYTHON": str(self._python),
        }
        namespaces = ["--pid", "--mount", "--uts", "--ipc", "--cgroup", "--net", "--propagation=private"]
        # The shell joins the cgroup before the namespace is made, so that the cgroup is the root of the namespace.
        script = 'echo $$ >"$0/cgroup.procs"; exec "$@"'
        command = ["unshare", "--fork", "--kill-child", *namespaces, str(PROJECT / "tests/interop/box-init")]
        with (self._state / "log").open("wb") as log:
            return subprocess.Popen(
                [*_DIE_WITH_PARENT, "sh", "-c", script, str(self._cgroup), *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _await_ready(self, ready: socket.socket) -> None:
        """Wait until the box's PID 1 reports READY=1, which it does when its default target is reached."""
        assert self._holder is not None
        deadline = time.monotonic() + BOOT_TIMEOUT
        message = b""
        while b"READY=1" not in message.split(b"\n"):
            ready.settimeout(1.0)
            with contextlib.suppress(TimeoutError):
                message = ready.recv(4096)
            if self._holder.poll() is not None:
                raise BoxError(
                    f"the box ended while it booted: {(self._state / 'log').read_text(errors='replace').strip()}"
                )
            if time.monotonic() > deadline:
                raise BoxError(f"the box's systemd did not report that it is up within {BOOT_TIMEOUT:g} s")

    @property
    def python(self) -> Path:
        """The directory of Python packages for the box's Python, with the same path on the host and in the box."""
        return self._python

    def take_guest(self, architecture: str = "x86_64") -> None:
        """Copy a built-in guest into the box's cache, if the host has one, because the box downloads nothing."""
        with contextlib.suppress(GuestError):
            source = Path(build(architecture).kernel).parent
            shutil.copytree(source, self.path(f"/root/.cache/vmspawn/guest/{source.name}"))

    def command(self, *arguments: str, unit: Sequence[str] | None = None) -> list[str]:
        """Return the command line that runs `arguments` in the box; `unit` has the options of a transient service."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--cgroup", "--ipc", "--uts", "--net", "--root"]
        environment = [
            "env",
            "-i",
            "--chdir=/root",
            "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME=/root",
            "TERM=dumb",
        ]
        environment += ["LC_ALL=C.UTF-8", "SYSTEMD_PAGER=", "SYSTEMD_COLORS=0"]
        service = [] if unit is None else ["systemd-run", "--quiet", "--collect", *unit, "--"]
        return [*enter, *environment, *service, *arguments]

    def run(
        self, *arguments: str, timeout: float = RUN_TIMEOUT, check: bool = True, unit: Sequence[str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the box to its end. With `check` it must succeed."""
        done = subprocess.run(
            self.command(*arguments, unit=unit),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(arguments)} exited with {done.returncode}: {done.stderr or done.stdout}")
        return done

    def path(self, path: str) -> Path:
        """Return the host's path of a file in the box."""
        return Path(f"/proc/{self.pid}/root") / path.lstrip("/")

    def close(self) -> None:
        """End the box, and remove its remains."""
        if self._holder is not None:
            # unshare's --kill-child kills PID 1, and with it all processes of its namespace.
            self._holder.kill()
            self._holder.wait()
            self._holder = None
        self._remove_cgroups()
        shutil.rmtree(self._state, ignore_errors=True)

    def _remove_cgroups(self) -> None:
        """Remove the cgroups when they are empty, which the kernel reports in cgroup.events of the topmost one."""
        deadline = time.monotonic() + 10.0
        events = self._cgroup / "cgroup.events"
        with events.open() as file:
            poller = select.poll()
            poller.register(file, select.POLLPRI)
            while "populated 1" in events.read_text() and time.monotonic() < deadline:
                poller.poll(1000)
        for folder, _, _ in os.walk(self._cgroup, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def main() -> None:
    """Run a verb of `./dev box`."""
    parser = argparse.ArgumentParser(prog="./dev box", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(metavar="VERB", dest="verb", required=True)
    verbs.add_parser("make", help=f"build the tree at {TREE}")
    verbs.add_parser(
        "test", help="run the ordinary tests in a box, with its Python, QEMU and virtiofsd; takes pytest's arguments"
    )
    run = verbs.add_parser("run", help="boot a box, run a command or a shell in it as a unit, and end the box")
    run.add_argument("command", nargs=argparse.REMAINDER, help="the command (default: bash)")
    options, rest = parser.parse_known_args()
    if rest and options.verb != "test":
        parser.error(f"unknown argument: {rest[0]}")
    try:
        if options.verb == "make":
            make()
        elif options.verb == "test":
            sys.exit(_test_in_new_box(rest))
        else:
            sys.exit(_run_in_new_box(options.command or ["bash"]))
    except BoxError as error:
        sys.exit(f"./dev box: {error}")


def _run_in_new_box(command: list[str]) -> int:
    with Box() as box:
        terminal = "--pty" if os.isatty(0) else "--pipe"
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return subprocess.run(box.command(*command, unit=("--wait", terminal)), check=False).returncode


def _test_in_new_box(arguments: Sequence[str]) -> int:
    """Run pytest in a box as a service. Its output is this process's output. The checkout is read-only in the box."""
    with Box() as box:
        for architecture in ("x86_64", "aarch64"):
            box.take_guest(architecture)
        settings = [f"--setenv=PYTHONPATH={PROJECT}:{PROJECT}/src:{box.python}", f"--working-directory={PROJECT}"]
        settings += ["--setenv=PYTHONDONTWRITEBYTECODE=1", "--setenv=HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis"]
        settings += ["--setenv=HOME=/root", "--setenv=TERM=dumb"]
        command = ["python3", "-m", "pytest", "-o", "cache_dir=/tmp/pytest", *arguments]
        unit = ("--wait", "--pipe", *settings)
        return subprocess.run(box.command(*command, unit=unit), stdin=subprocess.DEVNULL, check=False).returncode


if __name__ == "__main__":
    main()
