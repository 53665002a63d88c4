"""Names of machines, repositories and exports."""

from __future__ import annotations

from pathlib import Path

import pytest

from pullback import errors
from pullback.model import urls
from pullback.model.exports import NbdAddress


def test_good_names_give_absolute_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert urls.machine("qmp:/run/web01.sock") == urls.QmpMachine(socket=Path("/run/web01.sock"))
    assert urls.machine("qmp:web01.sock") == urls.QmpMachine(socket=tmp_path / "web01.sock")
    assert urls.unix_socket("unix:/run/nbd.sock") == Path("/run/nbd.sock")


@pytest.mark.parametrize("text", ["", "web01", "qmp", "qmp:", "/run/web01.sock", "QMP:/x", " qmp:/x", "unix:/x"])
def test_what_names_no_machine_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(errors.BadUrl) as caught:
        urls.machine(text)
    assert caught.value.url == text
    assert "qmp:/run/web01.sock" in (caught.value.hint or "")


def image(target: str, path: object, format: str | None = None) -> urls.Image:
    """A disk of a machine that is off."""
    return urls.Image(target=target, path=Path(str(path)), format=format)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("vda=/a.qcow2", [image("vda", "/a.qcow2")]),
        ("vda=/a.qcow2,vdb=/b.raw", [image("vda", "/a.qcow2"), image("vdb", "/b.raw")]),
        ("sda=raw:/dev/vg/a,hda=qcow2:/b", [image("sda", "/dev/vg/a", "raw"), image("hda", "/b", "qcow2")]),
        ("vda=/a,,b.raw,vdb=/c", [image("vda", "/a,b.raw"), image("vdb", "/c")]),
        ("vda=/a,,,vdb=/c", [image("vda", "/a,"), image("vdb", "/c")]),
        ("vda=/a:b=c", [image("vda", "/a:b=c")]),
        ("vda=/raw:a", [image("vda", "/raw:a")]),
        ("vda=./raw:a", [image("vda", "HERE/raw:a")]),
        ("vda=vmdk:a", [image("vda", "HERE/vmdk:a")]),
        ("nvme0n1=a b", [image("nvme0n1", "HERE/a b")]),
    ],
)
def test_a_machine_that_is_off_is_named_by_its_images(
    text: str, found: list[urls.Image], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = [image(i.target, str(i.path).replace("HERE", str(tmp_path)), i.format) for i in found]
    assert urls.machine(f"images:{text}") == urls.ImagesMachine(images=tuple(wanted))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' is not TARGET=PATH"),
        ("/a.qcow2", "'/a.qcow2' is not TARGET=PATH"),
        ("vda=/a,", "'' is not TARGET=PATH"),
        ("vda=/a,b", "'b' is not TARGET=PATH (a comma in a path is doubled)"),
        ("vda=", "the path of vda is missing"),
        ("vda=raw:", "the path of vda is missing"),
        ("=/a", "'' is no disk's name"),
        ("disk=/a", "'disk' is no disk's name"),
        ("../vda=/a", "'../vda' is no disk's name"),
        ("vda=/a,vda=/b", "there are two disks vda"),
        ("vda=/a\0b", "no path holds a zero byte"),
    ],
)
def test_what_names_no_images_is_refused_with_the_reason(text: str, problem: str) -> None:
    with pytest.raises(errors.BadUrl) as caught:
        urls.machine(f"images:{text}")
    assert problem in caught.value.problem
    assert "images:vda=" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["", "tcp:localhost:10809", "unix:", "/x"])
def test_a_server_is_a_unix_socket(text: str) -> None:
    with pytest.raises(errors.BadUrl):
        urls.unix_socket(text)


def test_the_address_of_an_export_is_quoted() -> None:
    address = NbdAddress(socket=Path("/run/a b/n&d.sock"), export="pullback/ä?")
    assert address.uri == "nbd+unix:///pullback%2F%C3%A4%3F?socket=/run/a%20b/n%26d.sock"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("localhost", ("localhost", None)),
        ("192.0.2.1:10809", ("192.0.2.1", 10809)),
        ("web01.example:0", ("web01.example", None)),
        ("[2001:db8::1]:10809", ("2001:db8::1", 10809)),
        ("[::]", ("::", None)),
    ],
)
def test_an_address_is_a_host_with_or_without_a_port(text: str, meant: tuple[str, int | None]) -> None:
    assert urls.address(text) == meant


@pytest.mark.parametrize(
    "text", ["", ":1", "::1", "a b", "x:", "x:y", "x:65536", "[x]y", "[]", "[:::1]", "x:-1", "x:١"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(errors.BadUrl, match="place to listen"):
        urls.address(text)
