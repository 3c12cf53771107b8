# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests how long the merge of an overlay is waited for, with a QEMU that writes an overlay at a limited speed."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import make_raw
from vmspawn.errors import Timeout
from vmspawn.snapshots import merge

#: Bytes of the overlay, and bytes per second. QEMU writes 1 MiB at once.
SIZE = 4 << 20
SPEED = 2 << 20

#: Seconds in which the test expects progress.
PROGRESS_MAX = 30


@pytest.fixture
def talk(qemu: str, tmp_path: Path) -> Iterator[merge._Talk]:
    """A QEMU that has begun to write an overlay to the image below."""
    image, overlay = make_raw(tmp_path / "image", SIZE), tmp_path / "overlay"
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(image), "-F", "raw", str(overlay)]
    subprocess.run(create, check=True)
    write = ["qemu-io", "-t", "unsafe", "-c", f"write -P 7 0 {SIZE}", str(overlay)]
    subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
    bottom = {"driver": "raw", "node-name": "bottom", "file": {"driver": "file", "filename": str(image)}}
    top = {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": str(overlay)}}
    nodes = ({**bottom, "read-only": True}, {**top, "backing": "bottom"})
    options = [word for node in nodes for word in ("-blockdev", json.dumps(node))]
    command = [qemu, "-machine", "none", "-nodefaults", "-display", "none", "-qmp", "stdio", *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0) as process:
        try:
            talk = merge._Talk(process)
            talk.execute("qmp_capabilities")
            arguments = {"job-id": "job", "device": "top", "base-node": "bottom", "speed": SPEED}
            talk.execute("block-commit", arguments)
            yield talk
        finally:
            process.kill()


def test_a_merge_may_take_as_long_as_it_makes_progress(talk: merge._Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    offset_now = merge._Talk._offset
    offsets = [-1]

    def next_offset(self: merge._Talk, job: str) -> int:
        """Answer after the next progress, however slow the host is."""
        deadline = time.monotonic() + PROGRESS_MAX
        while (offset := offset_now(self, job)) == offsets[-1] and not self._events:
            assert time.monotonic() < deadline, "the job made no progress"
        offsets.append(offset)
        return offset

    monkeypatch.setattr(merge._Talk, "_offset", next_offset)
    monkeypatch.setattr(merge, "_PROGRESS_TIMEOUT", 0.05)
    talk.event("job", "BLOCK_JOB_READY")
    assert len(offsets) > 3


def test_a_merge_that_makes_no_progress_fails(talk: merge._Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    talk.execute("block-job-pause", {"device": "job"})
    monkeypatch.setattr(merge, "_PROGRESS_TIMEOUT", 0.3)
    with pytest.raises(Timeout, match="written nothing"):
        talk.event("job", "BLOCK_JOB_READY")
