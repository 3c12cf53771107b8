# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures the library's cost in a test: its fixture beside a plain boot, and its commands beside `vmctl exec`.

All figures are taken in turn, with the built-in guest, so that other load on the host affects each alike. ssh is not
compared, because the built-in guest has no SSH server.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from vmspawn import sync
from vmspawn.testing.lab import Lab

MACHINES = int(os.environ.get("MACHINES", "7"))
COMMANDS = int(os.environ.get("COMMANDS", "40"))
VMCTL = [sys.executable, "-m", "vmspawn.cli.ctl"]
#: Seconds between commands: the ports of the one before are unplugged meanwhile.
PAUSE = 0.3
BOOT_TIMEOUT = 120.0


def rounds(count: int, pause: float, **works: Callable[[], object]) -> dict[str, float]:
    """Return the median of each function, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(count + 1):
        time.sleep(pause)
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def compare_starts(lab: Lab) -> None:
    """Compare a boot to its shell with the fixture `vm`: set-up alone, and set-up with its end and leak check."""
    setup: list[float] = []

    def boot() -> None:
        with sync.Machine(guest="builtin", name=f"boot-{os.getpid()}") as machine:
            machine.console.expect("vmspawn-guest: ready", timeout=BOOT_TIMEOUT)

    def fixture() -> None:
        start = time.perf_counter()
        with lab.machine("bench", {}):
            setup.append(time.perf_counter() - start)

    found = rounds(MACHINES, 0, boot=boot, fixture=fixture)
    print(f"fixture vm, set-up and end ÷ boot and end    {found['fixture'] / found['boot']:.2f}")
    print(f"fixture vm, set-up         ÷ boot and end    {statistics.median(setup[1:]) / found['boot']:.2f}")
    print(f"fixture vm, set-up                           {statistics.median(setup[1:]) * 1000:.0f} ms")


def compare_commands(lab: Lab) -> None:
    """Measure `machine.run`, in the process of the machine and in another one, and `vmctl exec`."""
    with lab.machine("bench", {}) as machine, sync.connect(machine.name) as connected:
        found = rounds(
            COMMANDS,
            PAUSE,
            run=lambda: machine.run(["true"], check=True),
            connected=lambda: connected.run(["true"], check=True),
            vmctl=lambda: subprocess.run([*VMCTL, "exec", machine.name, "true"], check=True),
        )
    print(f"machine.run ÷ vmctl exec                     {found['run'] / found['vmctl']:.2f}")
    print(f"machine.run of connect() ÷ vmctl exec        {found['connected'] / found['vmctl']:.2f}")
    print(f"machine.run                                  {found['run'] * 1000:.0f} ms")
    print("machine.run ÷ ssh by a forward               the built-in guest has no SSH server")


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), console=None, keep=False, required=True)
        compare_starts(lab)
        compare_commands(lab)


if __name__ == "__main__":
    main()
