"""Names of repositories, and where they come from when no option names one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback import errors
from pullback.model import urls
from pullback.repo import defaults

S3 = urls.S3Place


def local(path: str | Path) -> urls.ResticRepository:
    """A repository in a directory."""
    return urls.ResticRepository(location=urls.LocalPlace(path=Path(path)))


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/srv/backup", "/srv/backup"),
        ("/srv/a:b c/", "/srv/a:b c"),
        ("./backup", "HERE/backup"),
        (".", "HERE"),
        ("sub/backup", "HERE/sub/backup"),
        ("local:/srv/backup", "/srv/backup"),
        ("local:backup", "HERE/backup"),
    ],
)
def test_a_path_names_a_repository_in_the_format_of_restic(
    text: str, path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    found = urls.repository(text)
    assert found == local(path.replace("HERE", str(tmp_path)))
    assert found.url == path.replace("HERE", str(tmp_path))


def test_dir_names_a_plain_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert urls.repository("dir:/srv/a:b c") == urls.DirectoryRepository(path=Path("/srv/a:b c"))
    assert urls.repository("dir:backup") == urls.DirectoryRepository(path=tmp_path / "backup")
    assert urls.repository("dir:/srv/backup").url == "dir:/srv/backup"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("s3:https://s3.example.com/b1/web", S3(endpoint="s3.example.com", bucket="b1", prefix="web")),
        ("s3:http://127.0.0.1:9000/b1", S3(endpoint="127.0.0.1:9000", bucket="b1", secure=False)),
        ("s3:s3.amazonaws.com/bucket_name", S3(endpoint="s3.amazonaws.com", bucket="bucket_name")),
        ("s3://host/b1/a/b", S3(endpoint="host", bucket="b1", prefix="a/b")),
        ("s3:host:9000/b1/a//b/./c/", S3(endpoint="host:9000", bucket="b1", prefix="a/b/c")),
        ("s3:host/b1/", S3(endpoint="host", bucket="b1")),
        ("s3:https://[2001:db8::1]:9000/b1/x", S3(endpoint="[2001:db8::1]:9000", bucket="b1", prefix="x")),
        ("s3:https://host/b1/a%20b", S3(endpoint="host", bucket="b1", prefix="a b")),
        ("s3:host/b1/a%20b", S3(endpoint="host", bucket="b1", prefix="a%20b")),
    ],
)
def test_a_bucket_is_named_as_restic_names_it(text: str, place: urls.S3Place) -> None:
    assert urls.repository(text) == urls.ResticRepository(location=place)


@given(
    host=st.sampled_from(["host", "s3.example.com:9000", "[::1]", "192.0.2.1:80"]),
    prefix=st.lists(
        st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1), max_size=3
    ),
    secure=st.booleans(),
)
def test_the_name_of_a_bucket_leads_back_to_it(host: str, prefix: list[str], secure: bool) -> None:
    parts = [part for part in prefix if part not in (".", "..")]
    place = S3(endpoint=host, bucket="bucket", prefix="/".join(parts), secure=secure)
    assert urls.repository(place.url) == urls.ResticRepository(location=place)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it is empty"),
        ("web", "a directory of that name would be ./web"),
        ("dir:", "the directory's path is missing"),
        ("/a\0b", "no name holds a zero byte"),
        ("s3:", "the host is missing"),
        ("s3:https://", "the host is missing"),
        ("s3:host", "the bucket is missing"),
        ("s3:https://host/", "the bucket is missing"),
        ("s3:ho st/b1", "'ho st' is no HOST or HOST:PORT"),
        ("s3:host:99999/b1", "'host:99999' is no HOST or HOST:PORT"),
        ("s3:ftp://host/b1", "'ftp:' is no HOST or HOST:PORT"),
        ("s3:host/b/x", "'b' is no bucket's name"),
        ("s3:host/-b1", "'-b1' is no bucket's name"),
        ("s3:host/b1/../../c", "its prefix leads out of the bucket"),
        ("s3:https://host/b1/x?y", "a ? or # in it is written %3F or %23"),
        ("sftp:host:/x", "Pullback cannot work on sftp: yet"),
        ("rest:https://host/", "Pullback cannot work on rest: yet"),
        ("b2:bucket:path", "Pullback cannot work on b2: yet"),
    ],
)
def test_what_names_no_repository_is_refused_with_the_reason_and_an_example(text: str, problem: str) -> None:
    with pytest.raises(errors.BadUrl) as caught:
        urls.repository(text)
    assert caught.value.problem.startswith(problem)
    assert "/srv/backup" in (caught.value.hint or "")


@pytest.mark.parametrize("text", ["s3:https://key:geheim@host/b1", "rest:https://me:geheim@host/x"])
def test_a_password_in_a_name_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(errors.BadUrl) as caught:
        urls.repository(text)
    assert "geheim" not in f"{caught.value} {caught.value.hint}"


def test_the_environment_names_a_repository_and_our_variable_wins(tmp_path: Path) -> None:
    file = tmp_path / "name"
    file.write_text("\n s3:host/b1 \n")
    environ = {"RESTIC_REPOSITORY_FILE": str(file)}
    assert defaults.repository_url({}) is None
    assert defaults.repository_url(environ) == "s3:host/b1"
    environ["RESTIC_REPOSITORY"] = "/srv/restic"
    environ["PULLBACK_REPOSITORY"] = "/srv/ours"
    assert defaults.repository_url(environ) == "/srv/ours"
    del environ["PULLBACK_REPOSITORY"]
    with pytest.raises(errors.UsageError, match="both set"):
        defaults.repository_url(environ)
    del environ["RESTIC_REPOSITORY_FILE"]
    assert defaults.repository_url(environ) == "/srv/restic"


def test_a_file_that_names_no_repository_is_told(tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="RESTIC_REPOSITORY_FILE"):
        defaults.repository_url({"RESTIC_REPOSITORY_FILE": str(tmp_path / "none")})
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(errors.UsageError, match="is empty"):
        defaults.repository_url({"RESTIC_REPOSITORY_FILE": str(tmp_path / "empty")})
