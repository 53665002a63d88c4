"""The TPM's state in a manifest: what is written reads back, and nothing else is ever read."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback.model import tpm
from pullback.model.tpm import Backend, TpmFile, TpmState, Version

STATE = TpmState(
    version=Version.TPM_2_0,
    backend=Backend.DIR,
    encrypted=True,
    files=(TpmFile(name="tpm2-00.permall", data=b"state"), TpmFile(name="tpm2-00.volatilestate", data=b"more")),
)
SINGLE = replace(STATE, backend=Backend.FILE, files=(TpmFile(name=tpm.SINGLE, data=b"x"),))


def document(state: TpmState = STATE) -> dict[str, Any]:
    """Through JSON."""
    found: dict[str, Any] = json.loads(json.dumps(tpm.document(state.header)))
    return found


@pytest.mark.parametrize("state", [STATE, SINGLE])
def test_it_reads_back_with_its_bytes(state: TpmState) -> None:
    header = tpm.parse(document(state))
    assert header == state.header
    contents = {file.name: file.data for file in state.files}
    assert tpm.with_data(header, lambda file: contents[file.name]) == state
    with pytest.raises(ValueError, match="not what was stored"):
        tpm.with_data(header, lambda file: b"other")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "tpm2-00.permall/..", "tpm2-01.permall", "TMP2-00.permall", "", ".lock", "tpm.state"]
)
def test_a_file_has_no_name_but_those_of_swtpm(name: str) -> None:
    told = document()
    told["files"][0]["name"] = name
    with pytest.raises(ValueError, match="name"):
        tpm.parse(told)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", "3.0"),
        ("backend", "network"),
        ("encrypted", 1),
        ("files", []),
        ("files", [document()["files"][0]] * 2),
        ("files", [document()["files"][0]] * 4),
        ("surplus", None),
    ],
)
def test_what_breaks_a_rule_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        tpm.parse(document() | {key: value})


@pytest.mark.parametrize(("key", "value"), [("size", 0), ("size", tpm.MAX_FILE + 1), ("size", True), ("sha256", "x")])
def test_a_file_that_breaks_a_rule_is_refused(key: str, value: object) -> None:
    told = document()
    told["files"][0][key] = value
    with pytest.raises(ValueError, match="TPM"):
        tpm.parse(told)


def test_later_keys_are_passed_over_when_they_may_be() -> None:
    told = document() | {"surplus": 1}
    told["files"][0]["surplus"] = 2
    assert tpm.parse(told, lenient=True) == STATE.header


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@given(st.sampled_from(["version", "backend", "encrypted", "files"]), _JSON)
def test_whatever_stands_there_is_read_or_refused(key: str, value: object) -> None:
    with contextlib.suppress(ValueError):
        tpm.parse(document() | {key: value})
