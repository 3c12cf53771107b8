# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the reason that is reported when KVM is not used."""

import errno
import os

import pytest

from vmspawn.boot.qemu import why_not_opened


@pytest.mark.parametrize(("number", "is_named"), [(errno.EACCES, True), (errno.ENOENT, False), (errno.ENODEV, False)])
def test_only_a_missing_permission_is_reported_with_the_group(number: int, is_named: bool) -> None:
    text = why_not_opened(OSError(number, os.strerror(number)))
    assert text.startswith(f"/dev/kvm cannot be opened: {os.strerror(number)}")
    assert text.endswith("add yourself to the group kvm") is is_named
