"""YAML that somebody else wrote, read as what it is in the text: mappings, lists and texts.

The rule: nothing in it grows. It is read as a stream of events, never built into objects of its choice; their number
and how deep they stand in each other are bounded, and a part that stands for another is refused, since a few of them
stand for thousands.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

MOST_EVENTS = 20_000
"""MLflow writes some hundreds, since a signature is a few long texts to YAML."""

DEEPEST = 32
"""How many collections may stand inside each other."""

NOTHING = frozenset(("", "~", "null", "Null", "NULL"))
"""How a text says that there is none."""

# Written in C where the library was built with it; both read the same.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class UnusableYaml(Exception):
    """It cannot be read within the bounds; the text says what the file is or has, after its name."""


def events(text: bytes | str) -> Iterator[yaml.Event]:
    """The events of the first document; raises UnusableYaml."""
    depth = 0
    try:
        for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
            if number >= MOST_EVENTS:
                raise UnusableYaml(f"has more than {MOST_EVENTS} parts")
            if isinstance(event, yaml.DocumentEndEvent):
                return
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise UnusableYaml(f"nests deeper than {DEEPEST} levels")
            yield event
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UnusableYaml("is not YAML") from None


def content(text: bytes | str) -> Any:
    """What a document says: dict, list, str, or None; raises UnusableYaml."""
    nodes = (event for event in events(text) if isinstance(event, (yaml.NodeEvent, yaml.CollectionEndEvent)))
    return next((_value(event, nodes) for event in nodes), None)


def _value(event: yaml.Event, nodes: Iterator[yaml.Event]) -> Any:
    """What begins with an event; the events that belong to it are taken."""
    if isinstance(event, yaml.AliasEvent):
        raise UnusableYaml("refers to another part of itself")
    if isinstance(event, yaml.SequenceStartEvent):
        return [_value(each, nodes) for each in _until_end(nodes)]
    if isinstance(event, yaml.MappingStartEvent):
        return {_key(each): _value(next(nodes), nodes) for each in _until_end(nodes)}
    assert isinstance(event, yaml.ScalarEvent)
    is_plain, _ = event.implicit
    return None if is_plain and event.value in NOTHING else event.value


def _until_end(nodes: Iterator[yaml.Event]) -> Iterator[yaml.Event]:
    for event in nodes:
        if isinstance(event, yaml.CollectionEndEvent):
            return
        yield event


def _key(event: yaml.Event) -> str:
    if not isinstance(event, yaml.ScalarEvent):
        raise UnusableYaml("has a key that is no text")
    return str(event.value)
