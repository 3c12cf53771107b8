# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures the library's cost in a test: its fixture beside a plain boot, its commands beside `vmctl exec` and ssh.

All figures are taken in turn, with the built-in guest, so that other load on the host affects each alike. For ssh, the
guest runs in the host's userland with the host's dropbear, and ssh connects through a forward.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from tests.guest.test_ssh import SERVER, START
from vmspawn import StartError, sync
from vmspawn.helpers import virtiofsd
from vmspawn.testing.lab import Lab

MACHINES = int(os.environ.get("MACHINES", "7"))
COMMANDS = int(os.environ.get("COMMANDS", "40"))
VMCTL = [sys.executable, "-m", "vmspawn.cli.ctl"]
#: Seconds between commands: the ports of the previous command are unplugged meanwhile.
PAUSE = 0.3
BOOT_TIMEOUT = 120.0


def rounds(count: int, pause: float, **works: Callable[[], object]) -> dict[str, float]:
    """Return the median seconds of each function, after one round that is not counted."""
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
    """Compare the fixture `vm` with a boot: the set-up alone, and the set-up with the tear-down and the leak check."""
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


def ways(machine: sync.Machine, **more: list[str]) -> dict[str, float]:
    """Return the seconds of `true` in the guest: by the library, by `vmctl exec`, and by the commands in `more`."""
    commands = {"vmctl": [*VMCTL, "exec", machine.name, "true"], **more}
    with sync.connect(machine.name) as connected:
        return rounds(
            COMMANDS,
            PAUSE,
            run=lambda: machine.run(["true"], check=True),
            connected=lambda: connected.run(["true"], check=True),
            **{name: partial(subprocess.run, command, check=True) for name, command in commands.items()},
        )


def compare_commands(lab: Lab) -> None:
    """Measure `machine.run`, in the process of the machine and in another one, and `vmctl exec`."""
    with lab.machine("bench", {}) as machine:
        found = ways(machine)
    print(f"machine.run ÷ vmctl exec                     {found['run'] / found['vmctl']:.2f}")
    print(f"machine.run of connect() ÷ vmctl exec        {found['connected'] / found['vmctl']:.2f}")
    print(f"machine.run                                  {found['run'] * 1000:.0f} ms")


def compare_ssh(folder: Path) -> None:
    """Measure `machine.run` and `vmctl exec` beside ssh through a forward, in a guest with an SSH server."""
    if missing := missing_for_ssh():
        print(f"machine.run ÷ ssh by a forward               {missing} is not installed")
        return
    with sync.Machine(guest="builtin", name=f"ssh-{os.getpid()}", directory="/", pass_ssh_key=True) as machine:
        machine.run(START, check=True)
        machine.wait_for("ssh", timeout=BOOT_TIMEOUT)
        config = folder / "ssh-config"
        config.write_bytes(subprocess.run([*VMCTL, "ssh-config", machine.name], check=True, capture_output=True).stdout)
        found = ways(machine, ssh=["ssh", "-q", "-F", str(config), f"vmspawn/{machine.name}", "true"])
    print("in the host's userland, with an SSH server:")
    print(f"machine.run ÷ ssh by a forward               {found['run'] / found['ssh']:.2f}")
    print(f"vmctl exec ÷ ssh by a forward                {found['vmctl'] / found['ssh']:.2f}")
    print(f"machine.run ÷ vmctl exec                     {found['run'] / found['vmctl']:.2f}")


def missing_for_ssh() -> str:
    """Return the name of a program that the comparison with ssh lacks, or an empty string."""
    places = f"{os.environ['PATH']}:/usr/sbin"
    if missing := next((name for name in ("ssh", SERVER) if not shutil.which(name, path=places)), ""):
        return missing
    with suppress(StartError):
        virtiofsd.find()
        return ""
    return "virtiofsd"


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), console=None, keep=False, required=True)
        compare_starts(lab)
        compare_commands(lab)
        compare_ssh(Path(folder))


if __name__ == "__main__":
    main()
