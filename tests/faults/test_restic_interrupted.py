"""Ctrl-C and SIGTERM while a repository's server does not answer: nobody waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid

import pytest

import kit
import proxy
import seaweed
from kit import MakeBox
from pullback.repo.restic import keys
from pullback.repo.restic.repository import create_repository
from pullback.repo.store.s3 import S3Store
from pullback.units import MiB


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_hangs_does_not_keep_a_backup_from_ending(
    make_box: MakeBox, s3_server: seaweed.Server, number: signal.Signals
) -> None:
    box = make_box(kind="restic")
    for step in range(8):
        box.write("vda", step + 1, step * MiB, MiB)
    bucket, released = f"hang-{uuid.uuid4().hex}", threading.Event()
    s3_server.make_bucket(bucket)
    with proxy.before(s3_server.port) as between:
        place = s3_server.place(bucket, port=between.port)
        environ = os.environ | s3_server.environ
        store = S3Store(place, environ)
        create_repository(store, kit.PASSWORD, caches=box.directory / "c", cost=keys.Cost(1024, 8, 1)).close()
        data = f"/{bucket}/data/"
        between.rule = lambda request: (
            proxy.Fault(until=released) if request.method == "PUT" and request.path.startswith(data) else None
        )
        words = [sys.executable, "-m", "pullback.cli.main", "backup", f"qmp:{box.qmp}", "-r", place.url]
        environ |= {
            "PULLBACK_STATE_DIR": str(box.directory / "state"),
            "PULLBACK_PASSWORD_FILE": str(kit.password_file(box.directory)),
        }
        with subprocess.Popen(words, env=environ, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 30
            while not any(seen.method == "PUT" and seen.path.startswith(data) for seen in between.seen):
                assert time.monotonic() < deadline
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.05)
            begun = time.monotonic()
            process.send_signal(number)
            try:
                status = process.wait(40)
            finally:
                released.set()
                process.kill()
    assert status == 128 + number
    assert time.monotonic() - begun < 20
    assert box.leftovers() == []
    assert box.checkpoints("vda") == []
