"""Writes without pause, from a thread, while something else happens to the machine.

Each operation is done by QEMU before the next one begins, alternating over all disks. So what a
snapshot shows of a disk must be its state after some number of operations: a later write without
an earlier one, or half of one, fits no number. Several disks that are frozen in one transaction
must agree on one number. (Not where the machine stands still for it: unlike a guest, a monitor
writes during the pause too.)
"""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from kit import CLUSTER, Box
from pullback.engine.disks import device_path
from pullback.programs import qemu
from pullback.units import MiB

_SECTOR = 512
_PROMPT = b"(qemu) "
_SECONDS = 20.0
KINDS = ("write", "write", "write", "zero", "discard")


@dataclass(frozen=True, slots=True)
class Operation:
    """One change of a disk."""

    disk: str
    kind: str
    value: int
    start: int
    length: int

    def command(self) -> str:
        """For `qemu-io`."""
        word = {"write": f"write -q -P {self.value}", "zero": "write -q -z -u", "discard": "discard -q"}[self.kind]
        return f"{word} {self.start} {self.length}"

    def apply(self, content: bytearray) -> None:
        """The same in a model: qcow2 discards whole clusters only."""
        start, end = self.start, self.start + self.length
        if self.kind == "discard":
            start = -(-start // CLUSTER) * CLUSTER
            end = end if end == len(content) else end // CLUSTER * CLUSTER
        if start < end:
            content[start:end] = bytes([self.value]) * (end - start)


def random_operation(rng: random.Random, disk: str, size: int, kinds: Sequence[str] = KINDS) -> Operation:
    """512 bytes to 1 MiB at any sector; short ones are as likely as long ones."""
    kind = rng.choice(kinds)
    length = min(size, _SECTOR * round(2 ** rng.uniform(0, (MiB // _SECTOR).bit_length() - 1)))
    start = rng.randrange(0, (size - length) // _SECTOR + 1) * _SECTOR
    return Operation(disk, kind, rng.randrange(1, 256) if kind == "write" else 0, start, length)


def device(box: Box, disk: str) -> str:
    """What `qemu-io -d` wants: the device that has the drive."""
    path = device_path(disk)
    return f"{path}/virtio-backend" if next(d for d in box.disks if d.id == disk).bus is qemu.Bus.VIRTIO else path


class Storm:
    """Random operations on all disks of a box while the block runs; the box's model follows at its end."""

    def __init__(self, box: Box, seed: int, kinds: Sequence[str] = KINDS) -> None:
        self._box = box
        self._rng = random.Random(seed)
        self._kinds = kinds
        self._before = {disk.id: bytes(box.model[disk.id]) for disk in box.disks}
        self._operations: list[Operation] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="storm")
        self._error: BaseException | None = None

    @property
    def count(self) -> int:
        """Operations begun until now (all but the last are done)."""
        return len(self._operations)

    def _run(self) -> None:
        try:
            with socket.socket(socket.AF_UNIX) as monitor:
                monitor.settimeout(_SECONDS)
                monitor.connect(str(self._box.hmp))
                _until_prompt(monitor)
                while not self._stop.is_set():
                    self._one(monitor)
        except BaseException as error:  # noqa: BLE001 - raised where the block ends
            self._error = error

    def _one(self, monitor: socket.socket) -> None:
        disk = self._box.disks[len(self._operations) % len(self._box.disks)].id
        operation = random_operation(self._rng, disk, len(self._before[disk]), self._kinds)
        self._operations.append(operation)
        line = f'qemu-io -d {device(self._box, disk)} "{operation.command()}"\n'
        monitor.sendall(line.encode())
        _until_prompt(monitor)

    def matches(self, content: Mapping[str, bytes], first: int, last: int) -> list[int]:
        """After which numbers of operations, `first` to `last`, all disks given were `content` at once."""
        model = {disk: bytearray(data) for disk, data in self._before.items()}
        found = []
        for number, operation in enumerate([*self._operations[:last], None]):
            if number >= first and all(model[disk] == content[disk] for disk in content):
                found.append(number)
            if operation is not None:
                operation.apply(model[operation.disk])
        return found

    def __enter__(self) -> Storm:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(_SECONDS + 5)
        assert not self._thread.is_alive(), "a write hangs"
        for operation in self._operations:
            operation.apply(self._box.model[operation.disk])
        if self._error is not None and error is None:
            raise self._error


def _until_prompt(monitor: socket.socket) -> None:
    heard = b""
    while not heard.endswith(_PROMPT):
        part = monitor.recv(65536)
        if not part:
            raise EOFError("QEMU is gone")
        heard = (heard + part)[-65536:]
