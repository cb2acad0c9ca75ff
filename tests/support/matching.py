"""Answers compared with what a case expects of them: the parts that matter, written as data.

In an expectation an object names the fields that matter, and a list is compared item by item. Some texts stand for more
than themselves: `<text>` (not empty), `<number>` (whole, no boolean), `<hex32>`, `<any>`, and `<absent>`; an object
`{"$includes": [...]}` stands for a list that holds each of these somewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_KINDS: dict[str, Callable[[Any], bool]] = {
    "<any>": lambda found: True,
    "<text>": lambda found: isinstance(found, str) and found != "",
    "<number>": lambda found: isinstance(found, int) and not isinstance(found, bool),
    "<hex32>": lambda found: isinstance(found, str) and re.fullmatch("[0-9a-f]{32}", found) is not None,
}


def differences(expected: Any, found: Any, at: str = "answer") -> list[str]:
    """What is not as expected, one line each; empty when all is."""
    if isinstance(expected, str) and expected in _KINDS:
        return [] if _KINDS[expected](found) else [f"{at}: expected {expected}, found {found!r}"]
    if isinstance(expected, dict) and "$includes" in expected:
        if not isinstance(found, list):
            return [f"{at}: expected a list, found {found!r}"]
        missing = [one for one in expected["$includes"] if all(differences(one, item) for item in found)]
        return [f"{at}: nothing in it is like {one!r}" for one in missing]
    if isinstance(expected, dict) and isinstance(found, dict):
        lines = []
        for name, value in expected.items():
            if value == "<absent>":
                lines += [f"{at}.{name}: expected nothing, found {found[name]!r}"] if name in found else []
            elif name not in found:
                lines.append(f"{at}.{name}: is missing")
            else:
                lines += differences(value, found[name], f"{at}.{name}")
        return lines
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return [
            line
            for index, (value, item) in enumerate(zip(expected, found, strict=True))
            for line in differences(value, item, f"{at}[{index}]")
        ]
    # As JSON they differ although Python has them equal.
    is_same = expected == found and isinstance(expected, bool) == isinstance(found, bool)
    return [] if is_same else [f"{at}: expected {expected!r}, found {found!r}"]
