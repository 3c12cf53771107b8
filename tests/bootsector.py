# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes guests of a few bytes: boot sectors that do one thing."""

from pathlib import Path

#: The ACPI control register of q35, where SeaBIOS places it, and the values that are written to it.
ACPI_CONTROL = 0x604
SOFT_OFF = 0x2000
SUSPEND_TO_RAM = 0x2400

#: The port of pvpanic, and the event "the guest panicked".
PVPANIC = 0x505
PANICKED = 1

#: The port that starts the ib700 watchdog, and the value for its shortest timeout, 0 s.
IB700 = 0x443
AT_ONCE = 0x0F


_HALT = b"\xfb\xf4\xeb\xfd"  # sti; hlt; jmp to hlt


def make_boot_sector(path: Path, port: int, value: int) -> Path:
    """Make a raw image that boots, writes 16 bits to an I/O port, and halts."""
    code = b"".join(
        (
            b"\xba" + port.to_bytes(2, "little"),  # mov dx, port
            b"\xb8" + value.to_bytes(2, "little"),  # mov ax, value
            b"\xef" if value > 0xFF else b"\xee",  # out dx, ax; out dx, al
        )
    )
    return _make_image(path, code)


def make_reading_boot_sector(path: Path) -> Path:
    """Make a raw image that boots, reads the first sector of the second disk, and halts."""
    code = b"".join(
        (
            b"\xb8\x01\x02",  # mov ax, 0x0201: read one sector
            b"\xbb\x00\x80",  # mov bx, 0x8000: the address to read to
            b"\xb9\x01\x00",  # mov cx, 1: cylinder 0, sector 1
            b"\xba\x81\x00",  # mov dx, 0x81: head 0, second disk
            b"\xcd\x13",  # int 0x13
        )
    )
    return _make_image(path, code)


def make_echoing_boot_sector(path: Path) -> Path:
    """Make a raw image that boots, and writes each byte that the first serial port receives back to it."""
    code = b"".join(
        (
            b"\xba\xfd\x03",  # 0: mov dx, 0x3fd: the line status
            b"\xec",  # 3: in al, dx
            b"\xa8\x01",  # 4: test al, 1: data is ready
            b"\x74\xf8",  # 6: jz 0
            b"\xba\xf8\x03",  # 8: mov dx, 0x3f8: the data
            b"\xec",  # 11: in al, dx
            b"\xee",  # 12: out dx, al
            b"\xeb\xf1",  # 13: jmp 0
        )
    )
    return _make_image(path, code)


def make_panicking_boot_sector(path: Path, text: bytes) -> Path:
    """Make a raw image that boots, prints a text on the first serial port, and reports a panic."""
    code = b"".join(
        (
            b"\x31\xc0",  # 0: xor ax, ax
            b"\x8e\xd8",  # 2: mov ds, ax
            b"\xfc",  # 4: cld
            b"\xbe\x23\x7c",  # 5: mov si, 0x7c23: the text
            b"\xba\xfd\x03",  # 8: mov dx, 0x3fd: the line status
            b"\xec",  # 11: in al, dx
            b"\xa8\x20",  # 12: test al, 0x20: there is room for a byte
            b"\x74\xfb",  # 14: jz 11
            b"\xac",  # 16: lodsb
            b"\x84\xc0",  # 17: test al, al
            b"\x74\x06",  # 19: jz 27
            b"\xba\xf8\x03",  # 21: mov dx, 0x3f8: the data
            b"\xee",  # 24: out dx, al
            b"\xeb\xed",  # 25: jmp 8
            b"\xba" + PVPANIC.to_bytes(2, "little"),  # 27: mov dx, port
            b"\xb0" + PANICKED.to_bytes(1, "little"),  # 30: mov al, value
            b"\xee",  # 32: out dx, al
            b"\xeb\xfe",  # 33: jmp 33
            text + b"\0",  # 35
        )
    )
    return _make_image(path, code)


def _make_image(path: Path, code: bytes) -> Path:
    with open(path, "wb") as file:
        file.write((code + _HALT).ljust(510, b"\0") + b"\x55\xaa")
        file.truncate(1 << 20)
    return path
