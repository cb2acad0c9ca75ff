"""PatchOp of SCIM (RFC 7644, section 3.5.2) as a pure function from a document to a document.

A document is what can be changed about a resource, as plain JSON values under SCIM's names. The rule: an operation that
names what it cannot change is refused and nothing is done; in an operation without a path, unknown and fixed attributes
are passed over, as in every other body. Whether the result is any good is judged elsewhere.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from secrets_service import scim_filter
from secrets_service.errors import InvalidPath, NoTarget, NotChangeable
from secrets_service.scim_filter import Filter
from servicekit.errors import InvalidParameter

MOST_OPERATIONS = 100
LONGEST_PATH = 1_024

Document = dict[str, Any]
"""SCIM names to texts, booleans, objects of texts, and lists of objects with a `value`."""

_PATH = re.compile(r"\s*(?P<attribute>[A-Za-z]+)(?:\[(?P<filter>.*)\])?(?:\.(?P<part>[A-Za-z]+))?\s*", re.DOTALL)
_FIXED = frozenset({"id", "schemas", "meta", "groups", "applicationid"})


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What can be changed about one kind of resource."""

    single: frozenset[str]
    complex: Mapping[str, frozenset[str]]
    """Attributes that are one object, and its parts."""
    multiple: Mapping[str, frozenset[str]]
    """Attributes that are lists of objects, and their parts; `value` is always one."""

    def named(self, name: str) -> str | None:
        """The attribute of that name, in any letter case."""
        return _named(name, {*self.single, *self.complex, *self.multiple})


@dataclass(frozen=True, slots=True)
class Operation:
    """One change, as it was sent; `value` is None when there is none."""

    op: str
    path: str
    value: Any


@dataclass(frozen=True, slots=True)
class _Target:
    """What a path names."""

    attribute: str
    part: str | None
    filter: Filter | None


def patched(document: Document, operations: Sequence[Operation], shape: Shape) -> Document:
    """The document with all operations done; raises InvalidParameter, InvalidPath, NoTarget, NotChangeable."""
    if not 1 <= len(operations) <= MOST_OPERATIONS:
        raise InvalidParameter(f"Operations: 1 to {MOST_OPERATIONS}.")
    result = copy.deepcopy(document)
    for operation in operations:
        verb = operation.op.lower()
        if verb not in ("add", "remove", "replace"):
            raise InvalidParameter("Operations.op: one of add, remove, replace.")
        if operation.path:
            _apply(result, verb, _target(operation.path, shape), operation.value, shape)
        elif verb == "remove":
            raise NoTarget("Operations.path: needed to remove something.")
        else:
            for name, value in _object("Operations.value", operation.value).items():
                if (target := _loose_target(name, shape)) is not None:
                    _apply(result, verb, target, value, shape)
    return result


def _target(path: str, shape: Shape) -> _Target:
    match = _PATH.fullmatch(path[:LONGEST_PATH])
    attribute = shape.named(match["attribute"]) if match else None
    if match is None or attribute is None:
        if match is not None and match["attribute"].lower() in _FIXED:
            raise NotChangeable(f"Operations.path: {match['attribute']} cannot be changed.")
        raise InvalidPath
    parts = shape.multiple.get(attribute) or shape.complex.get(attribute) or frozenset()
    part = _named(match["part"], parts) if match["part"] else None
    is_list = attribute in shape.multiple
    if (match["part"] and part is None) or (match["filter"] is not None and not is_list):
        raise InvalidPath
    if is_list and part is not None and match["filter"] is None:
        raise InvalidPath
    wanted = None if match["filter"] is None else scim_filter.parse(match["filter"], parts)
    return _Target(attribute, part, wanted)


def _loose_target(name: str, shape: Shape) -> _Target | None:
    """What a member of a path-less value names, if it can be changed: `displayName`, but also `name.givenName`."""
    attribute, _, part = name.partition(".")
    known = shape.named(attribute)
    if known is None:
        return None
    return _target(name, shape) if part else _Target(known, None, None)


def _apply(document: Document, verb: str, target: _Target, value: Any, shape: Shape) -> None:
    name = target.attribute
    if value is None and verb != "remove":
        verb = "remove"  # null stands for nothing (RFC 7643, section 2.5)
    if name in shape.single:
        _put(document, name, verb, value)
    elif name in shape.complex:
        parts = shape.complex[name]
        if target.part is not None:
            _put(document.setdefault(name, {}), target.part, verb, value)
        elif verb == "remove":
            document.pop(name, None)
        else:
            document.setdefault(name, {}).update(_known_parts(name, value, parts))
    else:
        items = document.setdefault(name, [])
        change = _changed if target.filter is None else partial(_changed_where, filter=target.filter, part=target.part)
        document[name] = change(items, verb, value, name=name, parts=shape.multiple[name])


def _put(holder: dict[str, Any], name: str, verb: str, value: Any) -> None:
    if verb == "remove":
        holder.pop(name, None)
    else:
        holder[name] = value


def _changed(items: list[Any], verb: str, value: Any, *, name: str, parts: frozenset[str]) -> list[Any]:
    """A list after an operation on all of it."""
    if verb == "remove" and value is None:
        return []
    given = [_item(name, each, parts) for each in (value if isinstance(value, list) else [value])]
    named = {each["value"] for each in given}
    match verb:
        case "replace":
            return given
        case "remove":
            return [each for each in items if each.get("value") not in named]
        case _:
            return [each for each in items if each.get("value") not in named] + given


def _changed_where(
    items: list[Any],
    verb: str,
    value: Any,
    *,
    name: str,
    parts: frozenset[str],
    filter: Filter,
    part: str | None,
) -> list[Any]:
    """A list after an operation on those of its values that match. To remove what is not there is no mistake."""
    chosen = [scim_filter.matches(filter, _texts_of(each)) for each in items]
    if verb == "remove" and part is None:
        return [each for each, is_chosen in zip(items, chosen, strict=True) if not is_chosen]
    if verb != "remove" and not any(chosen):
        raise NoTarget(f"Operations.path: no value of {name} matches the filter.")
    for each in (item for item, is_chosen in zip(items, chosen, strict=True) if is_chosen):
        if part is not None:
            _put(each, part, verb, value)
        else:
            each.update(_known_parts(name, value, parts))
    return items


def _texts_of(item: Mapping[str, Any]) -> Callable[[str], Sequence[str]]:
    def texts(part: str) -> Sequence[str]:
        value = item.get(part)
        return () if value is None else (str(value).lower() if isinstance(value, bool) else str(value),)

    return texts


def _item(name: str, value: Any, parts: frozenset[str]) -> dict[str, Any]:
    """A value of a list, which may be given as its bare text."""
    item = _known_parts(name, value if isinstance(value, dict) else {"value": value}, parts)
    found = item.get("value")
    if isinstance(found, float) and found.is_integer():  # an id that was sent as a number
        item["value"] = found = str(int(found))
    if not isinstance(found, str):
        raise InvalidParameter(f"{name}: each one is an object with a value, which is a text.")
    return item


def _known_parts(name: str, value: Any, parts: frozenset[str]) -> dict[str, Any]:
    found = {_named(part, parts): each for part, each in _object(name, value).items()}
    return {part: each for part, each in found.items() if part is not None}


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidParameter(f"{name}: expected an object.")
    return value


def _named(name: str, known: frozenset[str] | set[str]) -> str | None:
    return next((each for each in known if each.lower() == name.lower()), None)
