# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the base class of the start path's named tuples.

A class of typing.NamedTuple takes five times as long to create, and a start creates forty classes before QEMU runs.
The type checker treats a Record as a NamedTuple, because both have the same interface. A module that defines a
Record needs `from __future__ import annotations`, because a Record's annotations are never evaluated.
"""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any

__all__ = ("Record",)

if TYPE_CHECKING:
    from typing import NamedTuple as Record
else:

    class _RecordType(type):
        """Makes the annotations of a class the names of its items."""

        def __new__(mcs, name: str, bases: tuple[type, ...], space: dict[str, Any]) -> type:
            fields = tuple(space.get("__annotations__", ()))
            defaults = {field: space[field] for field in fields if field in space}
            getters = {field: property(itemgetter(number)) for number, field in enumerate(fields)}
            space = {"__slots__": (), **space, **getters, "_fields": fields, "_field_defaults": defaults}
            return super().__new__(mcs, name, bases, space)

    class _Tuple(tuple):
        """The methods of a named tuple."""

        __slots__ = ()

        def __new__(cls, *values: object, **named: object) -> Any:
            if not named and len(values) == len(cls._fields):
                return tuple.__new__(cls, values)
            if len(values) > len(cls._fields):
                raise TypeError(f"{cls.__name__} has {len(cls._fields)} fields, and got {len(values)} values")
            rest = cls._fields[len(values) :]
            try:
                found = [named.pop(each) if each in named else cls._field_defaults[each] for each in rest]
            except KeyError as error:
                raise TypeError(f"{cls.__name__} needs a value for {error}") from None
            if named:
                raise TypeError(f"{cls.__name__} has no such field, or two values for it: {', '.join(named)}")
            return tuple.__new__(cls, (*values, *found))

        def _replace(self, **changes: object) -> Any:
            values = [changes.pop(each, value) for each, value in zip(self._fields, self, strict=True)]
            if changes:
                raise TypeError(f"{type(self).__name__} has no such field: {', '.join(changes)}")
            return tuple.__new__(type(self), values)

        def _asdict(self) -> dict[str, object]:
            return dict(zip(self._fields, self, strict=True))

        def __getnewargs__(self) -> tuple[object, ...]:
            return tuple(self)

        def __repr__(self) -> str:
            return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._asdict().items())})"

    class Record(_Tuple, metaclass=_RecordType):
        """A named tuple."""
