# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the targets of `./dev fuzz` with their seeds, and with a few inputs that hypothesis makes from the seeds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.run import NAMES
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_a_target_passes_with_its_seeds_and_with_changed_seeds(name: str, data: st.DataObject) -> None:
    target, seeds = TARGETS[name]
    for seed in seeds:
        target(seed)
    seed = data.draw(st.sampled_from(seeds))
    start = data.draw(st.integers(0, len(seed)))
    end = data.draw(st.integers(start, len(seed)))
    target(seed[:start] + data.draw(st.binary(max_size=8)) + seed[end:])
