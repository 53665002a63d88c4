"""Making an overlay in a running QEMU independent of the restore point that it was made over.

    expose     the overlay is exported read-only, so that it can be told to read ahead (`transfer.ahead`)
    detach     all data of the restore point is in it: what lies below is replaced by nothing at all, and its
               header's name of it is removed

`block-stream` would do it alone, but reads every byte of the disk, holes too: hours for a sparse disk of
some TiB (measured: 0.8 to 2.4 GiB a second of zeroes, QEMU 7.2). So it gets only its last step to do: with
an empty node below, it finds at once that nothing is left, and rewrites the header (block/stream.c: "Finish
early if end of backing file has been reached"). Before that everything is flushed, so that no power failure
can leave a header without a backing file over data that did not arrive; `blockdev-reopen` does that too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from pullback import errors, state
from pullback.engine import exports, graph, replies, serving
from pullback.engine.monitor import Monitor
from pullback.model.exports import Listen, NbdAddress
from pullback.state.serving import Register

#: Seconds that the last step may take; it writes one cluster, unless QEMU has to look through all of the disk.
_DETACH_SECONDS = 3600.0
#: Seconds that another command may hold the machine while we begin or end an export.
_LOCK_SECONDS = 30.0
_POLL_SECONDS = 0.2
#: Bytes of the node that stands below in the end: the smallest disk there is.
_NOTHING = 512


class Populating:
    """The overlays of one machine, by its monitor (or that of a storage daemon on its images)."""

    def __init__(self, monitor: Monitor, directories: state.Directories, machine: str) -> None:
        """`machine`: the name by which its NBD server is registered, as for any command on it."""
        self._monitor = monitor
        self._directories = directories
        self._machine = machine
        self._register = Register(directories.state, machine)

    @property
    def _private(self) -> Path:
        """The socket of the server that is wanted nowhere in particular, as `engine.serving` has it."""
        name = state.machine_directory(Path(), self._machine).name
        return self._directories.runtime / name[:8] / "nbd.sock"

    async def independent(self, node: str) -> bool:
        """Has the overlay nothing below it?"""
        nodes = graph.parse_nodes(await self._monitor.execute("query-named-block-nodes", {"flat": True}))
        found = graph.parse_graph(nodes, await self._monitor.execute("x-debug-query-block-graph"))
        return found.child(node, "backing") is None

    async def expose(self, node: str, id: str) -> NbdAddress:
        """Export the overlay, read-only, with what it holds itself. Raises `NbdServerBusy`."""
        async with _locked(self._directories, self._machine):
            await exports.remove_one(self._monitor, id)
            address = await serving.ensure(self._monitor, self._register, Listen(), private=self._private)
            if address.socket is None:
                raise errors.NbdServerBusy(detail=f"our own exports, at {address}")
            arguments = {"type": "nbd", "id": id, "node-name": node, "name": id, "allocation-depth": True}
            await self._monitor.execute("block-export-add", arguments)
        return NbdAddress(socket=Path(address.socket), export=id)

    async def withdraw(self, id: str) -> None:
        """End that export, and the server if nobody else uses it."""
        async with _locked(self._directories, self._machine):
            await exports.remove_one(self._monitor, id)
            await serving.stop_unused(self._monitor, self._register)

    async def detach(self, top: Mapping[str, object], *, below: tuple[str, ...]) -> None:
        """Nothing lies below the overlay any more, in QEMU and in its header.

        `top`: all options of its node, with `backing` naming the new node below, which is made. `below`: the
        nodes that are to go, from above. Raises `RefusedError` while another job holds the disk.
        """
        node, nothing = str(top["node-name"]), str(top["backing"])
        with suppress(errors.RefusedError):  # it is there since an attempt that was cut short
            values = {"driver": "null-co", "size": _NOTHING, "read-zeroes": True, "read-only": True}
            await self._monitor.execute("blockdev-add", {"node-name": nothing, **values})
        try:
            await self._monitor.execute("blockdev-reopen", {"options": [dict(top)]}, timeout=_DETACH_SECONDS)
        except errors.RefusedError as error:
            if error.error_class != "CommandNotFound":  # QEMU < 6.1: the long way, through all of the disk
                raise
        await self._stream(node)
        for gone in (nothing, *below):
            with suppress(errors.RefusedError):
                await self._monitor.execute("blockdev-del", {"node-name": gone})

    async def _stream(self, node: str) -> None:
        job = f"boot-{node}"
        with suppress(errors.RefusedError):  # it fails if one of that name runs since before
            await self._monitor.execute("block-stream", {"job-id": job, "device": node})

        async def over() -> bool:
            listed = replies.objects(await self._monitor.execute("query-block-jobs"), "query-block-jobs")
            return not any(replies.optional_text(item, "device") == job for item in listed)

        await self._monitor.poll(over, what="block-stream", timeout=_DETACH_SECONDS)
        if not await self.independent(node):
            raise errors.RefusedError(command="block-stream", reason="it did not come to its end", error_class="")


@asynccontextmanager
async def _locked(directories: state.Directories, machine: str) -> AsyncIterator[None]:
    """The machine's lock for a moment; whoever has it is waited for."""
    deadline = asyncio.get_running_loop().time() + _LOCK_SECONDS
    while True:
        held = state.lock(directories, f"machine {machine}", command="boot", title=machine)
        try:
            await asyncio.to_thread(held.__enter__)
            break
        except errors.BusyError:
            if asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        held.__exit__(None, None, None)
