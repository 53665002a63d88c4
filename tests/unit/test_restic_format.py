"""restic's format: what goes into files and comes out of them, and what hostile files do."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import sys
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pullback import errors
from pullback.errors import RepositoryDamaged
from pullback.repo.restic import (
    blobs,
    compression,
    config,
    crypto,
    documents,
    index,
    keys,
    lockfile,
    packs,
    snapshots,
    times,
    trees,
    unpacked,
)
from pullback.repo.restic.types import OVERHEAD, Blob, Entry

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

KEY = crypto.Key.random()
CHEAP = keys.Cost(2, 8, 1)
MAKER = keys.Maker(hostname="h", username="u", created=datetime(2026, 11, 24, tzinfo=UTC))
KiB = 1024


def flipped(data: bytes | bytearray, bit: int) -> bytes:
    """`data` with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8 % len(data)] ^= 1 << bit % 8
    return bytes(changed)


# -- sealing ---------------------------------------------------------------------------------


@given(st.binary(max_size=300))
def test_what_is_sealed_comes_back(plain: bytes) -> None:
    sealed = crypto.seal(KEY, plain)
    assert len(sealed) == len(plain) + OVERHEAD
    for given_as in (bytes(sealed), sealed, memoryview(sealed)):
        assert crypto.unseal(KEY, given_as, "x") == plain
    assert crypto.seal(KEY, memoryview(plain)) != sealed, "the vector is new each time"


@given(st.binary(max_size=60), st.integers(0))
def test_every_flip_in_sealed_data_is_refused(plain: bytes, bit: int) -> None:
    with pytest.raises(RepositoryDamaged) as caught:
        crypto.unseal(KEY, flipped(crypto.seal(KEY, plain), bit), "data/x")
    assert caught.value.file == "data/x"


@given(st.binary(max_size=60), st.integers(1, 91))
def test_every_truncation_of_sealed_data_is_refused(plain: bytes, cut: int) -> None:
    sealed = crypto.seal(KEY, plain)
    with pytest.raises(RepositoryDamaged):
        crypto.unseal(KEY, sealed[: max(0, len(sealed) - cut)], "x")


def test_another_key_does_not_open() -> None:
    assert not crypto.authentic(crypto.Key.random(), crypto.seal(KEY, b"plain"))


def test_a_key_is_not_printed_and_has_its_lengths() -> None:
    assert repr(KEY) == "Key()"
    with pytest.raises(ValueError):
        crypto.Key(b"", b"", b"")


def test_the_tag_is_the_one_of_the_published_example() -> None:
    """D. J. Bernstein, "The Poly1305-AES message-authentication code", appendix B, second example.

    The message there is f3 f6 as the cipher's text, so the plain text is what encrypts to it.
    """
    r = bytes.fromhex("851fc40c3467ac0be05cc20404f3f700")
    k = bytes.fromhex("ec074c835580741701425b623235add6")
    vector = bytes.fromhex("fb447350c4e868c52ac3275cf9d4327e")
    tag = bytes.fromhex("f4c633c3044fc145f84f335cb81953de")
    assert crypto.authentic(crypto.Key(bytes(32), k, r), vector + bytes.fromhex("f3f6") + tag)


# -- compression -----------------------------------------------------------------------------


@given(st.binary(max_size=5000), st.integers(-3, 5))
def test_what_is_compressed_comes_back(plain: bytes, level: int) -> None:
    assert compression.decompress(compression.compress(plain, level), len(plain), "x") == plain


@given(st.binary(min_size=1, max_size=2000), st.integers(-3, 3).filter(bool))
def test_content_of_another_length_than_told_is_refused(plain: bytes, difference: int) -> None:
    with pytest.raises(RepositoryDamaged):
        compression.decompress(compression.compress(plain), max(0, len(plain) + difference) or len(plain) + 1, "x")


def test_a_frame_that_does_not_tell_its_length_is_bounded() -> None:
    """64 MiB of zeroes in a few KiB: never more than the limit is made of them."""
    part = zstd.ZstdCompressor(1)
    bomb = b"".join(part.compress(bytes(1 << 20)) for _ in range(64)) + part.flush()
    assert zstd.get_frame_info(bomb).decompressed_size is None
    with pytest.raises(RepositoryDamaged):
        compression.decompress_document(bomb, 100_000, "x")
    with pytest.raises(RepositoryDamaged):
        compression.decompress(bomb, 100_000, "x")
    assert compression.decompress(bomb, 64 << 20, "x") == bytes(64 << 20)


@pytest.mark.parametrize("extra", [b"x", compression.compress(b"second frame")])
def test_what_follows_a_frame_is_refused(extra: bytes) -> None:
    with pytest.raises(RepositoryDamaged):
        compression.decompress(compression.compress(b"first") + extra, 5, "x")


def test_a_cut_frame_is_refused_at_every_length() -> None:
    frame = compression.compress(b"some text to compress" * 5)
    for length in range(len(frame)):
        with pytest.raises(RepositoryDamaged):
            compression.decompress(frame[:length], 105, "x")


@given(st.binary(max_size=200))
def test_garbage_is_no_frame(data: bytes) -> None:
    with pytest.raises(RepositoryDamaged):
        compression.decompress_document(b"\x28\xb5\x2f" + data[:-1] + b"\0", 10, "x")


def test_incompressible_data_is_recognised_and_other_data_is_not() -> None:
    noise = os.urandom(256 * KiB)
    text = b"some text, some more text; " * 10_000
    assert not compression.worth_compressing(noise)
    assert not compression.worth_compressing(b"")
    for plain in (text, base64.b64encode(noise), bytes(256 * KiB), noise[: 128 * KiB] + text[: 128 * KiB], noise[:100]):
        assert compression.worth_compressing(memoryview(plain))


# -- blobs and packs -------------------------------------------------------------------------

plains = st.one_of(st.binary(max_size=100), st.integers(0, 70_000).map(lambda size: b"ab" * size))


@given(plains, st.sampled_from(Blob), st.sampled_from([None, 1, 3]))
def test_a_blob_comes_back(plain: bytes, kind: Blob, level: int | None) -> None:
    blob = blobs.encode(KEY, plain, kind, level=level)
    assert blob.id == hashlib.sha256(plain).digest()
    assert blob.raw_length in ((0,) if level is None else (0, len(plain)))
    assert len(blob.sealed) <= len(plain) + OVERHEAD
    entry = Entry(blob.id, kind, 0, len(blob.sealed), blob.raw_length)
    assert blobs.decode(KEY, blob.sealed, entry, "x") == plain


def test_a_blob_that_is_another_is_refused() -> None:
    one, other = blobs.encode(KEY, b"one"), blobs.encode(KEY, b"two")
    entry = Entry(one.id, Blob.DATA, 0, len(one.sealed), 0)
    for sealed in (other.sealed, one.sealed[:-1], one.sealed + b"\0", flipped(one.sealed, 200)):
        with pytest.raises(RepositoryDamaged):
            blobs.decode(KEY, sealed, entry, "x")


@given(st.lists(plains, min_size=1, max_size=8), st.sampled_from(Blob))
def test_a_pack_tells_what_is_in_it(contents: list[bytes], kind: Blob) -> None:
    builder = packs.PackBuilder(KEY, kind)
    for plain in contents:
        builder.add(blobs.encode(KEY, plain, kind))
    told, count = builder.size, builder.count
    pack = builder.finish()
    assert (len(pack.data), len(pack.entries)) == (told, count)
    assert pack.name == hashlib.sha256(pack.data).hexdigest()
    assert packs.parse_pack(KEY, pack.data, "x") == list(pack.entries)
    for entry, plain in zip(pack.entries, contents, strict=True):
        sealed = memoryview(pack.data)[entry.offset : entry.offset + entry.length]
        assert blobs.decode(KEY, sealed, entry, "x") == plain


def small_pack() -> packs.Pack:
    """A pack of two blobs, one of them compressed."""
    builder = packs.PackBuilder(KEY, Blob.DATA)
    builder.add(blobs.encode(KEY, b"short"))
    builder.add(blobs.encode(KEY, b"long" * 50))
    return builder.finish()


def decode_all(data: bytes) -> None:
    """Everything that is in the pack."""
    for entry in packs.parse_pack(KEY, data, "x"):
        blobs.decode(KEY, data[entry.offset : entry.offset + entry.length], entry, "x")


def test_every_flip_and_every_truncation_of_a_pack_is_found() -> None:
    data = bytes(small_pack().data)
    decode_all(data)
    for at in range(len(data)):
        with pytest.raises(RepositoryDamaged):
            decode_all(flipped(data, at * 8 + at % 8))
        with pytest.raises(RepositoryDamaged):
            decode_all(data[:at])
        with pytest.raises(RepositoryDamaged):
            decode_all(data[: at + 1] + data[at:])


def test_a_pack_has_blobs_of_one_kind_and_at_least_one() -> None:
    builder = packs.PackBuilder(KEY, Blob.TREE)
    with pytest.raises(ValueError):
        builder.finish()
    with pytest.raises(ValueError):
        builder.add(blobs.encode(KEY, b"data"))


def entry_bytes(kind: int, length: int, raw: bytes = b"") -> bytes:
    """An entry of a header."""
    return bytes([kind]) + length.to_bytes(4, "little") + raw + bytes(32)


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (entry_bytes(4, 40), 40),
        (entry_bytes(0, 31), 31),
        (entry_bytes(2, 40, bytes(4)), 40),
        (entry_bytes(0, 40)[:-1], 40),
        (entry_bytes(0, 40), 41),
        (entry_bytes(0, 40), 39),
        (entry_bytes(0, 40) + entry_bytes(1, 4_000_000_000), 80),
        (b"", 40),
    ],
)
def test_a_header_that_lies_is_refused(header: bytes, body: int) -> None:
    """It is sealed as it must be, so whoever wrote it had the key."""
    sealed = crypto.seal(KEY, header)
    data = bytes(body) + sealed + len(sealed).to_bytes(4, "little")
    with pytest.raises(RepositoryDamaged):
        packs.parse_pack(KEY, data, "x")


@given(st.binary(max_size=80), st.integers(0, 1 << 40))
def test_any_tail_gives_a_place_inside_the_file_or_an_error(tail: bytes, size: int) -> None:
    try:
        offset, length = packs.header_place(tail, size, "x")
    except RepositoryDamaged:
        return
    assert 0 <= offset < offset + length == size - packs.TRAILER
    assert length <= packs.MAX_HEADER


# -- keys and config -------------------------------------------------------------------------


@pytest.mark.parametrize("password", ["secret", "ünïcode", "a b\n", "x" * 1000])
def test_a_key_file_opens_with_its_password_only(password: str) -> None:
    name, data = keys.create(password, KEY, MAKER, cost=CHEAP)
    assert keys.unlock(data, password, name) == KEY
    assert keys.unlock(data, password + "x", name) is None
    assert keys.describe(data, name) == keys.KeyInfo(name, "h", "u", "2026-11-24T00:00:00Z")


def test_the_key_that_fits_is_found_among_several() -> None:
    files = [keys.create(password, KEY, MAKER, cost=CHEAP) for password in ("one", "two", "three")]
    assert keys.open_any(files, "three", "repo") == (files[2][0], KEY)
    with pytest.raises(errors.WrongPassword) as caught:
        keys.open_any(files, "four", "repo")
    assert (caught.value.path, caught.value.exit_code) == ("repo", 12)
    with pytest.raises(errors.NoRepository):
        keys.open_any([], "four", "repo")


def test_a_damaged_key_file_is_no_wrong_password_and_hides_no_sound_one() -> None:
    sound, damaged = (keys.create("secret", KEY, MAKER, cost=CHEAP) for _ in range(2))
    broken = (damaged[0], flipped(damaged[1], 900))
    assert keys.open_any([broken, sound], "secret", "repo") == (sound[0], KEY)
    with pytest.raises(RepositoryDamaged):
        keys.open_any([broken, sound], "other", "repo")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("N", 1 << 30),
        ("N", 3),
        ("N", 0),
        ("N", -2),
        ("r", 1 << 30),
        ("p", 1 << 31),
        ("p", 0),
        ("N", "2"),
        ("kdf", "none"),
        ("salt", "?"),
        ("data", 7),
        ("data", None),
    ],
)
def test_a_hostile_key_file_is_refused_before_it_costs_anything(field: str, value: object) -> None:
    document = json.loads(keys.create("secret", KEY, MAKER, cost=CHEAP)[1]) | {field: value}
    data = json.dumps(document).encode()
    with pytest.raises(RepositoryDamaged):
        keys.unlock(data, "secret", hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("inner", [b"[]", b"{}", b'{"mac": {"k": "AA==", "r": "AA=="}, "encrypt": "AA=="}', b"\xff"])
def test_a_key_file_that_opens_and_holds_no_key_is_damaged(inner: bytes) -> None:
    document = json.loads(keys.create("secret", KEY, MAKER, cost=CHEAP)[1])
    material = hashlib.scrypt(b"secret", salt=base64.b64decode(document["salt"]), n=2, r=8, p=1, dklen=64)
    document["data"] = base64.b64encode(crypto.seal(crypto.Key.of(material), inner)).decode()
    data = json.dumps(document).encode()
    with pytest.raises(RepositoryDamaged):
        keys.unlock(data, "secret", hashlib.sha256(data).hexdigest())


def test_a_new_config_comes_back_and_is_not_compressed() -> None:
    made = config.new()
    sealed = config.encode(KEY, made)
    assert config.parse(KEY, sealed, "repo") == made
    assert crypto.unseal(KEY, sealed, "x").startswith(b'{"version":2,"id":"')
    assert made.polynomial.bit_length() == 54
    assert config.new() != made


def test_a_later_version_is_told_as_such() -> None:
    made = config.Config(3, "ab" * 32, 7)
    with pytest.raises(errors.RepositoryTooNew) as caught:
        config.parse(KEY, config.encode(KEY, made), "repo")
    assert (caught.value.found, caught.value.known, caught.value.path) == (3, 2, "repo")


def test_irreducible_polynomials_are_told_from_the_others() -> None:
    """Against trial division, for all polynomials up to degree 8."""

    def remainder(value: int, divisor: int) -> int:
        while value.bit_length() >= divisor.bit_length():
            value ^= divisor << value.bit_length() - divisor.bit_length()
        return value

    assert not config.irreducible(0)
    assert not config.irreducible(1)
    for value in range(2, 512):
        divided = any(remainder(value, other) == 0 for other in range(2, 1 << value.bit_length() - 1))
        assert config.irreducible(value) == (not divided), bin(value)


# -- documents -------------------------------------------------------------------------------


@given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=50), max_size=5), st.booleans())
def test_a_file_of_a_document_comes_back(value: dict[str, Any], compress: bool) -> None:
    document = documents.dump(value)
    name, data = unpacked.seal_file(KEY, document, compress=compress)
    assert unpacked.open_file(KEY, data, name, "x") == document
    assert json.loads(document) == value


def test_a_file_under_another_name_or_with_another_encoding_is_refused() -> None:
    name, data = unpacked.seal_file(KEY, b"{}")
    with pytest.raises(RepositoryDamaged):
        unpacked.open_file(KEY, flipped(data, 7), name, "x")
    for plain in (b"", b"\x01{}", b"\x02", b"\x02{}", b"\x03" + compression.compress(b"{}")):
        odd = bytes(crypto.seal(KEY, plain))
        with pytest.raises(RepositoryDamaged):
            unpacked.open_file(KEY, odd, hashlib.sha256(odd).hexdigest(), "x")


def test_a_sound_file_in_the_place_of_another_is_refused() -> None:
    (name, _), (_, other) = unpacked.seal_file(KEY, b"{}"), unpacked.seal_file(KEY, b"{}")
    with pytest.raises(RepositoryDamaged):
        unpacked.open_file(KEY, other, name, "x")


def test_a_document_longer_than_its_limit_is_refused() -> None:
    document = b'{"a":"' + b"a" * 10_000 + b'"}'
    for compress in (True, False):
        name, data = unpacked.seal_file(KEY, document, compress=compress)
        assert unpacked.open_file(KEY, data, name, "x", limit=20_000) == document
        with pytest.raises(RepositoryDamaged):
            unpacked.open_file(KEY, data, name, "x", limit=9_000)


def test_texts_are_escaped_as_go_does() -> None:
    assert documents.dump({"a": "<&>\u2028é\n"}) == '{"a":"\\u003c\\u0026\\u003e\\u2028é\\n"}'.encode()


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.just("ab" * 32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_ENTRY = Entry(b"\x11" * 32, Blob.DATA, 0, 100, 200)
_SNAPSHOT = snapshots.Snapshot(time="2026-11-24T06:00:18.25Z", tree="ab" * 32, paths=("/p",), tags=("t",), uid=3)
_LOCK = lockfile.Lock(time="2026-11-24T06:00:18Z", exclusive=True, hostname="h", username="u", pid=9)
_TREE = [trees.file("a", b"\x22" * 64, 5), trees.directory("b", b"\x33" * 32)]
PARSERS = {
    "index": (index.parse, index.encode([(b"\x44" * 32, [_ENTRY])], ["ab" * 32])),
    "snapshot": (snapshots.parse, snapshots.encode(_SNAPSHOT)),
    "lock": (lockfile.parse, lockfile.encode(_LOCK)),
    "tree": (trees.parse, trees.encode(_TREE)),
}


def inside(value: Any, path: list[int], new: Any) -> Any:
    """`value` with something in it, found by `path`, replaced."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    if isinstance(value, dict):
        name = sorted(value)[path[0] % len(value)]
        return value | {name: inside(value[name], path[1:], new)}
    at = path[0] % len(value)
    return [*value[:at], inside(value[at], path[1:], new), *value[at + 1 :]]


@pytest.mark.parametrize("kind", PARSERS)
@given(path=st.lists(st.integers(0, 20), max_size=6), new=anything)
@settings(max_examples=150)
def test_any_json_gives_a_value_or_a_clean_error(kind: str, path: list[int], new: Any) -> None:
    parse, document = PARSERS[kind]
    with contextlib.suppress(RepositoryDamaged):
        parse(json.dumps(inside(json.loads(document), path, new)).encode(), "x")


@pytest.mark.parametrize("kind", PARSERS)
@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"null", b"{", b"[" * 100_000, b'{"packs":1e999}', b"9" * 5000])
def test_what_is_no_object_gives_a_clean_error(kind: str, data: bytes) -> None:
    with pytest.raises(RepositoryDamaged):
        PARSERS[kind][0](b'{"nodes":1, "packs":1}' if data.startswith(b'{"packs') else data, "x")


def test_documents_come_back() -> None:
    assert index.parse(PARSERS["index"][1], "x") == index.IndexFile([(b"\x44" * 32, [_ENTRY])], ["ab" * 32])
    assert snapshots.parse(PARSERS["snapshot"][1], "x") == _SNAPSHOT
    assert lockfile.parse(PARSERS["lock"][1], "x") == _LOCK
    assert trees.parse(PARSERS["tree"][1], "x") == _TREE


def test_fields_of_a_later_restic_are_kept() -> None:
    document = json.loads(snapshots.encode(_SNAPSHOT)) | {"summary": {"files_new": 1}}
    parsed = snapshots.parse(json.dumps(document).encode(), "x")
    assert json.loads(snapshots.encode(parsed)) == document


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0", "x" * 5000, "\\x00", "\\u002f"])
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(RepositoryDamaged):
        trees.parse(json.dumps({"nodes": [{"name": name, "type": "file", "content": []}]}).encode(), "x")


def test_two_entries_of_one_name_are_refused() -> None:
    node = {"name": "a", "type": "file", "content": []}
    with pytest.raises(RepositoryDamaged):
        trees.parse(json.dumps({"nodes": [node, node]}).encode(), "x")
    with pytest.raises(ValueError):
        trees.encode([trees.file("a", b"", 0), trees.directory("a", bytes(32))])


@given(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1).filter(
        lambda n: n.strip(".")
    )
)
def test_names_come_back(name: str) -> None:
    [node] = trees.parse(trees.encode([trees.file(name, b"", 0)]), "x")
    assert node.name == name


# -- disks -----------------------------------------------------------------------------------


@given(st.integers(1, 4000), st.sampled_from([(16, 16), (16, 64), (64, 1024)]), st.data())
def test_a_disk_comes_back_from_its_trees(size: int, cut: tuple[int, int], data: st.DataObject) -> None:
    shape = trees.Shape(size, *cut)
    choice = data.draw(st.lists(st.integers(0, 1), min_size=shape.chunks, max_size=shape.chunks))
    ids = b"".join(bytes([number]) * 32 for number in choice)
    made = list(trees.disk_trees(ids, shape))
    stored = dict(made)
    assert len(stored) == len(made), "equal segments are given once"
    assert all(trees.tree_id(tree) == id for id, tree in made)
    assert trees.read_disk(made[-1][0], stored.__getitem__, shape, "x") == ids


def test_a_disk_of_another_shape_is_refused() -> None:
    shape = trees.Shape(1000, 16, 64)
    ids = bytes(range(63)) * 32
    made = list(trees.disk_trees(ids, shape))
    for other in (
        trees.Shape(999, 16, 64),
        trees.Shape(1000, 8, 64),
        trees.Shape(1000, 16, 128),
        trees.Shape(64, 16, 64),
    ):
        with pytest.raises(RepositoryDamaged):
            trees.read_disk(made[-1][0], dict(made).__getitem__, other, "x")
    with pytest.raises(ValueError):
        list(trees.disk_trees(ids[32:], shape))


def test_a_whole_segment_in_the_place_of_a_short_one_is_refused() -> None:
    shape = trees.Shape(40, 16, 32)
    whole = trees.segment_tree(bytes(64), 32)
    disk = trees.encode([trees.directory(f"00000{number}", trees.tree_id(whole)) for number in range(2)])
    stored = {trees.tree_id(tree): tree for tree in (whole, disk)}
    with pytest.raises(RepositoryDamaged):
        trees.read_disk(trees.tree_id(disk), stored.__getitem__, shape, "x")


# -- times and locks -------------------------------------------------------------------------


@given(st.datetimes(datetime(1000, 1, 2), datetime(9999, 12, 30)), st.integers(-14 * 60, 14 * 60))
def test_times_come_back(moment: datetime, minutes: int) -> None:
    zoned = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    assert times.read(times.write(zoned)) == zoned


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2015-01-02T18:10:50.895208559+01:00", datetime(2015, 1, 2, 17, 10, 50, 895208, UTC)),
        ("2015-01-02T18:10:50Z", datetime(2015, 1, 2, 18, 10, 50, 0, UTC)),
        ("2015-01-02T18:10:50.5-02:30", datetime(2015, 1, 2, 20, 40, 50, 500000, UTC)),
    ],
)
def test_times_of_restic_are_read(text: str, moment: datetime) -> None:
    assert times.read(text) == moment


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2015",
        "2015-01-02T18:10:50",
        "2015-13-02T18:10:50Z",
        "0001-01-01T00:00:00+14:00",
        "2015-01-02T18:10:50+99:00",
    ],
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        times.read(text)


NOW = datetime(2026, 11, 24, 7, tzinfo=UTC)


def test_an_exclusive_lock_conflicts_with_any_other() -> None:
    shared = lockfile.Lock(time=times.write(NOW), exclusive=False, hostname="h", username="u", pid=9)
    assert not shared.conflicts(exclusive=False)
    assert shared.conflicts(exclusive=True)
    assert _LOCK.conflicts(exclusive=False)
