# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs a writer in the guest that writes a log with chained checksums, and verifies the log on the host."""

import hashlib
from pathlib import Path

from tests.shell import Shell

RECORD = 512

# Each record has its number, and a checksum of the number and the previous record. A record is synced, then counted.
_SCRIPT = (
    "n=0 sum=start",
    "while [ ! -e /tmp/stop ]; do",
    '    sum=$(echo "$sum $n" | md5sum | cut -c1-32)',
    '    printf "%08d %s\\n" $n $sum |',
    "        dd of=$1 bs=512 seek=$n count=1 conv=sync,notrunc,fsync 2>/tmp/error || { echo $n >/tmp/failed; exit; }",
    "    n=$((n + 1))",
    "    echo $n >/tmp/count.new && mv /tmp/count.new /tmp/count",
    "done",
    ": >/tmp/stopped",
)


async def start_writer(shell: Shell, device: str) -> None:
    """Start the writer, and wait for its first record."""
    lines = " ".join(f"'{line}'" for line in _SCRIPT)
    await shell.run(f"rm -f /tmp/stop /tmp/stopped /tmp/count; printf '%s\\n' {lines} >/tmp/writer")
    await shell.run(f"until [ -b {device} ]; do usleep 10000; done")
    await shell.run(f"(setsid sh /tmp/writer {device} </dev/null >/dev/null 2>&1 &)")
    await shell.run("while [ ! -s /tmp/count ] && [ ! -e /tmp/failed ]; do usleep 10000; done; [ ! -e /tmp/failed ]")


async def records_written(shell: Shell) -> int:
    """Return the number of records on the disk. Fails if the writer met an error."""
    await shell.run("[ ! -e /tmp/failed ] || { cat /tmp/error; false; }")
    return int(await ask(shell, "cat /tmp/count"))


async def ask(shell: Shell, command: str) -> str:
    """Return the output of a command that prints one line. The guest's own messages may come before and after it."""
    output = await shell.run(f'echo "answer: $({command})"')
    return next(line for line in output.splitlines() if line.startswith("answer: ")).removeprefix("answer: ")


async def stop_writer(shell: Shell) -> int:
    """Stop the writer, and return the number of records that it wrote."""
    await shell.run(": >/tmp/stop; while [ ! -e /tmp/stopped ] && [ ! -e /tmp/failed ]; do usleep 10000; done")
    return await records_written(shell)


def verify(image: Path, count: int) -> int:
    """Check the first `count` records of a raw image and the valid records after them. Returns their total number."""
    checksum, number = "start", 0
    with open(image, "rb") as file:
        while record := file.read(RECORD):
            checksum = hashlib.md5(f"{checksum} {number}\n".encode(), usedforsecurity=False).hexdigest()
            if record.rstrip(b"\0") != f"{number:08d} {checksum}\n".encode():
                break
            number += 1
    assert number >= count, f"record {number} of {count} is wrong: {record[:60]!r}"
    return number
