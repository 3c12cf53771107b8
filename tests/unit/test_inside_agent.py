# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tests the session with the agent, on a real socket whose other end belongs to the test."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from vmspawn.agent.protocol import Done, Lost, Refused
from vmspawn.errors import NotConnected, NotSupported
from vmspawn.inside.agent import Agent

pytestmark = pytest.mark.asyncio


class FarEnd:
    """The agent's end of the control port. It records the messages and restarts that vmspawn's end reports."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        self.messages: list[Refused | Done | Lost] = []
        self.restarts = 0
        self.agent = Agent(self._connect, on_message=self.messages.append, on_restart=self._restarted)

    def _connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self.sockets.append(theirs)
        return ours

    def _restarted(self) -> None:
        self.restarts += 1

    async def read(self) -> list[list[str]]:
        """Return the messages that have come."""
        # The task that waits for the agent connects when it first runs.
        await asyncio.sleep(0)
        data = await asyncio.get_running_loop().sock_recv(self.sockets[-1], 65536)
        return [line.split()[:-1] for line in data.decode().splitlines() if line]

    async def send(self, text: str) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sockets[-1], text.encode())

    async def session(self, capabilities: str = "run") -> None:
        """Begin a session."""
        waiting = asyncio.ensure_future(self.agent.ready())
        [[_, nonce]] = await self.read()
        await self.send(f"ready {nonce} 1 7 {capabilities} ;\n")
        await waiting


@pytest_asyncio.fixture
async def far() -> AsyncIterator[FarEnd]:
    far = FarEnd()
    yield far
    far.agent.close()
    for each in far.sockets:
        each.close()


async def test_a_session_begins_with_the_nonce_that_vmspawn_sent(far: FarEnd) -> None:
    waiting = asyncio.ensure_future(far.agent.ready())
    [[word, nonce]] = await far.read()
    assert word == "sync"
    await far.send("ready other 1 7 run ;\n")
    done, _ = await asyncio.wait({waiting}, timeout=0.05)
    assert not done
    await far.send(f"ready {nonce} 1 7 run ;\n")
    await waiting
    assert far.agent.session == nonce


async def test_an_agent_that_comes_up_late_gets_sync_again(far: FarEnd) -> None:
    waiting = asyncio.ensure_future(far.agent.ready())
    first = await far.read()
    await far.send("ready - 1 7 run ;\n")
    assert await far.read() == first
    await far.send(f"ready {first[0][1]} 1 7 run ;\n")
    await waiting
    assert far.restarts == 0


async def test_a_sync_whose_answer_is_lost_is_sent_again(far: FarEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmspawn.inside.agent._SYNC_INTERVAL", 0.01)
    waiting = asyncio.ensure_future(far.agent.ready())
    first = await far.read()
    again = await far.read()
    assert again[0] == first[0]
    await far.send(f"ready {first[0][1]} 1 7 run ;\n" * 2)
    await waiting
    assert (far.agent.session, far.restarts) == (first[0][1], 0)


async def test_a_guest_that_does_not_read_gets_one_sync(far: FarEnd) -> None:
    waiting = asyncio.ensure_future(far.agent.ready())
    [[_, nonce]] = await far.read()
    # More than the socket takes.
    far.agent.send(b"x" * (1 << 20))
    for _ in range(100):
        await far.send("ready - 1 7 run ;\n")
        await asyncio.sleep(0)
    await far.send("done last ;\n")
    while not far.messages:  # noqa: ASYNC110 - the loop has to read what was sent
        await asyncio.sleep(0)
    received = b""
    far.agent.send(b"\nend ;\n")
    while b"end ;\n" not in received:
        received += await asyncio.get_running_loop().sock_recv(far.sockets[-1], 1 << 20)
    assert received.count(b"sync") == 1
    await far.send(f"ready {nonce} 1 7 run ;\n")
    await waiting


async def test_an_agent_that_was_started_again_is_a_new_session(far: FarEnd) -> None:
    await far.session()
    before = far.agent.session
    await far.send("ready - 1 8 run ;\n")
    [[_, nonce]] = await far.read()
    assert (nonce != before, far.restarts) == (True, 1)


async def test_another_version_of_the_protocol_is_refused(far: FarEnd) -> None:
    waiting = asyncio.ensure_future(far.agent.ready())
    [[_, nonce]] = await far.read()
    await far.send(f"ready {nonce} 2 7 run ;\n")
    with pytest.raises(NotSupported, match="version 2"):
        await waiting


async def test_ports_are_counted_until_the_guest_knows_them(far: FarEnd) -> None:
    await far.session()
    waiting = asyncio.ensure_future(far.agent.knows_ports("a-1", 4, 10))
    for count in (0, 3, 4):
        assert await far.read() == [["ports", "a-1"]]
        await far.send(f"ports a-1 {count} ;\n")
    assert await waiting


async def test_an_agent_that_does_not_answer_is_waited_for(far: FarEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that is too busy to answer is not taken for a guest that does not notice its ports."""
    monkeypatch.setattr("vmspawn.inside.agent._ASK_AGAIN", 0.02)
    monkeypatch.setattr("vmspawn.inside.agent._ANSWER_MAX", 0.0)
    await far.session()
    waiting = asyncio.ensure_future(far.agent.knows_ports("a-1", 4, 0.01))
    for _ in range(10):
        assert {tuple(message) for message in await far.read()} == {("ports", "a-1")}
    assert not waiting.done()
    await far.send("ports a-1 4 ;\n")
    assert await waiting


async def test_a_guest_that_notices_ports_slowly_has_more_time(far: FarEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change of the count starts the timeout again; without a change, the third question would be the last."""
    monkeypatch.setattr("vmspawn.inside.agent._ANSWER_MAX", 0.0)
    await far.session()
    waiting = asyncio.ensure_future(far.agent.knows_ports("a-1", 4, 0.02))
    for count in (1, 2, 3, 3):
        assert await far.read() == [["ports", "a-1"]]
        await far.send(f"ports a-1 {count} ;\n")
    assert not await asyncio.wait_for(waiting, 20)


async def test_questions_end_with_the_connection(far: FarEnd) -> None:
    await far.session()
    waiting = asyncio.ensure_future(far.agent.has_connected("a-1", 4, 10))
    await far.read()
    far.agent.close()
    with pytest.raises(NotConnected):
        await asyncio.wait_for(waiting, 10)
    with pytest.raises(NotConnected):
        await far.agent.knows_ports("a-1", 4, 10)


async def test_two_questions_about_one_set_get_their_own_answers(far: FarEnd) -> None:
    """A set of ports may be connected and unplugged at once."""
    await far.session()
    connecting = asyncio.ensure_future(far.agent.has_connected("a-1", 4, 10))
    assert await far.read() == [["connected", "a-1"]]
    unplugging = asyncio.ensure_future(far.agent.knows_ports("a-1", 0, 10))
    assert await far.read() == [["ports", "a-1"]]
    await far.send("ports a-1 0 ;\n")
    assert await unplugging
    assert not connecting.done()
    await far.send("connected a-1 4 ;\n")
    assert await connecting


async def test_a_lost_connection_is_replaced_for_a_waiting_task(far: FarEnd) -> None:
    waiting = asyncio.ensure_future(far.agent.ready())
    [[_, first]] = await far.read()
    far.sockets[-1].close()
    async with asyncio.timeout(10):
        while len(far.sockets) == 1:  # noqa: ASYNC110 - the event loop notices the end, and connects
            await asyncio.sleep(0)
    [[word, second]] = await far.read()
    assert (word, first != second) == ("sync", True)
    await far.send(f"ready {second} 1 7 run ;\n")
    await waiting


async def test_a_waiting_task_is_woken_when_the_agent_is_closed(far: FarEnd) -> None:
    waiting = asyncio.ensure_future(far.agent.ready())
    await far.read()
    far.agent.close()
    with pytest.raises(NotConnected, match="closed"):
        await asyncio.wait_for(waiting, 10)
    with pytest.raises(NotConnected, match="closed"):
        await far.agent.ready()
    assert len(far.sockets) == 1


async def test_a_waiting_task_gets_the_next_session_after_a_reset(far: FarEnd) -> None:
    waiting = asyncio.ensure_future(far.agent.ready())
    [[_, first]] = await far.read()
    far.agent.restart()
    [[_, second]] = await far.read()
    assert first != second
    await far.send(f"ready {second} 1 7 run ;\n")
    async with asyncio.timeout(20):
        await waiting


async def test_an_agent_is_asked_until_it_answers(far: FarEnd) -> None:
    await far.session()
    waiting = asyncio.ensure_future(far.agent.answers())
    assert await far.read() == [["ping", "answer"]]
    # The ping is repeated.
    assert await far.read() == [["ping", "answer"]]
    assert not waiting.done()
    await far.send("pong answer ;\n")
    await waiting


async def test_invalid_messages_change_nothing(far: FarEnd) -> None:
    await far.session()
    await far.send("x" * 100_000 + "\npong nobody ;\nready\n\0\xff\nlost a-1 ;\n")
    async with asyncio.timeout(20):
        while not far.messages:  # noqa: ASYNC110 - the reader sets no event
            await asyncio.sleep(0.01)
    assert far.messages == [Lost("a-1")]


async def test_a_flood_of_messages_leaves_time_for_other_tasks(far: FarEnd) -> None:
    await far.session()
    loop = asyncio.get_running_loop()
    flood = asyncio.ensure_future(loop.sock_sendall(far.sockets[-1], b"ready\n" * 1_000_000))
    await asyncio.sleep(0.3)
    # The agent waits: vmspawn does not read everything at once.
    assert not flood.done()
    flood.cancel()


async def test_a_missing_port_is_reported(far: FarEnd) -> None:
    def refuse() -> socket.socket:
        raise ConnectionRefusedError(111, "Connection refused")

    agent = Agent(refuse, on_message=lambda _: None, on_restart=lambda: None)
    with pytest.raises(NotConnected, match="refused"):
        await agent.ready()


async def test_a_full_queue_of_connections_is_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "port")

    def connect() -> socket.socket:
        with contextlib.ExitStack() as undo:
            connected = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            connected.setblocking(False)
            connected.connect(path)
            undo.pop_all()
        return connected

    agent = Agent(connect, on_message=lambda _: None, on_restart=lambda: None)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, contextlib.closing(agent):
        listener.bind(path)
        # QEMU listens with this backlog, too, so that two connections fill the queue.
        listener.listen(1)
        connect().close()
        connect().close()
        with pytest.raises(BlockingIOError):
            connect()
        waiting = asyncio.ensure_future(agent.ready())
        done, _ = await asyncio.wait({waiting}, timeout=0.2)
        assert not done
        for _ in range(2):
            listener.accept()[0].close()
        listener.settimeout(10)
        accepted, _ = await asyncio.to_thread(listener.accept)
        with accepted:
            accepted.setblocking(False)
            loop = asyncio.get_running_loop()
            sync = await loop.sock_recv(accepted, 4096)
            await loop.sock_sendall(accepted, b"ready %s 1 7 run ;\n" % sync.split()[1])
            await waiting


async def test_a_port_that_goes_while_its_queue_is_full_is_reported() -> None:
    reasons = [BlockingIOError(errno.EAGAIN, "full"), BlockingIOError(errno.EAGAIN, "full")]

    def connect() -> socket.socket:
        raise reasons.pop() if reasons else ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    agent = Agent(connect, on_message=lambda _: None, on_restart=lambda: None)
    async with asyncio.timeout(10):
        with pytest.raises(NotConnected, match="refused"):
            await agent.ready()


async def test_a_copy_gets_a_seed_and_the_time(far: FarEnd) -> None:
    await far.session("run,fork")
    begun = time.time()
    waking = asyncio.ensure_future(far.agent.wake_copy())
    [[word, seed, seconds, nanoseconds]] = await far.read()
    assert (word, len(bytes.fromhex(seed))) == ("fork", 32)
    assert begun <= int(seconds) + int(nanoseconds) / 1e9 <= time.time()
    await far.send(f"forked 00 ;\nforked {seed} ;\nforked {seed} ;\n")
    await waking


async def test_a_guest_may_refuse_to_set_its_clock(far: FarEnd) -> None:
    await far.session("run,fork")
    waking = asyncio.ensure_future(far.agent.wake_copy())
    [[_, seed, *_]] = await far.read()
    await far.send(f"refused {seed} 1 clock ;\n")
    with pytest.raises(NotSupported, match="refuses to set its clock: Operation not permitted"):
        await waking


async def test_an_older_agent_cannot_set_the_clock(far: FarEnd) -> None:
    await far.session()
    with pytest.raises(NotSupported, match="too old"):
        await far.agent.wake_copy()
