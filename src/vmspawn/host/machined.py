# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd-machined: making a machine known to machinectl, and finding those that others made known.

Nothing here is needed for a machine to work; on a host without systemd nobody misses it.
"""

import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import NotConnected, StartError, Timeout, UsageError, VmspawnError
from ..timeouts import LIST_TIMEOUT

MODES = ("auto", "yes", "no")

#: What we are called in machinectl's SERVICE column.
SERVICE = "vmspawn"

_INTERFACE = "io.systemd.Machine"

#: Seconds that a machine's end may wait for machined; it notices by itself that the leader is gone.
UNREGISTER_TIMEOUT = 5.0


class Registration(NamedTuple):
    """How a machine is to be registered, and in which unit it is to run.

    `mode` is one of MODES. `scope` is `system` or `user`, or empty: the system's for root, else the user's. `slice` and
    `properties` are for a scope unit that is made for QEMU.
    """

    mode: str = "auto"
    scope: str = ""
    keep_unit: bool = False
    slice: str = ""
    properties: tuple[str, ...] = ()

    @property
    def user(self) -> bool:
        """Whether the user's service manager is meant, not the system's."""
        return self.scope == "user" if self.scope else os.geteuid() != 0

    @property
    def own_scope(self) -> bool:
        """Whether QEMU is started in a scope unit of ours, for machined makes one that takes no settings."""
        return bool(self.slice or self.properties)


def check(registration: Registration) -> None:
    """Raise UsageError for what contradicts itself."""
    if registration.mode not in MODES:
        raise UsageError.with_fields(
            "{registration.mode={mode}} is not known", hint="there are: yes, no, auto", mode=registration.mode
        )
    if registration.keep_unit and registration.own_scope:
        setting = "{registration.slice=}" if registration.slice else "{registration.properties=}"
        raise UsageError.with_fields(
            setting + " needs a scope unit, and {registration.keep_unit=True} makes none", hint="leave out one of them"
        )
    if registration.keep_unit and registration.mode == "no":
        # As systemd-vmspawn: the unit is what machined would be told.
        return
    for each in registration.properties:
        if "=" not in each.lstrip("="):
            raise UsageError.with_fields(
                "{registration.properties={text}} has no value",
                hint="write {registration.properties=}NAME=VALUE",
                text=each,
            )


def socket_path(*, user: bool) -> str:
    """Where machined listens; an empty string where there can be none."""
    if not user:
        return "/run/systemd/machine/io.systemd.Machine"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(runtime, "systemd/machine/io.systemd.Machine") if runtime else ""


def scope_name(name: str) -> str:
    """What machined calls the scope unit of a machine."""
    # Of the characters of a machine's name, a unit's has only the dash escaped.
    escaped = name.replace("-", r"\x2d")
    return f"machine-{escaped}.scope"


class Candidate(NamedTuple):
    """A machine that is to be made known: QEMU's process, the path of the control socket, and the guest's root if that
    is a directory of the host's."""

    name: str
    leader: int
    control: str
    uuid: str | None = None
    directory: str | None = None

    def request(self, *, allocate_unit: bool) -> dict[str, Any]:
        """The parameters of machined's Register."""
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
    """Make a machine known to machined and say whether it is.

    Raises StartError if registration was a firm wish; else it is silent where there is no machined, and tells `notice`
    where there is one that refuses.
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
    """Take back the registration of this very QEMU by a manager that died, which is named in it as the supervisor.

    Raises VmspawnError if machined is not there.
    """
    from . import varlink

    try:
        known = await varlink.call(path, f"{_INTERFACE}.List", {"name": candidate.name})
        if (known.get("leader") or {}).get("pid") == candidate.leader:
            await varlink.call(path, f"{_INTERFACE}.Unregister", {"name": candidate.name})
    except varlink.VarlinkError:
        return  # NoSuchMachine; whatever else is wrong, Register says it as well


def _in_its_scope(candidate: Candidate) -> bool:
    """Whether QEMU is in the scope that machined would make for it, which cannot be made twice."""
    try:
        with open(f"/proc/{candidate.leader}/cgroup", encoding="utf-8") as file:
            return f"/{scope_name(candidate.name)}" in file.read()
    except OSError:
        return False


def _not_registered(registration: Registration, name: str, error: VmspawnError, notice: Callable[[str], None]) -> None:
    from .varlink import VarlinkError

    hint = "use {registration.mode=auto} or {registration.mode=no} to do without"
    if isinstance(error, NotConnected):
        reason = f"systemd-machined does not run ({error})"
        if registration.user:
            hint = "use {registration.scope=system} for the system's machined, or {registration.mode=no} to do without"
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
    """Make machined forget a machine that we registered. That it has done so by itself is no error, nor is its end."""
    from . import varlink

    path = socket_path(user=registration.user)
    with contextlib.suppress(VmspawnError):
        await varlink.call(path, f"{_INTERFACE}.Unregister", {"name": name}, timeout=UNREGISTER_TIMEOUT)


def machines() -> dict[str, str]:
    """The control sockets of all virtual machines that the system's and the user's machined know, by name.

    A machined that is not there, or does not answer in time, knows none.
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
