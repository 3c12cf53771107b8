# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the tests of QMP share."""

import pytest

from tests.qemu.qmp_fixtures import Kind, kinds


@pytest.fixture(scope="session", params=list(Kind), ids=lambda kind: kind.name.lower())
def kind(request: pytest.FixtureRequest) -> Kind:
    """How the QEMU of `qemu` is told to serve its monitors: each way that it knows."""
    assert isinstance(request.param, Kind)
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what a QEMU does not know, rather than skip each test of it."""
    items[:] = [item for item in items if _is_possible(item)]


def _is_possible(item: pytest.Item) -> bool:
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return "kind" not in parameters or parameters["kind"] in kinds(parameters["qemu"])
