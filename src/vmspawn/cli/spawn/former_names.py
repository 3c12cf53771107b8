# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines former names of systemd-vmspawn's options, which it still accepts but no longer documents."""

from __future__ import annotations

import argparse
from typing import Any

from ..values import whole_number


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options to the command's parser."""
    hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument("--qemu-smp", dest="cpus", type=whole_number, **hidden)
    parser.add_argument("--qemu-mem", dest="ram", **hidden)
    parser.add_argument("--qemu-kvm", dest="kvm", **hidden)
    parser.add_argument("--qemu-vsock", dest="unsupported_vsock", **hidden)
    parser.add_argument("--qemu-gui", dest="console", action="store_const", const="gui", **hidden)
