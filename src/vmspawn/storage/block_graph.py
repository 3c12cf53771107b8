# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reads QEMU's graph of block nodes: the nodes below a device, and a node's other users (docs/qemu.md, "The pivot").

QMP clients can change the graph at any time, by jobs, snapshots and exports, so each question reads it again.
"""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ..errors import QmpError, SystemFailure
from ..qmp.monitor import Monitor
from .attached_disk import AttachedDisk

#: The hint about QMP clients that use a disk's nodes.
USERS_HINT = "end the use through QMP (query-block-jobs, query-block-exports, query-named-block-nodes), then try again"

#: The prefix of the names of filters that QEMU inserts while a job runs.
_IMPLICIT = "#"

#: The names of the edges that lead down to a node's content. The first of them that a node has is used.
_DOWN = ("file", "image", "backing", "root")


class _Vertex(NamedTuple):
    """A block-driver (a node), a block-job, or a block-backend (a device, an export, or a job's writer)."""

    type: str
    name: str


class BlockGraph:
    """QEMU's block graph at one moment."""

    def __init__(
        self, found: dict[str, Any], nodes: Iterable[dict[str, Any]], exports: Iterable[dict[str, Any]]
    ) -> None:
        """Build the graph from the results of the three queries in `take`."""
        vertices = {each["id"]: _Vertex(each["type"], each["name"]) for each in found["nodes"]}
        self._edges = [(vertices[each["parent"]], each["name"], vertices[each["child"]]) for each in found["edges"]]
        self._nodes = {each["node-name"]: each for each in nodes}
        self._exports = list(exports)

    @classmethod
    async def take(cls, monitor: Monitor) -> BlockGraph:
        """Read the graph. Raises what `Monitor.execute` raises."""
        return cls(
            await monitor.execute("x-debug-query-block-graph"),
            await monitor.execute("query-named-block-nodes", {"flat": True}),
            await monitor.execute("query-block-exports"),
        )

    def size(self, node: str) -> int:
        """Return the size of a node's content in bytes, or 0 if there is no node of that name."""
        return int(self._nodes[node]["image"]["virtual-size"]) if node in self._nodes else 0

    def file(self, node: str) -> str:
        """Return the name of the file below a node if QEMU reports it, else the node's name."""
        text = str(self._nodes.get(node, {}).get("file", ""))
        return _file_name(text) or f"the node {node}"

    def under_device(self, device: str) -> str | None:
        """Return the node below a device, or None if the device has no node. Skips the filters of jobs."""
        return self._below(lambda vertex: _is_device(vertex, device))

    def under_node(self, name: str) -> str | None:
        """Return the node below a node, or None at the bottom of the graph. Skips the filters of jobs."""
        return self._below(lambda vertex: vertex == _Vertex("block-driver", name))

    def _below(self, is_parent: Any) -> str | None:
        edges = {edge: child.name for parent, edge, child in self._edges if is_parent(parent)}
        found = next((edges[edge] for edge in _DOWN if edge in edges), None)
        return self.under_node(found) if found is not None and found.startswith(_IMPLICIT) else found

    def is_kept(self, node: str, device: str) -> bool:
        """Return whether QEMU's block layer still has a node below a device."""
        return any(child.name == node and _is_device(parent, device) for parent, _, child in self._edges)

    def users(self, nodes: Collection[str]) -> str:
        """List the jobs, exports and other nodes that use one of these nodes, in words; empty if there are none."""
        return _listed(list(dict.fromkeys(self._users(nodes))))

    def _users(self, nodes: Collection[str]) -> Iterator[str]:
        for parent, _, child in self._edges:
            if child.type != "block-driver" or child.name not in nodes:
                continue
            if parent.type == "block-job":
                yield f"the block job {parent.name}"
            elif parent.type == "block-driver" and parent.name not in nodes and not parent.name.startswith(_IMPLICIT):
                yield f"the node {parent.name}"
        for each in self._exports:
            if each["node-name"] in nodes:
                yield f"the {each['type']} export {each['id']}"


def _is_device(vertex: _Vertex, device: str) -> bool:
    # The name is the path of a child of the device for virtio-blk, and the device's id alone for the other buses.
    return vertex.type == "block-backend" and device in vertex.name.split("/")


def _file_name(text: str) -> str:
    """Return the file name in a node's description, which is a file name, or JSON with a file name inside."""
    if not text.startswith("json:"):
        return text
    try:
        found: Any = json.loads(text.removeprefix("json:"))
    except ValueError:
        return ""
    while isinstance(found, dict):
        if isinstance(name := found.get("filename"), str):
            return name
        found = next((found[key] for key in _DOWN if key in found), None)
    return ""


def nodes_of(attached: AttachedDisk) -> frozenset[str]:
    """Return the names of a disk's nodes, whether the nodes exist or not."""
    images = (name for image in attached.images for name in (image.file_node, image.format_node))
    return frozenset((attached.identifiers.pivot, *images))


def _listed(users: Sequence[str]) -> str:
    *others, last = users or ("",)
    return f"{', '.join(others)} and {last}" if others else last


async def users_of(monitor: Monitor, attached: AttachedDisk) -> str:
    """List the users of a disk's nodes other than the disk, in words; empty if there are none.

    Raises what `Monitor.execute` raises.
    """
    graph = await BlockGraph.take(monitor)
    return graph.users(nodes_of(attached))


@contextlib.asynccontextmanager
async def blaming_users(monitor: Monitor, attached: AttachedDisk) -> AsyncIterator[None]:
    """Replace a QmpError of the body by SystemFailure with EBUSY if QMP clients use the disk's nodes."""
    try:
        yield
    except QmpError as error:
        if not (users := await users_of(monitor, attached)):
            raise
        raise SystemFailure(f"{attached.name} is used by {users}", errno.EBUSY, hint=USERS_HINT) from error
