"""JSON texts: read and written as the standard library would, but by orjson wherever the result is the same.

orjson is used if the model's environment has it. It refuses some of what `json` takes (`NaN`, lone surrogates, other
encodings than UTF-8, very deep nesting), and what it refuses is given to `json`, whose word counts.
"""

import json
import re
from collections.abc import Callable
from typing import Any

try:
    import orjson
except ImportError:  # it is no dependency of MLflow
    orjson = None  # type: ignore[assignment]

_LONG_NUMBER = re.compile(rb"[0-9]{19}")  # an integer beyond 64 bits is a float to orjson


def read(text: bytes) -> Any:
    """What `json.loads` makes of it. Raises ValueError, or RecursionError."""
    if orjson is not None and _LONG_NUMBER.search(text) is None:
        try:
            return orjson.loads(text)
        except ValueError:
            pass
    return json.loads(text)


def write(value: Any, *, simpler: Callable[[Any], Any], otherwise: Callable[[Any], str]) -> bytes:
    """What `otherwise` says of it, or another text of the same value.

    `simpler` is asked about values that JSON does not know; for those that it does not know either it raises TypeError.
    """
    if orjson is not None:
        try:
            text = orjson.dumps(value, simpler, orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_DATACLASS)
        except TypeError:
            pass
        else:
            # NaN and infinities are `null` to orjson and themselves to others. A `null` may also be one.
            if b"null" not in text:
                return text
    return otherwise(value).encode()
