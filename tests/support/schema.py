"""The JSON that commands print and write, as a JSON Schema: docs/schema.json.

``python -m tests.support.schema`` writes it anew. The report's part follows from the types in _output/form.py.
"""

from __future__ import annotations

import json
import types
import typing
from pathlib import Path
from typing import Any

from rankspawn import GroupReport

PATH = Path(__file__).parent.parent.parent / "docs" / "schema.json"

_SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
IDS = {"type": "string", "pattern": r"^(\d+(-\d+)?(,\d+(-\d+)?)*)?$", "description": "as the kernel lists ids: 0-3,8"}
NOTES = {"type": "array", "items": {"type": "string"}}


def _of_type(kind: Any, found: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type's values; those of TypedDicts are put into ``found``."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_of_type(part, found) for part in parts]}
    if origin is list:
        return {"type": "array", "items": _of_type(parts[0], found)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of_type(parts[1], found)}
    if typing.is_typeddict(kind):
        if kind.__name__ not in found:
            found[kind.__name__] = {}
            fields = {name: _of_type(one, found) for name, one in typing.get_type_hints(kind).items()}
            found[kind.__name__] = _object(fields, sorted(kind.__required_keys__))
        return {"$ref": f"#/$defs/{kind.__name__}"}
    return {"type": _SIMPLE[kind]}


def _object(fields: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": [*fields] if required is None else required}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def schema() -> dict[str, Any]:
    """What docs/schema.json has. A field that is not named may come with any version."""
    text, number, ids = {"type": "string"}, {"type": "integer"}, {"$ref": "#/$defs/ids"}
    version = {"const": 1}
    found: dict[str, Any] = {"ids": IDS}
    device = _object({"address": text, "node": number, "local_cpus": ids, "vendor": text, "name": text, "uuid": text})
    found["device"] = device

    def listed(fields: dict[str, Any]) -> dict[str, Any]:
        return {"type": "array", "items": _object(fields)}

    some_cpus = listed({"id": number, "cpus": ids})
    distances = {"type": "object", "additionalProperties": number}
    found["topology"] = _object(
        {
            "version": version, "root": text, "cpus": ids, "offline": ids, "allowed_cpus": ids, "allowed_nodes": ids,
            "nodes": listed({"id": number, "cpus": ids, "memory": number, "distances": distances}),
            "sockets": some_cpus, "dies": some_cpus, "cores": listed({"cpus": ids, "kind": text}),
            "caches": listed({"level": number, "cpus": ids}),
            "devices": {"type": "array", "items": {"$ref": "#/$defs/device"}}, "notes": NOTES,
        }
    )  # fmt: skip
    rank = {
        "rank": number, "cpus": _or_null(ids), "memory": _or_null(text), "required": {"type": "boolean"},
        "node": _or_null(number), "device": _or_null({"$ref": "#/$defs/device"}), "omp_num_threads": number,
        "notes": NOTES,
    }  # fmt: skip
    found["plan"] = _object({"version": version, "ranks": listed(rank), "notes": NOTES})
    findings = {"type": "object", "additionalProperties": text}
    found["doctor"] = _object({"version": version, "bound_at_birth": {"type": "boolean"}, "findings": findings})
    _of_type(GroupReport, found)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "rankspawn: topology --json, plan --json, doctor --json, and run --report (GroupReport)",
        "anyOf": [{"$ref": f"#/$defs/{name}"} for name in ("topology", "plan", "doctor", "GroupReport")],
        "$defs": found,
    }


if __name__ == "__main__":
    PATH.write_text(json.dumps(schema(), indent=1) + "\n")
