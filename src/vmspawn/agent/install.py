# SPDX-License-Identifier: LGPL-2.1-or-later
"""Makes the agent's unit, and the credentials that deliver the agent and its unit to an image without them.

Credentials reach a service as files below `%d`, which cannot be executed; so the unit copies the agent to /run.
systemd creates units from credentials since version 256.
"""

from __future__ import annotations

import zlib

UNIT = "vmspawn-agent.service"

#: The credentials with the agent, the unit, and the drop-in that starts the unit. systemd acts on the names of the last
#: two (systemd.system-credentials(7)).
AGENT_CREDENTIAL = "vmspawn.agent"
UNIT_CREDENTIAL = f"systemd.extra-unit.{UNIT}"
WANTED_CREDENTIAL = "systemd.unit-dropin.sysinit.target~vmspawn-agent"

#: The path of the agent in an image that was built with it.
INSTALLED_PATH = "/usr/lib/vmspawn/vmspawn-agent"

_RUN_PATH = "/run/vmspawn-agent"

# The unit does not run in an initrd, whose processes are killed when the root is switched. It starts as
# soon as systemd has made the static device nodes, and the agent waits for ports that appear later. systemd kills only
# the agent's own process, because commands outlive the agent. A command that is killed for its use of memory is not a
# failure of the service.
_UNIT = """\
[Unit]
Description=vmspawn agent
DefaultDependencies=no
After=systemd-tmpfiles-setup-dev.service systemd-remount-fs.service
Conflicts=shutdown.target
Before=shutdown.target
ConditionVirtualization=vm
ConditionPathExists=!/etc/initrd-release
StartLimitIntervalSec=0

[Service]
{start}
Restart=always
RestartSec=100ms
KillMode=process
OOMPolicy=continue
Delegate=yes
StandardInput=null
IgnoreSIGPIPE=no
"""

_COPY = (
    "ImportCredential={credential}\n"
    "ExecStartPre=/bin/sh -c '"
    'gzip -dc <"$$1/{credential}" >{path}.new && chmod 755 {path}.new && mv {path}.new {path}\' sh %d\n'
    "ExecStart={path}"
)

#: zlib's number for its largest window in gzip's format.
_GZIP = 16 + zlib.MAX_WBITS

_INSTALL = "\n[Install]\nWantedBy=sysinit.target\n"


def installed_unit(path: str = INSTALLED_PATH) -> bytes:
    """Return the unit for an image that has the agent at a path."""
    return (_UNIT.format(start=f"ExecStart={path}") + _INSTALL).encode()


def delivery(agent: bytes) -> dict[str, bytes]:
    """Return the credentials, by their names, that deliver the agent to an image without one.

    Compression halves the agent's size in SMBIOS tables. Higher levels would take ten times as long, and save 3 % more.
    The drop-in starts the unit whether the kernel is booted directly or by firmware.
    """
    start = _COPY.format(credential=AGENT_CREDENTIAL, path=_RUN_PATH)
    return {
        AGENT_CREDENTIAL: zlib.compress(agent, zlib.Z_BEST_SPEED, _GZIP),
        UNIT_CREDENTIAL: _UNIT.format(start=start).encode(),
        WANTED_CREDENTIAL: f"[Unit]\nWants={UNIT}\n".encode(),
    }
