# SPDX-License-Identifier: LGPL-2.1-or-later
"""Talks to the agent in the guest as the manager does, for tests: on the control port and on ports of commands.

The module uses raw QMP to a QEMU with the built-in guest, in one thread, with a deadline on every wait.
"""

from __future__ import annotations

import itertools
import json
import select
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vmspawn.agent import protocol
from vmspawn.agent.build import build as build_agent
from vmspawn.agent.protocol import ControlMessage, Exited, Failed, Malformed, Ready, Run, Signalled, StatusMessage
from vmspawn.guest import build, builtin
from vmspawn.guest.initramfs import Initramfs

# Deadlines, not expectations: a boot takes two seconds, and much longer on a busy host.
BOOT_SECONDS = 60.0
ANSWER_SECONDS = 25.0

#: Ports 0 and 1 belong to the console.
CONTROL_NUMBER, FIRST_NUMBER, PORTS = 2, 3, 256

MACHINES = {
    "x86_64": ("-machine", "q35"),
    "aarch64": ("-machine", "virt,gic-version=3", "-cpu", "cortex-a57"),
}

#: The ports of a command on a terminal.
_TERMINAL_PORTS = (protocol.STATUS, protocol.STDIN)

_Found = TypeVar("_Found")


def initrd_with(path: Path, guest: str, agent: bytes) -> Path:
    """Make an initrd with the agent: append an archive to the guest's initrd. The kernel unpacks all its archives."""
    with open(path, "wb") as file:
        file.write(Path(guest).read_bytes())
        archive = Initramfs(file)
        archive.add_file("lib/vmspawn/agent", agent, executable=True)
        archive.close()
    return path


class Monitor:
    """A QMP client on a connected socket. It can send descriptors. Only `wait_deleted` uses the events."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.socket.settimeout(ANSWER_SECONDS)
        self._buffer = b""
        self._events: list[Mapping[str, Any]] = []
        assert "QMP" in self._message()
        self.command("qmp_capabilities")

    def _message(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            data = self.socket.recv(65536)
            assert data, "QEMU has closed its monitor"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def send(self, name: str, fds: Sequence[int] = (), /, **arguments: Any) -> None:
        """Send a command without waiting. `reply` returns its reply."""
        data = json.dumps({"execute": name, "arguments": arguments}, separators=(",", ":")).encode()
        if fds:
            socket.send_fds(self.socket, [data], fds)
        else:
            self.socket.sendall(data)

    def reply(self) -> Any:
        """Return the next reply."""
        while "event" in (message := self._message()):
            self._events.append(message)
        assert "return" in message, message
        return message["return"]

    def command(self, name: str, /, **arguments: Any) -> Any:
        """Run a command and return its reply."""
        self.send(name, **arguments)
        return self.reply()

    def wait_deleted(self, device: str) -> None:
        """Wait for a device's DEVICE_DELETED."""
        while True:
            for event in self._events:
                if event["event"] == "DEVICE_DELETED" and event["data"].get("device") == device:
                    self._events.remove(event)
                    return
            message = self._message()
            assert "event" in message
            self._events.append(message)


@dataclass
class Completed:
    """The result of a command."""

    end: Exited | Signalled | Failed
    stdout: bytes
    stderr: bytes

    @property
    def status(self) -> int:
        """The exit status, as a shell reports it."""
        return 128 + self.end.signal if isinstance(self.end, Signalled) else self.end.status


class Command:
    """A command with the sockets of its ports. Tests may close `stdin` and the other sockets."""

    def __init__(self, machine: AgentMachine, run: Run) -> None:
        self.run = run
        self.machine = machine
        self.sockets: dict[str, socket.socket] = {}
        self.numbers: dict[str, int] = {}
        self.status: list[StatusMessage | Malformed] = []
        self._reader = protocol.status_reader()
        self._unread: dict[str, bytes] = {}
        for stream in protocol.PORTS:
            if (stream != protocol.STDIN or run.stdin) and (stream in _TERMINAL_PORTS or run.size is None):
                self.sockets[stream], self.numbers[stream] = machine.plug(self._id(stream), run.ports, stream)
        for _ in self.sockets:
            machine.wait_plugged()

    def _id(self, stream: str) -> str:
        return f"x{self.run.id}-{stream}"

    def read_status(self, seconds: float = ANSWER_SECONDS) -> None:
        """Read from the status port."""
        port = self.sockets[protocol.STATUS]
        assert select.select([port], [], [], seconds)[0], f"no status within {seconds:g} s; so far: {self.status}"
        data = port.recv(4096)
        assert data, f"the status port is closed; so far: {self.status}"
        self.status += self._reader.feed(data)

    def wait(self, kind: type[_Found]) -> _Found:
        """Wait for a message of this type on the status port."""
        while True:
            for message in self.status:
                if isinstance(message, kind):
                    return message
            self.read_status()

    def end(self) -> Exited | Signalled | Failed:
        """Wait for the command's end."""
        while True:
            for message in self.status:
                if isinstance(message, Exited | Signalled | Failed):
                    return message
            self.read_status()

    def close_stdin(self) -> None:
        """End the command's input, after the command has started."""
        while not any(isinstance(message, protocol.Started | Failed) for message in self.status):
            self.read_status()
        self.sockets[protocol.STDIN].shutdown(socket.SHUT_WR)

    def read_until(self, what: bytes, stream: str = protocol.STDIN) -> bytes:
        """Read up to the end of a text. The next call begins there."""
        found, port = self._unread.pop(stream, b""), self.sockets[stream]
        while what not in found:
            assert select.select([port], [], [], ANSWER_SECONDS)[0], f"no {what!r} in {found!r}"
            data = port.recv(65536)
            assert data, f"closed before {what!r}: {found!r}"
            found += data
        end = found.index(what) + len(what)
        self._unread[stream] = found[end:]
        return found[:end]

    def communicate(self, data: bytes = b"") -> Completed:
        """Send all input, read all output, and unplug the ports."""
        found = {name: bytearray() for name in (protocol.STDOUT, protocol.STDERR)}
        left = memoryview(data)
        stdin = self.sockets.get(protocol.STDIN)
        if stdin is not None and not data:
            self.close_stdin()
            stdin = None
        deadline = time.monotonic() + ANSWER_SECONDS
        while not self._is_complete(found):
            readable = [self.sockets[name] for name in (*found, protocol.STATUS)]
            ready = select.select(readable, [stdin] if stdin else [], [], max(0.0, deadline - time.monotonic()))
            assert ready[0] or ready[1], f"not done in time: {self.status}, {[len(each) for each in found.values()]}"
            for name, output in found.items():
                if self.sockets[name] in ready[0]:
                    output += self.sockets[name].recv(1 << 18)
            if self.sockets[protocol.STATUS] in ready[0]:
                self.read_status()
            if stdin is not None and ready[1]:
                left = left[stdin.send(left, socket.MSG_DONTWAIT) :]
                if not left:
                    self.close_stdin()
                    stdin = None
        self.unplug()
        return Completed(self.end(), bytes(found[protocol.STDOUT]), bytes(found[protocol.STDERR]))

    def _is_complete(self, found: Mapping[str, bytearray]) -> bool:
        for end in self.status:
            if isinstance(end, Failed):
                return True
            if isinstance(end, Exited | Signalled):
                return (len(found[protocol.STDOUT]), len(found[protocol.STDERR])) == (end.stdout, end.stderr)
        return False

    def unplug(self) -> None:
        """Unplug the ports, which kills the command if it still runs."""
        for stream in self.sockets:
            self.machine.monitor.command("device_del", id=self._id(stream))
        for stream, port in self.sockets.items():
            self.machine.monitor.wait_deleted(self._id(stream))
            self.machine.monitor.command("chardev-remove", id=self._id(stream))
            port.close()
            self.machine.free.append(self.numbers[stream])
        # Wait until the guest has handled the removals: QEMU drops port notifications when its queue of 32 is full.
        self.machine.ping()


class AgentMachine:
    """A machine with the built-in guest and its agent."""

    def __init__(
        self, qemu: str, folder: Path, stack: ExitStack, *, architecture: str = "x86_64", agent: Path | None = None
    ) -> None:
        guest = builtin.find(architecture) or build.build(architecture)
        program = Path(agent or build_agent(architecture)).read_bytes()
        self.console = folder / "console"
        self.free = list(range(FIRST_NUMBER, PORTS))
        self._ids = itertools.count()
        self.session = ""
        self.messages: list[ControlMessage | Malformed] = []
        self._stack = stack
        self.control: socket.socket | None = None
        ours, theirs = socket.socketpair()
        # A listening socket, not a pair, so that the host can disconnect and connect again.
        self._path = folder / "control"
        port = f"virtserialport,id=control,name={protocol.CONTROL_PORT}"
        with theirs, socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(self._path))
            listening.listen(1)
            command = [
                *(qemu, "-accel", "tcg", *MACHINES[architecture], "-m", "256"),
                *("-nodefaults", "-display", "none", "-no-reboot"),
                *("-kernel", guest.kernel, "-initrd", str(initrd_with(folder / "initrd", guest.initrd, program))),
                *("-append", " ".join((*guest.arguments, "console=hvc0"))),
                *("-device", f"virtio-serial-pci,id=serial,max_ports={PORTS}"),
                *("-chardev", f"file,id=console,path={self.console}"),
                *("-device", "virtconsole,chardev=console,bus=serial.0,nr=0"),
                *("-chardev", f"socket,id=control,fd={listening.fileno()},server=on,wait=off"),
                *("-device", f"{port},chardev=control,bus=serial.0,nr={CONTROL_NUMBER}"),
                *("-chardev", f"socket,id=monitor,fd={theirs.fileno()}"),
                *("-mon", "chardev=monitor,mode=control"),
            ]
            descriptors = (theirs.fileno(), listening.fileno())
            self.process = subprocess.Popen(command, pass_fds=descriptors, stdin=subprocess.DEVNULL)
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)
        stack.callback(ours.close)
        self.monitor = Monitor(ours)
        self.connect()

    def connect(self) -> None:
        """Connect to the control port, as a new manager does, and close the previous connection."""
        if self.control is not None:
            self.control.close()
        self.messages.clear()
        self._reader = protocol.control_reader()
        self.control = socket.socket(socket.AF_UNIX)
        self._stack.callback(self.control.close)
        self.control.settimeout(ANSWER_SECONDS)
        self.control.connect(str(self._path))

    def disconnect(self) -> None:
        """Close the connection to the control port."""
        assert self.control is not None
        self.control.close()

    def receive(self, kind: type[_Found], seconds: float = ANSWER_SECONDS) -> _Found:
        """Wait for a message of this type on the control port. Consumes the message and all earlier ones."""
        deadline = time.monotonic() + seconds
        assert self.control is not None
        while True:
            while self.messages:
                message = self.messages.pop(0)
                if isinstance(message, kind):
                    return message
            assert select.select([self.control], [], [], max(0.0, deadline - time.monotonic()))[0], (
                f"no {kind.__name__} within {seconds:g} s; the console has {self.console.read_text()[-500:]}"
            )
            data = self.control.recv(65536)
            assert data, "QEMU has closed the control port"
            self.messages += self._reader.feed(data)

    def send(self, data: bytes) -> None:
        """Send bytes to the agent."""
        assert self.control is not None
        self.control.sendall(data)

    def start_session(self) -> Ready:
        """Begin a session with the agent."""
        self.session = f"s{next(self._ids)}"
        self.send(protocol.sync(self.session))
        while (ready := self.receive(Ready)).nonce != self.session:
            pass
        return ready

    def ping(self) -> None:
        """Wait for the agent to answer."""
        nonce = f"p{next(self._ids)}"
        self.send(protocol.ping(nonce))
        assert self.control is not None
        while protocol.Pong(nonce) not in self.messages:
            assert select.select([self.control], [], [], ANSWER_SECONDS)[0], "the agent does not answer"
            data = self.control.recv(65536)
            assert data, "QEMU has closed the control port"
            self.messages += self._reader.feed(data)
        self.messages.remove(protocol.Pong(nonce))

    def plug(self, device: str, id: str, stream: str) -> tuple[socket.socket, int]:
        """Plug a port in, and return its socket and its number. `wait_plugged` reads the replies."""
        ours, theirs = socket.socketpair()
        self._stack.callback(ours.close)
        number = self.free.pop(0)
        with theirs:
            self.monitor.send("getfd", [theirs.fileno()], fdname=device)
            address = {"type": "fd", "data": {"str": device}}
            backend = {"type": "socket", "data": {"addr": address, "server": False}}
            self.monitor.send("chardev-add", id=device, backend=backend)
            self.monitor.send(
                "device_add",
                driver="virtserialport",
                id=device,
                chardev=device,
                name=protocol.port_name(id, stream),
                bus="serial.0",
                nr=number,
            )
        return ours, number

    def wait_plugged(self) -> None:
        """Wait until a port is plugged in."""
        for _ in range(3):
            self.monitor.reply()

    def start(self, *arguments: bytes | str, **fields: Any) -> Command:
        """Start a command."""
        words = [each.encode() if isinstance(each, str) else each for each in arguments]
        id = f"c{next(self._ids)}"
        run = Run(id, self.session, f"p-{id}", words, **fields)
        command = Command(self, run)
        self.send(protocol.run(run))
        return command

    def run(self, *arguments: bytes | str, data: bytes = b"", **fields: Any) -> Completed:
        """Run a command until it ends."""
        return self.start(*arguments, **fields).communicate(data)


@contextmanager
def booted(
    qemu: str, folder: Path, *, architecture: str = "x86_64", agent: Path | None = None
) -> Iterator[AgentMachine]:
    """Boot a machine, and begin a session with its agent. Kills the machine on exit."""
    with ExitStack() as stack:
        machine = AgentMachine(qemu, folder, stack, architecture=architecture, agent=agent)
        machine.receive(Ready, BOOT_SECONDS)
        machine.start_session()
        yield machine
