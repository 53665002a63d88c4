"""Who ends the connecting to an export leaves no socket open: QEMU waits in its main loop for a silent client."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from pullback import errors
from pullback.model.exports import NbdAddress
from pullback.progress import Cancel
from pullback.transfer import NbdEndpoint

_SECONDS = 10.0


@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled", "too late"])
def test_a_client_that_gave_up_connecting_is_gone_while_its_error_is_still_held(
    tmp_path: Path, cancelled: bool
) -> None:
    path, cancel = tmp_path / "nbd.sock", Cancel()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(_SECONDS)
        accepted: list[socket.socket] = []

        def accept() -> None:
            accepted.append(server.accept()[0])
            if cancelled:
                cancel.cancel(errors.Interrupted())

        thread = threading.Thread(target=accept)
        thread.start()
        with pytest.raises((errors.Interrupted, errors.EndpointTimeout)) as caught:
            NbdEndpoint(NbdAddress(socket=path, export="x"), cancel=cancel, timeout=_SECONDS if cancelled else 0.3)
        thread.join()
        accepted[0].settimeout(_SECONDS)
        assert accepted[0].recv(1) == b""  # closed
        accepted[0].close()
    assert caught.value.__traceback__ is not None
