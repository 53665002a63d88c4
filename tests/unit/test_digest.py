"""The digest of a disk, and the headers of images: byte layouts without QEMU."""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback import errors
from pullback.extents import Extent, between
from pullback.repo import files
from pullback.repo.digest import ENTRY, HashList, block_size_for, zero_hash
from pullback.repo.directory import qcow2
from pullback.units import MiB, TiB

BLOCK = 4096


def by_hand(content: bytes) -> str:
    blocks = [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]
    return hashlib.sha256(b"".join(hashlib.sha256(block).digest() for block in blocks)).hexdigest()


def hashed(content: bytes) -> HashList:
    hashes = HashList(len(content), BLOCK)
    for index in range(hashes.count):
        at = hashes.block(index)
        hashes.hash(index, content[at.start : at.end])
    return hashes


@given(st.binary(min_size=1, max_size=5 * BLOCK))
def test_the_digest_is_the_hash_of_the_blocks_hashes(content: bytes) -> None:
    assert hashed(content).digest() == by_hand(content)


@given(st.integers(1, 9 * BLOCK))
def test_a_disk_of_zeroes_needs_no_reading(size: int) -> None:
    hashes = HashList(size, BLOCK)
    hashes.set_zero(Extent(0, size))
    assert hashes.digest() == by_hand(bytes(size))


sizes = st.integers(1, 8 * BLOCK)


@given(st.data(), sizes)
def test_zeroes_count_only_for_blocks_that_lie_wholly_inside(data: st.DataObject, size: int) -> None:
    start = data.draw(st.integers(0, size - 1))
    extent = between(start, data.draw(st.integers(start + 1, size)))
    hashes = HashList(size, BLOCK)
    hashes.set_zero(extent)
    for index in range(hashes.count):
        block = hashes.block(index)
        inside = extent.start <= block.start and block.end <= extent.end
        assert hashes.entry(index) == (zero_hash(block.length) if inside else None)


@given(st.data(), sizes)
def test_forgotten_and_missing_ranges_are_whole_blocks(data: st.DataObject, size: int) -> None:
    start = data.draw(st.integers(0, size - 1))
    extent = between(start, data.draw(st.integers(start + 1, size)))
    hashes = hashed(bytes(size))
    assert list(hashes.missing()) == []
    hashes.forget(extent)
    (missing,) = hashes.missing()
    assert missing.start == extent.start // BLOCK * BLOCK
    assert missing.end == min(-(-extent.end // BLOCK) * BLOCK, size)


def test_a_list_with_a_forgotten_block_has_no_digest_and_no_bytes() -> None:
    hashes = hashed(bytes(3 * BLOCK))
    hashes.forget(Extent(BLOCK, 1))
    with pytest.raises(ValueError, match="not been hashed"):
        hashes.digest()
    with pytest.raises(ValueError, match="not been hashed"):
        hashes.encode()


def test_an_increment_hashes_only_what_it_touches() -> None:
    old, new = bytearray(os.urandom(6 * BLOCK + 100)), bytearray()
    new[:] = old
    new[BLOCK + 5 : BLOCK + 9] = b"new!"
    hashes = HashList.from_parent(hashed(bytes(old)), size=len(old), block_size=BLOCK)
    hashes.hash(1, new[BLOCK : 2 * BLOCK])
    assert hashes.digest() == by_hand(bytes(new))
    assert list(hashes.differing(hashed(bytes(old)))) == [1]


def test_the_parent_s_list_is_not_changed_by_the_copy() -> None:
    parent = hashed(bytes(2 * BLOCK))
    HashList.from_parent(parent, size=2 * BLOCK, block_size=BLOCK).set(0, b"x" * ENTRY)
    assert parent.digest() == by_hand(bytes(2 * BLOCK))


def test_a_list_of_another_shape_is_not_copied_or_compared() -> None:
    parent = hashed(bytes(2 * BLOCK))
    for size, block in ((2 * BLOCK, 2 * BLOCK), (2 * BLOCK - 1, BLOCK)):
        with pytest.raises(ValueError, match="another size"):
            HashList.from_parent(parent, size=size, block_size=block)
    with pytest.raises(ValueError, match="two sizes"):
        list(parent.differing(hashed(bytes(3 * BLOCK))))


def test_a_list_s_bytes_are_the_hashes_one_after_the_other() -> None:
    hashes = hashed(os.urandom(2 * BLOCK + 1))
    assert hashlib.sha256(hashes.encode()).hexdigest() == hashes.digest()
    assert HashList.decode(hashes.encode(), size=2 * BLOCK + 1, block_size=BLOCK).digest() == hashes.digest()


@pytest.mark.parametrize("change", [-1, 1, -ENTRY, ENTRY, 10 * MiB])
def test_a_list_of_the_wrong_length_is_refused(change: int) -> None:
    data = hashed(bytes(3 * BLOCK)).encode()
    with pytest.raises(ValueError, match="bytes instead of 96"):
        HashList.decode((data + bytes(max(change, 0)))[: 3 * ENTRY + change], size=3 * BLOCK, block_size=BLOCK)


@pytest.mark.timeout(10)
def test_a_repository_s_file_is_read_only_if_it_is_a_regular_one(tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"x")
    (tmp_path / "link").symlink_to("list")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", "absent"):
        with pytest.raises(OSError, match=name):
            files.read(tmp_path / name, limit=10)


def test_a_block_is_hashed_whole_or_not_at_all() -> None:
    hashes = HashList(2 * BLOCK, BLOCK)
    with pytest.raises(ValueError, match="whole block"):
        hashes.hash(0, bytes(BLOCK - 1))
    with pytest.raises(ValueError, match="no such entry"):
        hashes.set(2, bytes(ENTRY))


def test_threads_may_fill_a_list_together() -> None:
    content = os.urandom(64 * BLOCK)
    hashes = HashList(len(content), BLOCK)

    def fill(first: int) -> None:
        for index in range(first, hashes.count, 4):
            hashes.hash(index, memoryview(content)[index * BLOCK : (index + 1) * BLOCK])

    threads = [threading.Thread(target=fill, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert hashes.digest() == by_hand(content)


@pytest.mark.parametrize(
    ("size", "block"),
    [(512, MiB), (TiB, MiB), (TiB + 512, 2 * MiB), (8 * TiB, 8 * MiB), (256 * TiB, 256 * MiB)],
)
def test_blocks_grow_with_the_disk_so_that_the_list_does_not(size: int, block: int) -> None:
    assert block_size_for(size) == block
    assert -(-size // block) <= 1 << 20


def test_a_disk_beyond_all_bounds_is_told_so() -> None:
    with pytest.raises(errors.Unsupported):
        block_size_for(257 * TiB)


@pytest.mark.parametrize("length", [1, 512, MiB - 1, MiB, 2 * MiB + 7])
def test_zeroes_of_any_length_have_their_hash(length: int) -> None:
    assert zero_hash(length) == hashlib.sha256(bytes(length)).digest()


# -- headers of qcow2 images -----------------------------------------------------------------


def header(
    *,
    features: int = 0,
    crypt: int = 0,
    backing: bytes = b"",
    extensions: bytes = b"",
    version: int = 3,
    bits: int = 16,
) -> bytes:
    length = 104 if version == 3 else 72
    body = extensions + struct.pack(">II", 0, 0)
    offset = length + len(body) if backing else 0
    head = struct.pack(">4sIQIIQI", b"QFI\xfb", version, offset, len(backing), bits, 1 << 30, crypt).ljust(72, b"\0")
    if version == 3:
        head += struct.pack(">QQQII", features, 0, 0, 4, 104)
    return head + body + backing + bytes(512)


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


@pytest.mark.parametrize("version", [2, 3])
def test_a_header_tells_size_and_backing_file(version: int) -> None:
    found = qcow2.parse(header(backing=b"../a/b", extensions=extension(0xE2792ACA, b"qcow2"), version=version))
    assert (found.size, found.backing, found.backing_format) == (1 << 30, "../a/b", "qcow2")
    assert qcow2.parse(header(version=version)).backing is None


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        (b"", "cut off"),
        (b"QFI\xfb" + bytes(200), "not a qcow2"),
        (bytes(4096), "not a qcow2"),
        (header(features=1), "not closed"),
        (header(features=2), "corrupt"),
        (header(features=4), "another file"),
        (header(features=1 << 40), "unknown feature"),
        (header(extensions=extension(0x44415441, b"/etc/passwd")), "external data file"),
        (header(crypt=2), "encrypted"),
        (header(bits=63), "cluster size"),
        (header(backing=b"x" * 1024), "outside"),
        (header(extensions=struct.pack(">II", 7, 1 << 31)), "cut off"),
        (header()[:90], "cut off"),
    ],
)
def test_an_image_that_could_lead_astray_is_refused(head: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        qcow2.parse(head)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_no_header_and_no_crash(noise: bytes) -> None:
    plain = bytearray(header(backing=b"base", extensions=extension(0xE2792ACA, b"qcow2")))
    plain[8 : 8 + len(noise)] = noise
    for head in (noise, bytes(plain)):
        try:
            qcow2.parse(head)
        except ValueError:
            continue
