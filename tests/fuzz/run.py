# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fuzzes the targets with atheris, one after the other: `python -m tests.fuzz.run [--seconds=N] [TARGET…]`.

atheris keeps its corpus, and inputs that fail, in `.cache/fuzz/TARGET`.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

_FOLDER = Path(".cache/fuzz")

#: The names of the targets, whose modules are imported later.
NAMES = ("scanner", "envelopes", "images", "partitions", "varlink", "agent", "archive")

#: The maximum length of an input. A few tokens reach all states of the parsers.
_LENGTH_MAX = 1024


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one target in this process, which atheris ends."""
    import atheris

    # Instrument only the modules under test: instrumenting all imported modules takes a minute.
    followed = ["vmspawn.qmp", "vmspawn.control", "vmspawn.images", "vmspawn.agent", "vmspawn.archive", "asyncvarlink"]
    with atheris.instrument_imports(include=followed):
        from tests.fuzz.targets import TARGETS
    target, seeds = TARGETS[name]
    folder = _FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (folder / f"seed-{number}").write_bytes(seed)
    options = [f"-max_total_time={seconds}", f"-max_len={_LENGTH_MAX}", f"-artifact_prefix={folder}/failed-"]
    atheris.Setup([sys.argv[0], *options, str(folder)], target)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="./dev fuzz")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"one of {', '.join(NAMES)}; the default is all")
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - set(NAMES):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    if importlib.util.find_spec("atheris") is None:
        print("./dev fuzz: atheris is not installed; ./dev test tests/unit uses hypothesis", file=sys.stderr)
        return 1
    if arguments.here:
        fuzz(arguments.targets[0], arguments.seconds)
    failed = 0
    for name in arguments.targets or NAMES:
        print(f"fuzzing {name} for {arguments.seconds} s", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "tests.fuzz.run", "--here", f"--seconds={arguments.seconds}", name]
        failed |= subprocess.run(command, env={**os.environ, "PYTHONWARNINGS": "ignore"}, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
