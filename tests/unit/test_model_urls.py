"""Names of machines, repositories and exports."""

from __future__ import annotations

from pathlib import Path

import pytest

from pullback import errors
from pullback.model import urls
from pullback.model.exports import NbdAddress


def test_good_names_give_absolute_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert urls.machine("qmp:/run/web01.sock").socket == Path("/run/web01.sock")
    assert urls.machine("qmp:web01.sock").socket == tmp_path / "web01.sock"
    assert urls.repository("dir:backup").path == tmp_path / "backup"
    assert urls.repository("dir:/srv/a:b c").path == Path("/srv/a:b c")
    assert urls.unix_socket("unix:/run/nbd.sock") == Path("/run/nbd.sock")


@pytest.mark.parametrize("text", ["", "web01", "qmp", "qmp:", "/run/web01.sock", "QMP:/x", " qmp:/x", "unix:/x"])
def test_what_names_no_machine_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(errors.BadUrl) as caught:
        urls.machine(text)
    assert caught.value.url == text
    assert "qmp:/run/web01.sock" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["", "/srv/backup", "dir", "dir:", "s3:https://x/y", "file:/x"])
def test_what_names_no_repository_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(errors.BadUrl) as caught:
        urls.repository(text)
    assert "dir:/srv/backup" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["", "tcp:localhost:10809", "unix:", "/x"])
def test_a_server_is_a_unix_socket(text: str) -> None:
    with pytest.raises(errors.BadUrl):
        urls.unix_socket(text)


def test_the_address_of_an_export_is_quoted() -> None:
    address = NbdAddress(socket=Path("/run/a b/n&d.sock"), export="pullback/ä?")
    assert address.uri == "nbd+unix:///pullback%2F%C3%A4%3F?socket=/run/a%20b/n%26d.sock"
