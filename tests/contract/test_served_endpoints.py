"""What we serve is an endpoint like any other: the same contract suite, over our own NBD server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import memorysource
from pullback.flows.passing import OverlaidDisk
from pullback.model.exports import NbdAddress
from pullback.programs import qemu_nbd
from pullback.testing.endpoints import EndpointContract
from pullback.transfer import NbdEndpoint
from pullback.units import KiB


class InShort(EndpointContract):
    """Gives each test a directory with a short name."""

    @pytest.fixture(autouse=True)
    def _in_directory(self, short_dir: Path) -> None:
        self.directory = short_dir


class TestServed(InShort):
    writable = False

    @contextmanager
    def make(self, content: bytes) -> Iterator[NbdEndpoint]:
        with memorysource.disk(memorysource.Memory(content, 64 * KiB)) as disk:
            memorysource.serve({"vda": disk}, self.directory / "s")
            with NbdEndpoint(NbdAddress(socket=self.directory / "s", export="vda")) as endpoint:
                yield endpoint


class TestServedWithASmallCache(TestServed):
    @contextmanager
    def make(self, content: bytes) -> Iterator[NbdEndpoint]:
        with memorysource.disk(memorysource.Memory(content, 64 * KiB), limit=128 * KiB) as disk:
            memorysource.serve({"vda": disk}, self.directory / "s")
            with NbdEndpoint(NbdAddress(socket=self.directory / "s", export="vda")) as endpoint:
                yield endpoint


class TestServedForWriting(InShort):
    @contextmanager
    def make(self, content: bytes) -> Iterator[NbdEndpoint]:
        image = self.directory / "image"
        image.write_bytes(content)
        with qemu_nbd.serve(image, "raw", socket=self.directory / "below" / "s", writable=True) as below:
            memorysource.serve({"vda": OverlaidDisk(below, len(content))}, self.directory / "s")
            with NbdEndpoint(NbdAddress(socket=self.directory / "s", export="vda"), writable=True) as endpoint:
                yield endpoint
