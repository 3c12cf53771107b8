# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the timeouts, in seconds, that more than one room uses; each other timeout is defined where it is used."""

from __future__ import annotations

#: How long the guest has, by default, to power off before QEMU is ended: systemd's DefaultTimeoutStopSec=.
SHUTDOWN_TIMEOUT = 90.0

#: How long the guest has to react before the user is told how to force it.
REACTION_TIMEOUT = 10.0

#: How long a detach waits for the guest before it reports that the removal is pending. sd-varlink's clients give up
#: after 45 s without an answer.
DETACH_TIMEOUT = 30.0

#: How long a command in the guest has to start: for an agent that is not up yet, above all.
COMMAND_START_TIMEOUT = 60.0

#: How long an attach that waits for the guest's driver does so.
DRIVER_TIMEOUT = 30.0

#: How long a QEMU that was up before has to greet. It greets at once, unless another program holds the monitor, or QEMU
#: waits for the host's storage.
ADOPT_GREETING_TIMEOUT = 5.0

#: How long a listing waits for each source, so that one that hangs does not hide the others.
LIST_TIMEOUT = 2.0

#: How long the guest has to open the tray of an optical drive that it has locked.
TRAY_TIMEOUT = 10.0

#: How long after the power button it is pressed again: a guest in its firmware does not notice it.
POWER_BUTTON_INTERVAL = 5.0

#: Seconds that clients of the control socket have to take the machine's last event.
FAREWELL_TIMEOUT = 1.0
