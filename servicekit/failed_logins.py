"""How often one address may fail to prove who it is: guessing is slow, and nobody is locked out (S11).

The rule: every credential is looked at, however many before it were wrong. Only what a wrong one is answered changes,
and that the log hears no more of it. Whoever has a good one at the same address notices nothing.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from servicekit.errors import ServiceError, TooManyRequests, Unauthenticated
from servicekit.pace import Flood
from servicekit.source import Source, owner

log = logging.getLogger(__name__)


class TooManyFailures(TooManyRequests):
    """Credentials from this address were wrong too often of late; so was this one."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(
            "Invalid access token, and too many of them from this address. Use a valid one, or try again in"
            f" {retry_after} s.",
            retry_after=retry_after,
        )


class FailedLogins:
    """Counts the failures of each address: `per_minute` in the long run, twice that at once; 0: any number.

    `now` tells seconds on a clock that nobody can set.
    """

    def __init__(self, per_minute: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._flood = Flood(per_minute, now=now) if per_minute else None

    def refusal(self, error: ServiceError, source: Source, facts: dict[str, str]) -> ServiceError:
        """Counts that a request from `source` was refused for its credential; returns what it is to be answered.

        The log is told, with `facts`, as long as there are not too many.
        """
        address = owner(source.address)
        if self._flood is None or not (wait := self._flood.wait(address)):
            log.info("credential refused", extra=facts | {"reason": error.reason} | source.fields())
            return error
        if self._flood.begins(address):
            log.warning("too many credentials refused, no more of this address are logged", extra=source.fields())
        # To send none at all is no guess, and clients look for that answer.
        return error if isinstance(error, Unauthenticated) else TooManyFailures(math.ceil(wait))
