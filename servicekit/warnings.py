"""Warnings: what a caller should know although all went well.

A use case says one while it serves a request. It is logged as an event and travels with a successful answer: over gRPC
as trailing metadata `x-tessera-warning`, over REST as a header `X-Tessera-Warning`. A warning never holds a value.
"""

from __future__ import annotations

import logging

from servicekit import context

log = logging.getLogger(__name__)


def warn(event: str, text: str, **facts: str) -> None:
    """Warns the caller of the request being served with a sentence, and logs `event` with `facts`.

    What metadata cannot carry, anything but printable ASCII, travels escaped.
    """
    log.warning(event, extra=facts)
    request = context.current()
    if request is not None:
        request.warnings.append(_as_metadata(text))


def _as_metadata(text: str) -> str:
    return "".join(letter if " " <= letter <= "~" else ascii(letter)[1:-1] for letter in text)
