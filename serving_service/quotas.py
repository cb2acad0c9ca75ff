"""How much concurrency may be provisioned, for one model and for all of them together, and how often endpoints may be
made or get another configuration (contract 5.6).

What counts of concurrency is the most that a configuration may have: of each endpoint that of the configuration that
is being deployed, or else of the active one. Stopped endpoints count too, so that they can be started at any time.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable

from servicekit.pace import Window
from serving_service import scaling
from serving_service.errors import ConcurrencyQuotaExceeded, TooManyEndpointChanges
from serving_service.model import EndpointConfig

MOST_OF_A_MODEL = 1_024
MOST_IN_ALL = 4_096

CHANGES_SECONDS = 300.0
"""In which endpoints may be made or changed so often."""


class EndpointChanges:
    """How often endpoints were made or changed of late: at the most `most` times, or any number when that is 0."""

    def __init__(self, most: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._window = Window(most, CHANGES_SECONDS, now=now) if most else None

    def check(self) -> None:
        """Raises TooManyEndpointChanges when one more would be refused; counts nothing."""
        self._refuse(lambda window: window.left("workspace"))

    def count(self) -> None:
        """Counts one that is about to be recorded; raises TooManyEndpointChanges.

        Not before: what is refused would else keep everybody from changes that are not.
        """
        self._refuse(lambda window: window.wait("workspace"))

    def _refuse(self, wait_of: Callable[[Window], float]) -> None:
        if self._window is not None and (wait := wait_of(self._window)):
            raise TooManyEndpointChanges(self._most, retry_after=math.ceil(wait))


def check(config: EndpointConfig, others: Iterable[EndpointConfig]) -> None:
    """Raises ConcurrencyQuotaExceeded when `config` asks for more than the `others` leave."""
    taken = _by_model(others)
    asked = _by_model((config,))
    for model, concurrency in asked.items():
        if taken[model] + concurrency > MOST_OF_A_MODEL:
            raise ConcurrencyQuotaExceeded(f"model '{model}'", taken[model] + concurrency, MOST_OF_A_MODEL)
    if (total := taken.total() + asked.total()) > MOST_IN_ALL:
        raise ConcurrencyQuotaExceeded("all models together", total, MOST_IN_ALL)


def _by_model(configs: Iterable[EndpointConfig]) -> Counter[str]:
    sums: Counter[str] = Counter()
    for config in configs:
        for entity in config.entities:
            sums[entity.model.name] += scaling.provisioned(entity)[1]
    return sums
