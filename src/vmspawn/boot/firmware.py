# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finds the firmware that QEMU's firmware descriptors offer and that meets the user's requirements.

A descriptor is a JSON file that a firmware's package installs (QEMU's docs/interop/firmware.json). The files of all
directories are tried in the order of their names. A file hides the files of the same name in later directories, and an
empty file hides them without offering a firmware.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ..errors import StartError, UsageError
from ..record import Record
from ..user_directories import user_directory

KINDS = ("auto", "uefi", "bios", "none")

#: Features of firmware that is used only on request: firmware with enrolled keys boots only signed programs.
EXCLUDED = ("enrolled-keys",)

#: Descriptors are in this subdirectory of the user's configuration directory and of the system's directories. Earlier
#: directories have priority.
_SUBDIRECTORY = "qemu/firmware"
_SYSTEM = ("/etc", "/usr/local/share", "/usr/share")

#: QEMU's versioned names of the machine types. The patterns in descriptors match these names.
_MACHINE_NAMES = {"q35": "pc-q35-7.2", "pc": "pc-i440fx-7.2", "virt": "virt-7.2"}

#: Features of firmware for confidential machines: it is loaded into memory, and keeps no variables.
_CONFIDENTIAL = frozenset(("amd-sev-snp", "intel-tdx"))

_DESCRIPTOR_MAX = 1 << 20

#: A hint for users of the command and of the Python library, so it contains the command, and no field.
_LIST = "see: vmspawn --firmware=list"


class FirmwareWish(Record):
    """The firmware that the user wants.

    `kind` is one of KINDS or the path of a descriptor. `include` and `exclude` are features; a feature in both is
    included. `nvram_state` is `auto`, `off` or a path.
    """

    kind: str = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = EXCLUDED
    nvram_template: str | None = None
    nvram_state: str = "auto"

    @property
    def path(self) -> str | None:
        """The path of the descriptor that the user names, or None."""
        return self.kind if "/" in self.kind else None

    @property
    def field_requiring_uefi(self) -> str:
        """The field that requires UEFI, as an error's template, or an empty string."""
        if self.path is not None or self.kind == "uefi":
            return "{firmware.kind=}"
        if self.include:
            return "{firmware.include=}"
        if self.nvram_template:
            return "{firmware.nvram_template=}"
        return "" if self.nvram_state in ("auto", "off") else "{firmware.nvram_state=}"


class Blob(Record):
    """A file with firmware, or with the initial contents of its variables."""

    path: str
    format: str


class Firmware(Record):
    """The firmware of one descriptor. `is_in_memory` is true if it is loaded into memory and has no flash."""

    descriptor: str
    executable: Blob
    template: Blob | None
    features: frozenset[str]
    is_in_memory: bool


def check(wish: FirmwareWish, *, direct_boot: bool) -> None:
    """Raise UsageError for settings that contradict each other. `direct_boot` is true if the user names a kernel."""
    if wish.path is None and wish.kind not in KINDS:
        raise UsageError.with_fields(
            "{firmware.kind={kind}} is not known",
            hint="choose one of: {kinds}, list, describe, or a path that is absolute or begins with ./",
            kind=wish.kind,
            kinds=", ".join(KINDS),
        )
    if wish.kind == "none" and not direct_boot:
        raise UsageError.with_fields("{firmware.kind=none} boots nothing by itself", hint="name a kernel with {linux=}")
    without_uefi = wish.kind in ("bios", "none")
    if without_uefi and (wish.nvram_template or wish.nvram_state not in ("auto", "off")):
        setting = "{firmware.nvram_template=}" if wish.nvram_template else "{firmware.nvram_state=}"
        raise UsageError.with_fields(
            setting + " needs UEFI, and {firmware.kind={kind}} excludes it",
            hint="leave out one of them",
            kind=wish.kind,
        )
    if without_uefi and wish.include:
        raise UsageError.with_fields(
            "{firmware.kind={kind}} has none of the features {features}",
            hint="leave out the features, or use {firmware.kind=uefi}",
            kind=wish.kind,
            features=", ".join(wish.include),
        )


def directories() -> list[str]:
    """Return the directories of descriptors, in descending priority."""
    user = user_directory("XDG_CONFIG_HOME", ".config")
    return [os.path.join(base, _SUBDIRECTORY) for base in (user, *_SYSTEM) if base]


def descriptors() -> list[str]:
    """Return the paths of all descriptors, in the order in which they are to be tried."""
    found: dict[str, str] = {}
    for directory in directories():
        try:
            names = os.listdir(directory)
        except OSError:
            continue
        for name in names:
            if name.endswith(".json"):
                found.setdefault(name, os.path.join(directory, name))
    return [path for _, path in sorted(found.items()) if os.path.getsize(path)]


def features() -> list[str]:
    """Return the features of all descriptors."""
    return sorted({feature for _, content in _readable() for feature in content.get("features", ())})


def select(wish: FirmwareWish, architecture: str, machine_type: str) -> Firmware | None:
    """Return the first UEFI firmware that fits, or None. Raises StartError if the user names a descriptor that does not
    fit the machine and the features.
    """
    if wish.path is not None:
        return _named(wish, wish.path, architecture, machine_type)
    excluded = set(wish.exclude) - set(wish.include)
    for path, content in _readable():
        offered = _offer(path, content, architecture, machine_type)
        if offered and offered.is_in_memory and not _CONFIDENTIAL & set(wish.include):
            continue
        if offered and set(wish.include) <= offered.features and not excluded & offered.features:
            return offered
    return None


def _named(wish: FirmwareWish, path: str, architecture: str, machine_type: str) -> Firmware:
    offered = _offer(path, read(path), architecture, machine_type)
    if offered is None:
        raise StartError(
            f"the firmware of {path} is not UEFI for {architecture} machines of type {machine_type}",
            hint=_LIST,
        )
    if missing := sorted(set(wish.include) - offered.features):
        raise StartError(f"the firmware of {path} has no {', '.join(missing)}", hint=_LIST)
    return offered


def read(path: str) -> dict[str, Any]:
    """Read a descriptor. Raises StartError."""
    import json

    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(_DESCRIPTOR_MAX))
    except OSError as error:
        raise StartError(f"cannot read the firmware descriptor {path}: {error.strerror}") from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise StartError(f"the firmware descriptor {path} is not JSON as QEMU describes it")
    return content


def _readable() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the readable descriptors. A broken descriptor is skipped."""
    for path in descriptors():
        try:
            yield path, read(path)
        except StartError:
            continue


def _offer(path: str, content: dict[str, Any], architecture: str, machine_type: str) -> Firmware | None:
    """Return the firmware of a descriptor; None if it is not UEFI, not for the machine, or not understood."""
    try:
        if "uefi" not in content["interface-types"]:
            return None
        if not any(_fits(target, architecture, machine_type) for target in content["targets"]):
            return None
        mapping = content["mapping"]
        memory = mapping["device"] == "memory"
        if not memory and mapping["device"] != "flash":
            return None
        executable = Blob(mapping["filename"], "raw") if memory else _blob(mapping["executable"])
        has_template = not memory and "nvram-template" in mapping
        template = _blob(mapping["nvram-template"]) if has_template else None
        return Firmware(path, executable, template, frozenset(content.get("features", ())), memory)
    except (KeyError, TypeError):
        return None


def _blob(entry: dict[str, Any]) -> Blob:
    return Blob(entry["filename"], entry.get("format", "raw"))


def _fits(target: dict[str, Any], architecture: str, machine_type: str) -> bool:
    if target["architecture"] != architecture:
        return False
    name = _MACHINE_NAMES[machine_type]
    # The patterns are those of glob(7); in practice, the only wildcard is a star at the end.
    return any(name == each or (each.endswith("*") and name.startswith(each[:-1])) for each in target["machines"])
