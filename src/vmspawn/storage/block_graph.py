# SPDX-License-Identifier: LGPL-2.1-or-later
"""Read QEMU's graph of block nodes: what a device stands on, and who else uses a node (docs/qemu.md, "The pivot").

Clients can change the graph through QMP at any time, by jobs, snapshots and exports, so it is read anew for each
question.
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

#: What to do about users of a disk's nodes.
USERS_HINT = "end that through QMP (query-block-jobs, query-block-exports, query-named-block-nodes), then try again"

#: Filters that QEMU puts in for as long as a job runs have names that begin with this.
_IMPLICIT = "#"

#: The names of the edges that lead down to a node's content, the first that there is.
_DOWN = ("file", "image", "backing", "root")


class _Vertex(NamedTuple):
    """A block-driver (a node), a block-job, or a block-backend: a device, an export, or what a job writes through."""

    type: str
    name: str


class BlockGraph:
    """The graph at one moment."""

    def __init__(
        self, found: dict[str, Any], nodes: Iterable[dict[str, Any]], exports: Iterable[dict[str, Any]]
    ) -> None:
        """The arguments are what x-debug-query-block-graph, query-named-block-nodes and query-block-exports return."""
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
        """The bytes of a node's content; 0 if there is no such node."""
        return int(self._nodes[node]["image"]["virtual-size"]) if node in self._nodes else 0

    def file(self, node: str) -> str:
        """The name of the file that a node stands on, as far as QEMU tells it; else the node's own."""
        text = str(self._nodes.get(node, {}).get("file", ""))
        return _file_name(text) or f"the node {node}"

    def under_device(self, device: str) -> str | None:
        """The node that a device stands on, or None if it stands on none."""
        return self._below(lambda vertex: _is_device(vertex, device))

    def under_node(self, name: str) -> str | None:
        """The node that a node stands on, or None if it stands on none."""
        return self._below(lambda vertex: vertex == _Vertex("block-driver", name))

    def _below(self, is_parent: Any) -> str | None:
        edges = {edge: child.name for parent, edge, child in self._edges if is_parent(parent)}
        found = next((edges[edge] for edge in _DOWN if edge in edges), None)
        return self.under_node(found) if found is not None and found.startswith(_IMPLICIT) else found

    def is_kept(self, node: str, device: str) -> bool:
        """Whether a node is still what a device stands on, as far as QEMU's block layer knows."""
        return any(child.name == node and _is_device(parent, device) for parent, _, child in self._edges)

    def users(self, nodes: Collection[str]) -> str:
        """Who uses one of these nodes, beside each other and devices: jobs, exports and other nodes, in words."""
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
    # virtio-blk is known by its path with a child behind it, the others by their id alone.
    return vertex.type == "block-backend" and device in vertex.name.split("/")


def _file_name(text: str) -> str:
    """The file name in a node's description, which is one, or JSON that has one below."""
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
    """The names of a disk's nodes, whether they are there or not."""
    images = (name for image in attached.images for name in (image.file_node, image.format_node))
    return frozenset((attached.identifiers.pivot, *images))


def _listed(users: Sequence[str]) -> str:
    *others, last = users or ("",)
    return f"{', '.join(others)} and {last}" if others else last


async def users_of(monitor: Monitor, attached: AttachedDisk) -> str:
    """Who uses a disk's nodes beside the disk, in words; empty for nobody. Raises what `Monitor.execute` raises."""
    graph = await BlockGraph.take(monitor)
    return graph.users(nodes_of(attached))


@contextlib.asynccontextmanager
async def blaming_users(monitor: Monitor, attached: AttachedDisk) -> AsyncIterator[None]:
    """Raise SystemFailure with EBUSY in the place of a QmpError if somebody uses the disk's nodes through QMP."""
    try:
        yield
    except QmpError as error:
        if not (users := await users_of(monitor, attached)):
            raise
        raise SystemFailure(f"{attached.name} is used by {users}", errno.EBUSY, hint=USERS_HINT) from error
