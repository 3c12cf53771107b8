# SPDX-License-Identifier: LGPL-2.1-or-later
"""Installs the man pages, completion scripts and the systemd unit where man, the shells and systemd look for them.

A record lists the files with their hashes, and the directories that were made for them. A file that is not in the
record, or whose content has changed since it was installed, is neither overwritten nor removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ..errors import ExtrasError, SystemFailure
from ..user_directories import user_directory

#: The extras in the installed package; hatch_build.py puts them there.
SOURCES = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "extras")

_RECORD = "vmspawn/extras.json"
_SHARE = "/usr/local/share"

#: Lines of the packaged unit that are replaced.
_UNIT_COMMAND = "ExecStart=vmspawn "
_SYSTEM_TARGET, _USER_TARGET = "WantedBy=machines.target", "WantedBy=default.target"

_FILE_MODE, _FOLDER_MODE = 0o644, 0o755


class File(NamedTuple):
    """A file to install."""

    path: str
    data: bytes


class Destination(NamedTuple):
    """The directories to install into. `fish` and `units` are absolute, or relative to `share`."""

    share: str
    fish: str
    units: str
    is_user: bool

    @property
    def record(self) -> str:
        """The path of the record."""
        return os.path.join(self.share, _RECORD)

    def folder(self, kind: str) -> str:
        """Return the directory to install files of a kind into."""
        folders = {
            "man": "man/man1",
            "bash-completion": "bash-completion/completions",
            "zsh": "zsh/site-functions",
            "fish": self.fish,
            "systemd": self.units,
        }
        return os.path.join(self.share, folders[kind])


def system_destination() -> Destination:
    """Return the directories that programs search for every user. fish searches /etc/fish, not /usr/local."""
    return Destination(_SHARE, "/etc/fish/completions", "/usr/local/lib/systemd/system", is_user=False)


def user_destination() -> Destination:
    """Return the directories below $XDG_DATA_HOME, which programs search for one user. Raises ExtrasError."""
    share = user_directory("XDG_DATA_HOME", ".local/share")
    if share is None:
        raise ExtrasError(
            "cannot install extras for this user, who has no home directory", hint="set XDG_DATA_HOME to a directory"
        )
    return Destination(share, "fish/vendor_completions.d", "systemd/user", is_user=True)


def check_command(command: str, destination: Destination) -> None:
    """Refuse to install a system unit whose command another user could replace. Raises ExtrasError."""
    if not destination.is_user and os.geteuid() == 0 != os.stat(command).st_uid:
        raise ExtrasError(
            f"cannot install a unit that runs {command} as root: the file belongs to another user",
            hint="install vmspawn as root first, or use --user",
        )


def wanted_files(sources: str, destination: Destination, command: str) -> list[File]:
    """Return the files to install. The unit starts `command`. Raises ExtrasError."""
    found = []
    for kind in _listing(sources):
        for name in _listing(os.path.join(sources, kind)):
            with open(os.path.join(sources, kind, name), "rb") as file:
                data = file.read()
            if kind == "systemd":
                data = _unit(data.decode(), destination, command).encode()
            found.append(File(os.path.join(destination.folder(kind), name), data))
    return found


def _listing(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        raise ExtrasError(
            "cannot install extras: vmspawn runs from a checkout, and only an installed vmspawn has them",
            hint="install vmspawn first: pipx install .",
        ) from None


def _unit(text: str, destination: Destination, command: str) -> str:
    text = text.replace(_UNIT_COMMAND, f"ExecStart={_quote_for_unit(command)} ")
    return text.replace(_SYSTEM_TARGET, _USER_TARGET) if destination.is_user else text


def _quote_for_unit(path: str) -> str:
    """Quote a program's path as systemd.service(5) reads it."""
    path = path.replace("%", "%%")
    if not set(path) & set(" \t\"'\\;"):
        return path
    escaped = path.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def install(files: Sequence[File], record_path: str) -> None:
    """Install all files or none.

    1. Refuse to overwrite files that are not in the record.
    2. Make missing directories.
    3. Write a record of both the old files and the new ones. If vmctl is killed from here on, the installation can be
       repeated or removed.
    4. Write the new files.
    5. Remove files of an earlier version that this version does not have.
    6. Write the record of the new files.

    Raises ExtrasError or SystemFailure.
    """
    before = _read_record(record_path)
    _refuse_to_overwrite(files, before)
    hashes = {file.path: [_hash(file.data)] for file in files}
    old = {path: known for path, known in before["files"].items() if path not in hashes}
    both = {**old, **{path: [*before["files"].get(path, ()), *new] for path, new in hashes.items()}}
    missing = _missing_folders([record_path, *(file.path for file in files)])
    folders = list(dict.fromkeys([*before["folders"], *missing]))
    with contextlib.ExitStack() as undo:
        for folder in folders:
            _make_folder(folder, undo)
        _write(File(record_path, _record_data(both, folders)), undo)
        for file in files:
            _write(file, undo)
        undo.pop_all()
    for path in filter(lambda path: _is_ours(before, path), old):
        with _explained(f"cannot remove {path}"):
            _remove_file(path)
    with contextlib.ExitStack() as undo:
        _write(File(record_path, _record_data(hashes, folders)), undo)
        undo.pop_all()


def _refuse_to_overwrite(files: Sequence[File], record: dict[str, Any]) -> None:
    for file in files:
        if os.path.lexists(file.path) and not _is_ours(record, file.path):
            raise ExtrasError(
                f"cannot install {file.path}: it exists and vmctl has not installed it", hint="move it away first"
            )


def remove(record_path: str) -> tuple[list[str], list[str]]:
    """Remove the installed files, and the directories that were made for them if they are empty.

    Returns the paths of the removed files, and of modified files, which are kept. Raises ExtrasError or SystemFailure.
    """
    record = _read_record(record_path)
    present = [path for path in record["files"] if os.path.lexists(path)]
    ours = [path for path in present if _is_ours(record, path)]
    for path in [*ours, record_path]:
        with _explained(f"cannot remove {path}"):
            _remove_file(path)
    for folder in sorted(record["folders"], key=len, reverse=True):
        _remove_empty_folder(folder)
    return ours, [path for path in present if path not in ours]


def _read_record(path: str) -> dict[str, Any]:
    """Return the installed files with the hashes that they may have, and the directories.

    Raises ExtrasError or SystemFailure.
    """
    try:
        with open(path, "rb") as file:
            record = json.load(file)
        return {"files": dict(record["files"]), "folders": list(record["folders"])}
    except (FileNotFoundError, NotADirectoryError):
        return {"files": {}, "folders": []}
    except OSError as error:
        raise SystemFailure(f"cannot read {path}", error.errno or 0) from None
    except (ValueError, KeyError, TypeError):
        raise ExtrasError(
            f"the record of installed files is damaged: {path}", hint="delete it and the installed files"
        ) from None


def _record_data(files: dict[str, list[str]], folders: Sequence[str]) -> bytes:
    return json.dumps({"files": files, "folders": folders}, indent=1).encode() + b"\n"


def _is_ours(record: dict[str, Any], path: str) -> bool:
    """Return whether a file exists and has the content that was installed."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return _hash(file.read()) in record["files"].get(path, ())
    except OSError:
        return False


def _hash(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def _missing_folders(paths: Sequence[str]) -> Iterator[str]:
    """Yield the directories that the paths need and that do not exist, outermost first."""
    for path in paths:
        missing = []
        while (path := os.path.dirname(path)) and not os.path.lexists(path):
            missing.append(path)
        yield from reversed(missing)


def _make_folder(path: str, undo: contextlib.ExitStack) -> None:
    with _explained(f"cannot make {path}"), contextlib.suppress(FileExistsError):
        os.mkdir(path, _FOLDER_MODE)
        undo.callback(_remove_empty_folder, path)
        # Other users must be able to read what root installs, whatever root's umask is.
        os.chmod(path, _FOLDER_MODE)


def _write(file: File, undo: contextlib.ExitStack) -> None:
    """Replace a file atomically; undoing it restores the old one."""
    with _explained(f"cannot write {file.path}"):
        undo.callback(_restoration(file.path))
        _replace(file)


def _restoration(path: str) -> Callable[[], object]:
    """Return a function that restores the present content of a file, or removes the file if it does not exist yet."""
    try:
        with open(path, "rb") as old:
            data = old.read()
    except FileNotFoundError:
        return lambda: _remove_file(path)
    return lambda: _replace(File(path, data))


def _remove_file(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _remove_empty_folder(path: str) -> None:
    # Other programs may have put files there, or removed the directory.
    with contextlib.suppress(OSError):
        os.rmdir(path)


def _replace(file: File) -> None:
    temporary = f"{file.path}.{os.getpid()}.new"
    try:
        with open(temporary, "xb") as new:
            os.fchmod(new.fileno(), _FILE_MODE)
            new.write(file.data)
        os.rename(temporary, file.path)
    except BaseException:
        _remove_file(temporary)
        raise


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn an OSError into a SystemFailure, with a hint if permissions are missing."""
    try:
        yield
    except OSError as error:
        denied = isinstance(error, PermissionError) and os.geteuid() != 0
        hint = "use --user, or run it as root" if denied else ""
        raise SystemFailure(what, error.errno or 0, hint=hint) from None
