"""Keys and regions for S3, from variables and Amazon's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from pullback import errors
from pullback.model.urls import S3Place
from pullback.repo.store import aws

OWN = S3Place(endpoint="s3.example.com", bucket="b1")
AMAZON = S3Place(endpoint="s3.amazonaws.com", bucket="b1")
FRANKFURT = S3Place(endpoint="s3.eu-central-1.amazonaws.com", bucket="b1")
PAIR = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "geheim"}


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """Variables of a user with Amazon's files."""
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = d1\naws_secret_access_key = d%2\n"
        "[work]\naws_access_key_id=w1\naws_secret_access_key=w2\naws_session_token=w3\n"
    )
    (tmp_path / ".aws" / "config").write_text("[default]\nregion=eu-north-1\n[profile work]\nregion = ap-south-1\n")
    return {"HOME": str(tmp_path)}


def test_variables_come_before_files(home: dict[str, str]) -> None:
    assert aws.keys(OWN, home | PAIR) == aws.Keys(access="id", secret="geheim")
    assert aws.keys(OWN, home | PAIR | {"AWS_SESSION_TOKEN": "t"}) == aws.Keys(access="id", secret="geheim", token="t")


def test_a_profile_is_found_in_the_files(home: dict[str, str], tmp_path: Path) -> None:
    assert aws.keys(OWN, home) == aws.Keys(access="d1", secret="d%2")
    assert aws.keys(OWN, home | {"AWS_PROFILE": "work"}) == aws.Keys(access="w1", secret="w2", token="w3")
    elsewhere = {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / ".aws" / "credentials")}
    assert aws.keys(OWN, elsewhere) == aws.Keys(access="d1", secret="d%2")


@pytest.mark.parametrize(
    "environ", [{}, {"AWS_ACCESS_KEY_ID": "id"}, {"AWS_SECRET_ACCESS_KEY": "geheim"}, {"HOME": "/nonexistent"}]
)
def test_without_keys_nothing_is_tried(environ: dict[str, str]) -> None:
    with pytest.raises(errors.StoreRefused) as caught:
        aws.keys(OWN, environ)
    assert "AWS_ACCESS_KEY_ID" in (caught.value.hint or "")
    assert "geheim" not in str(caught.value)


def test_an_unknown_profile_has_no_keys(home: dict[str, str]) -> None:
    with pytest.raises(errors.StoreRefused):
        aws.keys(OWN, home | {"AWS_PROFILE": "other"})


def test_a_file_that_is_no_such_file_is_told(home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".aws" / "credentials").write_bytes(b"\xff\xfe no section")
    with pytest.raises(errors.StoreRefused, match="cannot be read"):
        aws.keys(OWN, home)


@pytest.mark.parametrize(
    ("place", "environ"), [(AMAZON, {}), (FRANKFURT, {}), (OWN, {"AWS_WEB_IDENTITY_TOKEN_FILE": "/x"})]
)
def test_amazons_own_machines_need_no_keys(place: S3Place, environ: dict[str, str]) -> None:
    assert aws.keys(place, environ) is None


def test_the_region_is_what_is_said_first(home: dict[str, str]) -> None:
    assert aws.region(OWN, {}) == "us-east-1"
    assert aws.region(OWN, home) == "eu-north-1"
    assert aws.region(OWN, home | {"AWS_PROFILE": "work"}) == "ap-south-1"
    assert aws.region(FRANKFURT, home) == "eu-central-1"
    assert aws.region(S3Place(endpoint="s3-eu-west-1.amazonaws.com", bucket="b1"), {}) == "eu-west-1"
    assert aws.region(S3Place(endpoint="s3.dualstack.eu-west-1.amazonaws.com", bucket="b1"), {}) == "eu-west-1"
    assert aws.region(FRANKFURT, home | {"AWS_REGION": "r2"}) == "r2"
    assert aws.region(FRANKFURT, {"AWS_DEFAULT_REGION": "r1", "AWS_REGION": "r2"}) == "r1"


def test_keys_do_not_show_their_secret() -> None:
    assert "geheim" not in f"{aws.Keys(access='id', secret='geheim', token='geheim')!r}"
