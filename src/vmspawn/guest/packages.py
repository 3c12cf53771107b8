# SPDX-License-Identifier: LGPL-2.1-or-later
"""Downloads and unpacks packages of the distribution, without root and without installing them.

apt uses the host's configured sources.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..aio import programs
from ..errors import GuestError
from ..search_path import find_program

#: Debian's names of the architectures.
DEBIAN_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}

# Enough at 1 MB/s: a kernel has 20 to 100 MB, and the package lists have 10 MB.
_DOWNLOAD_SECONDS = 300
_LOCAL_SECONDS = 60

# apt's default is two minutes for each address of a server that does not answer.
_IMPATIENT = ("-o", "Acquire::http::Timeout=20", "-o", "Acquire::https::Timeout=20")

# The modules (Ubuntu), or the modules and the image (Debian 14), may be in packages that a kernel's package depends on.
_KERNEL_PART = re.compile(r"linux-(image|base|binary|modules)-\d")

_CONFIG = """\
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Architectures;
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Get::List-Cleanup "true";
Acquire::Languages "none";
Dir::State "{directory}/state";
Dir::State::status "/dev/null";
Dir::Cache "{directory}/cache";
"""


class Apt:
    """Runs apt-get and apt-cache with package lists: the host's, or private ones in a directory.

    Private lists serve hosts whose own lists are missing, out of date or for another architecture.
    """

    def __init__(self, options: tuple[str, ...] = ()) -> None:
        self._options = options
        #: The error of a download that may have left lists out of date or missing.
        self.trouble: GuestError | None = None

    @classmethod
    def private(cls, directory: Path, architecture: str) -> Apt:
        """Download package lists to a directory; returns an Apt that uses them."""
        for name in ("state/lists/partial", "cache/archives/partial"):
            (directory / name).mkdir(parents=True)
        config = directory / "apt.conf"
        config.write_bytes(os.fsencode(_CONFIG.format(architecture=architecture, directory=directory)))
        apt = cls(("-c", str(config)))
        # Some sources may fail, as long as the package is found.
        try:
            apt._get("update", "-o", "APT::Update::Error-Mode=any")
        except GuestError as error:
            apt.trouble = error
        return apt

    def depends(self, package: str) -> list[str]:
        """Return the packages that a package depends on, including alternatives."""
        record = _run(["apt-cache", *self._options, "show", "--no-all-versions", package], seconds=_LOCAL_SECONDS)
        depends = re.search(r"^Depends: (.*)$", record, re.MULTILINE)
        return [entry.split()[0] for entry in re.split(r"[,|]", depends[1])] if depends else []

    def kernel_parts(self, metapackage: str) -> list[str]:
        """Return the kernel packages that a metapackage depends on."""
        parts: list[str] = []
        wanted = [metapackage]
        while wanted:
            found = [name for name in self.depends(wanted.pop()) if _KERNEL_PART.match(name)]
            new = [name for name in found if name not in parts]
            parts += new
            wanted += new
        if not parts:
            raise GuestError(f"the package {metapackage} depends on no kernel")
        return parts

    def download(self, packages: list[str], directory: Path) -> None:
        """Download the packages' files to the directory."""
        self._get("download", *packages, directory=directory)

    def _get(self, *words: str, directory: Path | None = None) -> None:
        _run(["apt-get", *self._options, *_IMPATIENT, "-q", *words], seconds=_DOWNLOAD_SECONDS, directory=directory)


def available() -> bool:
    """Return whether this host has the programs to download and unpack Debian packages."""
    return all(find_program(program) for program in ("apt-get", "apt-cache", "dpkg-deb"))


class Fetcher:
    """Downloads packages of one architecture and unpacks them below a scratch directory, which the caller removes."""

    def __init__(self, architecture: str, scratch: Path, on_progress: Callable[[str], None]) -> None:
        self._architecture = DEBIAN_NAMES[architecture]
        self._scratch = scratch
        self._on_progress = on_progress
        self._private: Apt | None = None

    def fetch(self, package: str) -> Path:
        """Unpack one package, and return the directory with its files."""
        return self._first_that_works([package], lambda apt, name: [name])

    def fetch_kernel(self, metapackages: Sequence[str]) -> Path:
        """Unpack the kernel of the first metapackage that exists, and return the directory with its files."""
        return self._first_that_works(metapackages, lambda apt, name: apt.kernel_parts(name))

    def _first_that_works(self, names: Sequence[str], resolve: Callable[[Apt, str], list[str]]) -> Path:
        for apt in self._apts():
            errors: list[GuestError] = []
            for name in names:
                try:
                    return self._unpack(apt, name, resolve(apt, name))
                except GuestError as error:
                    errors.append(error)
            reason = apt.trouble or errors[0]
        raise GuestError(
            f"cannot download the package {names[0]} for {self._architecture}: {reason}",
            hint="check that `apt-get update` works on this host",
        ) from reason

    def _apts(self) -> Iterator[Apt]:
        if self._architecture == _run(["dpkg", "--print-architecture"], seconds=_LOCAL_SECONDS).strip():
            yield Apt()
        if self._private is None:
            self._on_progress("Downloading package lists")
            self._private = Apt.private(self._scratch / "apt", self._architecture)
        yield self._private

    def _unpack(self, apt: Apt, name: str, packages: list[str]) -> Path:
        archives, tree = self._scratch / f"{name}.debs", self._scratch / name
        for directory in (archives, tree):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
        self._on_progress(f"Downloading {', '.join(packages)}")
        apt.download(packages, archives)
        for archive in archives.iterdir():
            _run(["dpkg-deb", "-x", str(archive), str(tree)], seconds=_LOCAL_SECONDS)
            archive.unlink()
        return tree


def _run(command: list[str], *, seconds: float, directory: Path | None = None) -> str:
    """Run a program and return its output. Raises GuestError with the program's first error message."""
    environment = os.environ | {"LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = programs.run(command, directory=directory, environment=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise GuestError(f"{command[0]} did not finish within {seconds:.0f} s") from None
    except OSError as error:
        raise GuestError(f"{command[0]} could not be started: {error.strerror}") from error
    if done.returncode != 0:
        raise GuestError(_complaint(command[0], done))
    return done.stdout.decode(errors="replace")


def _complaint(program: str, done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("E: ")] or lines
    return f"{program}: {errors[0].removeprefix('E: ')}" if errors else f"{program} exited with {done.returncode}"
