# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checks errors as a user of the command line reads them."""

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vmspawn.cli.spelling import as_option
from vmspawn.errors import UsageError, VmspawnError


@contextmanager
def refused(
    message: str, kind: type[VmspawnError] = UsageError, *, program: str = "vmspawn"
) -> Iterator[pytest.ExceptionInfo[VmspawnError]]:
    """Expect an error whose message, with fields spelled as options, matches."""
    with pytest.raises(kind) as caught:
        yield caught
    said, _ = caught.value.spelled(functools.partial(as_option, program))
    assert re.search(message, said), said
