# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the kind, the architecture and the version of kernels, by their files' headers."""

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmspawn.images.kernel_image import EFI, LINUX, OTHER, UKI, architecture_of, kind_of, version_of


def pe(*sections: bytes, signature: bytes = b"PE\0\0", magic: bytes = b"") -> bytes:
    """Return a PE image's headers (Microsoft's PE format): DOS header, COFF header, an optional header, the sections.

    `magic` comes before the DOS header's pointer to the COFF header.
    """
    dos = b"MZ".ljust(56, b"\0") + (magic or bytes(4)) + struct.pack("<I", 128)
    coff = signature + struct.pack("<HHIIIHH", 0x8664, len(sections), 0, 0, 0, 112, 0)
    table = b"".join(name.ljust(8, b"\0") + bytes(32) for name in sections)
    return dos.ljust(128, b"\0") + coff + bytes(112) + table


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", OTHER),
        (b"MZ", OTHER),
        (b"\x7fELF".ljust(200, b"\0"), OTHER),
        (pe(signature=b"XX\0\0"), OTHER),
        (pe(b".text", b".data")[:130], OTHER),
        (pe(b".text", b".data"), EFI),
        (pe(b".text", b".linux"), EFI),
        (pe(b".text", b".data", magic=b"ARM\x64"), LINUX),
        (pe(b".text", b".osrel", b".linux", magic=b"ARM\x64"), UKI),
        (pe(*[b".text"] * 6).ljust(0x202, b"\0") + b"HdrS", LINUX),
        (pe(b".text", b".osrel", b".linux", b".initrd"), UKI),
    ],
)
def test_the_kind_of_a_kernel_is_detected(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "kernel").write_bytes(content)
    assert kind_of(str(tmp_path / "kernel")) == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300).map(lambda rest: b"MZ" + rest))
def test_no_content_of_a_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "kernel").write_bytes(content)
    assert kind_of(str(tmp_path / "kernel")) in (EFI, LINUX, OTHER, UKI)
    assert architecture_of(str(tmp_path / "kernel")) == version_of(str(tmp_path / "kernel")) == ""


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ""),
        (pe(b".text"), "x86_64"),
        (pe(b".text").replace(b"PE\0\0\x64\x86", b"PE\0\0\x64\xaa"), "aarch64"),
        (pe(b".text").replace(b"PE\0\0\x64\x86", b"PE\0\0\x4c\x01"), ""),
        (pe(b".text", signature=b"XX\0\0"), ""),
    ],
)
def test_the_architecture_of_a_kernel_is_detected(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "kernel").write_bytes(content)
    assert architecture_of(str(tmp_path / "kernel")) == expected
