# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the options of systemd-vmspawn for features that vmspawn does not have yet.

Values that disable the feature are accepted. Values that require it are refused, so that scripts notice that it is
missing. The help omits these options; vmspawn(1) lists them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ...errors import UsageError
from ...record import Record
from ..parser import Parser
from ..values import boolean


class _Unsupported(Record):
    """An option, a placeholder for its value, the feature, and the values that disable the feature."""

    name: str
    metavar: str
    feature: str
    disabling: tuple[str, ...] = ("no", "auto")


_BOOLEANS = (
    _Unsupported("--vsock", "BOOL|auto", "a VSOCK device"),
    _Unsupported("--tpm", "BOOL|auto", "a TPM"),
    _Unsupported("--notify-ready", "BOOL", "waiting for the guest's READY=1", ("no",)),
    _Unsupported("--bind-user-shell", "BOOL|PATH", "users of the host in the guest", ("no",)),
)

_VALUES = (
    _Unsupported("--vsock-cid", "CID", "a VSOCK device", ()),
    _Unsupported("--tpm-state", "off|auto|PATH", "a TPM", ("off", "auto")),
    _Unsupported("--coco", "no|sev-snp|tdx", "a confidential machine", ("no",)),
    _Unsupported("--private-users", "UIDBASE[:NUIDS]", "mapped users for --directory=", ()),
    _Unsupported("--bind-user", "NAME", "users of the host in the guest", ()),
    _Unsupported("--bind-user-group", "GROUP", "users of the host in the guest", ()),
    _Unsupported("--forward-journal", "FILE|DIR", "the guest's journal on the host", ()),
    _Unsupported("--forward-journal-max-use", "BYTES", "the guest's journal on the host", ()),
    _Unsupported("--forward-journal-keep-free", "BYTES", "the guest's journal on the host", ()),
    _Unsupported("--forward-journal-max-file-size", "BYTES", "the guest's journal on the host", ()),
    _Unsupported("--forward-journal-max-files", "N", "the guest's journal on the host", ()),
    _Unsupported("--background", "COLOR", "a tinted terminal", ("",)),
)


def add(parser: Parser) -> None:
    """Add the options to the command's parser."""
    group = parser.add_argument_group("Not supported yet")
    parser.hidden_groups.append(group)
    for each in (*_BOOLEANS, *_VALUES):
        help_text = f"{each.feature}: not supported yet"
        group.add_argument(each.name, metavar=each.metavar, dest=_destination(each), help=help_text)
    group.add_argument("-n", "--network-tap", action="store_true", help="a TAP device: not supported yet")
    for name in ("--no-pager", "--no-ask-password"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)


def _destination(option: _Unsupported) -> str:
    return "unsupported_" + option.name.lstrip("-").replace("-", "_")


def check(options: argparse.Namespace) -> list[str]:
    """Return a line for each optional feature that is skipped. Raises UsageError for a required feature."""
    if options.network_tap:
        raise UsageError("--network-tap is not supported yet", hint="use --network-user-mode")
    return [*_check(options, _BOOLEANS, booleans=True), *_check(options, _VALUES, booleans=False)]


def _check(options: argparse.Namespace, table: tuple[_Unsupported, ...], *, booleans: bool) -> Iterator[str]:
    for each in table:
        text = getattr(options, _destination(each))
        if text is None:
            continue
        named = "PATH" in each.metavar and text.startswith("/")
        value = boolean(f"{each.name}=", text, auto="auto" in each.disabling) if booleans and not named else text
        if value not in each.disabling:
            choices = " or ".join(f"{each.name}={choice}" for choice in each.disabling)
            hint = f"use {choices}" if choices else f"leave out {each.name}="
            raise UsageError(f"{each.name}={text}: {each.feature} is not supported yet", hint=hint)
        if value == "auto" and booleans:
            yield f"{each.name}=auto: {each.feature} is not supported yet, so the machine has none"
