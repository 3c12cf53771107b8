# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests archives: vmspawn exchanges them with GNU tar and busybox's tar without loss, and refuses hostile ones."""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmspawn.archive import unpack as unpacking
from vmspawn.archive.pack import UNIT, Packer, SparseFile, data_of, name_of
from vmspawn.archive.place import place
from vmspawn.archive.reader import Kind, Piece, Reader, Truncated
from vmspawn.archive.unpack import Unpacked, unpack
from vmspawn.errors import CopyFailed, SystemFailure, UsageError, VmspawnError

TARS = [["tar"], ["busybox", "tar"]]
MIB = 1 << 20

tars = pytest.mark.parametrize(
    "tar",
    [pytest.param(each, marks=pytest.mark.skipif(not shutil.which(each[0]), reason=f"{each[0]} is not installed"))
     for each in TARS],
    ids=lambda tar: tar[0],
)  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a directory with all kinds of files."""
    top = tmp_path / "tree"
    (top / "sub" / ("deep" * 30) / ("er" * 60)).mkdir(parents=True)
    (top / "file").write_bytes(b"content\n")
    (top / "empty").touch()
    (top / "large").write_bytes(os.urandom(3 * MIB + 17))
    os.link(top / "file", top / "sub" / "hard")
    (top / "sub" / "link").symlink_to("../file")
    (top / "sub" / "far").symlink_to("deep" * 30 + "/" + "er" * 60)
    Path(os.fsdecode(os.fsencode(top) + b"/odd \xff\n'name")).write_bytes(b"odd")
    (top / "-rf").write_bytes(b"dash")
    (top / "locked").mkdir()
    (top / "locked" / "inner").write_bytes(b"inner")
    (top / "file").chmod(0o640)
    (top / "large").chmod(0o755)
    (top / "locked").chmod(0o555)
    for path, time in ((top / "file", 10**9), (top / "locked", 5 * 10**8), (top / "empty", -1000)):
        os.utime(path, (time, time))
    os.utime(top / "sub" / "link", (1234567890, 1234567890), follow_symlinks=False)
    return top


def look(top: Path) -> dict[str, tuple[object, ...]]:
    """Return a directory and all files below: mode, time, content or link target, and number of hard links."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted([top, *top.rglob("*")]):
        status = path.lstat()
        is_link = stat.S_ISLNK(status.st_mode)
        content = os.readlink(path) if is_link else path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        mode = 0 if is_link else status.st_mode
        links = status.st_nlink if stat.S_ISREG(status.st_mode) else 0
        found[os.fsdecode(path.relative_to(top))] = (mode, int(status.st_mtime), content, links)
    return found


def unpacked(data: bytes, folder: Path, root: str, *, skip_special: bool = False) -> Unpacked:
    """Unpack an archive, and move its content to the directory."""
    work = Path(tempfile.mkdtemp(prefix=".work-", dir=folder))
    try:
        found = unpack(io.BytesIO(data), str(work), root=root, skip_special=skip_special)
        if os.path.lexists(work / root):
            place(str(work), root, str(folder / root), found)
        return found
    finally:
        shutil.rmtree(work)


@tars
def test_every_tar_unpacks_a_packed_tree_whole(tree: Path, tmp_path: Path, tar: list[str]) -> None:
    target = tmp_path / "target"
    target.mkdir()
    packer = Packer([str(tree)])
    subprocess.run([*tar, "-x", "-p", "-f", "-", "-C", str(target)], input=b"".join(packer.blocks()), check=True)
    expected = look(tree)
    if tar[0] == "busybox":
        # busybox sets no time on a symbolic link.
        expected = {name: row[:1] + row[2:] for name, row in expected.items()}
        assert {name: row[:1] + row[2:] for name, row in look(target / "tree").items()} == expected
        assert (target / "tree" / "locked").stat().st_mtime == 5 * 10**8
    else:
        assert look(target / "tree") == expected
    assert packer.total >= 3 * MIB


@tars
def test_a_tree_of_every_tar_is_unpacked_whole(tree: Path, tmp_path: Path, tar: list[str]) -> None:
    target = tmp_path / "target"
    target.mkdir()
    options = ["--format=gnu", "-S"] if tar[0] == "tar" else []
    os.utime(tree / "empty", (0, 0))
    data = subprocess.run(
        [*tar, "-c", *options, "-f", "-", "./tree"], cwd=tmp_path, stdout=subprocess.PIPE, check=True
    ).stdout
    unpacked(data, target, "tree")
    assert look(target / "tree") == look(tree)


def test_a_packed_tree_is_unpacked_whole(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    unpacked(b"".join(Packer([str(tree)]).blocks()), tmp_path / "target", "tree")
    assert look(tmp_path / "target" / "tree") == look(tree)


def make_sparse(path: Path) -> Path:
    with open(path, "wb") as file:
        for offset in (0, 10 * MIB, 10 * MIB + 3 * UNIT, 39 * MIB + 5):
            file.seek(offset)
            file.write(b"data")
        file.truncate(40 * MIB + 1)
    return path


def test_holes_are_not_sent(tmp_path: Path) -> None:
    path = make_sparse(tmp_path / "sparse")
    packer = Packer([str(path)])
    assert len(b"".join(packer.blocks())) < 4096
    (file,) = packer.sparse
    copy = bytearray(file.size + UNIT)
    sent = b"".join(data_of(file, file.pieces))
    assert len(sent) == sum(each.length for each in file.pieces) < MIB
    for offset, length in file.pieces:
        copy[offset : offset + length], sent = sent[:length], sent[length:]
    assert copy[: file.size] == path.read_bytes()


@tars
def test_holes_stay_holes(tmp_path: Path, tar: list[str]) -> None:
    make_sparse(tmp_path / "sparse")
    (tmp_path / "target").mkdir()
    options = ["--format=gnu", "-S"] if tar[0] == "tar" else []
    data = subprocess.run(
        [*tar, "-c", *options, "-f", "-", "./sparse"], cwd=tmp_path, stdout=subprocess.PIPE, check=True
    ).stdout
    unpacked(data, tmp_path / "target", "sparse")
    copy = tmp_path / "target" / "sparse"
    assert copy.read_bytes() == (tmp_path / "sparse").read_bytes()
    assert copy.stat().st_blocks * 512 < 2 * MIB


def member(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **fields: object) -> bytes:
    """Make one member of an archive."""
    made = tarfile.TarInfo(name)
    made.type, made.size = kind, len(content)
    for key, value in fields.items():
        setattr(made, key, value)
    return made.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape") + content + bytes(-len(content) % 512)


END = bytes(1024)
TOP = member("top", tarfile.DIRTYPE)


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> bytes:
    return member(name, kind, linkname=target)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (TOP + member("/etc/passwd", content=b"x"), "not below"),
        (TOP + member("top/../../x"), "not below"),
        (member("../top"), "not below"),
        (member("other"), "not below"),
        (TOP + member("top/a/b"), "before its directory"),
        (TOP + link("top/l", "/etc") + member("top/l/passwd"), "leads out"),
        (TOP + link("top/l", "..") + member("top/l/x"), "leads out"),
        (TOP + link("top/l", "a") + member("top/l/x"), "before its directory"),
        (TOP + member("top/d", tarfile.DIRTYPE) + link("top/d/l", "../../x"), "leads out"),
        (TOP + member("top/d", tarfile.DIRTYPE) + link("top/up", "d/../.."), "leads out"),
        (TOP + link("top/l", ""), "leads out"),
        (link("top", "x"), "is a symbolic link, to"),
        (TOP + link("top/h", "/etc/passwd", tarfile.LNKTYPE), "not below"),
        (TOP + link("top/h", "top/none", tarfile.LNKTYPE), "hard link to a file that was not sent"),
        (TOP + link("top/h", "top", tarfile.LNKTYPE), "cannot write|not permitted"),
        (TOP + member("top/null", tarfile.CHRTYPE, devmajor=1, devminor=3), "device"),
        (TOP + member("top/disk", tarfile.BLKTYPE), "device"),
        (TOP + member("top/pipe", tarfile.FIFOTYPE), "device"),
        (TOP + member("top/f") + member("top/f"), "twice"),
        (TOP + member("top/f") + member("top/f", tarfile.DIRTYPE), "twice"),
        (TOP + link("top/l", "a") + link("top/l", "b"), "twice"),
        (TOP + link("top/l", "a") + member("top/l"), "twice"),
        (TOP + member("top/big")[:124] + b"%011o\0" % (1 << 32), "not an archive|ended early"),
        (TOP + member("top/f", content=b"abc")[:-512], "ended early"),
        (TOP, "ended early"),
        (b"", "ended early"),
        (END, "empty archive"),
        (b"x" * 512, "not an archive"),
        (TOP + member("top/x", b"Z"), "not known"),
        (member("n", tarfile.GNUTYPE_LONGNAME, size=1 << 40), "name of"),
        (member("n", tarfile.GNUTYPE_LONGNAME, content=b"top\0") * 2 + TOP, "two long names"),
        (member("top", tarfile.XHDTYPE, content=b"20 path=/etc/passwd\n") + TOP, "not known"),
        (TOP + member("top/huge", size=1 << 60), "not enough free space"),
    ],
)
def test_a_hostile_archive_is_refused(tmp_path: Path, data: bytes, why: str) -> None:
    complete = data if "early" in why else data + END
    with pytest.raises(VmspawnError, match=why):
        unpacked(complete, tmp_path, "top")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("target", ["busybox", "../usr/lib/os-release", "/proc/self/fd"])
def test_an_archive_of_one_symbolic_link_is_refused_or_skipped(tmp_path: Path, target: str) -> None:
    with pytest.raises(CopyFailed, match=f"'top' is a symbolic link, to '{target}'") as caught:
        unpacked(link("top", target) + END, tmp_path, "top")
    assert caught.value.hint == "copy the file that the link leads to"
    assert os.listdir(tmp_path) == []
    assert len(unpacked(link("top", target) + END, tmp_path, "top", skip_special=True).skipped) == 1


def test_special_files_can_be_left_out(tmp_path: Path) -> None:
    data = TOP + member("top/pipe", tarfile.FIFOTYPE) + link("top/out", "/etc") + member("top/f", content=b"x") + END
    found = unpacked(data, tmp_path, "top", skip_special=True)
    assert len(found.skipped) == 2
    assert [path.name for path in (tmp_path / "top").iterdir()] == ["f"]


def test_no_file_gets_more_rights_than_read_write_execute(tmp_path: Path) -> None:
    data = (
        TOP + member("top/su", content=b"x", mode=0o6777, uid=0) + member("top/d", tarfile.DIRTYPE, mode=0o3777) + END
    )
    unpacked(data, tmp_path, "top")
    assert [stat.S_IMODE((tmp_path / "top" / name).stat().st_mode) for name in ("su", "d")] == [0o777, 0o777]


def endless(block: Callable[[int], bytes]) -> io.BufferedReader:
    """Return an endless stream."""

    class Endless(io.RawIOBase):
        number = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            data = block(self.number)
            self.number += 1
            buffer[: len(data)] = data
            return len(data)

    return io.BufferedReader(Endless(), 1 << 16)


def test_the_number_of_files_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "ENTRIES_MAX", 1000)
    stream = endless(lambda number: member(f"top/{number}") if number else TOP)
    with pytest.raises(CopyFailed, match="more than 1000 files"):
        unpack(stream, str(tmp_path), root="top")


def test_an_endless_name_is_refused(tmp_path: Path) -> None:
    """The name is sent in members of type L, none of which is followed by a file."""
    stream = endless(lambda _: member("n", tarfile.GNUTYPE_LONGNAME, content=b"top\0"))
    with pytest.raises(CopyFailed, match="two long names"):
        unpack(stream, str(tmp_path), root="top")


def test_the_length_of_all_names_together_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpacking, "_NAMES_MAX", 100_000)
    stream = endless(lambda number: link(f"top/{number}", "x" * 90) if number else TOP)
    with pytest.raises(CopyFailed, match="names of more than"):
        unpack(stream, str(tmp_path), root="top")


def number(value: int) -> bytes:
    """Encode a number of a sparse header: in octal digits, or in base 256 if it is large."""
    return b"%011o\0" % value if value < 8**11 else b"\x80" + value.to_bytes(11, "big")


def test_the_depth_of_nested_directories_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(CopyFailed, match="directories nested more than 256 levels deep"):
        unpacked(b"".join(member("top" + "/a" * depth, tarfile.DIRTYPE) for depth in range(257)), tmp_path, "top")
    assert os.listdir(tmp_path) == []


def test_a_directory_gets_its_permissions_after_the_directories_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = member("top", tarfile.DIRTYPE, mode=0o777) + member("top/a", tarfile.DIRTYPE, mode=0o777)
    data += member("top/a/b", tarfile.DIRTYPE, mode=0o777) + END
    changed: list[str] = []
    finish = Unpacked.finish

    def record(self: Unpacked, path: str, final: str) -> None:
        changed.append(path)
        finish(self, path, final)

    monkeypatch.setattr(Unpacked, "finish", record)
    unpacked(data, tmp_path, "top")
    assert changed == ["top/a/b", "top/a", "top"]


def sparse_header(pieces: list[tuple[int, int]], size: int, stored: int, *, more: bool = False) -> bytes:
    """Make an old GNU sparse header with up to four pieces."""
    block = bytearray(member("top", tarfile.GNUTYPE_SPARSE, size=stored))
    for index, (offset, length) in enumerate(pieces):
        block[386 + 24 * index : 386 + 24 * index + 24] = number(offset) + number(length)
    block[482] = more
    block[483:495] = number(size)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("pieces", "size", "stored", "why"),
    [
        ([(0, 512), (256, 256)], 1024, 768, "in order"),
        ([(0, 512)], 100, 512, "does not fit"),
        ([(0, 512)], 1024, 1024, "does not fit"),
        ([], 1 << 63, 0, "file of 9223372036854775808 bytes"),
        ([(1 << 70, 512)], 1 << 80, 512, "file of"),
    ],
)
def test_a_wrong_map_of_a_sparse_file_is_refused(
    tmp_path: Path, pieces: list[tuple[int, int]], size: int, stored: int, why: str
) -> None:
    with pytest.raises(CopyFailed, match=why):
        unpack(io.BytesIO(sparse_header(pieces, size, stored) + bytes(4096)), str(tmp_path), root="top")


def test_an_endless_map_of_a_sparse_file_is_refused(tmp_path: Path) -> None:
    entry = b"".join(b"%011o\0%011o\0" % (1, 1) for _ in range(21)) + b"\1" + bytes(7)
    stream = endless(lambda number: entry if number else sparse_header([(0, 1)], 1 << 30, 1, more=True))
    with pytest.raises(CopyFailed, match="more than 100000 pieces"):
        unpack(stream, str(tmp_path), root="top")


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=150).filter(
    lambda name: name not in (".", "..") and len(name.encode()) <= 255
)


@settings(max_examples=40)
@given(st.dictionaries(NAMES, st.binary(max_size=2000) | NAMES, max_size=6))
def test_any_names_and_contents_survive(files: dict[str, bytes | str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        top, target = Path(folder, "top"), Path(folder, "target")
        top.mkdir()
        target.mkdir()
        for name, content in files.items():
            if isinstance(content, bytes):
                (top / name).write_bytes(content)
            else:
                (top / name).symlink_to(content)
        unpacked(b"".join(Packer([str(top)]).blocks()), target, "top")
        assert look(target / "top") == look(top)


@st.composite
def hostile_archives(draw: st.DrawFn) -> bytes:
    """Make archives whose members point anywhere."""
    paths = st.lists(st.sampled_from(["top", "a", "b", "..", ".", "", "\xff"]), min_size=1, max_size=4).map("/".join)
    kinds = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])

    def made() -> bytes:
        kind = draw(kinds)
        content = draw(st.binary(max_size=600)) if kind == tarfile.REGTYPE else b""
        return member("top/" + draw(paths), kind, content, linkname=draw(paths), mode=draw(st.integers(0, 0o7777)))

    return TOP + b"".join(made() for _ in range(draw(st.integers(1, 8)))) + END


@settings(max_examples=60)
@given(hostile_archives(), st.booleans())
def test_a_hostile_archive_changes_nothing_outside_of_its_directory(data: bytes, skip: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        outside, inside = Path(folder, "outside"), Path(folder, "inside")
        outside.mkdir()
        inside.mkdir()
        (outside / "file").write_bytes(b"precious")
        before = look(outside)
        try:
            unpacked(data, inside, "top", skip_special=skip)
        except VmspawnError:
            assert os.listdir(inside) == []
        for path in inside.rglob("*"):
            assert stat.S_IFMT(path.lstat().st_mode) in (stat.S_IFLNK, stat.S_IFDIR, stat.S_IFREG)
            # Two links may lead to each other.
            real = Path(os.path.realpath(path))
            assert not os.path.islink(path) or inside / "top" in (real, *real.parents)
        assert look(outside) == before


@given(st.binary(max_size=3000))
def test_any_bytes_are_an_archive_or_are_refused(data: bytes) -> None:
    reader = Reader(io.BufferedReader(io.BytesIO(data)))
    try:
        for each in reader.members():
            assert isinstance(each.kind, Kind)
    except CopyFailed:
        pass


def test_a_file_that_shrinks_meanwhile_is_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * MIB))
    blocks = Packer([str(path)]).blocks()
    next(blocks)
    next(blocks)
    os.truncate(path, 5)
    with pytest.raises(CopyFailed, match="became shorter"):
        list(blocks)


def test_special_files_equal_names_and_paths_without_a_name_are_not_packed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CopyFailed, match="device, a socket or a pipe"):
        Packer([str(tmp_path)])
    assert len(Packer([str(tmp_path)], skip_special=True).skipped) == 1
    with pytest.raises(UsageError, match="same name"):
        Packer([str(tmp_path / "a"), str(tmp_path / "b" / "a")])
    for path, why in (("/", "no name"), (".", "no name"), ("a/..", "no name"), ("", "is empty")):
        with pytest.raises(UsageError, match=why):
            name_of(path)


def test_an_existing_directory_gets_the_new_files(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "sub").mkdir(parents=True)
    (top / "old").write_bytes(b"old")
    (top / "both").write_bytes(b"old")
    top.chmod(0o750)
    data = TOP + member("top/both", content=b"new") + member("top/sub", tarfile.DIRTYPE)
    data += member("top/sub/x", content=b"x") + member("top/fresh", tarfile.DIRTYPE, mode=0o700) + END
    unpacked(data, tmp_path, "top")
    assert {path.name for path in top.iterdir()} == {"old", "both", "sub", "fresh"}
    assert (top / "both").read_bytes() == b"new"
    assert stat.S_IMODE(top.stat().st_mode) == 0o750
    assert stat.S_IMODE((top / "fresh").stat().st_mode) == 0o700


def test_a_file_does_not_replace_a_directory(tmp_path: Path) -> None:
    (tmp_path / "top" / "x").mkdir(parents=True)
    (tmp_path / "top" / "a").write_bytes(b"old")
    with pytest.raises(CopyFailed, match="one of them is a directory"):
        unpacked(TOP + member("top/a", content=b"new") + member("top/x") + END, tmp_path, "top")
    assert (tmp_path / "top" / "a").read_bytes() == b"old"


def test_a_complete_archive_is_distinguished_from_a_truncated_archive() -> None:
    assert [each.name for each in Reader(io.BytesIO(TOP + END)).members()] == ["top"]
    with pytest.raises(Truncated):
        list(Reader(io.BytesIO(TOP)).members())


def test_an_error_names_a_file_that_opens_and_cannot_be_read() -> None:
    path = "/sys/class/net/lo/speed"
    if not os.path.exists(path):
        pytest.skip(f"there is no {path}, which the kernel refuses to read")
    with pytest.raises(SystemFailure, match=f"cannot read '{path}': Invalid argument"):
        list(Packer([path]).blocks())
    file = SparseFile(path, "speed", UNIT, 0, (Piece(0, UNIT),))
    with pytest.raises(SystemFailure, match=f"cannot read '{path}': Invalid argument"):
        list(data_of(file, file.pieces))
