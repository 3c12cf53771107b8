# SPDX-License-Identifier: LGPL-2.1-or-later
"""Connects Ansible to machines, without a network, as the connection plugin `vmspawn`."""

from __future__ import annotations

import shlex
from pathlib import Path

from ansible.errors import AnsibleConnectionFailure, AnsibleFileNotFound
from ansible.plugins.connection import ConnectionBase

from vmspawn import sync
from vmspawn.errors import VmspawnError

DOCUMENTATION = """
name: vmspawn
short_description: run tasks in the guest of a vmspawn machine
description: Commands and files pass through virtio-serial ports of the machine; the guest needs no network and no SSH.
options:
  remote_addr:
    description: name of the machine
    default: inventory_hostname
    vars: [{name: inventory_hostname}, {name: ansible_host}, {name: ansible_vmspawn_machine}]
  remote_user:
    description: user in the guest; root if it is not set
    vars: [{name: ansible_user}]
"""


class Connection(ConnectionBase):  # type: ignore[misc] # a base class without types
    """A connection to a running machine."""

    transport = "vmspawn"
    has_pipelining = True

    def _connect(self) -> Connection:
        self._connected = True
        return self

    def exec_command(self, cmd: str, in_data: bytes | None = None, sudoable: bool = True) -> tuple[int, bytes, bytes]:
        """Run a command line, and return its status and output. Raises AnsibleConnectionFailure."""
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        return self._run(cmd, in_data)

    def _run(self, command: str, data: bytes | None) -> tuple[int, bytes, bytes]:
        try:
            with sync.connect(self.get_option("remote_addr")) as machine:
                done = machine.run(command, input=data, text=False, user=self.get_option("remote_user"))
        except VmspawnError as error:
            raise AnsibleConnectionFailure(str(error)) from error
        return done.status, done.stdout, done.stderr

    def put_file(self, in_path: str, out_path: str) -> None:
        """Copy a file into the guest."""
        super().put_file(in_path, out_path)
        source = Path(in_path)
        if not source.exists():
            raise AnsibleFileNotFound(f"{in_path} does not exist")
        self._move(f"cat > {shlex.quote(out_path)}", source.read_bytes())

    def fetch_file(self, in_path: str, out_path: str) -> None:
        """Copy a file from the guest."""
        super().fetch_file(in_path, out_path)
        Path(out_path).write_bytes(self._move(f"cat {shlex.quote(in_path)}", None))

    def _move(self, command: str, data: bytes | None) -> bytes:
        status, output, errors = self._run(command, data)
        if status:
            raise AnsibleConnectionFailure(f"{command}: {errors.decode(errors='replace').strip()}")
        return output

    def close(self) -> None:
        """Close the connection, which has nothing open between commands."""
        self._connected = False
