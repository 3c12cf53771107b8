# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the checks of I/O limits, and their conversion to QEMU's parameters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmspawn.errors import BadConfig
from vmspawn.storage.limits import LIMIT_MAX, NO_LIMITS, Limits, check_limits

RATES = st.integers(0, LIMIT_MAX)


def test_empty_limits_reset_all_former_limits() -> None:
    assert not NO_LIMITS.has_any
    assert set(NO_LIMITS.to_qemu().values()) == {0}
    # There are six rates and their bursts (qapi/block-core.json, ThrottleLimits).
    assert len(NO_LIMITS.to_qemu()) == 12


@given(st.builds(Limits, RATES, RATES, RATES, RATES, RATES, RATES, st.floats(1, 1000)))
def test_a_burst_is_never_below_its_limit_which_qemu_would_refuse(limits: Limits) -> None:
    found = limits.to_qemu()
    for name in ("iops-total", "iops-read", "iops-write", "bps-total", "bps-read", "bps-write"):
        burst = found[f"{name}-max"]
        assert burst == 0 or burst >= found[name]  # type: ignore[operator]


@given(RATES, RATES, RATES)
def test_a_total_limit_excludes_limits_of_its_parts(total: int, read: int, write: int) -> None:
    limits = Limits(iops=total, iops_read=read, iops_write=write)
    if total and (read or write):
        with pytest.raises(BadConfig, match="exclude each other"):
            check_limits(limits)
    else:
        assert check_limits(limits) is limits


@pytest.mark.parametrize(
    "limits",
    [Limits(bps=-1), Limits(iops_read=LIMIT_MAX + 1), Limits(burst=0), Limits(burst=1e4), Limits(burst=float("nan"))],
)
def test_limits_out_of_range_are_refused(limits: Limits) -> None:
    with pytest.raises(BadConfig, match="out of range"):
        check_limits(limits)


def test_limits_read_as_people_would_write_them() -> None:
    assert str(Limits(iops=100, bps_write=5, burst=2)) == "iops 100, bps-write 5, burst 2"
    assert str(NO_LIMITS) == ""
