# SPDX-License-Identifier: LGPL-2.1-or-later
"""Opens images with the user's permissions, and passes them to the machine."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ...control.client import Client
from ...storage.backing import open_disk
from ...storage.formats import FORMATS
from ...text import utf8
from .replies import MACHINE


def add_path(parser: argparse.ArgumentParser, **settings: Any) -> None:
    """Add the argument that names an image."""
    parser.add_argument("path", metavar="PATH", help="image or block device, opened with your permissions", **settings)


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add the option for the image's format."""
    parser.add_argument("--format", choices=FORMATS, help="format of the image (default: raw)")


def call_with_image(
    client: Client, method: str, path: str, parameters: dict[str, Any], *, read_only: bool
) -> dict[str, Any]:
    """Open an image, and call a method with its descriptor."""
    backing = open_disk(path, read_only=read_only)
    image = {"fileDescriptorIndex": 0, "path": utf8(os.path.abspath(path))}
    try:
        return client.call(f"{MACHINE}.{method}", {**image, **parameters}, fds=(backing.fd,))
    finally:
        backing.close()
