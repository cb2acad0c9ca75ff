"""SCIM filters: texts such as `userName sw "a" and (active eq true or displayName co "b")`, parsed once and bounded.

The grammar is that of the documentation (eq, ne, co, sw; `and` binds closer than `or`) with parentheses. Texts are
compared casefolded. Whatever does not parse, or names an attribute that cannot be filtered by, is refused as a whole:
a filter that is half understood would show, or remove, the wrong things.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from secrets_service import names
from secrets_service.errors import InvalidFilter

LONGEST = 4_096
MOST_COMPARISONS = 50
DEEPEST = 10

ACTIVE = "active"
"""The one attribute whose values are no texts."""


class Operator(StrEnum):
    """How two texts are compared; names are written in any letter case."""

    EQ = "eq"
    NE = "ne"
    CO = "co"
    SW = "sw"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One attribute and one text, which is casefolded; `ne` is true where `eq` is not."""

    attribute: str
    operator: Operator
    value: str


@dataclass(frozen=True, slots=True)
class AllOf:
    """True where all parts are."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """True where some part is."""

    parts: tuple[Filter, ...]


Filter = Comparison | AllOf | AnyOf

_TOKEN = re.compile(
    r'\s*(?:(?P<parenthesis>[()])|(?P<text>"(?:[^"\\\x00-\x1f]|\\.)*")|(?P<word>[A-Za-z][A-Za-z0-9_.$-]*))', re.ASCII
)


def parse(text: str, attributes: Iterable[str]) -> Filter:
    """The filter in `text`, over the attributes of these names; raises InvalidFilter."""
    if len(text) > LONGEST:
        raise InvalidFilter(f"has more than {LONGEST} characters.")
    return _Parser(_tokens(text), {name.lower(): name for name in attributes}).parse()


def matches(filter: Filter, values: Callable[[str], Sequence[str]]) -> bool:
    """Whether a filter is true of a thing, of which `values` tells the texts of an attribute."""
    match filter:
        case AllOf(parts):
            return all(matches(part, values) for part in parts)
        case AnyOf(parts):
            return any(matches(part, values) for part in parts)
        case Comparison(attribute, operator, sought):
            found = map(names.folded_principal, values(attribute))
            match operator:
                case Operator.EQ:
                    return sought in found
                case Operator.NE:
                    return sought not in found
                case Operator.CO:
                    return any(sought in value for value in found)
                case Operator.SW:
                    return any(value.startswith(sought) for value in found)


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    place = 0
    text = text.rstrip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise InvalidFilter(f"cannot be read from character {place + 1} on.")
        tokens.append(match[match.lastgroup or 0])
        place = match.end()
    return tokens


class _Parser:
    """Recursive descent; one method per rule of the grammar."""

    def __init__(self, tokens: list[str], attributes: dict[str, str]) -> None:
        self._tokens = tokens
        self._attributes = attributes
        self._place = 0
        self._depth = 0
        self._comparisons = 0

    def parse(self) -> Filter:
        found = self._any_of()
        if self._place < len(self._tokens):
            raise InvalidFilter("goes on where it should end. Join comparisons by and, or.")
        return found

    def _any_of(self) -> Filter:
        parts = [self._all_of()]
        while self._taken("or"):
            parts.append(self._all_of())
        return parts[0] if len(parts) == 1 else AnyOf(tuple(parts))

    def _all_of(self) -> Filter:
        parts = [self._one()]
        while self._taken("and"):
            parts.append(self._one())
        return parts[0] if len(parts) == 1 else AllOf(tuple(parts))

    def _one(self) -> Filter:
        if not self._taken("("):
            return self._comparison()
        self._depth += 1
        if self._depth > DEEPEST:
            raise InvalidFilter(f"has parentheses deeper than {DEEPEST} levels.")
        found = self._any_of()
        if not self._taken(")"):
            raise InvalidFilter("lacks a closing parenthesis.")
        self._depth -= 1
        return found

    def _comparison(self) -> Comparison:
        self._comparisons += 1
        if self._comparisons > MOST_COMPARISONS:
            raise InvalidFilter(f"has more than {MOST_COMPARISONS} comparisons.")
        attribute = self._attributes.get(self._next("an attribute").lower())
        if attribute is None:
            raise InvalidFilter(f"names no attribute that can be filtered by: {', '.join(self._attributes.values())}.")
        word = self._next("an operator").lower()
        if word not in list(Operator):
            raise InvalidFilter("has an operator other than eq, ne, co, sw.")
        operator = Operator(word)
        value = _value(self._next("a value"), is_flag=attribute == ACTIVE)
        if attribute == ACTIVE and (operator not in (Operator.EQ, Operator.NE) or value not in ("true", "false")):
            raise InvalidFilter("compares active with something other than eq or ne, true or false.")
        return Comparison(attribute, operator, value)

    def _next(self, what: str) -> str:
        if self._place == len(self._tokens):
            raise InvalidFilter(f'ends where {what} should stand. Write it as attribute operator "value".')
        self._place += 1
        return self._tokens[self._place - 1]

    def _taken(self, token: str) -> bool:
        is_next = self._place < len(self._tokens) and self._tokens[self._place].lower() == token
        self._place += is_next
        return is_next


def _value(token: str, *, is_flag: bool) -> str:
    """A quoted text, as it is compared; or true and false as they are."""
    if is_flag and not token.startswith('"'):
        return token.lower()
    try:
        text = json.loads(token) if token.startswith('"') else "\0"
        text.encode()
    except ValueError:  # an unknown escape, or half a surrogate pair
        text = "\0"
    if "\0" in text:  # nothing that is kept holds one, and SQL would stop reading there
        raise InvalidFilter("has a value that is no text in double quotes, or one with a NUL.")
    return names.folded_principal(text)
