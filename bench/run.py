# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measures a command on a user's kernel in the host's userland, and compares it with virtme-ng.

Both get the same kernel and run `true` in turn: `vmspawn --guest=builtin --linux=… --directory=/ --run=true`, and
`vng -r … -- true`. The kernel is the one that VMSPAWN_BENCH_KERNEL names, with its modules in VMSPAWN_BENCH_MODULES.
vng (of the package virtme-ng) and depmod have to be in PATH. Without KVM, vng emulates the guest as vmspawn does.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time

from vmspawn.boot.qemu import choose_accelerator

ROUNDS = int(os.environ.get("VMSPAWN_BENCH_ROUNDS", "5"))
QEMU = os.environ.get("QEMU", "qemu-system-x86_64")


def seconds(command: list[str]) -> float:
    """Return the time that a process takes, in seconds."""
    start = time.perf_counter()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed with status {done.returncode}: {done.stderr[-500:]}")
    return time.perf_counter() - start


def commands(kernel: str, modules: str) -> dict[str, list[str]]:
    """Return the two commands, by their names."""
    ours = [sys.executable, "-m", "vmspawn.cli.spawn", "-M", "bench-run", f"--qemu={QEMU}", "--guest=builtin"]
    ours += [f"--linux={kernel}", "--directory=/", "--run=true", *([f"--modules={modules}"] if modules else [])]
    theirs = ["vng", "-r", kernel, "--qemu", QEMU]
    if choose_accelerator("auto", os.uname().machine)[0] != "kvm":
        theirs.append("--disable-kvm")
    return {"vmspawn": ours, "vng": [*theirs, "--", "true"]}


def main() -> None:
    """Measure in turn, and print medians and their ratio."""
    kernel = os.environ.get("VMSPAWN_BENCH_KERNEL", "")
    if not kernel or not shutil.which("vng"):
        print("bench run: needs VMSPAWN_BENCH_KERNEL, and vng (virtme-ng) in PATH; skipped")
        return
    measured: dict[str, list[float]] = {"vmspawn": [], "vng": []}
    for _ in range(ROUNDS):
        for name, command in commands(kernel, os.environ.get("VMSPAWN_BENCH_MODULES", "")).items():
            measured[name].append(seconds(command))
    medians = {name: statistics.median(found) for name, found in measured.items()}
    for name, median in medians.items():
        spread = f"{min(measured[name]):.2f} to {max(measured[name]):.2f}"
        print(f"{name:8} {median:6.2f} s, median of {ROUNDS} ({spread})")
    print(f"vmspawn / vng: {medians['vmspawn'] / medians['vng']:.2f}")


if __name__ == "__main__":
    main()
