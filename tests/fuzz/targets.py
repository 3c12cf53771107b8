# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the fuzz targets: the parsers of untrusted input, each compared with a second implementation or a rule.

`./dev fuzz` calls a target with inputs that atheris makes, guided by their coverage. tests/unit/test_fuzz_targets.py
calls each target with a few inputs. A target fails if it raises AssertionError, or an error that its parser must not
raise.
"""

import io
import json
import os
import stat
import struct
import tarfile
import tempfile
import uuid
import zlib
from collections.abc import Callable
from typing import Any, cast

import msgspec
from asyncvarlink import VarlinkErrorReply

from vmspawn.agent import protocol
from vmspawn.archive.place import place
from vmspawn.archive.unpack import unpack
from vmspawn.control import connection
from vmspawn.control.server import build_registry
from vmspawn.errors import StartError, VmspawnError
from vmspawn.images import qcow2
from vmspawn.images.detection import container_format
from vmspawn.images.other_files import READERS, other_files
from vmspawn.images.partitions import root_argument
from vmspawn.inside.inside import Inside
from vmspawn.machine.running import Running
from vmspawn.qmp.syntax import envelope
from vmspawn.qmp.syntax.dialect import dialect_of
from vmspawn.qmp.syntax.envelope import USUAL, Command, Refusal
from vmspawn.qmp.syntax.message import Message
from vmspawn.qmp.syntax.reader import Malformed
from vmspawn.qmp.syntax.scanner import Scanner

_DIALECTS = (dialect_of("JSON parse error, expecting value"), dialect_of("1:1: JSON parse error, expecting value"))


def scanner(data: bytes) -> None:
    """Check that the messages of a stream do not depend on where it is cut, and that each message is JSON."""
    if not data:
        return
    dialect, stream = _DIALECTS[data[0] & 1], data[1:]
    whole = scan(dialect, [stream])
    cut = data[0] % (len(stream) + 1)
    assert _outcomes(scan(dialect, [stream[:cut], stream[cut:]])) == _outcomes(whole)
    assert _outcomes(scan(dialect, [bytes([byte]) for byte in stream])) == _outcomes(whole)
    for each in whole:
        if isinstance(each, Message):
            msgspec.json.decode(each.text, type=msgspec.Raw)


def scan(dialect: Any, pieces: list[bytes]) -> list[Message | Malformed]:
    """Return the messages of a stream that comes in these pieces."""
    reader, found = Scanner(dialect), []
    for piece in pieces:
        reader.feed(piece)
        while (message := reader.next()) is not None or reader.is_busy:
            if message is not None:
                found.append(message)
    return found


def _outcomes(found: list[Message | Malformed]) -> list[object]:
    return [(each.text, each.members) if isinstance(each, Message) else each for each in found]


def envelopes(data: bytes) -> None:
    """Check that a message becomes a command in JSON with the same name, or a refusal of one line.

    The quick path for usual commands must make the same command.
    """
    for message in scan(_DIALECTS[0], [data + b"\n"]):
        for oob in (False, True):
            item = envelope.read(message, oob=oob)
            if isinstance(item, Refusal):
                assert "error" in json.loads(item.line)
                assert item.line.endswith(b"\r\n")
            else:
                _check_command(item, message)
    reader = Scanner(_DIALECTS[0])
    reader.feed(data)
    if (captured := reader.take(USUAL)) is not None:
        quick = envelope.usual(captured)
        slow = envelope.read(scan(_DIALECTS[0], [data + b"\n"])[0], oob=False)
        assert (quick.body, quick.name, quick.id) == (slow.body, slow.name, slow.id)  # type: ignore[union-attr]


def _check_command(command: Command, message: Message | Malformed) -> None:
    assert isinstance(message, Message)
    assert message.members is not None
    assert msgspec.json.decode(command.body + b"}", type=dict[str, msgspec.Raw])
    assert (command.id is None) == ("id" not in message.members)
    name = message.members.get("exec-oob" if command.is_oob else "execute")
    assert name is not None
    assert msgspec.json.decode(name) == command.name.decode()


def varlink(data: bytes) -> None:
    """Check that a call is parsed and its parameters are converted, or that it is refused by a Varlink error."""
    try:
        request = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    if not isinstance(request, dict):
        return
    descriptors = connection._Descriptors(object(), [])
    try:
        call = connection._parse(request)
        assert (call.method, bool(call.more)) == (request["method"], request.get("more") is True)
        _, signature = _REGISTRY.lookup_method(call)
        connection._convert(signature, call, descriptors)
    except VarlinkErrorReply as error:
        json.dumps(error.tojson())


def images(data: bytes) -> None:
    """Check that the parsers read a bounded part of an image, whatever its header contains."""
    if not data:
        return
    image = _Image(data[0], data[1:])
    container_format(image.read, image.size)
    assert image.requested <= _DETECTION_MAX
    for image_format in READERS:
        image.requested = 0
        try:
            found = other_files(image_format, image.read)
        except ValueError:
            continue
        finally:
            assert image.requested <= _READING_MAX
        assert {each.role for each in found} <= _ROLES
        json.dumps(found)


_ROLES = {"backing file", "data file", "extent", "parent"}


def partitions(data: bytes) -> None:
    """Check that any image, raw or qcow2, gives an argument root= or mount.usr=, or is refused."""
    if not data:
        return
    fd = os.memfd_create("fuzz")
    try:
        os.pwrite(fd, data[1:], 0)
        read = qcow2.Reader(fd, "image").read if data[0] & 1 else lambda offset, length: os.pread(fd, length, offset)
        argument = root_argument(read, architecture="x86_64", bus="virtio-blk", path="image")
        assert argument.startswith(("root=", "mount.usr="))
        assert argument.isprintable()
    except StartError:
        pass
    finally:
        os.close(fd)


def _gpt() -> bytes:
    """Make a disk with a GPT and one partition of the type for root file systems."""
    header = b"EFI PART" + struct.pack("<64xQII", 2, 1, 128)
    entry = uuid.UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709").bytes_le + bytes(range(16)) + bytes(24)
    return bytes(512) + header.ljust(512, b"\0") + entry.ljust(128, b"\0")


def _qcow2() -> bytes:
    """Make a qcow2 image of 1 KiB in two clusters, of which the second is compressed."""
    header = struct.pack(">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, 9, 1024, 0, 1, 112, 0, 0, 0, 0, 0, 0, 0, 4, 104)
    packer = zlib.compressobj(wbits=-12)
    packed = packer.compress(_gpt()[512:1024]) + packer.flush()
    table = struct.pack(">QQ", 0, 1 << 62 | 528)
    return header.ljust(112, b"\0") + struct.pack(">Q", 512).ljust(400, b"\0") + table + packed


#: The maximum numbers of bytes that may be read to detect a format, and to check an image of a known format.
_DETECTION_MAX = 1 << 10
_READING_MAX = 1 << 20


class _Image:
    """An image that begins with the content. If `kind` is odd, a third of the content is at each of VHDX's tables."""

    def __init__(self, kind: int, content: bytes) -> None:
        self._pieces = [(0, content)]
        if kind & 1:
            third = len(content) // 3
            metadata = content[third : 2 * third]
            self._pieces = [(192 << 10, content[:third]), (1 << 20, metadata), ((1 << 20) + 512, content[2 * third :])]
        self.size = max(offset + len(piece) for offset, piece in self._pieces)
        self.requested = 0

    def read(self, offset: int, length: int) -> bytes:
        """Read from the image, which has zeros after its end."""
        assert offset >= 0
        assert length >= 0
        self.requested += length
        length = max(0, min(length, self.size - offset))
        found = bytearray(length)
        for start, piece in self._pieces:
            first, last = max(start, offset), min(start + len(piece), offset + length)
            if first < last:
                found[first - offset : last - offset] = piece[first - start : last - start]
        return bytes(found)


def _vhdx() -> bytes:
    """Make the parts of a VHDX image with a parent: a region table, metadata, and its items."""

    def guid(text: str) -> bytes:
        return uuid.UUID(text).bytes_le

    region = b"regi" + struct.pack("<4xI4x", 1) + guid("8b7ca206-4790-4b9a-b8fe-575f050f886e")
    region += struct.pack("<QII", 1 << 20, 1 << 20, 1)
    metadata = b"metadata" + struct.pack("<2xH20x", 2) + guid("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
    metadata += struct.pack("<IIII", 512, 8, 4, 0) + guid("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
    metadata += struct.pack("<IIII", 520, 64, 4, 0)
    key, value = "relative_path".encode("utf-16-le"), "a".encode("utf-16-le")
    pair = struct.pack("<IIHH", 32, 32 + len(key), len(key), len(value))
    items = struct.pack("<II", 0, 2) + bytes(16) + struct.pack("<HH", 0, 1) + pair + key + value
    size = max(map(len, (region, metadata, items)))
    return b"\1" + b"".join(part.ljust(size, b"\0") for part in (region, metadata, items))


def agent(data: bytes) -> None:
    """Check that the messages of a guest's stream do not depend on where it is cut, and that at most a line is kept."""
    if not data:
        return
    stream = data[1:]
    cut = data[0] % (len(stream) + 1)
    for make in (protocol.control_reader, protocol.status_reader):
        whole = make().feed(stream)
        reader = make()
        assert reader.feed(stream[:cut]) + reader.feed(stream[cut:]) == whole
        reader = make()
        assert [each for byte in stream for each in reader.feed(bytes([byte]))] == whole
        assert len(reader._partial) <= protocol.LINE_MAX


# No method is called, so no machine is needed.
_REGISTRY = build_registry(cast(Running, None), Inside(cast(Running, None)))


def archive(data: bytes) -> None:
    """Check that any archive writes only into the work directory, and that only ordinary files are moved to the target.

    Ordinary files are regular files, directories, and symbolic links to a path in the target.

    Each line of the input describes a member: its type, permissions, name, link target and content.
    """
    with tempfile.TemporaryDirectory() as folder:
        outside, work, target = (os.path.join(folder, name) for name in ("outside", "work", "target"))
        for path in (outside, work, target):
            os.mkdir(path)
        try:
            found = unpack(io.BytesIO(_archive(data)), work, root="top", skip_special=data[:1] == b"s")
            if os.path.lexists(os.path.join(work, "top")):
                place(work, "top", os.path.join(target, "top"), found)
        except VmspawnError:
            pass
        assert sorted(os.listdir(folder)) == ["outside", "target", "work"]
        assert not os.listdir(outside)
        for path, folders, files in os.walk(target):
            for each in (os.path.join(path, name) for name in folders + files):
                kind = stat.S_IFMT(os.lstat(each).st_mode)
                assert kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
                real = os.path.realpath(each)
                assert kind != stat.S_IFLNK or real == f"{target}/top" or real.startswith(f"{target}/top/")


def _archive(data: bytes) -> bytes:
    made = bytearray()
    for line in data.split(b"\n"):
        kind, mode, name, link, content = (line.split(b"|", 4) + [b""] * 5)[:5]
        header = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
        header.type = kind[-1:] or tarfile.DIRTYPE
        header.mode = int.from_bytes(mode[:2], "big")
        header.linkname = link.decode("utf-8", "surrogateescape")
        header.size = len(content)
        made += header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + content + bytes(-len(content) % 512)
    return bytes(made + bytes(1024))


#: The targets by name, each with its seeds.
TARGETS: dict[str, tuple[Callable[[bytes], None], tuple[bytes, ...]]] = {
    "scanner": (
        scanner,
        (
            b'\x05{"execute":"query-name","id":[1,{"a":null}]} {\'execute\':\'x\'}\n',
            b'\x06{"execute" : "a", "arguments": {"b": -1.5e3, "c": "\\u00e9 \xc3\xa9"}} ] {"a" 1} \xff {"id":0} ',
            b"\x07{'k': ['}', \"]\", '\"']}[] 12 \"s\" 'q'\n",
        ),
    ),
    "envelopes": (
        envelopes,
        (
            b'{"execute":"query-status"}',
            b'{"execute":"stop","arguments":{ },"id":{"a":[]}}',
            b'{"exec-oob":"migrate-pause","id":1}',
            b'{"execute":"x","control":{}}',
        ),
    ),
    "images": (
        images,
        (
            b"\0QFI\xfb\0\0\0\3"
            + struct.pack(">QI", 112, 4)
            + bytes(52)
            + struct.pack(">Q", 4)
            + bytes(20)
            + struct.pack(">IIII", 104, 0x44415441, 4, 0x64617461)
            + b"base",
            b"\0KDMV"
            + struct.pack("<IIQQQQ", 1, 3, 8192, 128, 1, 1).ljust(508, b"\0")
            + b'# Disk DescriptorFile\nparentCID=0\nparentFileNameHint="p"\nRW 8192 SPARSE "a"\nRW 1 FLAT "b" 0\n',
            b'\0# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\nRW 8192 FLAT "a" 0\n',
            b"\0" + bytes(64) + struct.pack("<IIII", 0xBEDA107F, 0x10001, 400, 4).ljust(512, b"\0"),
            _vhdx(),
            b"\0" + bytes(512) + b"conectix" + bytes(504),
        ),
    ),
    "agent": (
        agent,
        (
            b"\x04ready - 1 7 tty,resize ;\nrefused c1 17 id ;\nlost c1 ;\ndone c2 ;\nconnected p 4 ;\n",
            b"\x05started 5 ;\nclosed stdin ;\nexit 0 1 2 ;\n",
            b"\x06error 127 2 exec ;\nsignal 9 0 0 ;\n",
        ),
    ),
    "archive": (
        archive,
        (
            b"5|\1\xed|top\n0|\1\xa4|top/file||content\n2||top/link|file\n1||top/hard|top/file",
            b"s5||top\n2||top/link|../..\n0||top/link/x||y\n3||top/null\n5||top/d\n2||top/d/up|../d",
            b"0|\x0f\xff|top||" + bytes(300) + b"\nL||x||top/" + b"a" * 120 + b"\nS||top/sparse",
        ),
    ),
    "partitions": (
        partitions,
        (b"\0" + _gpt(), b"\0" + bytes(450) + b"\x83".ljust(60, b"\0") + b"\x55\xaa", b"\1" + _qcow2()),
    ),
    "varlink": (
        varlink,
        (
            b'{"method":"org.varlink.service.GetInfo"}',
            b'{"method":"io.systemd.MachineInstance.SubscribeEvents","more":true,"parameters":{"filter":["STOP"]}}',
            b'{"method":"io.vmspawn.Machine.AttachStorage","parameters":{"fileDescriptorIndex":0,"name":"a"}}',
            b'{"method":"io.vmspawn.Machine.DetachStorage","oneway":true,"parameters":{"name":"a","force":false}}',
        ),
    ),
}
