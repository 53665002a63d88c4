"""One contract suite for everything that holds a disk's bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pullback.model.exports import NbdUri
from pullback.programs import process, qemu_nbd
from pullback.testing.endpoints import EndpointContract, MemoryEndpoint, nbdkit
from pullback.transfer import FileEndpoint, NbdEndpoint


class InDirectory(EndpointContract):
    """Gives each test a directory of its own."""

    @pytest.fixture(autouse=True)
    def _in_directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path
        self.image = tmp_path / "a, b:c.raw"

    def qcow2(self, content: bytes) -> Path:
        """The content as a qcow2 image."""
        self.image.write_bytes(content)
        image = self.directory / "a, b:c.qcow2"
        process.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", f"file:{self.image}", image], timeout=20)
        return image


class TestMemory(EndpointContract):
    @contextmanager
    def make(self, content: bytes) -> Iterator[MemoryEndpoint]:
        with MemoryEndpoint(content) as endpoint:
            yield endpoint


class TestMemoryOfAnOddSize(TestMemory):
    size = 2 * 1024**2 + 13


class TestFile(InDirectory):
    @contextmanager
    def make(self, content: bytes) -> Iterator[FileEndpoint]:
        self.image.write_bytes(content)
        with FileEndpoint(self.image, writable=True) as endpoint:
            yield endpoint


class TestFileOfAnOddSize(TestFile):
    size = 2 * 1024**2 + 13


class TestFileForReading(TestFile):
    writable = False

    @contextmanager
    def make(self, content: bytes) -> Iterator[FileEndpoint]:
        self.image.write_bytes(content)
        os.chmod(self.image, 0o400)
        with FileEndpoint(self.image) as endpoint:
            yield endpoint


class TestBlockDevice(InDirectory):
    @contextmanager
    def make(self, content: bytes) -> Iterator[FileEndpoint]:
        self.image.write_bytes(content)
        device = process.run(["losetup", "-f", "--show", self.image], timeout=20).decode().strip()
        try:
            with FileEndpoint(Path(device), writable=True) as endpoint:
                yield endpoint
        finally:
            process.run(["losetup", "-d", device], timeout=20)


class TestRawThroughQemuNbd(InDirectory):
    @contextmanager
    def make(self, content: bytes) -> Iterator[NbdEndpoint]:
        self.image.write_bytes(content)
        socket = self.directory / "s" / "nbd"
        with (
            qemu_nbd.serve(self.image, "raw", socket=socket, writable=True) as address,
            NbdEndpoint(address, writable=True) as endpoint,
        ):
            yield endpoint


class TestQcow2ThroughQemuNbd(InDirectory):
    shared = qemu_nbd.SHARED

    @contextmanager
    def make(self, content: bytes) -> Iterator[NbdEndpoint]:
        image, socket = self.qcow2(content), self.directory / "s" / "nbd"
        with (
            qemu_nbd.serve(image, "qcow2", socket=socket, writable=True, shared=self.shared) as address,
            NbdEndpoint(address, writable=True) as endpoint,
        ):
            yield endpoint


class TestOneConnectionToQemuNbd(TestQcow2ThroughQemuNbd):
    """Without multi-conn the only connection is shared by the channel and the questions."""

    shared = 1


class TestNbdkit(InDirectory):
    filters: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @contextmanager
    def make(self, content: bytes) -> Iterator[NbdEndpoint]:
        self.image.write_bytes(content)
        words = [*self.filters, "file", f"file={self.image}", *self.options]
        with (
            nbdkit(self.directory / "nbd", *words) as (address, _),
            NbdEndpoint(address, writable=True) as endpoint,
        ):
            yield endpoint


class TestNbdkitByUri(InDirectory):
    @contextmanager
    def make(self, content: bytes) -> Iterator[NbdEndpoint]:
        self.image.write_bytes(content)
        with (
            nbdkit(self.directory / "nbd", "file", f"file={self.image}") as (address, _),
            NbdEndpoint(NbdUri(uri=address.uri), writable=True) as endpoint,
        ):
            yield endpoint


class TestNbdkitOfAnOddSize(TestNbdkit):
    size = 2 * 1024**2 + 13


class TestNbdkitWithoutExtentsAndZeroRequests(TestNbdkit):
    filters = ("--filter=noextents", "--filter=nozero")


class TestNbdkitWithOneConnection(TestNbdkit):
    filters = ("--filter=multi-conn",)
    options = ("multi-conn-mode=disable",)


class TestNbdkitWithSmallPayloads(TestNbdkit):
    """Requests above the server's limit must be cut by us: it answers them with an error."""

    filters = ("--filter=blocksize-policy",)
    options = (
        "blocksize-minimum=1",
        "blocksize-preferred=4096",
        "blocksize-maximum=65536",
        "blocksize-error-policy=error",
    )
