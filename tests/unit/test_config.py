"""The configuration file: what it can say, and what is refused with the table, the key and a remedy."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback import config, errors
from pullback.model import urls
from pullback.model.backups import Fleecing, Quiesce
from pullback.model.hooks import Hooks
from pullback.model.retention import Keep
from pullback.units import MiB

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
PLACE = Path("/etc/pullback/config.toml")
MAIN = '[repositories.main]\nurl = "/srv/backup"\n'
WEB = '[machines.web01]\nurl = "qmp:/run/web01.sock"\n'
FULL = """
[defaults]
repository = "main"
exclude = ["vdz"]
tags = ["daily"]
quiesce = "try"
keep = {last = 7}
limit_rate = "20M"

[hooks]
pre = ["/usr/local/bin/before", "a b"]
error = ["logger", "it failed"]
timeout = 60

[machines.web01]
url = "qmp:/run/web01.sock"

[machines.db01]
url = "images:vda=/srv/db01/a.qcow2,vdb=raw:/srv/db01/b,,c.raw"
disks = ["vda"]
exclude = []
scratch = "/var/tmp"
engine = "classic"
quiesce = "require"
agent = "/run/db01.agent"
mount_points = ["/", "/srv"]
repository = ["cloud", "main"]
tags = []
hooks = {pre = [], timeout = 5.5}

[repositories.main]
url = "/srv/backup"
password_file = "/etc/pullback/main.password"

[repositories.cloud]
url = "s3:https://s3.example.org/bucket/pullback"
password_command = ["pass", "show", "the cloud"]
environment_file = "/etc/pullback/cloud.env"
keep = {daily = 14, weekly = 8}
limit_rate = 1000000
"""


def parse(text: str) -> config.Config:
    """The configuration in a text."""
    return config.parse(text.encode(), PLACE)


def refused(text: str) -> errors.BadConfig:
    """How a text is refused."""
    with pytest.raises(errors.BadConfig) as caught:
        parse(text)
    return caught.value


def write(path: Path, text: str, mode: int = 0o644) -> Path:
    """A file with a mode, whatever the umask."""
    path.write_text(text)
    path.chmod(mode)
    return path


# -- what it says ----------------------------------------------------------------------------


def test_a_machine_has_what_the_defaults_say_and_what_it_says_itself() -> None:
    found = parse(FULL)
    assert found.machine("web01") == config.Machine(
        name="web01",
        url="qmp:/run/web01.sock",
        place=urls.QmpMachine(socket=Path("/run/web01.sock")),
        exclude=("vdz",),
        quiesce=Quiesce.TRY,
        repositories=("main",),
        tags=("daily",),
        hooks=Hooks(pre=("/usr/local/bin/before", "a b"), error=("logger", "it failed"), timeout=60),
    )
    other = found.machine("db01")
    assert other.place == urls.machine("images:vda=/srv/db01/a.qcow2,vdb=raw:/srv/db01/b,,c.raw")
    assert (other.disks, other.exclude, other.tags) == (("vda",), (), ())
    assert (other.scratch, other.agent) == (Path("/var/tmp"), Path("/run/db01.agent"))
    assert (other.engine, other.quiesce) == (Fleecing.CLASSIC, Quiesce.REQUIRE)
    assert other.mount_points == ("/", "/srv")
    assert other.hooks == Hooks(error=("logger", "it failed"), timeout=5.5)


def test_a_repository_has_what_the_defaults_say_and_what_it_says_itself() -> None:
    found = parse(FULL)
    main, cloud = found.repository("main"), found.repository("cloud")
    assert (main.keep, main.limit_rate) == (Keep(last=7), 20 * MiB)
    assert main.password_file == Path("/etc/pullback/main.password")
    assert (cloud.keep, cloud.limit_rate) == (Keep(daily=14, weekly=8), 1_000_000)
    assert cloud.password_command == ("pass", "show", "the cloud")
    assert found.repositories_of(found.machine("db01")) == (cloud, main)


def test_a_machine_that_is_off_is_called_as_its_table_and_one_that_runs_as_it_calls_itself() -> None:
    found = parse(FULL + '[machines.mail]\nurl = "qmp:/run/mail.sock"\nname = "post"\n')
    assert [found.machine(name).identity for name in ("web01", "db01", "mail")] == [None, "db01", "post"]


def test_keep_rules_are_options_of_a_command() -> None:
    assert Keep(last=3, weekly=8).words() == ("--keep-last", "3", "--keep-weekly", "8")
    assert not Keep()
    assert Keep(yearly=1)


def test_an_empty_file_is_a_configuration_of_nothing() -> None:
    assert parse("") == config.Config(path=PLACE)


def test_every_example_in_the_docs_is_a_configuration() -> None:
    blocks = re.findall(r"^```toml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    assert "web01" in parse(blocks[0]).machines
    for block in blocks:
        parse(block)


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "problem", "way_out"),
    [
        (WEB + 'scrach = "/tmp"', "machines.web01.scrach", "is no key that is known here", "Did you mean scratch?"),
        (WEB + "hooks = {prae = []}", "machines.web01.hooks.prae", "is no key", "Did you mean pre?"),
        ("[machine.web01]", "machine", "is no key", "Did you mean machines?"),
        ("[repositories.main]", "repositories.main.url", "is missing", "every key"),
        ("[machines.web01]", "machines.web01.url", "is missing", "every key"),
        (MAIN + 'password = "x"', "repositories.main.password", "would be a secret", "password_file"),
        (MAIN + 'secret_access_key = "x"', "repositories.main.secret_access_key", "a secret", "environment_file"),
        ('[repositories.a]\nurl = "s3:https://u:p@h/b"', "repositories.a.url", "has a password in it", ""),
        ('[repositories.a]\nurl = "dir:backup"', "repositories.a.url", "does not begin with '/'", ""),
        ('[repositories.a]\nurl = "./backup"', "repositories.a.url", "does not begin with '/'", ""),
        ('[repositories.a]\nurl = "backup"', "repositories.a.url", "does not name a repository", ""),
        ('[machines.a]\nurl = "web01"', "machines.a.url", "does not name a machine", "qmp:/run/web01.sock"),
        ('[machines.a]\nurl = "qmp:web01.sock"', "machines.a.url", "does not begin with '/'", ""),
        ('[machines.a]\nurl = "images:vda=/a,,b,vdb=raw:c"', "machines.a.url", "does not begin with '/'", ""),
        ('[machines."a b"]\nurl = "qmp:/a"', "machines.a b", "other characters than letters", ""),
        ('[machines."a\\u001b"]\nurl = "qmp:/a"', "machines.'a\\x1b'", "other characters than letters", ""),
        (WEB + 'disks = ["sdaa1"]', "machines.web01.disks", "names 'sdaa1', which is no disk", ""),
        (WEB + 'disks = "vda"', "machines.web01.disks", "is no list of texts", ""),
        (WEB + 'scratch = "tmp"', "machines.web01.scratch", "is no absolute path", ""),
        (WEB + 'scratch = "/a\\u0000b"', "machines.web01.scratch", "is no text", ""),
        (WEB + 'engine = "fast"', "machines.web01.engine", "is none of filter, classic", ""),
        (WEB + "quiesce = true", "machines.web01.quiesce", "is none of no, try, require", ""),
        (WEB + 'tags = ["a,b"]', "machines.web01.tags", "has a tag with a comma", ""),
        (WEB + 'repository = "main"', "machines.web01.repository", "there is no table", "none yet"),
        (
            WEB + MAIN.replace("main", "mains") + '[defaults]\nrepository = "main"',
            "defaults.repository",
            "no",
            "mains?",
        ),
        (WEB + 'repository = ["a", "a"]', "machines.web01.repository", "says a name twice", ""),
        ('[hooks]\npre = "systemctl stop db"', "hooks.pre", "must be a list of words", ""),
        ('[hooks]\npre = ["bin/x"]', "hooks.pre", "begins with a relative path", ""),
        ("[hooks]\ntimeout = 0", "hooks.timeout", "is no number of seconds above 0", ""),
        ("[hooks]\ntimeout = inf", "hooks.timeout", "is no number of seconds", ""),
        ("[hooks]\ntimeout = true", "hooks.timeout", "is no number of seconds", ""),
        (MAIN + "keep = {last = -1}", "repositories.main.keep.last", "is no whole number", ""),
        (MAIN + "keep = {last = 0}", "repositories.main.keep", "keeps nothing at all", ""),
        (MAIN + "keep = {dayly = 7}", "repositories.main.keep.dayly", "is no key", "Did you mean daily?"),
        (MAIN + 'limit_rate = "fast"', "repositories.main.limit_rate", "is no rate", ""),
        (MAIN + "limit_rate = 0", "repositories.main.limit_rate", "is no rate above 0", ""),
        (MAIN + "password_command = []", "repositories.main.password_command", "has no words", ""),
        (
            MAIN + 'password_file = "/a"\npassword_command = ["b"]',
            "repositories.main.password_command",
            "two ways to say the same",
            "",
        ),
        ("machines = 3", "machines", "is no table", ""),
        ("[machines]\na = 3", "machines.a", "is no table", ""),
        ("[machines", "the text", "is no TOML", ""),
        (WEB + 'url = "qmp:/b"', "the text", "is no TOML", ""),
    ],
)
def test_what_is_wrong_is_said_with_file_table_and_key(text: str, key: str, problem: str, way_out: str) -> None:
    error = refused(text)
    assert str(error).startswith(f"{PLACE}: {key} ")
    assert problem in error.problem
    assert way_out in (error.hint or "")
    assert error.exit_code == errors.Exit.USAGE


def test_no_secret_is_said_again_in_a_message() -> None:
    for text in (MAIN + 'password = "hunter2"', '[repositories.a]\nurl = "s3:https://u:hunter2@h/b"'):
        error = refused(text)
        assert "hunter2" not in f"{error} {error.hint} {error.facts()}"


_LEAVES = st.one_of(
    st.text(max_size=8), st.integers(), st.floats(), st.booleans(), st.sampled_from(["/srv/x", "vda", "qmp:/a", "20M"])
)
_KEYS = st.sampled_from(
    ["machines", "repositories", "defaults", "hooks", "web01", "url", "keep", "disks", "scratch", "engine", "quiesce",
     "repository", "tags", "pre", "timeout", "limit_rate", "password_file", "last", "name", "x"]
)  # fmt: skip
_TABLES = st.recursive(
    st.dictionaries(_KEYS, _LEAVES | st.lists(_LEAVES, max_size=2), max_size=3),
    lambda inner: st.dictionaries(_KEYS, inner | _LEAVES, max_size=4),
    max_leaves=12,
)


def toml(value: Any) -> str:
    """A value as TOML, inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(letter):08x}" for letter in value if not 0xD800 <= ord(letter) < 0xE000) + '"'
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def complaint(data: bytes) -> str | None:
    """How bytes are refused; None if they are a configuration."""
    try:
        config.parse(data, PLACE)
    except errors.BadConfig as error:
        return str(error)
    return None


@given(_TABLES)
def test_whatever_stands_in_the_file_is_a_configuration_or_a_clear_error(values: dict[str, Any]) -> None:
    told = complaint("\n".join(f"{key} = {toml(value)}" for key, value in values.items()).encode())
    assert told is None or told.startswith(f"{PLACE}: ")


@given(st.binary(max_size=64))
def test_whatever_bytes_the_file_has_nothing_else_is_raised(data: bytes) -> None:
    told = complaint(data)
    assert told is None or told.startswith(f"{PLACE}: ")


# -- names -----------------------------------------------------------------------------------


def test_a_name_that_is_not_configured_is_told_with_those_that_are() -> None:
    with pytest.raises(errors.NotConfigured) as caught:
        parse(FULL).machine("web1")
    assert str(caught.value) == f"There is no machine 'web1' in {PLACE}."
    assert caught.value.hint == "There are: db01, web01."
    with pytest.raises(errors.NotConfigured, match="There is no repository 'x'"):
        parse(FULL).repository("x")


def test_without_a_file_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(errors.NotConfigured) as caught:
        config.Config(path=PLACE, exists=False).machine("web01")
    assert caught.value.hint == "There is no such file."


@pytest.mark.parametrize("text", ["web01", "a.b-c_d", "7"])
def test_these_can_be_names(text: str) -> None:
    assert config.is_name(text)


@pytest.mark.parametrize("text", ["", "/srv", "./a", "qmp:/run/a.sock", "dir:/srv", "s3:https://h/b", "a b", "-x", "ä"])
def test_these_are_no_names(text: str) -> None:
    assert not config.is_name(text)


# -- files -----------------------------------------------------------------------------------


def test_the_file_is_found_by_option_then_variable_then_place(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.toml", MAIN), write(tmp_path / "two.toml", WEB)
    assert config.load(one, {"PULLBACK_CONFIG": str(two)}).repositories.keys() == {"main"}
    assert config.load(None, {"PULLBACK_CONFIG": str(two)}).machines.keys() == {"web01"}


def test_the_default_place_is_the_systems_for_root_and_the_users_for_others() -> None:
    home = Path.home() / ".config/pullback/config.toml"
    root = os.geteuid() == 0
    assert config.default_path({}) == (config.SYSTEM_PATH if root else home)
    assert config.default_path({"XDG_CONFIG_HOME": "/x"}) == (
        config.SYSTEM_PATH if root else Path("/x/pullback/config.toml")
    )


def test_a_file_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(errors.BadConfig, match="the file is not there"):
        config.load(tmp_path / "none.toml", {})
    with pytest.raises(errors.BadConfig, match="the file is not there"):
        config.load(None, {"PULLBACK_CONFIG": str(tmp_path / "none.toml")})


def test_a_file_that_everybody_can_change_is_not_believed(tmp_path: Path) -> None:
    path = write(tmp_path / "config.toml", MAIN, 0o666)
    with pytest.raises(errors.BadConfig, match="can be changed by every user") as caught:
        config.load(path)
    assert caught.value.hint == f"chmod o-w {path}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_not_believed(tmp_path: Path) -> None:
    path = write(tmp_path / "config.toml", MAIN)
    os.chown(path, 12345, 12345)
    with pytest.raises(errors.BadConfig, match="belongs to another user"):
        config.load(path)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(errors.BadConfig, match=r"is no regular file|cannot be read"):
            config.load(path)


def test_a_file_without_end_is_not_read_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "config.toml", "#" * (config.MAX_FILE + 1))
    with pytest.raises(errors.BadConfig, match=r"is longer than 1\.00 MiB"):
        config.load(path)


# -- the environment -------------------------------------------------------------------------


def repository(**values: Any) -> config.Repository:
    """A repository with some settings."""
    return config.Repository(name="main", url="/srv/backup", **values)


def test_a_configured_password_takes_the_place_of_every_one_in_the_environment() -> None:
    base = {"RESTIC_PASSWORD": "a", "RESTIC_PASSWORD_COMMAND": "b", "PULLBACK_PASSWORD_FILE": "/c", "HOME": "/root"}
    by_file = repository(password_file=Path("/etc/pw")).environ(base)
    assert by_file == {"HOME": "/root", "PULLBACK_PASSWORD_FILE": "/etc/pw"}
    by_command = repository(password_command=("pass", "show", "my key")).environ(base)
    assert by_command == {"HOME": "/root", "PULLBACK_PASSWORD_COMMAND": "pass show 'my key'"}
    assert repository().environ(base) == base


def test_an_environment_file_is_lines_of_names_and_values(tmp_path: Path) -> None:
    text = "# S3\n\nAWS_ACCESS_KEY_ID=abc\nexport AWS_SECRET_ACCESS_KEY='d=e f'\nEMPTY=\nQUOTED=\"x\"\n"
    path = write(tmp_path / "s3.env", text, 0o600)
    found = repository(environment_file=path).environ({"AWS_ACCESS_KEY_ID": "other", "HOME": "/root"})
    assert found == {
        "AWS_ACCESS_KEY_ID": "abc", "AWS_SECRET_ACCESS_KEY": "d=e f", "EMPTY": "", "QUOTED": "x", "HOME": "/root"
    }  # fmt: skip


def test_an_environment_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "s3.env", "AWS_SECRET_ACCESS_KEY=x\n", 0o644)
    with pytest.raises(errors.BadConfig, match="can be read by every user") as caught:
        config.read_environment(path)
    assert caught.value.hint == f"chmod 600 {path}"


def test_a_line_that_is_no_variable_is_told_by_its_number_and_not_by_its_text(tmp_path: Path) -> None:
    path = write(tmp_path / "s3.env", "A=1\nhunter2\n", 0o600)
    with pytest.raises(errors.BadConfig, match="line 2 is not NAME=VALUE") as caught:
        config.read_environment(path)
    assert "hunter2" not in str(caught.value.facts())


# -- the page --------------------------------------------------------------------------------


def documented(heading: str) -> set[str]:
    """The keys in the table below a heading."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## `{heading}`\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `([a-z_]+)` \|", section, re.MULTILINE))


def known(text: str) -> set[str]:
    """The keys of a table, as they are told to who uses one that is not known."""
    told = refused(text + "\nqqqqqqqqqqqqqqqq = 1").hint or ""
    return set(told.removeprefix("There are: ").rstrip(".").split(", "))


@pytest.mark.parametrize(
    ("heading", "text"), [("[machines.NAME]", WEB), ("[repositories.NAME]", MAIN), ("[hooks]", "[hooks]")]
)
def test_the_page_has_each_key_that_there_is(heading: str, text: str) -> None:
    assert documented(heading) == known(text)


def test_the_page_has_each_key_of_the_defaults_and_of_keep_rules() -> None:
    text = PAGE.read_text(encoding="utf-8")
    defaults = text.partition("\n## `[defaults]`\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", defaults)) == known("[defaults]")
    keep = next(line for line in text.splitlines() if line.startswith("| `keep`"))
    assert set(re.findall(r"`(\w+)`", keep)) - {"keep", "forget"} == known("[repositories.main.keep]")
