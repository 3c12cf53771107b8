# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the bounds that keep one client of the multiplexer from slowing down the others, each with its reason."""

from __future__ import annotations

#: Bytes that are read from a socket at once. More is slower for small messages (a buffer of 256 kB costs 27 us, for the
#: allocator maps and unmaps it), and one huge command must not keep the others waiting.
RECEIVE_SIZE = 8192

#: Bytes of one command as the client wrote it. QEMU's own limit is 64 MiB, but it reads 225 kB/s, so 4 MiB keep it busy
#: for 20 s. A longer command is refused with QEMU's own message.
COMMAND_SIZE = 4 << 20

#: Brackets and braces open at once; QEMU's own limit (qobject/json-streamer.c, MAX_NESTING).
NESTING = 1024

#: Bytes of one number or keyword. A number is scanned again from its start whenever bytes arrive in its middle, which
#: must not become quadratic. No useful number is longer.
ATOM_SIZE = 4096

#: Messages taken from one client before the others have their turn. Invalid messages are answered without QEMU, so only
#: this bound keeps 8 kB of `]]]]…` from causing 8192 replies in a row.
MESSAGES_PER_TURN = 16

#: Single tokens scanned for one client before the others have their turn; about a millisecond. A usual message needs
#: none.
STEPS_PER_TURN = 200

#: Bytes that may wait for a client before no more of its commands are taken. QEMU itself would queue replies without
#: bound. About 5 replies to query-qmp-schema.
OUTPUT_HELD = 1 << 20

#: Bytes that may wait for a client that does not read at all. Only events, which cannot be held back, reach this bound.
#: The client is disconnected when it gets another message with so many bytes waiting.
OUTPUT_SIZE = 8 << 20

#: Bytes read ahead from a client while its command runs. QEMU itself reads nothing then. Reading ahead saves a turn of
#: the event loop between pipelined commands, and detects that the client is gone.
READ_AHEAD = RECEIVE_SIZE

#: Bytes read ahead from a client whose commands are not taken because it does not read. Many programs write all their
#: commands before they read the first reply, and QEMU serves them; a smaller bound would be a deadlock.
INPUT_HELD = 1 << 20

#: In-band commands that wait in a client's queue once it has enabled `oob`, the running one not counted. QEMU's own
#: number (monitor/monitor-internal.h, QMP_REQ_QUEUE_LEN_MAX): with that many waiting it stops reading, and an
#: out-of-band command behind them is stuck, as the specification says.
OOB_QUEUE = 8

#: In-band commands in flight on one of QEMU's monitors: one runs, one is read meanwhile, and one covers our latency.
#: More would not be faster, and only one of them has no id. QEMU stops reading when OOB_QUEUE of them
#: wait, so out-of-band commands can always overtake.
IN_FLIGHT = 3

#: Bytes of a compacted command above which it goes over the bulk monitor: at 4.4 us a byte, it would delay all other
#: commands by 70 ms.
BULK_SIZE = 16 << 10

#: Sessions open at once. An event is sent to each of them, at some 10 us a session.
SESSIONS = 1024

#: Seconds for QEMU's greeting and for its answer to the negotiation. QEMU greets 0.05 s after it was started; a monitor
#: that stays silent belongs to another program, for QEMU serves one client a socket.
GREETING_TIMEOUT = 15.0

#: Seconds for queued bytes to reach a client after QEMU's end, and for QEMU to undo the remains of sessions when the
#: multiplexer closes.
DRAIN_TIMEOUT = 5.0
