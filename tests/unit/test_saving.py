# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests that no device is plugged in while the state is about to be saved."""

import asyncio

from vmspawn.qmp.saving import Saving


async def test_a_device_waits_until_all_savers_have_ended() -> None:
    saving = Saving()
    saving.begin()
    saving.begin()
    order = []

    async def come() -> None:
        async with saving.device_comes():
            order.append("device")
            assert saving.is_device_coming

    task = asyncio.create_task(come())
    for number in range(2):
        await asyncio.sleep(0)
        order.append(f"saver {number}")
        saving.end()
    await task
    assert order == ["saver 0", "saver 1", "device"]
    assert not saving.is_device_coming


async def test_devices_do_not_wait_for_each_other() -> None:
    saving = Saving()
    async with saving.device_comes():
        async with saving.device_comes():
            pass
        assert saving.is_device_coming
