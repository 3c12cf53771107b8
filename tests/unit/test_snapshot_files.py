# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests snapshots on the disk: the snapshot that a file is part of, the protection of files, and refusals."""

import errno
import fcntl
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from vmspawn.errors import NoSuchSnapshot, SnapshotExists, SnapshotInUse, StartError, UsageError
from vmspawn.images import snapshot_files
from vmspawn.snapshots import directory, manifest, merge, open_files, same_host
from vmspawn.snapshots.directory import NewFolder, OpenSnapshot
from vmspawn.snapshots.durable_files import replace_file
from vmspawn.snapshots.manifest import Firmware, Manifest, SnapshotFile, Source, State
from vmspawn.storage import backing


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMSPAWN_SNAPSHOT_DIR", str(tmp_path / "snapshots"))
    return tmp_path / "snapshots"


def described(full_name: str, *paths: Path) -> Manifest:
    machine, name = directory.parse_name(full_name)
    files = []
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        files.append(SnapshotFile.of(str(path), fd))
        os.close(fd)
    source = Source("/usr/bin/qemu", "7.2.0", 1, 2, {})
    state = State("state", 0, "fd")
    return Manifest(
        machine, name, 1.0, "", False, True, source, "q", "tcg", {}, (), {5: "x"}, {}, {}, {7: "y"}, tuple(files), state
    )


def made(full_name: str, *paths: Path) -> Manifest:
    found = described(full_name, *paths)
    new = NewFolder(full_name)
    new.make()
    new.write(snapshot_files.MANIFEST, found.to_json())
    new.finish()
    return found


def test_a_manifest_is_read_as_it_was_written() -> None:
    found = described("web@clean")
    assert manifest.load(found.to_json(), "web@clean") == found


def test_a_manifest_of_the_first_version_is_read() -> None:
    older = json.loads(described("web@clean").to_json())
    del older["firmware"], older["processor"]
    older["version"] = 1
    found = manifest.load(json.dumps(older).encode(), "web@clean")
    assert (found.firmware, found.processor) == (None, "")
    same_host.check(found)


def test_another_firmware_or_processor_is_refused(tmp_path: Path) -> None:
    firmware = tmp_path / "firmware.fd"
    firmware.write_bytes(b"one")
    kept = Firmware(str(firmware), hashlib.sha256(b"one").hexdigest())
    found = described("web@clean")._replace(firmware=kept)
    same_host.check(manifest.load(found.to_json(), "web@clean"))
    firmware.write_bytes(b"two")
    with pytest.raises(StartError, match=f"another firmware than the present {firmware}"):
        same_host.check(found)
    # A machine without a state boots, with any firmware.
    same_host.check(found._replace(state=None))
    firmware.unlink()
    with pytest.raises(StartError, match="cannot read the firmware"):
        same_host.check(found)
    with pytest.raises(StartError, match="another processor"):
        same_host.check(described("web@clean")._replace(accelerator="kvm", processor="model name\t: of another host"))
    same_host.check(described("web@clean")._replace(accelerator="kvm", processor=same_host.processor("kvm")))
    assert same_host.processor("tcg") == ""


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"version": 1}', b'{"version": 99}', b"\xff"])
def test_a_manifest_that_cannot_be_read_is_refused(content: bytes) -> None:
    with pytest.raises(StartError, match="web@clean"):
        manifest.load(content, "web@clean")


def test_a_file_of_a_snapshot_is_opened_for_reading_only(tmp_path: Path) -> None:
    path = tmp_path / "data.raw"
    path.write_bytes(bytes(512))
    made("web@clean", path)
    with pytest.raises(SnapshotInUse, match="part of snapshot web@clean"):
        backing.open_disk(str(path), read_only=False)
    linked = tmp_path / "linked"
    linked.hardlink_to(path)
    path.unlink()
    with pytest.raises(SnapshotInUse):
        backing.open_disk(str(linked), read_only=False)
    backing.open_disk(str(linked), read_only=True).close()
    directory.remove("web@clean")
    backing.open_disk(str(linked), read_only=False).close()


def test_a_snapshot_is_complete_or_absent(folder: Path) -> None:
    new = NewFolder("web@clean")
    new.make()
    assert snapshot_files.names() == []
    new.discard()
    assert list(folder.iterdir()) == []
    made("web@clean")
    with pytest.raises(SnapshotExists):
        NewFolder("web@clean").make()


def test_the_remains_of_a_dead_process_are_removed(folder: Path) -> None:
    left = folder / f"{snapshot_files.UNFINISHED}web@old-999999999"
    left.mkdir(parents=True, mode=0o700)
    folder.chmod(0o700)
    made("web@clean")
    assert not left.exists()


def test_a_snapshot_in_use_stays(tmp_path: Path, folder: Path) -> None:
    made("web@clean")
    inside = folder / "web@clean" / "image1"
    inside.touch()
    made("web@next", inside)
    with pytest.raises(SnapshotInUse, match="web@next is based on web@clean"):
        directory.remove("web@clean")
    directory.remove("web@next")
    opened = directory.OpenSnapshot("web@clean")
    with pytest.raises(SnapshotInUse, match="a machine uses"):
        directory.remove("web@clean")
    opened.close()
    directory.remove("web@clean")
    with pytest.raises(NoSuchSnapshot):
        directory.remove("web@clean")


def test_directories_that_other_users_may_write_to_are_refused(folder: Path) -> None:
    made("web@clean")
    (folder / "web@clean").chmod(0o777)
    with pytest.raises(StartError, match="other users may write"):
        directory.OpenSnapshot("web@clean")


def test_other_users_have_no_access(folder: Path) -> None:
    made("web@clean")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "web@clean" / "manifest.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "@x", "web@", "web@a/b", "web@.x", "a b@c"])
def test_invalid_snapshot_names_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        directory.parse_name(text)


def test_the_only_snapshot_needs_no_name() -> None:
    with pytest.raises(NoSuchSnapshot):
        directory.find("web", "")
    made("web@a")
    assert directory.find("web", "") == "web@a"
    made("web@b")
    with pytest.raises(UsageError):
        directory.find("web", "")


def test_the_newest_disks_are_found_without_a_name_if_there_is_no_snapshot() -> None:
    made("web@current")
    assert directory.find("web", "") == "web@current"
    made("web@clean")
    assert directory.find("web", "") == "web@clean"


def test_only_one_process_locks_a_snapshot_exclusively() -> None:
    made("web@current")
    first, second = OpenSnapshot("web@current"), OpenSnapshot("web@current")
    assert not first.lock_alone()
    second.close()
    assert first.lock_alone()
    first.close()


def test_a_lock_on_a_manifest_that_was_removed_does_not_count(folder: Path) -> None:
    made("web@current")
    with closing(OpenSnapshot("web@current")) as snapshot:
        # While this process converts its lock, another process may get the lock and rename the directory like this.
        os.rename(folder / "web@current", folder / ".new-web@current-removed-1")
        with pytest.raises(NoSuchSnapshot):
            snapshot.lock_alone()


def test_a_lock_on_a_manifest_that_was_replaced_is_taken_on_the_new_one(folder: Path) -> None:
    found = made("web@current")
    with closing(OpenSnapshot("web@current")) as snapshot:
        new = folder / "web@current" / "new"
        new.write_bytes(found._replace(created=2.0).to_json())
        os.rename(new, folder / "web@current" / snapshot_files.MANIFEST)
        assert snapshot.lock_alone()
        assert snapshot.manifest.created == 2.0
        with pytest.raises(SnapshotInUse):
            OpenSnapshot("web@current", wait=False)


def test_a_snapshot_stays_locked_when_its_manifest_is_replaced() -> None:
    found = made("web@current")
    with closing(OpenSnapshot("web@current")) as snapshot:
        assert snapshot.lock_alone()
        snapshot.replace(found._replace(created=2.0))
        with pytest.raises(SnapshotInUse):
            OpenSnapshot("web@current", wait=False)
        # A merge by another process skips the locked snapshot.
        assert not merge.merge("web")
    with closing(OpenSnapshot("web@current", wait=False)) as snapshot:
        assert snapshot.manifest.created == 2.0


def test_a_snapshot_is_gone_for_a_process_that_waited_for_its_lock() -> None:
    made("web@clean")
    with closing(OpenSnapshot("web@clean")) as snapshot, ThreadPoolExecutor() as pool:
        assert snapshot.lock_alone()
        waiting = [pool.submit(directory.remove, "web@clean") for _ in range(4)]
        snapshot.remove()
        snapshot.close()
        for each in waiting:
            with pytest.raises(NoSuchSnapshot):
                each.result(timeout=60)


def test_the_newest_disks_are_not_discarded_while_snapshots_need_the_older_ones() -> None:
    made("web@current")
    made("web-2@clean")
    directory.check_discards_nothing("web@current")
    made("web@clean")
    with pytest.raises(SnapshotInUse) as caught:
        directory.check_discards_nothing("web@current")
    assert "web@clean" in caught.value.hint
    assert "web-2" not in caught.value.hint
    directory.check_discards_nothing("web@clean")


def test_nothing_is_merged_without_a_snapshot_or_without_disks() -> None:
    assert not merge.merge("web")
    made("web@current")
    # There are no disks.
    assert not merge.merge("web")


def test_a_file_without_a_name_gets_one_and_others_are_copied(tmp_path: Path) -> None:
    unnamed = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR, 0o600)
    memory = os.memfd_create("x")
    for number, fd in enumerate((unnamed, memory)):
        os.pwrite(fd, b"data", 1 << 20)
        open_files.keep(fd, str(tmp_path / f"kept{number}"))
        assert (tmp_path / f"kept{number}").read_bytes() == bytes(1 << 20) + b"data"
    assert os.fstat(unnamed).st_ino == (tmp_path / "kept0").stat().st_ino
    os.close(unnamed)
    os.close(memory)


def test_a_kept_file_is_replaced_or_stays(tmp_path: Path) -> None:
    kept, other = tmp_path / "kept", tmp_path / "other"
    kept.write_text("old")
    other.write_text("new")

    def fill_the_disk(path: str) -> None:
        Path(path).write_text("half")
        raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(OSError, match="no space"):
        replace_file(str(kept), fill_the_disk)
    assert kept.read_text() == "old"
    # The second time, both are links to one file, which rename(2) would leave in place.
    for _ in range(2):
        replace_file(str(kept), lambda path: os.link(other, path))
        assert kept.read_text() == "new"
        assert sorted(os.listdir(tmp_path)) == ["kept", "other"]


def test_damaged_manifests_are_skipped(folder: Path) -> None:
    made("web@clean")
    (folder / "web@clean" / "manifest.json").write_text(json.dumps([1]))
    assert list(snapshot_files.manifests()) == []


def test_a_snapshot_in_another_directory_is_removed(folder: Path, tmp_path: Path) -> None:
    """The directory of all snapshots may be on another file system, and need not exist."""
    new = NewFolder("web@warm", str(tmp_path / "warm"))
    new.make()
    new.write(snapshot_files.MANIFEST, described("web@warm").to_json())
    new.finish()
    with closing(OpenSnapshot("web@warm", str(tmp_path / "warm"))) as snapshot:
        snapshot.remove()
    assert os.listdir(tmp_path / "warm") == []
    assert not folder.exists()


def test_overlays_without_a_manifest_stay_while_a_process_makes_them(folder: Path) -> None:
    current = folder / "web@current"
    current.mkdir(parents=True, mode=0o700)
    (current / "drive0-1.qcow2").touch()
    lock = os.open(current, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    snapshot_files.tidy_current("web", set())
    assert (current / "drive0-1.qcow2").exists()
    os.close(lock)
    snapshot_files.tidy_current("web", set())
    assert not current.exists()
