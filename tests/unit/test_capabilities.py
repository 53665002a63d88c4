"""Reading `query-qmp-schema`: a real one of QEMU 7.2 (trimmed), with parts taken away, and hostile ones."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pullback import errors
from pullback.engine.capabilities import Capabilities, Schema, capabilities
from pullback.engine.probe import Defects

REAL: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data" / "qemu-7.2-schema.json").read_text())


def read(schema: object) -> Capabilities:
    """What a QEMU with that schema can do."""
    return capabilities("7.2.22", Schema(schema), Defects())


def without(command: str, case: str = "", member: str = "") -> list[dict[str, Any]]:
    """The real schema without a command, or without a case or member of its argument."""
    schema = copy.deepcopy(REAL)
    by_name = {entity["name"]: entity for entity in schema}
    if not case and not member:
        return [entity for entity in schema if entity["name"] != command]
    argument = by_name[by_name[command]["arg-type"]]
    if case and not member:
        argument["variants"] = [variant for variant in argument["variants"] if variant["case"] != case]
        return schema
    kind = by_name[next(variant["type"] for variant in argument["variants"] if variant["case"] == case)]
    kind["members"] = [entry for entry in kind["members"] if entry["name"] != member]
    return schema


def test_a_real_qemu_offers_both_engines_and_exports() -> None:
    can = read(REAL)
    assert (can.filter, can.classic, can.classic_breaks_snapshot) == (True, True, False)
    assert (can.exports, can.fuse, can.graph) == (True, True, True)


@pytest.mark.parametrize("member", ["on-cbw-error", "cbw-timeout"])
def test_a_filter_that_could_hurt_the_guest_is_not_used(member: str) -> None:
    assert not read(without("blockdev-add", "copy-before-write", member)).filter


@pytest.mark.parametrize("case", ["copy-before-write", "snapshot-access"])
def test_the_filter_needs_both_its_drivers(case: str) -> None:
    assert not read(without("blockdev-add", case)).filter


def test_what_is_missing_is_not_offered() -> None:
    assert not read(without("block-export-add", "fuse")).fuse
    assert not read(without("block-export-add")).exports
    assert not read(without("transaction")).classic
    assert not read(without("x-debug-query-block-graph")).graph


def test_the_classic_engine_of_a_later_qemu_protects_the_guest_too() -> None:
    schema = copy.deepcopy(REAL)
    by_name = {entity["name"]: entity for entity in schema}
    by_name[by_name["blockdev-backup"]["arg-type"]]["members"].append({"name": "on-cbw-error", "type": "x"})
    assert read(schema).classic_breaks_snapshot


def test_an_empty_schema_offers_nothing() -> None:
    can = read([])
    assert not any((can.filter, can.classic, can.exports, can.fuse, can.graph))


NAMES = st.sampled_from(["blockdev-add", "transaction", "0", "1"])
ENTITIES = st.dictionaries(
    st.sampled_from(["name", "arg-type", "members", "variants", "element-type", "type", "case", "meta-type"]),
    st.one_of(
        NAMES, st.none(), st.integers(), st.lists(st.dictionaries(st.sampled_from(["name", "type", "case"]), NAMES))
    ),
)


@given(st.one_of(st.none(), st.integers(), st.lists(ENTITIES, max_size=5)))
def test_a_hostile_schema_is_a_bad_reply_and_nothing_else(schema: object) -> None:
    with suppress(errors.BadReply):
        read(schema)
