# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies files to and from a guest, as tar archives through commands in the guest.

The calls block, and use threads for standard error and for the command's end. The caller passes a function that starts
a command.

A copy is made in a work directory beside its target, and moved to its place when it is complete. The work directory is
.vmspawn-copy-XXXX. It remains in the guest if this process is killed, or the guest no longer answers, before the
copy is complete.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple, Protocol, TypeVar

from ..archive import pack, place, unpack
from ..archive.pack import UNIT, Packer, SparseFile
from ..archive.reader import Truncated
from ..errors import CopyFailed, SystemFailure, UsageError, VmspawnError
from ..text import printable

_T = TypeVar("_T")

#: Bytes of a command's standard error that are kept.
_MESSAGES_MAX = 64 * 1024

#: Seconds without a byte after which the rest of an ended command's output counts as lost.
_OUTPUT_TIMEOUT = 10.0

#: Seconds after which a copy that waits for a command's end notices that it was cancelled.
_CANCEL_INTERVAL = 0.1

#: Seconds within which the guest must remove the work directory of a copy that failed.
_CLEANUP_TIMEOUT = 10.0

_BUFFER_SIZE = 1 << 20

#: The maximum number of bytes after the end of an archive. GNU tar's records have 10 KiB by default.
_REST_MAX = 1 << 20

#: The maximum number of pieces of a sparse file for one command. Each piece is an argument.
_PIECES_MAX = 2000

#: The maximum number of directories whose time one command sets. Their names are arguments, which have at most 512 KiB.
_TIMES_MAX = 100

#: Sets `$folder` to the directory that gets the copy, and `$work` to the work directory in it. Arguments: the target;
#: its parent; its name, or an empty string if the target has to be a directory; a token.
_PLACES = """
if [ -d "$1" ]; then folder=$1
elif [ -n "$3" ]; then folder=$2
else echo "$1 is not a directory" >&2; exit 81
fi
[ -d "$folder" ] || { echo "there is no directory $folder" >&2; exit 81; }
work=$folder/.vmspawn-copy-$4
"""

_UNPACK = f"""{_PLACES}
mkdir -m 700 "$work" || exit 1
tar -x -p -f - -C "$work" || {{ status=$?; rm -rf "$work"; exit $status; }}
"""

#: More arguments: the file in the work directory, its size and time, and for each piece its offset and length in units.
_FILL = f"""{_PLACES}
file=$work/$5 size=$6 time=$7
shift 7
for piece; do
    dd of="$file" bs={UNIT} seek="${{piece%:*}}" count="${{piece#*:}}" iflag=fullblock conv=notrunc status=none || exit
done
truncate -s "$size" "$file" && touch -d "@$time" "$file"
"""

#: More arguments: times, each followed by a file in the work directory.
_TIMES = f"""{_PLACES}
shift 4
while [ $# -gt 0 ]; do
    touch -d "@$1" "$work/$2" || exit
    shift 2
done
"""

#: More arguments: the name in the archive, or an empty string for several.
_PLACE = f"""{_PLACES}
is_folder() {{ [ -d "$1" ] && [ ! -L "$1" ]; }}
place() {{
    if is_folder "$1" && is_folder "$2"; then
        for each in "$1"/* "$1"/.[!.]* "$1"/..?*; do
            if [ -e "$each" ] || [ -L "$each" ]; then place "$each" "${{2%/}}/${{each##*/}}" || return; fi
        done
    elif is_folder "$2" || {{ is_folder "$1" && {{ [ -e "$2" ] || [ -L "$2" ]; }}; }}; then
        echo "cannot replace $2: only one of the two is a directory" >&2
        return 82
    else
        mv -f -T "$1" "$2"
    fi
}}
if [ -d "$1" ] || [ -z "$5" ]; then place "$work" "$folder"
else place "$work/$5" "$2/$3"
fi
status=$?
rm -rf "$work"
exit $status
"""

_REMOVE = f"""{_PLACES}
rm -rf "$work"
"""

#: Arguments: the directory, the name in it, and a word if the size is to be counted, else an empty string. The first
#: line of output has the size in KiB, or 0. GNU tar exits with 1 if a file has changed meanwhile, as a log does.
_PACK = """
cd "$1" || exit 1
[ -e "./$2" ] || [ -L "./$2" ] || { echo "No such file or directory" >&2; exit 1; }
size=
[ -z "$3" ] || read -r size rest <<END
$(du -sk "./$2" 2>/dev/null)
END
echo "${size:-0}"
if tar --version 2>/dev/null | grep -q 'GNU tar'; then
    tar -c --format=gnu -S -f - "./$2"
    status=$?
    [ $status = 1 ] && exit 0
    exit $status
fi
exec tar -c -f - "./$2"
"""


#: Hints for exit statuses of the scripts.
_HINTS = {81: "create the directory first", 82: "remove it first, or copy to another name"}


class Ended(NamedTuple):
    """The end of a command, with the number of bytes that it has written to each stream."""

    status: int
    stdout: int
    stderr: int


class GuestCommand(Protocol):
    """A command that runs in the guest, with blocking sockets for its streams, which it owns."""

    @property
    def stdin(self) -> socket.socket | None:
        """The command's standard input, if it has one."""

    @property
    def stdout(self) -> socket.socket:
        """The command's standard output."""

    @property
    def stderr(self) -> socket.socket:
        """The command's standard error."""

    def wait(self) -> Ended:
        """Wait for the command's end. Called in another thread than the other methods. Raises NotConnected."""

    def close(self) -> None:
        """End the command, and close its streams."""


#: Starts a command with these arguments; it has an input if the second argument is true. Raises VmspawnError.
Start = Callable[[Sequence[bytes], bool], GuestCommand]

#: A function that is called with the number of copied bytes and the total. While the total is unknown, both are equal.
Progress = Callable[[int, int], None]


def hang_up(command: GuestCommand) -> None:
    """Shut down this process's ends of a command's streams, so that the threads that wait for them continue."""
    for each in (command.stdin, command.stdout, command.stderr):
        if each is not None:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class _Counted(io.RawIOBase):
    """A socket as a stream that counts the bytes that it has read."""

    def __init__(self, source: socket.socket, changed: threading.Condition) -> None:
        self._source = source
        self._changed = changed
        self.total = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._source.recv_into(buffer)
        with self._changed:
            self.total += count
            self._changed.notify_all()
        return count


class Copying:
    """Copies to and from one guest. `cancel` may be called in another thread."""

    def __init__(self, start: Start, *, skip_special: bool = False, on_progress: Progress | None = None) -> None:
        self._start = start
        self._skip_special = skip_special
        self._on_progress = on_progress
        self._command: GuestCommand | None = None
        self._is_cancelled = False
        self._lock = threading.Lock()
        #: Lines about files that were left out.
        self.skipped: list[str] = []

    def cancel(self) -> None:
        """End the copy; its caller gets CopyFailed."""
        with self._lock:
            self._is_cancelled = True
            if self._command is not None:
                hang_up(self._command)

    # To the guest.

    def to_guest(self, sources: Sequence[str], target: str) -> None:
        """Copy files and directories to the path `target` in the guest, or into it if it is a directory.

        Raises CopyFailed, SystemFailure, UsageError, or an error of `start`.
        """
        packer = Packer(sources, skip_special=self._skip_special)
        self.skipped += packer.skipped
        places = _places(target, several=len(sources) > 1)
        what = ", ".join(map(repr, sources))
        try:
            self._run([_UNPACK, *places], what, feed=self._counted(packer.blocks(), packer.total))
            for file in packer.sparse:
                self._fill(file, places, what)
            late = sorted(set(packer.late))
            for start in range(0, len(late), _TIMES_MAX):
                words = [word for name, time in late[start : start + _TIMES_MAX] for word in (str(time), name)]
                self._run([_TIMES, *places, *words], what)
            name = packer.names[0] if len(sources) == 1 else ""
            self._run([_PLACE, *places, name], what)
        except BaseException:
            self._clean_up(places, what)
            raise

    def _clean_up(self, places: Sequence[str], what: str) -> None:
        """Remove the work directory in the guest, if the guest still answers."""
        self._is_cancelled = False
        timer = threading.Timer(_CLEANUP_TIMEOUT, self.cancel)
        timer.start()
        try:
            with contextlib.suppress(VmspawnError):
                self._run([_REMOVE, *places], what)
        finally:
            timer.cancel()

    def _fill(self, file: SparseFile, places: Sequence[str], what: str) -> None:
        batches = range(0, len(file.pieces), _PIECES_MAX) or (0,)
        for start in batches:
            pieces = file.pieces[start : start + _PIECES_MAX]
            words = [f"{offset // UNIT}:{length // UNIT}" for offset, length in pieces]
            arguments = [_FILL, *places, file.name, str(file.size), str(file.time), *words]
            self._run(arguments, what, feed=self._counted(pack.data_of(file, pieces), 0))

    def _counted(self, blocks: Iterator[bytes], total: int) -> Iterator[bytes]:
        done = 0
        for block in blocks:
            yield block
            done += len(block)
            if self._on_progress is not None and total:
                self._on_progress(min(done, total), total)

    # From the guest.

    def from_guest(self, sources: Sequence[str], target: str) -> None:
        """Copy files and directories of the guest to the path `target` of the host, or into it if it is a directory.

        Raises CopyFailed, SystemFailure, UsageError, or an error of `start`.
        """
        pack.check_path(target)
        is_folder = os.path.isdir(target)
        if not is_folder and (len(sources) > 1 or target.endswith("/")):
            raise UsageError(f"{target} is not a directory", hint="create it first, or copy one file to a new name")
        for source in sources:
            name = pack.name_of(source)
            final = os.path.join(target, name) if is_folder else target
            self._from_guest(source, name, final)

    def _from_guest(self, source: str, name: str, final: str) -> None:
        try:
            work = tempfile.mkdtemp(prefix=".vmspawn-copy-", dir=os.path.dirname(final) or ".")
        except OSError as error:
            hint = "create the directory first" if error.errno == errno.ENOENT else ""
            raise SystemFailure(f"cannot write {final}", error.errno or errno.EIO, hint=hint) from None
        try:
            folder = os.path.dirname(source.rstrip("/")) or ("/" if source.startswith("/") else ".")
            arguments = [_PACK, folder, name, "count" if self._on_progress is not None else ""]

            def receive(stream: BinaryIO) -> unpack.Unpacked:
                return self._receive(stream, work, name)

            unpacked = self._run(arguments, f"{source!r}", consume=receive)
            self.skipped += unpacked.skipped
            if os.path.lexists(os.path.join(work, name)):
                place.place(work, name, final, unpacked)
        finally:
            _remove(work)

    def _receive(self, stream: BinaryIO, work: str, name: str) -> unpack.Unpacked:
        line = stream.readline(64)
        if not line.strip().isdigit():
            raise Truncated
        total, done = int(line) << 10, 0

        def on_progress(count: int) -> None:
            nonlocal done
            done += count
            if self._on_progress is not None:
                self._on_progress(done, max(total, done))

        return unpack.unpack(stream, work, root=name, skip_special=self._skip_special, on_progress=on_progress)

    # Commands.

    def _run(
        self,
        arguments: Sequence[str],
        what: str,
        *,
        feed: Iterator[bytes] | None = None,
        consume: Callable[[BinaryIO], _T] | None = None,
    ) -> _T:
        """Run a script in the guest; send it data, or read its output. Raises CopyFailed if the script fails."""
        script, *words = arguments
        command = self._start([b"sh", b"-c", script.encode(), b"sh", *map(os.fsencode, words)], feed is not None)
        try:
            with self._lock:
                self._command = command
                if self._is_cancelled:
                    hang_up(command)
            return _Streams(command, what, lambda: self._is_cancelled).run(feed, consume)
        finally:
            with self._lock:
                self._command = None
            command.close()


class _Streams:
    """The streams of one command, and its end."""

    def __init__(self, command: GuestCommand, what: str, is_cancelled: Callable[[], bool]) -> None:
        self._command = command
        self._what = what
        self._is_cancelled = is_cancelled
        self._changed = threading.Condition()
        self._output = _Counted(command.stdout, self._changed)
        self._messages = b""
        self._message_bytes = 0
        self._end: Ended | None = None
        self._error: VmspawnError | None = None

    def run(self, feed: Iterator[bytes] | None, consume: Callable[[BinaryIO], _T] | None) -> _T:
        reader = threading.Thread(target=self._read_messages, daemon=True)
        waiter = threading.Thread(target=self._wait, args=(reader,), daemon=True)
        reader.start()
        waiter.start()
        stream = io.BufferedReader(self._output, _BUFFER_SIZE)
        truncated: Truncated | None = None
        try:
            if feed is not None:
                self._send(feed)
            result = consume(stream) if consume is not None else None
            # Read the rest, because otherwise the command could not end: tar fills its last record with zeros.
            if len(stream.read(_REST_MAX + 1)) > _REST_MAX:
                raise CopyFailed(f"cannot copy {self._what}: the guest sent more data after the end of the archive")
        except Truncated as error:
            truncated = error
        except OSError as error:
            truncated = Truncated()
            truncated.__cause__ = error
        while waiter.is_alive() and not self._is_cancelled():
            waiter.join(_CANCEL_INTERVAL)
        if self._is_cancelled():
            raise CopyFailed("the copy was cancelled")
        self._check()
        if truncated is not None:
            raise truncated from None
        return result  # type: ignore[return-value]

    def _send(self, feed: Iterator[bytes]) -> None:
        target = self._command.stdin
        assert target is not None
        for block in feed:
            try:
                target.sendall(block)
            except OSError:
                # The command reads no more input; its status shows the reason.
                return
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _read_messages(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._command.stderr.recv(4096):
                with self._changed:
                    self._messages = (self._messages + data)[-_MESSAGES_MAX:]
                    self._message_bytes += len(data)
                    self._changed.notify_all()

    def _wait(self, reader: threading.Thread) -> None:
        """Wait for the command's end and its last output, and shut down the streams, which QEMU leaves open."""
        try:
            self._end = self._command.wait()
        except VmspawnError as error:
            self._error = error
        except (OSError, ValueError):
            # `run` has failed, and the command was closed meanwhile.
            return
        with self._changed:
            while self._end is not None and not self._has_all(self._end):
                before = self._output.total + self._message_bytes
                if not self._changed.wait(_OUTPUT_TIMEOUT) and self._output.total + self._message_bytes == before:
                    break
        hang_up(self._command)
        reader.join()

    def _has_all(self, end: Ended) -> bool:
        return self._output.total >= end.stdout and self._message_bytes >= end.stderr

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        assert self._end is not None
        if self._end.status:
            lines = [line for line in self._messages.decode(errors="replace").splitlines() if line.strip()]
            why = lines[-1] if lines else f"the command in the guest ended with status {self._end.status}"
            raise CopyFailed(f"cannot copy {self._what}: {printable(why)}", hint=_HINTS.get(self._end.status, ""))


def _places(target: str, *, several: bool) -> tuple[str, str, str, str]:
    """Return the arguments of the scripts: the target, its parent, its name, a token. Raises UsageError."""
    if not target:
        raise UsageError("the path in the guest is empty", hint="write MACHINE:PATH, or MACHINE:. for the user's home")
    stripped = target.rstrip("/") or "/"
    folder, slash, name = stripped.rpartition("/")
    is_folder = several or target.endswith("/") or name in ("", ".", "..")
    parent = folder or ("/" if slash else ".")
    # A path that begins with a dash would be an option.
    if not target.startswith("/"):
        stripped, parent = f"./{stripped}", f"./{parent}"
    return stripped, parent, "" if is_folder else name, os.urandom(8).hex()


def _remove(work: str) -> None:
    """Remove a work directory. Errors are ignored."""
    shutil.rmtree(work, ignore_errors=True)
