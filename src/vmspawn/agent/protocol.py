# SPDX-License-Identifier: LGPL-2.1-or-later
"""Encodes messages to the agent in the guest, and parses messages from the agent (docs/agent.md).

The guest is hostile: its input is bounded, and a line that is not a valid message is `Malformed`.

The messages are structs of msgspec, because each manager loads this module at its start, and Python defines a struct in
a small fraction of the time that it needs for a dataclass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import msgspec

from ..errors import UsageError

#: The version that the agent reports in `Ready`.
VERSION = 1

#: The virtio-serial port for messages, and the prefix of the names of all other ports.
CONTROL_PORT = "io.vmspawn.agent"
_COMMAND_PORT = "io.vmspawn.exec."

#: The ports of a set. A command with a terminal has STATUS, and STDIN in both directions.
STDIN, STDOUT, STDERR, STATUS = "stdin", "stdout", "stderr", "status"
PORTS = (STATUS, STDIN, STDOUT, STDERR)

#: The name of a terminal among the streams of a command.
TTY = "tty"

#: The agent's bounds: bytes and words of a message to it, and entries of a command's environment.
MESSAGE_MAX = 512 * 1024
WORDS_MAX = 32 * 1024
ENVIRONMENT_MAX = 1024

#: The kernel's bound: bytes of one argument with its terminating NUL byte (MAX_ARG_STRLEN).
ARGUMENT_MAX = 128 * 1024

#: The maximum number of bytes of a line from the agent, without its line feed.
LINE_MAX = 512

_SIZE_MAX = 0xFFFF
_SIGNAL_MAX = 64
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


# To the agent: each function returns the encoded message.


class Run(msgspec.Struct, frozen=True):
    """A command to run.

    `session` is the nonce of the last `sync`: the agent refuses commands of an earlier manager. `ports` is the set of
    ports that the command gets. Without arguments, the command is the user's login shell. `size` is the terminal's size
    in rows and columns; without it the command has pipes. `stdin` is True if the command has an input.
    """

    id: str
    session: str
    ports: str
    arguments: Sequence[bytes] = ()
    environment: Mapping[bytes, bytes] = msgspec.field(default_factory=dict)
    directory: bytes | None = None
    user: bytes | None = None
    size: tuple[int, int] | None = None
    stdin: bool = True


def port_name(ports: str, stream: str) -> str:
    """Return the name of a port of a set."""
    return f"{_COMMAND_PORT}{_name(ports)}.{stream}"


def parse_port_name(port_name: str) -> tuple[str, str]:
    """Return the set that a port belongs to, and the port's stream."""
    ports, _, stream = port_name.removeprefix(_COMMAND_PORT).partition(".")
    return ports, stream


def sync(nonce: str) -> bytes:
    """Begin a session. The agent ends the commands of the last session, and answers `Ready` with the nonce.

    Messages before that answer belong to the last session. The line feed before the message completes a partial message
    of an earlier manager.
    """
    return b"\n" + _message("sync", _name(nonce))


def ping(nonce: str) -> bytes:
    """Ask for a `Pong` with the nonce."""
    return _message("ping", _name(nonce))


def count_ports(ports: str) -> bytes:
    """Ask how many ports of a set the guest knows. The answer is `Ports`."""
    return _message("ports", _name(ports))


def count_connected(ports: str) -> bytes:
    """Ask how many ports of a set are connected and used by no command. The answer is `Connected`."""
    return _message("connected", _name(ports))


def run(command: Run) -> bytes:
    """Start a command, whose ports may be plugged in earlier or later. Raises UsageError for invalid arguments."""
    words: list[str | bytes] = ["run", _name(command.id), _name(command.session), _name(command.ports)]
    if command.stdin and command.size is None:
        words.append("stdin")
    if command.size is not None:
        words.append(f"tty={_size(command.size)}")
    if command.user is not None:
        words.append(b"user=" + _not_empty("user", command.user))
    if command.directory is not None:
        words.append(b"cwd=" + _not_empty("directory", command.directory))
    words += _environment(command.environment)
    return _message(*words, "--", *_arguments(command.arguments))


def resize(id: str, rows: int, columns: int) -> bytes:
    """Set the size of a command's terminal."""
    return _message("resize", _name(id), *_size((rows, columns)).split(","))


def close(id: str, stream: str) -> bytes:
    """Report that the host has closed its end of a stream: it sends no more input, or reads no more output."""
    return _message("close", _name(id), stream)


def signal(id: str, number: int) -> bytes:
    """Send a signal to the process group of a command."""
    if not 0 < number <= _SIGNAL_MAX:
        raise UsageError(f"there is no signal {number}")
    return _message("signal", _name(id), str(number))


def hang_up(id: str) -> bytes:
    """Kill a command and all its children, as closing the status port does."""
    return _message("hangup", _name(id))


def fork(seed: str, nanoseconds: int) -> bytes:
    """Report that the machine is a copy. The answer is `Forked` with the seed.

    The agent mixes the seed, a hexadecimal number, into the kernel's random numbers, and sets the clock to a time in
    nanoseconds since 1970.
    """
    return _message("fork", _name(seed), *map(str, divmod(nanoseconds, 1_000_000_000)))


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} is not an identifier: up to 64 of a-z, 0-9 and -, and no dash at the beginning")
    return text


def _size(size: tuple[int, int]) -> str:
    if not all(0 <= number <= _SIZE_MAX for number in size):
        raise UsageError(f"a terminal cannot have {size[0]} rows and {size[1]} columns")
    return f"{size[0]},{size[1]}"


def _not_empty(what: str, value: bytes) -> bytes:
    if not value:
        raise UsageError(f"the {what} is empty")
    return value


def _environment(environment: Mapping[bytes, bytes]) -> list[str | bytes]:
    if len(environment) > ENVIRONMENT_MAX:
        raise UsageError(f"the environment has more than {ENVIRONMENT_MAX} variables")
    for name in environment:
        if not name or b"=" in name:
            raise UsageError(f"{name!r} cannot be the name of a variable")
    return [b"env=%b=%b" % (name, _bounded("an environment variable", value)) for name, value in environment.items()]


def _arguments(arguments: Sequence[bytes]) -> list[bytes]:
    if arguments:
        _not_empty("command", arguments[0])
    return [_bounded("an argument", argument) for argument in arguments]


def _bounded(what: str, value: bytes) -> bytes:
    if len(value) >= ARGUMENT_MAX:
        raise UsageError(f"{what} is longer than {ARGUMENT_MAX - 1} bytes")
    return value


_SPECIAL = re.compile(rb"[\x01-\x20%;\x7f]")


def _encode(word: str | bytes) -> bytes:
    """Encode a word: %xx replaces the bytes that would end the word or the message, and a lone % is the empty word."""
    data = word.encode() if isinstance(word, str) else word
    if b"\0" in data:
        raise UsageError("arguments, variables and names cannot contain NUL bytes")
    return _SPECIAL.sub(lambda match: b"%%%02x" % ord(match[0]), data) or b"%"


def _message(*words: str | bytes) -> bytes:
    """Join words to a line. The last word, a semicolon, marks a complete message."""
    line = b" ".join((*map(_encode, words), b";\n"))
    if len(words) >= WORDS_MAX or len(line) > MESSAGE_MAX:
        raise UsageError(
            "the command's arguments and environment are too long",
            hint=f"the limits are {WORDS_MAX} words and {MESSAGE_MAX >> 10} KiB; pass data on standard input",
        )
    return line


# From the agent


class Ready(msgspec.Struct, frozen=True):
    """The agent is ready. The nonce is that of the `sync` that it answers, or None if the agent announces itself.

    If the process id differs from the last one, the agent was restarted. The commands of the previous agent continue,
    but messages can no longer resize, signal or kill them.
    """

    nonce: str | None
    version: int
    pid: int
    capabilities: frozenset[str]


class Pong(msgspec.Struct, frozen=True):
    """The answer to a ping."""

    nonce: str


class Ports(msgspec.Struct, frozen=True):
    """The number of ports of a set that the guest knows."""

    id: str
    count: int


class Connected(msgspec.Struct, frozen=True):
    """The number of ports of a set that are connected."""

    id: str
    count: int


class Refused(msgspec.Struct, frozen=True):
    """The agent refused a message. The id is None if the agent could not parse the message."""

    id: str | None
    errno: int
    what: str


class Done(msgspec.Struct, frozen=True):
    """The command is over and its ports are closed; another command may use them."""

    id: str


class Lost(msgspec.Struct, frozen=True):
    """The supervisor of a command was killed. Its ports are closed."""

    id: str


class Forked(msgspec.Struct, frozen=True):
    """The guest has mixed the seed into its random numbers, and has set its clock."""

    seed: str


class Started(msgspec.Struct, frozen=True):
    """The command runs. The host must not end the command's input before this message."""

    pid: int


class InputClosed(msgspec.Struct, frozen=True):
    """The command has closed its input."""


class Exited(msgspec.Struct, frozen=True):
    """The command exited. `stdout` and `stderr` are the numbers of bytes that it wrote."""

    status: int
    stdout: int
    stderr: int


class Signalled(msgspec.Struct, frozen=True):
    """A signal ended the command. The other fields are those of `Exited`."""

    signal: int
    stdout: int
    stderr: int


class Failed(msgspec.Struct, frozen=True):
    """The command could not be started. The status is 126 or 127 as in a shell, or 125 for other failures."""

    status: int
    errno: int
    what: str


class Malformed(msgspec.Struct, frozen=True):
    """An invalid line, shortened."""

    line: bytes


ControlMessage = Ready | Pong | Ports | Connected | Refused | Done | Lost | Forked
StatusMessage = Started | InputClosed | Exited | Signalled | Failed

_Message = TypeVar("_Message")


class Reader(Generic[_Message]):
    """Divides the input from one port into messages. Keeps at most one line."""

    def __init__(self, parse: Callable[[list[str]], _Message]) -> None:
        self._parse = parse
        self._partial = b""
        self._skip = False

    def feed(self, data: bytes) -> list[_Message | Malformed]:
        """Return the messages that these bytes complete. Empty lines are skipped."""
        *lines, rest = data.split(b"\n")
        found: list[_Message | Malformed] = []
        for line in lines:
            self._add(line, found)
            if self._partial and not self._skip:
                found.append(self._message(self._partial))
            self._partial, self._skip = b"", False
        self._add(rest, found)
        return found

    def _add(self, data: bytes, found: list[_Message | Malformed]) -> None:
        if self._skip:
            return
        self._partial += data[: LINE_MAX + 1]
        if len(self._partial) > LINE_MAX:
            found.append(_malformed(self._partial))
            self._partial, self._skip = b"", True

    def _message(self, line: bytes) -> _Message | Malformed:
        try:
            *words, end = line.decode("ascii").split(" ")
            if end == ";" and words:
                return self._parse(words)
        except ValueError:
            pass
        return _malformed(line)


def control_reader() -> Reader[ControlMessage]:
    """Return a reader for the control port."""
    return Reader(_parse_control)


def status_reader() -> Reader[StatusMessage]:
    """Return a reader for the status port of a command."""
    return Reader(_parse_status)


def _parse_control(words: list[str]) -> ControlMessage:
    """Parse a message. Raises ValueError."""
    match words:
        case ["ready", nonce, version, pid, capabilities]:
            known = frozenset(_word(each) for each in capabilities.split(","))
            return Ready(_name_or_none(nonce), _number(version, 0xFFFF), _number(pid, _PID_MAX), known)
        case ["pong", nonce]:
            return Pong(_name(nonce))
        case ["ports", id, count]:
            return Ports(_name(id), _number(count, _PORTS_MAX))
        case ["connected", id, count]:
            return Connected(_name(id), _number(count, _PORTS_MAX))
        case ["refused", id, errno, what]:
            return Refused(_name_or_none(id), _number(errno, _ERRNO_MAX), _word(what))
        case ["done", id]:
            return Done(_name(id))
        case ["lost", id]:
            return Lost(_name(id))
        case ["forked", seed]:
            return Forked(_name(seed))
    raise ValueError


def _parse_status(words: list[str]) -> StatusMessage:
    """Parse a message. Raises ValueError."""
    match words:
        case ["started", pid]:
            return Started(_number(pid, _PID_MAX))
        case ["closed", "stdin"]:
            return InputClosed()
        case ["exit", status, stdout, stderr]:
            return Exited(_number(status, 255), _number(stdout, _TOTAL_MAX), _number(stderr, _TOTAL_MAX))
        case ["signal", number, stdout, stderr] if number != "0":
            return Signalled(_number(number, _SIGNAL_MAX), _number(stdout, _TOTAL_MAX), _number(stderr, _TOTAL_MAX))
        case ["error", ("125" | "126" | "127") as status, errno, what]:
            return Failed(int(status), _number(errno, _ERRNO_MAX), _word(what))
    raise ValueError


_PID_MAX = 2**31 - 1
_ERRNO_MAX = 4095
_PORTS_MAX = 511
_TOTAL_MAX = 2**64 - 1

_NUMBER = re.compile(r"0|[1-9][0-9]{0,19}")
_WORD = re.compile(r"[a-z][a-z0-9-]{0,31}")


def _number(text: str, bound: int) -> int:
    if not _NUMBER.fullmatch(text) or (value := int(text)) > bound:
        raise ValueError
    return value


def _word(text: str) -> str:
    if not _WORD.fullmatch(text):
        raise ValueError
    return text


def _name_or_none(text: str) -> str | None:
    return None if text == "-" else _name(text)


def _malformed(line: bytes) -> Malformed:
    return Malformed(line[:80])
