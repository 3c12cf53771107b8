# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the watchdog interval that the service manager requests in the environment, and the notifications in it."""

import asyncio
import os

import pytest

from vmspawn.host.notify import Notifier
from vmspawn.manager.heartbeat import Heartbeat


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("3000000", None, 3.0),
        pytest.param("3000000", str(os.getpid()), 3.0, id="ours"),
        ("3000000", "1", 0.0),
        ("soon", None, 0.0),
        (None, None, 0.0),
    ],
)
def test_a_watchdog_counts_only_for_the_watched_process(
    monkeypatch: pytest.MonkeyPatch, usec: str | None, pid: str | None, seconds: float
) -> None:
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert Notifier().watchdog == seconds
    assert not {"WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)


async def test_a_watchdog_is_notified_three_times_in_each_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    heartbeat = Heartbeat(Notifier())
    loop = asyncio.get_running_loop()
    before = loop.time()
    heartbeat.begin()
    assert heartbeat._next is not None
    assert before + 1.0 <= heartbeat._next.when() <= loop.time() + 1.0
    heartbeat.end()
    assert heartbeat._next.cancelled()
