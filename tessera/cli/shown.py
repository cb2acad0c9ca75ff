"""How commands show what a platform tells them.

The rule: what models print and people write is not ours; on a terminal its control characters are spelled out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from urllib.parse import quote

WHERE = (
    "The platform is the one that DATABRICKS_HOST and DATABRICKS_TOKEN name; REQUESTS_CA_BUNDLE names a file of"
    " certificates to believe, where those of the system are not enough."
)
"""What helps with every command that asks a platform."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def segment(name: str) -> str:
    """A name as a part of a path."""
    return quote(name, safe="")


def text(said: str) -> None:
    """Prints a text as it is, at once."""
    if sys.stdout.isatty():
        said = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", said)
    sys.stdout.write(said)
    sys.stdout.flush()


def lines(said: Iterable[str]) -> None:
    """Prints lines."""
    for line in said:
        text(f"{line}\n")


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns of the width that they need, under their names."""
    everything = [names, *rows]
    widths = [max(len(row[column]) for row in everything) for column in range(len(names))]
    for row in everything:
        padded = (each.ljust(width) for each, width in zip(row, widths, strict=True))
        text("  ".join(padded).rstrip() + "\n")
