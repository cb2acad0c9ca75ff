"""Values that a JSON Schema allows, made without chance: as much of the dialect as our descriptions of models use.

Each turn makes another choice wherever there is one, so a few turns see each alternative and each edge of a type.
"""

from __future__ import annotations

from typing import Any

TURNS = 12
"""More than any type has edges, and a multiple of two and three."""

ANYTHING: Any = {"role": "user", "content": "hi"}
"""Where a schema says nothing: what LLM models take there, too."""

_EDGES: dict[str, list[Any]] = {
    "boolean": [True, False],
    "int8": [0, -(2**7), 2**7 - 1],
    "int32": [0, -(2**31), 2**31 - 1],
    "int64": [0, -(2**63), 2**63 - 1],
    "float": [0.5, -1000.0, 3.0],
    "double": [0.5, -1e300, 3.0],
    "number": [0.5, 3.0],
    "base64": ["AP8=", ""],
    "time": ["2026-01-02T03:04:05", "1970-01-01T00:00:00"],
    "string": ["x", "", "\u00fc\u2028"],
}


def bodies(schema: dict[str, Any]) -> list[Any]:
    """Values of every alternative, none twice: every other one with nothing that may be left out."""
    made: list[Any] = []
    for alternative in schema.get("oneOf", [schema]):
        for turn in range(TURNS):
            body = _value(alternative, turn, is_full=turn % 2 == 0)
            if body not in made:
                made.append(body)
    return made


def _value(schema: dict[str, Any], turn: int, *, is_full: bool) -> Any:
    if "const" in schema:
        return schema["const"]
    if choices := schema.get("anyOf"):
        return _value(choices[turn // 2 % len(choices)], turn, is_full=is_full)
    if schema.get("type") == "object":
        return _object(schema, turn, is_full=is_full)
    if schema.get("type") == "array":
        return _array(schema, turn, is_full=is_full)
    if "type" not in schema:
        return ANYTHING
    edges = _EDGES[_kind(schema)]
    return edges[turn // 2 % len(edges)]


def _kind(schema: dict[str, Any]) -> str:
    if "contentEncoding" in schema:
        return "base64"
    if "pattern" in schema:
        return "time"
    return str(schema.get("format", schema["type"]))


def _object(schema: dict[str, Any], turn: int, *, is_full: bool) -> Any:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    names = [name for name in properties if is_full or name in required]
    made = {name: _value(properties[name], turn, is_full=is_full) for name in names}
    if is_full and isinstance(more := schema.get("additionalProperties"), dict):
        made["more"] = _value(more, turn, is_full=is_full)
    return made


def _array(schema: dict[str, Any], turn: int, *, is_full: bool) -> list[Any]:
    if "prefixItems" in schema:
        return [_value(each, turn, is_full=is_full) for each in schema["prefixItems"]]
    size = schema.get("maxItems", max(schema.get("minItems", 0), 1 + turn // 6 % 2))
    # In one list the same may be left out of each: a table has no holes.
    return [_value(schema.get("items", {}), turn + 2 * number, is_full=is_full) for number in range(size)]
