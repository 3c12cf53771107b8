# SPDX-License-Identifier: LGPL-2.1-or-later
"""Registers machines with systemd-machined, and lists the machines that are registered.

All of this is optional: a machine works without it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from ..errors import NotConnected, StartError, Timeout, UsageError, VmspawnError
from ..record import Record
from ..timeouts import LIST_TIMEOUT

MODES = ("auto", "yes", "no")

#: vmspawn's name in machinectl's column SERVICE.
SERVICE = "vmspawn"

_INTERFACE = "io.systemd.Machine"

#: Seconds to wait for machined at a machine's end. machined also notices the end of QEMU by itself.
UNREGISTER_TIMEOUT = 5.0


class Registration(Record):
    """The user's settings for the registration, and for QEMU's unit.

    `mode` is one of MODES. `scope` is `system` or `user`; empty means `system` for root, else `user`. `keep_unit` keeps
    QEMU in the unit that vmspawn runs in. `slice` and `properties` are settings of a scope unit that is made for QEMU.
    """

    mode: str = "auto"
    scope: str = ""
    keep_unit: bool = False
    slice: str = ""
    properties: tuple[str, ...] = ()

    @property
    def user(self) -> bool:
        """True for the user's service manager, False for the system's service manager."""
        return self.scope == "user" if self.scope else os.geteuid() != 0

    @property
    def own_scope(self) -> bool:
        """True if vmspawn makes QEMU's scope unit, because machined cannot make a unit with these settings."""
        return bool(self.slice or self.properties)


def check(registration: Registration) -> None:
    """Raise UsageError for settings that contradict each other."""
    if registration.mode not in MODES:
        raise UsageError.with_fields(
            "{registration.mode={mode}} is not known", hint="choose one of: yes, no, auto", mode=registration.mode
        )
    if registration.keep_unit and registration.own_scope:
        setting = "{registration.slice=}" if registration.slice else "{registration.properties=}"
        raise UsageError.with_fields(
            setting + " needs a scope unit, and {registration.keep_unit=True} makes none", hint="leave out one of them"
        )
    for each in registration.properties:
        if "=" not in each.lstrip("="):
            raise UsageError.with_fields(
                "{registration.properties={text}} has no value",
                hint="write {registration.properties=}NAME=VALUE",
                text=each,
            )


def socket_path(*, user: bool) -> str:
    """Return the path of machined's socket, or an empty string for a user without a runtime directory."""
    if not user:
        return "/run/systemd/machine/io.systemd.Machine"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(runtime, "systemd/machine/io.systemd.Machine") if runtime else ""


def scope_name(name: str) -> str:
    """Return the name that machined gives the scope unit of a machine."""
    # The dash is the only character of a machine's name that a unit's name escapes.
    escaped = name.replace("-", r"\x2d")
    return f"machine-{escaped}.scope"


class Candidate(Record):
    """A machine to register: QEMU's process id, the path of the control socket, and the guest's root if it is a
    directory of the host."""

    name: str
    leader: int
    control: str
    uuid: str | None = None
    directory: str | None = None

    def request(self, *, allocate_unit: bool) -> dict[str, Any]:
        """Return the parameters of machined's Register."""
        wanted: dict[str, Any] = {
            "name": self.name,
            "service": SERVICE,
            "class": "vm",
            "leader": self.leader,
            "controlAddress": os.path.abspath(self.control),
            "allocateUnit": allocate_unit,
        }
        if self.uuid:
            wanted["id"] = self.uuid.replace("-", "").lower()
        if self.directory:
            wanted["rootDirectory"] = self.directory
        return wanted


async def register(registration: Registration, candidate: Candidate, notice: Callable[[str], None]) -> bool:
    """Register a machine with machined. Returns whether that succeeded.

    If registration is required (`yes`), a failure raises StartError. Otherwise a refusal is reported to `notice`, and a
    machined that does not run is ignored.
    """
    from . import varlink

    if registration.mode == "no":
        return False
    path = socket_path(user=registration.user)
    settled = registration.keep_unit or registration.own_scope or _in_its_scope(candidate)
    try:
        await _forget_former(path, candidate)
        await varlink.call(path, f"{_INTERFACE}.Register", candidate.request(allocate_unit=not settled))
    except VmspawnError as error:
        _not_registered(registration, candidate.name, error, notice)
        return False
    return True


async def _forget_former(path: str, candidate: Candidate) -> None:
    """Unregister this QEMU if a dead manager registered it: machined records that manager as the machine's supervisor.

    Raises VmspawnError if machined does not run.
    """
    from . import varlink

    try:
        known = await varlink.call(path, f"{_INTERFACE}.List", {"name": candidate.name})
        if (known.get("leader") or {}).get("pid") == candidate.leader:
            await varlink.call(path, f"{_INTERFACE}.Unregister", {"name": candidate.name})
    except varlink.VarlinkError:
        return  # NoSuchMachine; Register reports any other problem


def _in_its_scope(candidate: Candidate) -> bool:
    """Return whether QEMU is already in the scope that machined would make for it."""
    try:
        with open(f"/proc/{candidate.leader}/cgroup", encoding="utf-8") as file:
            return f"/{scope_name(candidate.name)}" in file.read()
    except OSError:
        return False


def _not_registered(registration: Registration, name: str, error: VmspawnError, notice: Callable[[str], None]) -> None:
    from .varlink import VarlinkError

    hint = "use {registration.mode=auto} or {registration.mode=no} to leave it unregistered"
    if isinstance(error, NotConnected):
        reason = f"systemd-machined does not run ({error})"
        if registration.user:
            hint = (
                "use {registration.scope=system} for the system's machined, "
                "or {registration.mode=no} to leave it unregistered"
            )
    elif isinstance(error, VarlinkError) and error.leaf == "MachineExists":
        reason = f"systemd-machined knows another machine named {name}"
        hint = "choose another name with {name=}"
    else:
        reason = f"systemd-machined refused: {error}"
    if registration.mode == "yes":
        raise StartError.with_fields("cannot register the machine: {reason}", hint=hint, reason=reason)
    if not isinstance(error, NotConnected):
        notice(f"not registered: {reason}")


async def unregister(registration: Registration, name: str) -> None:
    """Unregister a machine. Ignores errors, because machined may have unregistered it already, or have ended."""
    from . import varlink

    path = socket_path(user=registration.user)
    with contextlib.suppress(VmspawnError):
        await varlink.call(path, f"{_INTERFACE}.Unregister", {"name": name}, timeout=UNREGISTER_TIMEOUT)


def machines() -> dict[str, str]:
    """Return the control sockets of all virtual machines that the system's and the user's machined list, by name.

    A machined that does not run, or does not answer in time, is ignored.
    """
    found: dict[str, str] = {}
    for user in (False, True):
        if path := socket_path(user=user):
            found = {**_machines_at(path), **found}
    return found


def _machines_at(path: str) -> dict[str, str]:
    from .varlink import Client, VarlinkError

    try:
        with Client.of_service(path, timeout=LIST_TIMEOUT) as service:
            return {
                each["name"]: each["controlAddress"]
                for each in service.stream(f"{_INTERFACE}.List", forever=False)
                if each.get("class") == "vm" and each.get("controlAddress")
            }
    except (NotConnected, VarlinkError, Timeout):
        return {}
