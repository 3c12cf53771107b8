# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the timeouts, in seconds, that several packages use. Other timeouts are defined where they are used."""

from __future__ import annotations

#: The guest's default time to power off before QEMU is ended, as systemd's DefaultTimeoutStopSec=.
SHUTDOWN_TIMEOUT = 90.0

#: The guest's time to react before a message explains how to end the machine.
REACTION_TIMEOUT = 10.0

#: The guest's time to release a disk before the removal is reported as pending. It is shorter than the 45 s after which
#: sd-varlink's clients give up.
DETACH_TIMEOUT = 30.0

#: The time within which a command in the guest must start. The agent in a booting guest may start late.
COMMAND_START_TIMEOUT = 60.0

#: The time within which the guest's driver must use a new disk, if the caller waits for the driver.
DRIVER_TIMEOUT = 30.0

#: The time within which a running QEMU must greet a new manager. QEMU greets at once, unless another program uses the
#: monitor, or QEMU waits for the host's storage.
ADOPT_GREETING_TIMEOUT = 5.0

#: The time within which each source of a listing must answer, so that a hanging source does not hide the others.
LIST_TIMEOUT = 2.0

#: The guest's time to open a locked tray of an optical drive.
TRAY_TIMEOUT = 10.0

#: The time after which the power button is pressed again, because firmware ignores it.
POWER_BUTTON_INTERVAL = 5.0

#: The time within which clients of the control socket must read the machine's last event.
FAREWELL_TIMEOUT = 1.0

#: The manager enforces the timeouts of its methods. A client waits this much longer for the manager's reply.
REPLY_GRACE = 15.0

#: The timeout of waits without a limit. It is a number because --timeout= and the managers' methods take a number.
FOREVER = 1_000_000
