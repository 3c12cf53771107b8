# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes the SSH key of a machine, and the credentials that pass it to the guest's root user."""

from __future__ import annotations

from ..errors import StartError
from ..host import runtime
from ..host.runtime import MachineDirectory
from ..search_path import find_program
from .config import MachineConfig

#: Credentials that systemd reads (systemd.system-credentials(7)).
_KEYS_CREDENTIAL = "ssh.authorized_keys.root"
_TMPFILES_CREDENTIAL = "tmpfiles.extra"

#: Seconds for ssh-keygen; a large RSA key takes long.
_TIMEOUT = 60.0


def make(config: MachineConfig, directory: MachineDirectory) -> None:
    """Make the key in the machine's directory, if the user wants one. Raises StartError."""
    if config.pass_ssh_key:
        _generate(config, directory.file(runtime.SSH_KEY))


def credentials(config: MachineConfig, directory: MachineDirectory) -> dict[str, bytes]:
    """Return the credentials with the key by their names.

    systemd in the guest writes the first credential to root's `authorized_keys`, but only if root has no such file. The
    second one adds the key to an existing file, because each start makes a new key.
    """
    if not config.pass_ssh_key:
        return {}
    key = directory.read(runtime.SSH_PUBLIC_KEY)
    line = rb"w+ /root/.ssh/authorized_keys - - - - \n" + key.strip() + rb"\n"
    return {_KEYS_CREDENTIAL: key, _TMPFILES_CREDENTIAL: line + b"\n"}


def _generate(config: MachineConfig, path: str) -> None:
    program = find_program("ssh-keygen")
    if program is None:
        raise StartError.with_fields(
            "{pass_ssh_key=} needs ssh-keygen, which is not installed",
            hint="install it (Debian: openssh-client; Fedora: openssh), or use {pass_ssh_key=False}",
        )
    import subprocess

    from ..aio import programs

    command = [program, "-q", "-t", config.ssh_key_type, "-N", "", "-C", f"vmspawn/{config.name}", "-f", path]
    try:
        done = programs.run(command, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise StartError(f"ssh-keygen made no key within {_TIMEOUT:g} s") from None
    except OSError as error:
        raise StartError(f"cannot run {program}: {error.strerror}") from None
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).decode(errors="replace").splitlines()
        raise StartError.with_fields(
            "cannot make a key with {ssh_key_type={type}}: {reason}",
            type=config.ssh_key_type,
            reason=next(filter(None, map(str.strip, lines)), f"ssh-keygen ended with status {done.returncode}"),
        )
