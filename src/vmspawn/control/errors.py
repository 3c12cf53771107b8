# SPDX-License-Identifier: LGPL-2.1-or-later
"""Translates exceptions into Varlink errors.

On systemd's interfaces, an error that systemd defines has systemd's name and parameters. Each other error is one of
`io.vmspawn.Machine`, and has a message and a hint. If the message or the hint contains the name of an option, the error
also has a template of both, because the command line and Python spell an option differently.
"""

import os
import traceback
import typing
from collections.abc import Mapping
from errno import EIO

from asyncvarlink import TypedVarlinkErrorReply, VarlinkErrorReply

from .. import errors, log

MACHINE_INSTANCE = "io.systemd.MachineInstance"
VMSPAWN = "io.vmspawn.Machine"


class _Nothing(typing.TypedDict):
    pass


class _Template(typing.TypedDict):
    message: str
    hint: str
    values: dict[str, str]


class _Explained(typing.TypedDict):
    message: str
    hint: str | None
    template: _Template | None


class _Errno(typing.TypedDict):
    origin: str | None
    errno: int
    errnoName: str | None


class System(TypedVarlinkErrorReply, name="io.systemd.System"):
    """A system call failed. Only systemd's interfaces use this error."""

    parameters: _Errno


class AlreadyAcquired(TypedVarlinkErrorReply, name="io.systemd.QemuMachineInstance.AlreadyAcquired"):
    """Declared because systemd's stub declared it. Never sent, because several clients may acquire QMP."""

    parameters: _Nothing


def _plain(name: str) -> type[TypedVarlinkErrorReply]:
    namespace = {"__annotations__": {"parameters": _Nothing}}
    return type(name, (TypedVarlinkErrorReply,), namespace, interface=MACHINE_INSTANCE)


class _ExplainedError(TypedVarlinkErrorReply, name=f"{VMSPAWN}.Error"):
    """The base class of the errors with a message. They share one type of parameters, which takes long to create."""

    parameters: _Explained

    def __init_subclass__(cls, *, name: str) -> None:
        cls.name = name


def _explained(name: str, doc: str) -> type[TypedVarlinkErrorReply]:
    return type(name, (_ExplainedError,), {"__doc__": doc}, name=f"{VMSPAWN}.{name}")


#: The errors of io.systemd.MachineInstance, in the order of its definition.
MACHINE_INSTANCE_ERRORS = tuple(
    _plain(name)
    for name in (
        "NotConnected",
        "NotSupported",
        "NoSuchStorage",
        "StorageExists",
        "StorageImmutable",
        "BadConfig",
        "ConfigNotSupported",
    )
)

#: The exceptions with an error of their own in io.vmspawn.Machine. All others are sent as NotSupported.
_SOURCES: tuple[type[errors.VmspawnError], ...] = (
    errors.NotConnected,
    errors.NotSupported,
    errors.NoSuchStorage,
    errors.StorageExists,
    errors.StorageImmutable,
    errors.BadConfig,
    errors.ConfigNotSupported,
    errors.StoragePending,
    errors.NoFreePort,
    errors.PortInUse,
    errors.NoSuchForward,
    errors.QmpError,
    errors.Timeout,
    errors.EventsLost,
    errors.MachineEnded,
    errors.NoSuchSnapshot,
    errors.SnapshotExists,
    errors.SnapshotInUse,
    errors.SnapshotBlocked,
)
VMSPAWN_ERRORS = tuple(_explained(source.__name__, source.__doc__ or "") for source in _SOURCES)

_BY_NAME = {reply.name: reply for reply in (*MACHINE_INSTANCE_ERRORS, *VMSPAWN_ERRORS)}


def host_failure(error: OSError) -> errors.SystemFailure:
    """Return the error for a failed system call, for example because no descriptor or memory was free."""
    log.debug(f"the host refused: {''.join(traceback.format_exception(error))}")
    what = error.filename or "a system call"
    return errors.SystemFailure(f"the host refused {what}", error.errno or EIO)


def package_changed(error: ImportError) -> errors.NotSupported:
    """Return the error for a module that has disappeared since the manager started."""
    return errors.NotSupported(
        f"vmspawn was upgraded or removed while the machine's manager ran: {error}",
        hint=f"replace the manager: kill -9 {os.getpid()}, then vmctl adopt",
    )


def to_reply(error: errors.VmspawnError, interface: str) -> VarlinkErrorReply:
    """Return the Varlink error for an exception that a method of `interface` raised."""
    if isinstance(error, errors.SystemFailure) and interface != VMSPAWN:
        return System({"origin": "linux", "errno": error.errno, "errnoName": error.errno_name})
    name = _leaf_name(error)
    if reply := _BY_NAME.get(f"{interface}.{name}"):
        return reply({}) if interface == MACHINE_INSTANCE else _explain(reply, error)
    return _explain(_BY_NAME[f"{VMSPAWN}.{name}"], error)


def _leaf_name(error: errors.VmspawnError) -> str:
    for source in _SOURCES:
        if isinstance(error, source):
            return source.__name__
    return errors.NotSupported.__name__


def _explain(reply: type[TypedVarlinkErrorReply], error: errors.VmspawnError) -> VarlinkErrorReply:
    return reply(message=str(error), hint=error.hint or None, template=_template(error))


def _template(error: errors.VmspawnError) -> dict[str, typing.Any] | None:
    """Return the template of an error that names fields, so that each client can spell them in its own way."""
    if error.template is None:
        return None
    message, hint, values = error.template
    return {"message": message, "hint": hint, "values": {name: str(value) for name, value in values.items()}}


_EXCEPTIONS = {source.__name__: source for source in _SOURCES}


def to_exception(name: str, parameters: Mapping[str, typing.Any]) -> errors.VmspawnError:
    """Return the exception for a Varlink error of a machine's control socket."""
    interface, _, leaf = name.rpartition(".")
    if interface == "io.systemd" and "errno" in parameters:
        return errors.SystemFailure("a system call of the machine's manager failed", int(parameters["errno"]))
    message = str(parameters.get("message") or f"the machine's manager answered {leaf}")
    hint = str(parameters.get("hint") or "")
    if leaf == errors.QmpError.__name__:
        # The message is "QEMU refused COMMAND: DESCRIPTION". The class of QEMU's error is not transmitted.
        command, _, description = message.removeprefix("QEMU refused ").partition(": ")
        return errors.QmpError(command, "GenericError", description)
    error = _EXCEPTIONS.get(leaf, errors.NotSupported)(message, hint=hint)
    if template := parameters.get("template"):
        error.template = errors.Template(template["message"], template["hint"], template["values"])
    return error
