"""How much concurrency may be provisioned: at the limit, and one step past it."""

from __future__ import annotations

import dataclasses

import pytest

from serving_service import quotas
from serving_service.errors import ConcurrencyQuotaExceeded, TooManyEndpointChanges
from serving_service.model import EndpointConfig
from serving_service.quotas import EndpointChanges
from tests.support.builders import a_config, an_entity


def a_config_of(model: str, most: int) -> EndpointConfig:
    entity = dataclasses.replace(
        an_entity(model=model), workload_size="", min_concurrency=0, max_concurrency=most, scale_to_zero=True
    )
    return dataclasses.replace(a_config(), entities=(entity,))


def test_one_model_has_a_quota_over_all_endpoints() -> None:
    others = [a_config_of("churn", 1_000), a_config_of("other", 1_000)]
    quotas.check(a_config_of("churn", 24), others)
    with pytest.raises(ConcurrencyQuotaExceeded, match=r"model 'churn' would have 1028 of at most 1024"):
        quotas.check(a_config_of("churn", 28), others)


def test_all_models_together_have_one_too() -> None:
    others = [a_config_of(f"model-{number}", 1_024) for number in range(3)]
    quotas.check(a_config_of("last", 1_024), others)
    with pytest.raises(ConcurrencyQuotaExceeded, match="all models together would have 4100 of at most 4096"):
        quotas.check(a_config_of("last", 1_024), [*others, dataclasses.replace(a_config())])


def test_endpoints_change_fifty_times_in_five_minutes_and_not_more() -> None:
    now = [1_000.0]
    changes = EndpointChanges(50, now=lambda: now[0])
    for _ in range(50):
        changes.check()
        changes.count()
    for refuse in (changes.check, changes.count):
        with pytest.raises(TooManyEndpointChanges) as refused:
            refuse()
        assert (refused.value.reason, refused.value.retry_after) == ("REQUEST_LIMIT_EXCEEDED", 300)
    now[0] += 300
    changes.count()


def test_endpoints_change_at_will_where_there_is_no_limit() -> None:
    changes = EndpointChanges(0)
    for _ in range(1_000):
        changes.check()
        changes.count()
