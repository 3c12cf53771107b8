# SPDX-License-Identifier: LGPL-2.1-or-later
"""Installs the man pages, completion scripts and the systemd unit where their readers look, and removes them again.

A record says which files and folders were made, with the files' hashes. A file that the record does not know, or whose
content has changed since, belongs to somebody else: it is neither overwritten nor removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ..errors import ExtrasError, SystemFailure

#: The extras in the installed package; hatch_build.py puts them there.
SOURCES = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "extras")

_RECORD = "vmspawn/extras.json"
_SHARE = "/usr/local/share"

#: What the unit in the package has, and what replaces it.
_UNIT_COMMAND = "ExecStart=vmspawn "
_SYSTEM_TARGET, _USER_TARGET = "WantedBy=machines.target", "WantedBy=default.target"

_FILE_MODE, _FOLDER_MODE = 0o644, 0o755


class File(NamedTuple):
    """A file to install."""

    path: str
    data: bytes


class Destination(NamedTuple):
    """The folders to install into: those of the system or of a user. The others may be relative to `share`."""

    share: str
    fish: str
    units: str
    is_user: bool

    @property
    def record(self) -> str:
        """The file that lists what is installed."""
        return os.path.join(self.share, _RECORD)

    def folder(self, kind: str) -> str:
        """The folder for the files of a folder of the extras."""
        folders = {
            "man": "man/man1",
            "bash-completion": "bash-completion/completions",
            "zsh": "zsh/site-functions",
            "fish": self.fish,
            "systemd": self.units,
        }
        return os.path.join(self.share, folders[kind])


def system_destination() -> Destination:
    """The folders that every user's programs search: below /usr/local, where fish does not look, and /etc/fish."""
    return Destination(_SHARE, "/etc/fish/completions", "/usr/local/lib/systemd/system", is_user=False)


def user_destination() -> Destination:
    """The folders below $XDG_DATA_HOME, which the user's programs search."""
    share = os.environ.get("XDG_DATA_HOME", "")
    if not os.path.isabs(share):
        share = os.path.join(os.path.expanduser("~"), ".local/share")
    return Destination(share, "fish/vendor_completions.d", "systemd/user", is_user=True)


def wanted_files(sources: str, destination: Destination, command: str) -> list[File]:
    """The files to install, with `command` as the vmspawn that the unit starts. Raises ExtrasError."""
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
            "this vmspawn has no man pages, completion scripts and unit to install: it runs from a checkout",
            hint="install it first: pipx install .",
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
    """Install the files, or none of them. Files of an earlier version that are no longer wanted are removed.

    1. Refuse if a file of somebody else has one of the names.
    2. Make the folders that are missing.
    3. Write a record that knows the old files and the new ones, so that an installation that is killed can be
       repeated or removed.
    4. Write the files.
    5. Write the record of the new files alone.

    Raises ExtrasError or SystemFailure.
    """
    before = _read_record(record_path)
    for file in files:
        if os.path.lexists(file.path) and not _is_ours(before, file.path):
            raise ExtrasError(
                f"cannot install {file.path}: a file that vmctl did not write is there", hint="move it away first"
            )
    hashes = {file.path: [_hash(file.data)] for file in files}
    old = {path: known for path, known in before["files"].items() if path not in hashes}
    both = {**old, **{path: [*before["files"].get(path, ()), *new] for path, new in hashes.items()}}
    folders = list(
        dict.fromkeys([*before["folders"], *_missing_folders([record_path, *(file.path for file in files)])])
    )
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


def remove(record_path: str) -> tuple[list[str], list[str]]:
    """Remove what was installed: its files, and its folders if they are empty.

    Returns the paths of the files that are removed, and of those that have changed and stay. Raises SystemFailure.
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
    """What is installed: the files with the hashes that they may have, and the folders. Raises ExtrasError."""
    try:
        with open(path, "rb") as file:
            record = json.load(file)
        return {"files": dict(record["files"]), "folders": list(record["folders"])}
    except (FileNotFoundError, NotADirectoryError):
        return {"files": {}, "folders": []}
    except OSError as error:
        raise SystemFailure(f"cannot read {path}", error.errno or 0) from None
    except (ValueError, KeyError, TypeError):
        raise ExtrasError(f"{path} is damaged: it does not list what is installed", hint="remove it") from None


def _record_data(files: dict[str, list[str]], folders: Sequence[str]) -> bytes:
    return json.dumps({"files": files, "folders": folders}, indent=1).encode() + b"\n"


def _is_ours(record: dict[str, Any], path: str) -> bool:
    """Whether a file is there as it was installed."""
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
    """The folders of the paths that do not exist, parents first."""
    for path in paths:
        missing = []
        while (path := os.path.dirname(path)) and not os.path.lexists(path):
            missing.append(path)
        yield from reversed(missing)


def _make_folder(path: str, undo: contextlib.ExitStack) -> None:
    with _explained(f"cannot make {path}"), contextlib.suppress(FileExistsError):
        os.mkdir(path, _FOLDER_MODE)
        undo.callback(_remove_empty_folder, path)
        # Other users read what root installs, whatever root's umask is.
        os.chmod(path, _FOLDER_MODE)


def _write(file: File, undo: contextlib.ExitStack) -> None:
    """Replace a file at once, and put the old one back on undo."""
    with _explained(f"cannot write {file.path}"):
        undo.callback(_restoration(file.path))
        _replace(file)


def _restoration(path: str) -> Callable[[], object]:
    """What gives a file the content that it has now, or removes it again."""
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
    # Other programs may have put files there, or removed the folder.
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
    """Raise what the system refuses as SystemFailure, with a hint where the user lacks the rights."""
    try:
        yield
    except OSError as error:
        denied = isinstance(error, PermissionError) and os.geteuid() != 0
        hint = "use --user, or run it as root" if denied else ""
        raise SystemFailure(what, error.errno or 0, hint=hint) from None
