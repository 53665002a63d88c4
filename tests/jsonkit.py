"""Judging what `--json` printed by its description."""

from __future__ import annotations

from typing import Any

from pullback.cli.documents import Field, Kind

_TYPES: dict[Kind, tuple[type, ...]] = {
    Kind.TEXT: (str,),
    Kind.INTEGER: (int,),
    Kind.NUMBER: (int, float),
    Kind.FLAG: (bool,),
    Kind.TEXTS: (list,),
    Kind.OBJECT: (dict,),
    Kind.OBJECTS: (list,),
    Kind.MAP: (dict,),
}


def mismatches(value: dict[str, Any], fields: tuple[Field, ...], where: str = "") -> list[str]:
    """Where an object is not what its description says."""
    known = {field.name for field in fields}
    found = [f"{where}{name}: not described" for name in value if name not in known]
    for field in fields:
        name = f"{where}{field.name}"
        if field.name not in value:
            found.append(f"{name}: missing")
        else:
            found += _mismatches(value[field.name], field, name)
    return found


def _mismatches(value: object, field: Field, name: str) -> list[str]:
    if value is None:
        return [] if field.optional else [f"{name}: null"]
    if not isinstance(value, _TYPES[field.kind]) or (isinstance(value, bool) and field.kind is not Kind.FLAG):
        return [f"{name}: {value!r} is no {field.kind}"]
    if field.words and value not in field.words:
        return [f"{name}: {value!r}"]
    if isinstance(value, list) and field.kind is Kind.TEXTS:
        return [f"{name}: {item!r}" for item in value if not isinstance(item, str)]
    if isinstance(value, list):
        return [line for item in value for line in mismatches(item, field.inside, f"{name}[].")]
    if isinstance(value, dict) and field.kind is Kind.OBJECT:
        return mismatches(value, field.inside, f"{name}.")
    return []
