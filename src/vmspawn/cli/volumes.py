# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parses volumes of systemd's storage providers, for vmspawn's --bind-volume= and vmctl's bind-volume."""

from __future__ import annotations

from ..errors import UsageError
from ..host.storageprovider import Volume
from ..storage.disk import BUSES
from .values import boolean, parse_size

SYNTAX = "PROVIDER:VOLUME[:CONFIG][:KEY=VALUE,…]"

_CREATE_MODES = ("any", "new", "open")
_REQUESTS = ("blk", "reg")


def parse(option: str, text: str) -> Volume:
    """Parse a volume. Its CONFIG must be a bus. Raises UsageError."""
    parts = text.split(":", 3)
    provider, name, *rest = (*parts, "") if len(parts) == 1 else parts
    if not provider or not name or "/" in provider or provider.startswith("."):
        raise UsageError(f"{option}{text} names no volume", hint=f"write {option}{SYNTAX}")
    settings = rest.pop() if rest and "=" in rest[-1] else ""
    config = rest[0] if rest else ""
    if len(rest) > 1 or "=" in config:
        raise UsageError(f"{option}{text} has too many parts", hint=f"write {option}{SYNTAX}")
    if config and config not in BUSES:
        raise UsageError(f"{option}{text}: unknown bus {config}", hint=f"choose one of: {', '.join(BUSES)}")
    parameters: dict[str, object] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        parameters.update(_parameter(option, key, value))
    return Volume(provider, name, config, parameters)


def _parameter(option: str, key: str, value: str) -> dict[str, object]:
    match key:
        case "template":
            return {"template": value}
        case "create":
            return {"createMode": _choice(f"{option}…create=", value, _CREATE_MODES)}
        case "request-as":
            return {"requestAs": _choice(f"{option}…request-as=", value, _REQUESTS)}
        case "size" | "create-size":
            return {"createSizeBytes": parse_size(value, option=f"{option}…{key}=")}
        case "read-only" | "ro":
            choice = boolean(f"{option}…{key}=", value, auto=True)
            return {} if choice == "auto" else {"readOnly": choice == "yes"}
    raise UsageError(
        f"{option}: unknown key {key}=", hint="known keys: create=, size=, template=, read-only=, request-as="
    )


def _choice(option: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UsageError(f"{option}{value} is not known", hint=f"choose one of: {', '.join(choices)}")
    return value
