"""What the tests of lasting snapshots, jobs and exports share."""

from __future__ import annotations

import subprocess
from typing import Any

from kit import CLUSTER
from pullback import errors, sync
from pullback.model.exports import Served

TUESDAY = {"name": "tuesday"}


def read(served: Served) -> bytes:
    """All of an export."""
    done = subprocess.run(["nbdcopy", served.uri, "-"], capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def dirty(served: Served) -> set[int]:
    """Clusters that an export's bitmap says have changed."""
    found = set()
    context = served.contexts[0][0]
    done = subprocess.run(["nbdinfo", f"--map={context}", served.uri], capture_output=True, timeout=30, check=True)
    for line in done.stdout.decode().splitlines():
        start, length, flag = (int(word) for word in line.split()[:3])
        if flag == 1:
            found |= set(range(start // CLUSTER, (start + length) // CLUSTER))
    return found


def names(machine: sync.Machine) -> list[str]:
    """Checkpoints."""
    return [checkpoint.name for checkpoint in machine.checkpoint_list().checkpoints]


def job(machine: sync.Machine) -> Any:
    """The job that is under way."""
    try:
        return machine.backup_info()
    except errors.NoJob:
        return None
