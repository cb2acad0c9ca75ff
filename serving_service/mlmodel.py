"""What a model takes and gives, as its `MLmodel` file says.

Whoever registers a model writes that file, so nothing in it is believed: it is read as a stream of YAML events
(`plain_yaml.py`), aliases lead nowhere, and its size and the depth and number of its parts are bounded. MLflow is not
asked, since this service does not import it.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serving_service import plain_yaml
from serving_service.plain_yaml import NOTHING, UnusableYaml

FILE = "MLmodel"

MOST_BYTES = 1 << 20
"""Of the file: a signature of ten thousand columns has room."""

MOST_PARTS = 20_000
"""How many objects and lists the three parts of a signature may hold together."""

DEEPEST = 32
"""How many of them may stand inside each other."""

_TRUE = frozenset(("true", "True", "TRUE"))


class UnusableSignature(Exception):
    """A signature that cannot be understood; the text says why, for people."""


@dataclass(frozen=True)
class Signature:
    """The three parts of a signature, as MLflow writes them: lists of objects, whose content is still to be checked."""

    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    params: list[dict[str, Any]]
    is_from_type_hint: bool = False
    """Whether the model says by a type hint what it takes; MLflow lets such a model have `inputs` only."""


def read(folder: Path) -> Signature | None:
    """The signature of the model in a folder; None when it has none that says what it takes.

    Raises UnusableSignature, and OSError when the file is gone.
    """
    path = folder / FILE
    if not stat.S_ISREG(path.lstat().st_mode):
        raise UnusableSignature(f"its {FILE} is no file")
    with path.open("rb") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise UnusableSignature(f"its {FILE} is larger than {MOST_BYTES} bytes")
    return parsed(text)


def parsed(text: bytes) -> Signature | None:
    """The signature that stands in the text of an MLmodel file; as `read`."""
    try:
        found = dict(_scalars(text))
    except UnusableYaml as error:
        raise UnusableSignature(f"its {FILE} {error}") from None
    inputs, outputs, params = (_list(found.get(("signature", part)), part) for part in ("inputs", "outputs", "params"))
    if not inputs:
        return None
    _check_bounds([inputs, outputs, params])
    return Signature(inputs, outputs, params, found.get(("is_signature_from_type_hint",)) in _TRUE)


@dataclass(slots=True)
class _Open:
    """A YAML collection that has begun."""

    is_mapping: bool
    key: str | None = None
    """The key whose value comes next; None where a key comes next, and in a sequence."""


def _scalars(text: bytes) -> Iterator[tuple[tuple[str, ...], str]]:
    """The values of the file's mapping, and of mappings in it, that are texts, with the keys that lead there."""
    around: list[_Open] = []
    for event in plain_yaml.events(text):
        if isinstance(event, yaml.CollectionStartEvent):
            if around and around[-1].is_mapping and around[-1].key is None:
                raise UnusableSignature(f"its {FILE} has a key that is no text")
            around.append(_Open(isinstance(event, yaml.MappingStartEvent)))
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            around.pop()
        elif not isinstance(event, yaml.NodeEvent) or not around:
            continue
        elif around[-1].is_mapping and around[-1].key is None:
            if not isinstance(event, yaml.ScalarEvent):
                raise UnusableSignature(f"its {FILE} has a key that is no text")
            around[-1].key = event.value
            continue
        elif all(one.is_mapping for one in around):
            path = tuple(one.key or "" for one in around)
            if isinstance(event, yaml.ScalarEvent):
                yield path, event.value
            elif path[0] == "signature":
                raise UnusableSignature("its signature refers to another part of the file")
        if around:
            around[-1].key = None


def _list(text: str | None, part: str) -> list[dict[str, Any]]:
    if text is None or text in NOTHING:
        return []
    try:
        # What JSON has no words for is no value of ours either.
        value = json.loads(text, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise UnusableSignature(f"the {part} of its signature are no JSON list of objects")
    return value


def _check_bounds(parts: list[Any]) -> None:
    """Raises UnusableSignature for what is too much, too deep, or no text that could be handed on."""
    level, count = parts, 0
    for _ in range(DEEPEST):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        count += len(level)
        if count > MOST_PARTS:
            raise UnusableSignature(f"its signature has more than {MOST_PARTS} parts")
        if not level:
            break
    else:
        raise UnusableSignature(f"its signature nests deeper than {DEEPEST} levels")
    try:
        json.dumps(parts, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UnusableSignature("its signature holds half a character") from None
