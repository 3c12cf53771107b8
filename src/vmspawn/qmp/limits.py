# SPDX-License-Identifier: LGPL-2.1-or-later
"""Defines the limits that keep one client of the multiplexer from delaying the others, each with its reason."""

from __future__ import annotations

#: Bytes that are read from a socket at once. A larger buffer is slower for small messages (256 kB cost 27 µs, because
#: the allocator maps and unmaps it), and one huge command must not delay the other clients.
RECEIVE_SIZE = 8192

#: Bytes of one command as the client wrote it. QEMU's limit is 64 MiB, but QEMU reads 225 kB/s, so a command of 4 MiB
#: occupies it for 20 s. A longer command is refused with QEMU's own message.
COMMAND_SIZE = 4 << 20

#: Brackets and braces that are open at once. This is QEMU's limit (qobject/json-streamer.c, MAX_NESTING).
NESTING = 1024

#: Bytes of one number or keyword. A number is scanned again from its start whenever more of its bytes arrive; the limit
#: keeps that from taking quadratic time. No useful number is longer.
ATOM_SIZE = 4096

#: Messages taken from one client before the other clients' turn. Invalid messages are answered without QEMU, so only
#: this limit keeps 8 kB of `]]]]…` from causing 8192 replies in a row.
MESSAGES_PER_TURN = 16

#: Tokens inspected for one client before the other clients' turn, in about a millisecond. Usual messages need no
#: inspection.
STEPS_PER_TURN = 200

#: Unread output in bytes at which no more commands of the client are taken: about 5 replies to query-qmp-schema. QEMU
#: itself queues replies without a limit.
OUTPUT_HELD = 1 << 20

#: Unread output in bytes at which the client is disconnected when it gets another message. Only events, which cannot be
#: held back, reach this limit.
OUTPUT_SIZE = 8 << 20

#: Bytes that are read from a client while its command runs. QEMU itself reads nothing meanwhile. Reading ahead saves a
#: turn of the event loop between pipelined commands, and detects a disconnect.
READ_AHEAD = RECEIVE_SIZE

#: Bytes that are read from a client while its commands are not taken because its output is unread. Many programs write
#: all their commands before they read the first reply, and QEMU serves them; with a lower limit they would deadlock.
INPUT_HELD = 1 << 20

#: In-band commands that wait in a client's queue after the client has enabled `oob`, not counting the running command.
#: This is QEMU's limit (monitor/monitor-internal.h, QMP_REQ_QUEUE_LEN_MAX). QEMU stops reading at the limit, so that an
#: out-of-band command behind these commands waits, as the specification states.
OOB_QUEUE = 8

#: In-band commands in flight on one of QEMU's monitors: one runs, one is read meanwhile, and one covers vmspawn's
#: latency. More would not be faster, and only one of them can be sent without an id. QEMU stops reading only when
#: OOB_QUEUE commands wait. This limit is lower, so out-of-band commands can always overtake the commands in flight.
IN_FLIGHT = 3

#: Bytes of a compact command above which it goes to the bulk monitor: at 4.4 µs per byte, it would delay all other
#: commands by 70 ms.
BULK_SIZE = 16 << 10

#: Sessions that are open at once. Each event is sent to all of them, at about 10 µs per session.
SESSIONS = 1024

#: Seconds for QEMU's greeting, and for its reply to the negotiation. QEMU greets 0.05 s after it was started. A monitor
#: that stays silent serves another program, because QEMU serves one client per socket.
GREETING_TIMEOUT = 15.0

#: Seconds for a client to read its queued output after QEMU's exit, for QEMU to answer the commands in flight before a
#: save holds back the sessions' commands, and for QEMU to close the descriptors of ended sessions.
DRAIN_TIMEOUT = 5.0
