"""The systemd units: what they run is what the command line takes, and stopping them leaves nobody standing still."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pullback import config
from pullback.errors import Exit
from pullback.flows import hooks

PLACE = Path(__file__).parents[2] / "packaging" / "systemd"
UNITS = sorted(path.name for path in PLACE.iterdir())
SERVICES = [name for name in UNITS if name.endswith(".service")]
TIMERS = [name for name in UNITS if name.endswith(".timer")]
INSTANCE = "web01.example-1_a"
#: The settings that may be used, by section: a key that systemd does not know is ignored, and only the journal says so.
_KNOWN = {
    "Unit": "Description Documentation Wants After RequiresMountsFor",
    "Service": """Type ExecStart SuccessExitStatus TimeoutStartSec TimeoutStopSec KillMode KillSignal OOMPolicy Nice
        IOSchedulingClass ProtectSystem ProtectKernelTunables ProtectKernelModules ProtectKernelLogs
        ProtectControlGroups ProtectClock ProtectHostname RestrictAddressFamilies RestrictRealtime LockPersonality
        SystemCallArchitectures UMask PrivateDevices NoNewPrivileges""",
    "Timer": "OnCalendar RandomizedDelaySec FixedRandomDelay Persistent",
    "Install": "WantedBy",
}


def settings(name: str) -> dict[tuple[str, str], str]:
    """(section, key) to value."""
    found: dict[tuple[str, str], str] = {}
    section = ""
    for line in (PLACE / name).read_text(encoding="ascii").splitlines():
        if head := re.fullmatch(r"\[(\w+)\]", line):
            section = head[1]
        elif line and not line.startswith("#"):
            key, equals, value = line.partition("=")
            assert equals, f"{name}: {line}"
            assert (section, key) not in found, f"{name}: {key} stands twice"
            found[section, key] = value
    return found


def service(name: str, key: str) -> str:
    """A setting of a service."""
    return settings(name)["Service", key]


def test_these_are_the_units() -> None:
    kinds = ("backup", "forget", "prove")
    assert [f"pullback-{kind}@.{suffix}" for kind in kinds for suffix in ("service", "timer")] == UNITS


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_says_only_what_systemd_knows(name: str) -> None:
    for section, key in settings(name):
        assert key in _KNOWN[section].split()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_has_nothing_to_complain_about(name: str, tmp_path: Path) -> None:
    program = f"{Path(sys.executable).parent / 'pullback'}"
    for other in UNITS:
        text = (PLACE / other).read_text().replace("ExecStart=pullback ", f"ExecStart={program} ")
        (tmp_path / other).write_text(text)
    line = ["systemd-analyze", "verify", "--man=no", f"./{name.replace('@', '@' + INSTANCE)}"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_unit_runs_is_a_command_that_there_is(name: str) -> None:
    """With --help behind it: then unknown options and commands are still refused, and nothing is done."""
    words = shlex.split(service(name, "ExecStart").replace("%i", INSTANCE))
    assert words[0] == "pullback"
    line = [sys.executable, "-m", "pullback.cli.main", *words[1:], "--help"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: pullback {words[1]} ")


@pytest.mark.parametrize("name", SERVICES)
def test_an_instance_is_the_name_of_something_configured(name: str) -> None:
    assert " %i" in service(name, "ExecStart")
    assert config.is_name(INSTANCE)


@pytest.mark.parametrize("name", SERVICES)
def test_a_stop_reaches_us_alone_and_leaves_us_time_to_clean_up(name: str) -> None:
    """The guard must outlive us: systemd kills it with any other mode."""
    assert service(name, "KillMode") == "process"
    assert service(name, "KillSignal") == "SIGTERM"
    needed = 10 + hooks.INTERRUPTED_SECONDS + hooks.GRACE_SECONDS
    assert int(service(name, "TimeoutStopSec")) > 2 * needed
    assert service(name, "TimeoutStartSec") == "infinity"


@pytest.mark.parametrize("name", SERVICES)
def test_a_warning_and_a_stop_are_no_failures(name: str) -> None:
    codes = {int(word) for word in service(name, "SuccessExitStatus").split()}
    assert codes == {Exit.WARNED, Exit.TERMINATED}


def test_the_guest_does_not_wait_for_a_process_that_was_made_slow() -> None:
    keys = {key for _, key in settings("pullback-backup@.service")}
    assert not keys & {"Nice", "CPUWeight", "IOWeight", "CPUQuota", "IOSchedulingClass", "MemoryMax"}


def test_qemu_finds_what_we_make_under_the_same_name() -> None:
    keys = {key for _, key in settings("pullback-backup@.service")}
    assert not keys & {"PrivateTmp", "ProtectHome", "RootDirectory", "PrivateDevices", "RuntimeDirectory"}


@pytest.mark.parametrize("name", TIMERS)
def test_a_timer_catches_up_and_spreads_its_starts(name: str) -> None:
    known = settings(name)
    assert known["Timer", "Persistent"] == "yes"
    assert known["Timer", "RandomizedDelaySec"]
    assert known["Install", "WantedBy"] == "timers.target"
    assert name.replace(".timer", ".service") in SERVICES
