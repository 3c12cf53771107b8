# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the transcript of QMP messages: its secrets and its size."""

import stat
from pathlib import Path

import pytest

from vmspawn.qmp.transcript import SIZE_MAX, Transcript, without_secrets


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b'{"data":"a\\"b", "id":1}', b'{"data":"(left out)", "id":1}'),
        (b'{"password" : "x"}', b'{"password" : "(left out)"}'),
        (b'{"data": {"device": "d"}}', b'{"data": {"device": "d"}}'),
        (b'{"name":"password"}', b'{"name":"password"}'),
        (b'{"command-line":"set_password vnc x\\" y"}', b'{"command-line":"set_password (left out)"}'),
        (b'{"command-line": "info block x"}', b'{"command-line": "info block x"}'),
        (b'{"command-line":"stop"}', b'{"command-line":"stop"}'),
        (b'{"return": "a\\"b", "id": 1}', b'{"return": "(left out)", "id": 1}'),
        (b'{"return": "a\\r\\n", "id": 1}', b'{"return": "a\\r\\n", "id": 1}'),
        (b'{"return": "", "id": 1}', b'{"return": "", "id": 1}'),
    ],
)
def test_secrets_are_left_out_of_a_transcript(message: bytes, expected: bytes) -> None:
    assert without_secrets(message) == expected


def test_a_transcript_is_rotated_at_its_limit(tmp_path: Path) -> None:
    path, old = tmp_path / "qmp.log", tmp_path / "qmp.log.old"
    transcript = Transcript(str(path))
    for _ in range(SIZE_MAX >> 20):
        assert not old.exists()
        transcript.sent("manager", b"x" * (1 << 20))
    transcript.sent("manager", b"again")
    transcript.close()
    assert SIZE_MAX < old.stat().st_size < SIZE_MAX + (1 << 20)
    assert path.read_text().endswith(" manager -> again\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
