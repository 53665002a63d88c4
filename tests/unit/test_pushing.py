"""The values of a push, and what is decided by them alone."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pullback import errors
from pullback.engine import destinations, push, transaction
from pullback.model import checkpoints, pushing
from pullback.model.backups import Fleecing
from pullback.model.checkpoints import Mark
from pullback.model.disks import Bitmap, Bus, Disk
from pullback.model.pushing import (
    Destination,
    Format,
    Kind,
    NbdServer,
    Pushed,
    PushedDisk,
    PushPart,
    PushProgress,
    PushRequest,
    PushStatus,
)
from pullback.units import MiB

MARK = Mark(name="one", nonce="0123456789abcdef", first=1, last=1)
DISK = Disk(target="vda", bus=Bus.VIRTIO, qdev="vda", root="vda-format", node="vda-format", size=8 * MiB)


@pytest.mark.parametrize(
    ("uri", "server"),
    [
        ("nbd://host", NbdServer(socket=None, host="host", port=10809, export="")),
        ("nbd://[::1]:5/a%2Fb", NbdServer(socket=None, host="::1", port=5, export="a/b")),
        ("nbd+tcp://host:99/x", NbdServer(socket=None, host="host", port=99, export="x")),
        ("nbd+unix:///a%20b?socket=/run/x%2Cy.sock", NbdServer(socket=Path("/run/x,y.sock"), export="a b")),
        ("nbd+unix:///?socket=/s", NbdServer(socket=Path("/s"), export="")),
    ],
)
def test_nbd_uris_lead_somewhere(uri: str, server: NbdServer) -> None:
    to = Destination.nbd(uri)
    assert (to.server, to.kind, to.format) == (server, Kind.NBD, Format.RAW)


@pytest.mark.parametrize(
    ("uri", "word"),
    [
        ("nbds://host/x", "TLS"),
        ("nbds+unix:///x?socket=/s", "TLS"),
        ("nbd+unix:///x", "no NBD URI"),
        ("nbd+unix://host/x?socket=/s", "no NBD URI"),
        ("nbd+unix:///x?socket=/s&socket=/t", "no NBD URI"),
        ("nbd+unix:///x?socket=s", "absolute"),
        ("nbd://", "no NBD URI"),
        ("nbd://host:many/x", "no NBD URI"),
        ("nbd://host/x?tls=1", "no NBD URI"),
        ("http://host/x", "no NBD URI"),
        ("/a/path", "no NBD URI"),
    ],
)
def test_other_uris_are_refused(uri: str, word: str) -> None:
    with pytest.raises(errors.UsageError, match=word):
        Destination.nbd(uri)


def test_destinations_are_absolute_and_only_qcow2_is_compressed() -> None:
    for path in ("relative", "", "/nul\0"):
        with pytest.raises(errors.UsageError, match="absolute"):
            Destination.file(path)
    with pytest.raises(errors.UsageError, match="qcow2"):
        Destination.block("/dev/x", compress=True)
    assert Destination.file("/x", compress=True).compress


# -- the description -------------------------------------------------------------------------


def described(**changes: Any) -> Pushed:
    disk = PushedDisk(
        index=0,
        target="vda",
        size=8 * MiB,
        node="vda-format",
        destination=Destination.file("/srv/a,b.raw", Format.RAW),
        incremental=True,
        part="/srv/.pullback-01234567-dst0.part",
        meta="/scratch/pullback-01234567-meta0",
        checkpoint=MARK,
        freeze="pullback/0-0/fedcba9876543210/zero",
        fleecing=Fleecing.FILTER,
        reason="it protects the guest's writes",
    )
    moment = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
    return Pushed(job="01234567", disks=(replace(disk, **changes),), moment=moment)


@pytest.mark.parametrize(
    "found",
    [
        described(),
        described(part=None, meta=None, checkpoint=None, freeze=None, fleecing=None, incremental=False),
        described(destination=Destination.nbd("nbd://h/x", Format.QCOW2, reuse=True, compress=True)),
        described(destination=Destination.block("/dev/vg/lv")),
        replace(described(), moment=None),
    ],
)
def test_a_description_survives_json(found: Pushed) -> None:
    assert pushing.pushed(json.loads(json.dumps(found.document()))) == found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("index", "0"),
        ("index", True),
        ("size", 1.5),
        ("target", None),
        ("part", "relative"),
        ("meta", 7),
        ("checkpoint", "not-ours"),
        ("fleecing", "magic"),
        ("incremental", 1),
        ("destination", {"kind": "file", "place": "relative", "format": "raw", "reuse": False, "compress": False}),
        ("destination", {"kind": "ftp", "place": "/x", "format": "raw", "reuse": False, "compress": False}),
        ("destination", None),
    ],
)
def test_a_damaged_description_is_refused(key: str, value: object) -> None:
    document: Any = json.loads(json.dumps(described().document()))
    document["disks"][0][key] = value
    with pytest.raises(errors.BadDocument, match="damaged"):
        pushing.pushed(document)
    del document["disks"][0][key]
    with pytest.raises(errors.BadDocument):
        pushing.pushed(document)


@pytest.mark.parametrize(
    "document", [{}, {"job": 1, "moment": None, "disks": []}, {"job": "x", "moment": "?", "disks": []}]
)
def test_what_is_no_description_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(errors.BadDocument):
        pushing.pushed(document)


def test_a_push_asks_for_a_snapshot_that_nobody_reads_from_outside() -> None:
    part = PushPart(disk=DISK, destination=Destination.file("/x"), since=("b",), checkpoint=MARK, freeze="b")
    found = PushRequest(job="01234567", parts=(part,), scratch=Path("/s"), fleecing=Fleecing.CLASSIC).snapshot
    assert found.pushed
    assert not found.lasting
    assert (found.job, found.scratch, found.fleecing) == ("01234567", Path("/s"), Fleecing.CLASSIC)
    assert [(d.disk, d.since, d.checkpoint, d.freeze) for d in found.disks] == [(DISK, ("b",), MARK, "b")]


# -- destinations ----------------------------------------------------------------------------


def describe(to: Destination) -> PushedDisk:
    return destinations.describe("01234567", 3, PushPart(disk=DISK, destination=to), Path("/scratch"))


def test_files_that_we_make_have_another_name_first() -> None:
    found = describe(Destination.file("/srv/vda.qcow2"))
    assert (found.part, found.meta) == ("/srv/.pullback-01234567-dst3.part", None)
    found = describe(Destination.file("/srv/vda.raw", Format.RAW))
    assert (found.part, found.meta) == ("/srv/.pullback-01234567-dst3.part", "/scratch/pullback-01234567-meta3")
    for to in (Destination.file("/x", reuse=True), Destination.block("/dev/x"), Destination.nbd("nbd://h")):
        assert (describe(to).part, describe(to).meta) == (None, None)


def test_no_destination_is_taken_twice_by_whatever_name(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    (tmp_path / "link").symlink_to("image")
    image, link = (describe(Destination.file(tmp_path / name, reuse=True)) for name in ("image", "link"))
    destinations.refuse_taken([image], [])
    for listed, used in (([image, link], []), ([link], [str(tmp_path / "image")]), ([image, image], ["json:{}"])):
        with pytest.raises(errors.DestinationUnusable, match="in use"):
            destinations.refuse_taken(listed, used)
    gone = describe(Destination.file(tmp_path / "new"))
    with pytest.raises(errors.DestinationUnusable, match="disk vda"):
        destinations.refuse_taken([gone, gone], [])
    server = describe(Destination.nbd("nbd://h/x"))
    with pytest.raises(errors.DestinationUnusable):
        destinations.refuse_taken([server, server], [])


# -- how it goes -----------------------------------------------------------------------------


def one(status: PushStatus, error: str | None = None) -> PushProgress:
    return PushProgress(target="vda", done=0, total=1, status=status, error=error)


def test_a_push_is_over_when_all_is_copied_or_one_failed() -> None:
    done, failed, running = one(PushStatus.CONCLUDED), one(PushStatus.FAILED), one(PushStatus.RUNNING)
    assert push.over([done, done])
    assert push.over([running, failed])
    for other in (running, one(PushStatus.PAUSED), one(PushStatus.PENDING)):
        assert not push.over([done, other])


@pytest.mark.parametrize(
    ("error", "fleecing", "kind"),
    [
        ("No space left on device", Fleecing.FILTER, errors.DestinationFull),
        ("Permission denied", Fleecing.FILTER, errors.SnapshotBroken),
        ("Permission denied", Fleecing.CLASSIC, errors.PushFailed),
        ("Input/output error", Fleecing.FILTER, errors.PushFailed),
        (None, None, errors.PushFailed),
    ],
)
def test_why_a_push_failed(error: str | None, fleecing: Fleecing | None, kind: type[errors.PullbackError]) -> None:
    found = described(fleecing=fleecing)
    push.require_copied(found, [one(PushStatus.CONCLUDED)])
    with pytest.raises(kind):
        push.require_copied(found, [one(PushStatus.FAILED, error)])


# -- checkpoints -----------------------------------------------------------------------------


def chain(*links: tuple[str, int, bool]) -> checkpoints.Chain:
    bitmaps = [
        Bitmap(name=f"pullback/{step}-{step}/{nonce * 16}/c{step}", granularity=65536, count=0, recording=recording)
        for nonce, step, recording in links
    ]
    return checkpoints.chain(bitmaps)


def test_a_checkpoint_is_given_back_as_it_was_or_else_deleted_like_any() -> None:
    new = Mark(name="c2", nonce="b" * 16, first=2, last=2)
    newest = chain(("a", 1, False), ("b", 2, True))
    older = newest.links[0].mark.bitmap
    assert transaction.give_back("n", newest, new) == transaction.take_back("n", new, older)
    alone = chain(("b", 2, True))
    assert transaction.give_back("n", alone, new) == transaction.take_back("n", new, None)
    overtaken = chain(("a", 1, False), ("b", 2, False), ("c", 3, True))
    merge = overtaken.deletion(new.nonce)
    assert merge is not None
    assert transaction.give_back("n", overtaken, new) == transaction.deletion("n", merge)
    assert transaction.give_back("n", chain(("a", 1, True)), new) == []
