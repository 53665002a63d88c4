"""Manifests: what is written reads back, and nothing else is ever read."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pullback import errors
from pullback.model import points
from pullback.model.backups import Level
from pullback.model.checkpoints import Mark
from pullback.model.description import Description, Firmware, Kind
from pullback.model.points import ImageFiles, Mode, Point, PointDisk, PointRef
from pullback.model.texts import MAX_TEXT, is_showable
from pullback.model.tpm import Backend, TpmFile, TpmState, Version
from pullback.repo import selection
from pullback.repo.directory import layout

CREATED = datetime(2026, 11, 24, 6, 0, 18, 250_000, tzinfo=UTC)
PARENT = PointRef(point="20261123T060018Z-00112233", target="vda")


def disk(target: str = "vda", **changes: object) -> PointDisk:
    plain = PointDisk(
        target=target,
        qdev="/machine/peripheral/d0",
        serial=None,
        source="/var/lib/images/web01 – α.qcow2",
        source_format="qcow2",
        size=64 << 20,
        mode=Mode.FULL,
        reason="the first backup",
        parent=None,
        mark=Mark(name="auto.0011223344556677.20261124T060018Z", nonce="00ff00ff00ff00ff", first=3, last=4),
        block_size=1 << 20,
        digest="ab" * 32,
        stored=4096,
        read=1 << 20,
        files=ImageFiles(image=f"{target}.qcow2", hashes=f"{target}.sha256", structure="cd" * 32),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def point(*disks: PointDisk, **changes: object) -> Point:
    plain = Point(
        id=points.new_id(CREATED, "1f2e3d4c"),
        machine="web01",
        created=CREATED,
        level=Level.AUTO,
        pullback="0.1.0",
        qemu="7.2.22",
        engine="filter",
        pause=0.004913,
        checkpoint="auto.0011223344556677.20261124T060018Z",
        disks=disks or (disk(),),
        notes=("vdb was left out",),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


DESCRIPTION = Description(
    kind=Kind.QEMU,
    program="/usr/bin/qemu-system-x86_64",
    argv=("qemu", "-name", "web01"),
    version="7.2.22",
    xml=("<a>", "</a>"),
)
TPM = TpmState(
    version=Version.TPM_2_0,
    backend=Backend.DIR,
    encrypted=False,
    files=(TpmFile(name="tpm2-00.permall", data=b"state"), TpmFile(name="tpm2-00.volatilestate", data=b"more")),
).header
FIRMWARE = [Firmware(name=name, writable=True, data=name.encode()).header for name in ("pflash0", "pflash1")]


def decode(data: bytes) -> Point:
    return points.decode(data, name="p")


def changed(change: Callable[[dict[str, object]], object], whole: Point | None = None, *, sign: bool = True) -> bytes:
    """A manifest after `change`, with a right checksum if `sign`."""
    body = json.loads(points.encode(whole or point()))
    change(body)
    if sign:
        body["sha256"] = points._checksum(body)
    return json.dumps(body).encode()


texts = st.text(st.characters(codec="utf-8"), max_size=40).filter(is_showable)
targets = st.from_regex(r"[a-z][a-z0-9._-]{0,20}", fullmatch=True)


@st.composite
def disks(draw: st.DrawFn, target: str) -> PointDisk:
    increment = draw(st.booleans())
    return disk(
        target,
        qdev=draw(st.none() | texts),
        serial=draw(st.none() | texts),
        source=draw(st.none() | texts),
        size=draw(st.integers(1, 1 << 31)) * 512,
        mode=Mode.INCREMENTAL if increment else Mode.FULL,
        parent=PARENT if increment else None,
        reason=None if increment else draw(st.none() | texts),
        mark=draw(st.none() | st.just(disk().mark)),
        stored=draw(st.integers(0, 1 << 62)),
    )


@st.composite
def whole_points(draw: st.DrawFn) -> Point:
    created = draw(st.datetimes(datetime(2000, 1, 1), datetime(9999, 1, 1))).replace(tzinfo=UTC)
    names = draw(st.lists(targets, min_size=1, max_size=4, unique=True))
    return point(
        *[draw(disks(name)) for name in names],
        id=points.new_id(created),
        machine=draw(texts.filter(bool)),
        created=created,
        pause=draw(st.integers(0, 10**9)) / 1_000_000,
        checkpoint=draw(st.none() | texts),
        notes=tuple(draw(st.lists(texts, max_size=3))),
        host=draw(st.none() | texts),
        seconds=draw(st.none() | st.integers(0, 10**8).map(lambda number: number / 1000)),
        tags=tuple(draw(st.lists(texts, max_size=3))),
        description=draw(st.none() | st.just(DESCRIPTION)),
        firmware=tuple(draw(st.lists(st.sampled_from(FIRMWARE), max_size=2, unique=True))),
        tpm=draw(st.none() | st.just(TPM)),
    )


@given(whole_points())
def test_a_point_reads_back_as_it_was_written(written: Point) -> None:
    assert decode(points.encode(written)) == written


@given(whole_points())
def test_a_point_in_restic_s_format_reads_back_without_its_tags_which_the_snapshot_has(written: Point) -> None:
    bare = replace(written, id="ab" * 32, disks=tuple(replace(one, files=None) for one in written.disks))
    data = points.encode(bare)
    assert points.decode(data, name="p", identity="cd" * 32) == replace(bare, id="cd" * 32, tags=())
    with pytest.raises(errors.VerificationFailed, match="'id'"):
        decode(data)


def test_a_manifest_of_the_first_minor_version_is_read() -> None:
    def older(body: dict[str, object]) -> None:
        body["minor"] = 0
        for key in ("host", "milliseconds", "tags", "description", "firmware", "tpm"):
            del body[key]

    assert decode(changed(older)) == point()


def test_a_manifest_of_the_second_minor_version_is_read() -> None:
    described = replace(point(), description=Description(kind=Kind.QEMU, argv=("qemu",), version="7.2"))

    def older(body: dict[str, object]) -> None:
        body["minor"] = 1
        del body["tpm"]
        del body["description"]["xml"]  # type: ignore[attr-defined]

    assert decode(changed(older, described)) == described


def test_a_manifest_is_text_with_a_checksum_that_others_can_compute() -> None:
    body = json.loads(points.encode(point()))
    assert body["format"] == 1
    assert body["pause_us"] == 4913
    assert body["disks"][0]["mark"]["first"] == 3
    assert body["sha256"] == points._checksum(body)


def test_every_flipped_bit_is_seen_or_changes_no_meaning() -> None:
    manifest = points.encode(point())
    for number in range(len(manifest) * 8):
        flipped = bytearray(manifest)
        flipped[number // 8] ^= 1 << number % 8
        try:
            assert decode(bytes(flipped)) == point()  # only a changed letter in a \uxxxx would come here
        except (errors.VerificationFailed, errors.RepositoryTooNew):
            continue


def test_every_truncation_is_seen() -> None:
    manifest = points.encode(point())
    for length in range(len(manifest) - 1):
        with pytest.raises(errors.VerificationFailed):
            decode(manifest[:length])


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_by_our_own_error(data: bytes) -> None:
    with pytest.raises(errors.VerificationFailed):
        decode(data)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["../x", "", "ß"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False), junk)
def test_a_mutated_manifest_gives_a_point_or_our_own_error(dice: random.Random, value: object) -> None:
    body = json.loads(points.encode(point(disk(mode=Mode.INCREMENTAL, parent=PARENT, reason=None), disk("vdb"))))
    place = _somewhere(body, dice)
    place[dice.choice(list(place))] = value
    try:
        body["sha256"] = points._checksum(body)
    except ValueError:
        body["sha256"] = "00" * 32
    try:
        found = decode(json.dumps(body).encode())
    except (errors.VerificationFailed, errors.RepositoryTooNew):
        return
    assert decode(points.encode(found)) == found


def _somewhere(body: dict[str, object], dice: random.Random) -> dict[str, object]:
    """The body itself, or one of the objects in it."""
    found = [body]
    for at in found:
        for value in at.values():
            found.extend(inner for inner in (value if isinstance(value, list) else [value]) if isinstance(inner, dict))
    return dice.choice(found)


def _set(key: str, value: object) -> Callable[[dict[str, object]], object]:
    return lambda body: body.__setitem__(key, value)


def _set_disk(key: str, value: object) -> Callable[[dict[str, object]], object]:
    return lambda body: body["disks"][0].__setitem__(key, value)  # type: ignore[index]


@pytest.mark.parametrize(
    "change",
    [
        _set("machine", ""),
        _set("machine", "a\x1b[2Jb"),
        _set("created", "2026-11-24T06:00:19.000000Z"),
        _set("created", "2026-13-24T06:00:19.000000Z"),
        _set("id", "../../etc"),
        _set("id", "99999999T999999Z-00000000"),
        _set("level", "some"),
        _set("pause_us", 0.5),
        _set("pause_us", True),
        _set("disks", []),
        _set("disks", [json.loads(points.encode(point()))["disks"][0]] * 2),
        _set("disks", [json.loads(points.encode(point()))["disks"][0]] * 257),
        _set("notes", ["\ud800"]),
        _set("notes", "text"),
        _set("surplus", 1),
        _set("minor", -1),
        _set_disk("image", "../../../etc/passwd"),
        _set_disk("image", ".hidden"),
        _set_disk("image", "manifest.json"),
        _set_disk("image", "vda.sha256"),
        _set_disk("image", "a" * 200),
        _set_disk("hashes", "/etc/passwd"),
        _set_disk("target", "a/b"),
        _set_disk("size", 0),
        _set_disk("size", 511),
        _set_disk("size", 1 << 63),
        _set_disk("size", "64"),
        _set_disk("block_size", 3 << 20),
        _set_disk("block_size", 512),
        _set_disk("digest", "AB" * 32),
        _set_disk("digest", "ab" * 31),
        _set_disk("mode", "incremental"),
        _set_disk("parent", {"point": PARENT.point, "target": "vda"}),
        _set_disk("parent", {"point": "..", "target": "vda"}),
        _set_disk("mark", {"name": "a", "nonce": "0011", "first": 1, "last": 1}),
        _set_disk("mark", {"name": "a", "nonce": "00ff00ff00ff00ff", "first": 2, "last": 1}),
        _set_disk("mark", {"name": "a/b", "nonce": "00ff00ff00ff00ff", "first": 1, "last": 1}),
        _set_disk("surplus", None),
        lambda body: body.pop("qemu"),
        lambda body: body["disks"][0].pop("read"),
        lambda body: body["disks"][0].update(size=1 << 50, block_size=4096),
    ],
)
def test_a_rule_that_is_broken_is_refused_even_with_a_right_checksum(
    change: Callable[[dict[str, object]], object],
) -> None:
    try:
        data = changed(change)
    except UnicodeEncodeError:
        data = changed(change, sign=False)
    with pytest.raises(errors.VerificationFailed):
        decode(data)


@pytest.mark.parametrize("change", [_set("level", "full"), _set_disk("parent", None)])
def test_an_increment_must_fit_its_surroundings(change: Callable[[dict[str, object]], object]) -> None:
    body = json.loads(points.encode(point(disk(mode=Mode.INCREMENTAL, parent=PARENT, reason=None))))
    change(body)
    body["sha256"] = points._checksum(body)
    with pytest.raises(errors.VerificationFailed):
        decode(json.dumps(body).encode())


def test_a_point_cannot_be_its_own_parent() -> None:
    own = PointRef(point=point().id, target="vdb")
    with pytest.raises(errors.VerificationFailed, match="own parent"):
        points.encode(point(disk(mode=Mode.INCREMENTAL, parent=own, reason=None)))


def test_a_later_format_is_refused_by_name() -> None:
    with pytest.raises(errors.RepositoryTooNew):
        decode(changed(_set("format", 2)))


def test_unknown_keys_of_a_later_minor_version_are_passed_over() -> None:
    def later(body: dict[str, object]) -> None:
        body.update(minor=points.MINOR + 1, surplus={"x": 1})
        body["disks"][0].update(surplus=[1])  # type: ignore[index]

    assert decode(changed(later)) == point()


def test_a_key_that_stands_twice_is_refused() -> None:
    data = points.encode(point())
    with pytest.raises(errors.VerificationFailed, match="twice"):
        decode(data.replace(b'"qemu":', b'"qemu": "x", "qemu":'))


def test_deep_nesting_and_endless_numbers_are_refused() -> None:
    for data in (b"[" * 200_000, b'{"format": ' + b"9" * 10_000 + b"}", b'{"format": NaN}', b'{"format": 1e400}'):
        with pytest.raises(errors.VerificationFailed):
            decode(data)


def test_texts_for_people_are_written_so_that_a_terminal_is_safe() -> None:
    found = decode(points.encode(point(disk(serial="\x1b[31m\ud800"), notes=("x" * 9000,))))
    assert found.disks[0].serial == r"\u001b[31m\ud800"
    assert len(found.notes[0]) == MAX_TEXT


def test_a_point_that_could_not_be_read_back_is_not_written() -> None:
    for wrong in (point(machine="a\nb"), point(disk(size=100)), point(disk(), disk()), point(machine="\ud800")):
        with pytest.raises(errors.VerificationFailed):
            points.encode(wrong)


def test_ids_sort_by_time_and_name_their_second() -> None:
    assert points.new_id(CREATED, "1f2e3d4c") == "20261124T060018Z-1f2e3d4c"
    assert points.id_moment("20261124T060018Z-1f2e3d4c") == CREATED.replace(microsecond=0)
    assert points.id_moment("20261324T060018Z-1f2e3d4c") is None
    assert points.new_id(CREATED) < points.new_id(CREATED + timedelta(seconds=1))


def test_a_disk_is_found_by_its_target_or_the_known_ones_are_told() -> None:
    found = point(disk("vda"), disk("vdb"))
    assert found.disk("vdb").target == "vdb"
    with pytest.raises(errors.UnknownDisk, match="vdz") as caught:
        found.disk("vdz")
    assert caught.value.hint == "The disks there: vda, vdb."


# -- names of machines -----------------------------------------------------------------------


@given(texts.filter(bool))
def test_a_machine_s_directory_leads_back_to_its_name(machine: str) -> None:
    try:
        directory = layout.encoded(machine)
    except errors.UsageError:
        assert len(machine) > 20  # only a long name can be too long
        return
    assert layout.machine_name(directory) == machine
    assert "/" not in directory
    assert not directory.startswith(".")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".lock", "lost+found", "%2e", "a%", "%FF", "ü", "%0A"])
def test_other_directories_are_no_machines(name: str) -> None:
    assert layout.machine_name(name) is None


# -- which point is meant --------------------------------------------------------------------


def choose(text: str, *ids: str, machine: str = "web01") -> str:
    candidates = []
    for identity in ids:
        moment = points.id_moment(identity)
        assert moment is not None
        candidates.append(selection.Candidate(machine=machine, id=identity, created=moment.replace(microsecond=7)))
    return selection.choose(candidates, text, machine=None, repository="/r").id


A, B, C = "20261123T235959Z-aaaaaaaa", "20261124T060018Z-bbbbbbbb", "20261124T060018Z-bbcccccc"


@pytest.fixture(params=["UTC0", "CET-1CEST,M3.5.0,M10.5.0/3"])
def zone(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", request.param)
        time.tzset()
        yield request.param
    time.tzset()


def test_ids_and_their_beginnings_name_a_point(zone: str) -> None:
    assert choose(A, A, B, C) == A
    assert choose("20261123", A, B, C) == A
    assert choose("20261124t060018z-bbc", A, B, C) == C


@pytest.mark.parametrize("text", ["20261124", "20261124T060018Z-bb"])
def test_a_beginning_that_fits_several_is_ambiguous(text: str) -> None:
    with pytest.raises(errors.AmbiguousPoint, match=B):
        choose(text, A, B, C)


@pytest.mark.parametrize("text", ["", "x", "2027", "2026-11-22", "2026-02-30", "2026-11-24 25:00", "0001-01-01", "%"])
def test_what_names_nothing_is_unknown(text: str) -> None:
    with pytest.raises(errors.UnknownPoint):
        choose(text, A, B, C)


def test_latest_is_the_newest() -> None:
    assert choose("latest", B, A) == B


def test_a_date_is_the_end_of_that_local_day(zone: str) -> None:
    # 23:59:59 UTC of the 23rd is 00:59:59 of the 24th in Berlin's winter.
    if zone == "UTC0":
        assert choose("2026-11-23", A, B) == A
    else:
        with pytest.raises(errors.UnknownPoint):
            choose("2026-11-23", A, B)
    assert choose("2026-11-24", A, B) == B
    assert choose("2999-12-30", A, B) == B


def test_a_time_means_the_last_point_not_after_it(zone: str) -> None:
    local = CREATED.astimezone()
    assert choose(f"{local:%Y-%m-%d %H:%M:%S}", A, B) == B
    assert choose(f"{local:%Y-%m-%dT%H:%M}", A, B) == A
    assert choose("2026-11-24T06:00:18Z", A, B) == B
    assert choose("2026-11-24 07:00:17+01:00", A, B) == A


def test_nothing_is_there() -> None:
    with pytest.raises(errors.NoPoints):
        selection.choose([], "latest", machine=None, repository="/r")


@pytest.mark.parametrize("text", ["latest", "2026-11-24"])
def test_several_machines_make_latest_and_dates_ambiguous(text: str) -> None:
    both = [selection.Candidate(machine=name, id=A, created=CREATED) for name in ("web01", "db01")]
    with pytest.raises(errors.AmbiguousPoint, match=r"db01.*web01"):
        selection.choose(both, text, machine=None, repository="/r")


def test_values_are_not_changed_by_writing_them() -> None:
    before = point()
    after = copy.deepcopy(before)
    points.encode(before)
    assert before == after
