# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes the seed of cloud-init's NoCloud source: a small ISO 9660 image with the label CIDATA.

The files are described in cloud-init's manual, "NoCloud".
"""

from __future__ import annotations

import io
import json
import os

from ..errors import NotInstalled, StartError
from ..fingerprint import fingerprint_strings
from ..host import runtime
from ..host.runtime import MachineDirectory
from ..storage.disk import DEFAULT_BUS, Disk
from .config import MachineConfig

#: The label by which cloud-init finds the seed, and the name of the disk.
_LABEL = "CIDATA"
_DISK = "cidata"

#: The maximum size of user data. Real user data is far smaller.
_USER_DATA_MAX = 16 << 20

#: Seconds without a byte after which reading user data from a pipe, such as the shell's <(COMMAND), fails.
_PIPE_TIMEOUT = 30.0

#: The user data if the user gives no file.
_NO_USER_DATA = b"#cloud-config\n{}\n"

#: Enables root's login, which images disable. User data can disable it again, because it has precedence.
_VENDOR_DATA = b"#cloud-config\ndisable_root: false\n"


def with_seed(config: MachineConfig, directory: MachineDirectory) -> MachineConfig:
    """Return the configuration with the seed as a disk, if cloud-init is enabled. Raises StartError, NotInstalled."""
    if config.cloud_init is None:
        return config
    key = directory.read(runtime.SSH_PUBLIC_KEY).decode().strip() if config.pass_ssh_key else ""
    path = directory.file(runtime.CLOUD_INIT)
    _write_image(path, seed_files(config.name or "", _user_data(config.cloud_init), key))
    disk = Disk(path, _DISK, DEFAULT_BUS, "raw", read_only=True)
    return config._replace(extra_disks=(*config.extra_disks, disk))


def seed_files(name: str, user_data: bytes, key: str) -> dict[str, bytes]:
    """Return the seed's files by their names. `key` is a public SSH key, or an empty string.

    cloud-init configures an image once for each instance-id, which changes with the user data and the machine's name.
    """
    meta = {
        "instance-id": f"{name}-{fingerprint_strings([user_data.decode('latin-1')])}",
        # Underscores are not allowed in host names.
        "local-hostname": name.replace("_", "-"),
        "public-keys": [key] if key else [],
    }
    # JSON is YAML.
    text = json.dumps(meta, indent=2).encode() + b"\n"
    return {"user-data": user_data, "meta-data": text, "vendor-data": _VENDOR_DATA}


def _user_data(path: str) -> bytes:
    if not path:
        return _NO_USER_DATA
    try:
        data = _read(path)
    except OSError as error:
        raise _unusable(path, error.strerror or f"nothing was written to it for {_PIPE_TIMEOUT:g} s") from None
    if len(data) > _USER_DATA_MAX:
        raise _unusable(path, f"it is larger than {_USER_DATA_MAX >> 20} MiB")
    if not data.startswith((b"#", b"Content-Type:", b"MIME-Version:", b"From ", b"\x1f\x8b")):
        raise StartError.with_fields(
            "cannot use {cloud_init={path}}: cloud-init ignores user data without a header",
            hint="begin the file with the line #cloud-config",
            path=path,
        )
    return data


def _read(path: str) -> bytes:
    """Read a file or a pipe to its end, but at most one byte more than the maximum. Raises OSError."""
    import select

    # With O_NONBLOCK, opening a FIFO does not wait for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        data = bytearray()
        while len(data) <= _USER_DATA_MAX:
            if not poll.poll(_PIPE_TIMEOUT * 1000):
                raise TimeoutError
            piece = os.read(fd, _USER_DATA_MAX + 1 - len(data))
            if not piece:
                break
            data += piece
        return bytes(data)
    finally:
        os.close(fd)


def _unusable(path: str, reason: str) -> StartError:
    return StartError.with_fields("cannot use {cloud_init={path}}: {reason}", path=path, reason=reason)


def _write_image(path: str, content: dict[str, bytes]) -> None:
    try:
        import pycdlib
    except ImportError:
        raise NotInstalled.with_fields(
            "{cloud_init=} needs the Python package pycdlib",
            hint="install it with: pipx inject vmspawn pycdlib",
        ) from None
    image = pycdlib.PyCdlib()
    image.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=_LABEL)
    for number, (name, data) in enumerate(content.items()):
        image.add_fp(io.BytesIO(data), len(data), f"/FILE{number}.;1", rr_name=name, joliet_path=f"/{name}")
    # User data may contain passwords.
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        image.write_fp(file)
    image.close()
