"""How much concurrency may be provisioned, for one model and for all of them together (contract 5.6).

What counts is the most that a configuration may have: of each endpoint that of the configuration that is being
deployed, or else of the active one. Stopped endpoints count too, so that they can be started at any time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from serving_service import scaling
from serving_service.errors import ConcurrencyQuotaExceeded
from serving_service.model import EndpointConfig

MOST_OF_A_MODEL = 1_024
MOST_IN_ALL = 4_096


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
