# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes guests of a few bytes: boot sectors that write to one I/O port and halt."""

from pathlib import Path

#: The ACPI control register of q35, where SeaBIOS places it, and the values that are written to it.
ACPI_CONTROL = 0x604
SOFT_OFF = 0x2000
SUSPEND_TO_RAM = 0x2400

#: The port of pvpanic, and the event "the guest panicked".
PVPANIC = 0x505
PANICKED = 1

#: The port that starts the ib700 watchdog, and its shortest timeout, 0.
IB700 = 0x443
AT_ONCE = 0x0F


def make_boot_sector(path: Path, port: int, value: int) -> Path:
    """Make a raw image that boots, writes 16 bits to an I/O port, and halts."""
    code = b"".join(
        (
            b"\xba" + port.to_bytes(2, "little"),  # mov dx, port
            b"\xb8" + value.to_bytes(2, "little"),  # mov ax, value
            b"\xef" if value > 0xFF else b"\xee",  # out dx, ax; out dx, al
            b"\xfb\xf4\xeb\xfd",  # sti; hlt; jmp to hlt
        )
    )
    with open(path, "wb") as file:
        file.write(code.ljust(510, b"\0") + b"\x55\xaa")
        file.truncate(1 << 20)
    return path
