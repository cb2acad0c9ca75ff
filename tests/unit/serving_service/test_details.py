"""What is said beside the configuration: what is switched on is refused by its name, the rest comes back as said."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from hypothesis import example, given, settings
from hypothesis import strategies as st

from servicekit.context import Level
from servicekit.errors import FeatureDisabled, InvalidParameter
from serving_service import details, messages
from serving_service.app import MESSAGE_LIMIT
from serving_service.endpoints import View
from serving_service.model import Endpoint
from serving_service.store import MAX_ENDPOINTS
from tessera.serving.v1 import serving_pb2 as pb
from tests.support.builders import a_config, an_endpoint

GATEWAY_OFF = {
    "fallback_config": {"enabled": False},
    "guardrails": {"input": {"safety": False, "pii": {"behavior": "NONE"}}, "output": {}},
    "inference_table_config": {"catalog_name": "", "schema_name": "s", "enabled": False},
    "usage_tracking_config": {},
}


def a_gateway(**fields: object) -> pb.AiGatewayConfig:
    return ParseDict(fields, pb.AiGatewayConfig())


def a_telemetry(**fields: object) -> pb.TelemetryConfig:
    return ParseDict(fields, pb.TelemetryConfig())


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("fallback_config.enabled", {"fallback_config": {"enabled": True}}),
        ("inference_table_config.enabled", {"inference_table_config": {"enabled": True}}),
        ("guardrails.input.safety", {"guardrails": {"input": {"safety": True}}}),
        ("guardrails.output.pii", {"guardrails": {"output": {"pii": {"behavior": "BLOCK"}}}}),
        ("guardrails.input.invalid_keywords", {"guardrails": {"input": {"invalid_keywords": ["x"]}}}),
        ("guardrails.output.valid_topics", {"guardrails": {"output": {"valid_topics": ["x"]}}}),
    ],
)
def test_a_gateway_feature_that_is_switched_on_is_refused_by_its_name(field: str, given: dict[str, object]) -> None:
    with pytest.raises(FeatureDisabled, match=rf"^ai_gateway\.{field}: "):
        details.read_ai_gateway(a_gateway(**given), at="ai_gateway")


@pytest.mark.parametrize(
    ("gateway", "is_tracked"),
    [
        (None, False),
        ({"usage_tracking_config": {}}, False),
        ({"usage_tracking_config": {"enabled": False}}, False),
        ({"usage_tracking_config": {"enabled": True}}, True),
    ],
)
def test_usage_is_tracked_where_that_is_switched_on(gateway: dict[str, object] | None, is_tracked: bool) -> None:
    said = None if gateway is None else details.read_ai_gateway(a_gateway(**gateway), at="ai_gateway")
    assert details.is_usage_tracked(an_endpoint(ai_gateway=said)) is is_tracked


@pytest.mark.parametrize(
    ("field", "limit"),
    [
        ("renewal_period", {"calls": 1, "key": "user"}),
        ("renewal_period", {"calls": 1, "key": "user", "renewal_period": "hour"}),
        ("key", {"calls": 1, "key": "USER", "renewal_period": "minute"}),
        ("principal", {"tokens": 1, "principal": "ada", "renewal_period": "minute"}),
        ("principal", {"tokens": 1, "key": "endpoint", "principal": "ada", "renewal_period": "minute"}),
        ("principal", {"calls": 1, "key": "user_group", "renewal_period": "minute"}),
        ("principal", {"calls": 1, "key": "service_principal", "renewal_period": "minute"}),
        ("calls", {"calls": -1, "key": "user", "renewal_period": "minute"}),
        ("tokens", {"tokens": -1, "renewal_period": "minute"}),
        ("calls", {"calls": 9, "tokens": 1, "key": "endpoint", "renewal_period": "minute"}),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused_by_its_field(field: str, limit: dict[str, object]) -> None:
    good = {"renewal_period": "minute", "calls": 1}
    with pytest.raises(InvalidParameter, match=rf"^ai_gateway\.rate_limits\[1\]\.{field}: "):
        details.read_ai_gateway(a_gateway(rate_limits=[good, limit]), at="ai_gateway")


def test_a_limit_says_what_it_limits_and_there_are_not_very_many() -> None:
    with pytest.raises(InvalidParameter, match=r"^rate_limits\[0\]: give `calls` or `tokens`"):
        details.read_ai_gateway(a_gateway(rate_limits=[{"renewal_period": "minute"}]), at="")
    many = [{"renewal_period": "minute", "calls": 1, "key": "user", "principal": f"u{n}"} for n in range(21)]
    with pytest.raises(InvalidParameter, match="at most 20 limits"):
        details.read_ai_gateway(a_gateway(rate_limits=many), at="")
    groups = [{**each, "key": "user_group"} for each in many[:6]]
    with pytest.raises(InvalidParameter, match="at most 5 limits for groups"):
        details.read_ai_gateway(a_gateway(rate_limits=groups), at="")


def test_limits_come_back_as_they_were_said() -> None:
    said = a_gateway(rate_limits=[{"renewal_period": "minute", "calls": 0, "tokens": 7, "key": "user"}])
    assert details.message(pb.AiGatewayConfig, details.read_ai_gateway(said, at="")) == said


def test_the_older_spelling_has_calls_of_users_and_of_the_endpoint() -> None:
    given = [pb.RateLimit(calls=0, renewal_period="minute"), pb.RateLimit(calls=5, renewal_period="minute", key="user")]
    assert details.read_rate_limits(given) == (
        {"calls": "0", "renewal_period": "minute"},
        {"calls": "5", "renewal_period": "minute", "key": "user"},
    )
    for field, limit in (
        ("calls", pb.RateLimit(renewal_period="minute")),
        ("key", pb.RateLimit(calls=1, renewal_period="minute", key="user_group")),
        ("renewal_period", pb.RateLimit(calls=1)),
    ):
        with pytest.raises(InvalidParameter, match=rf"^rate_limits\[0\]\.{field}: "):
            details.read_rate_limits([limit])


def test_what_is_switched_off_comes_back_as_it_was_said() -> None:
    given = a_gateway(**GATEWAY_OFF)
    said = details.read_ai_gateway(given, at="ai_gateway")
    assert said == GATEWAY_OFF
    assert details.message(pb.AiGatewayConfig, said) == given


def test_an_empty_gateway_is_none() -> None:
    assert details.read_ai_gateway(pb.AiGatewayConfig(), at="") is None
    assert details.message(pb.AiGatewayConfig, None) is None


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("telemetry_profile_id", {"telemetry_profile_id": "p"}),
        ("enabled_telemetry_features", {"enabled_telemetry_features": ["TELEMETRY_FEATURE_TRACES"]}),
        ("table_names.logs_table", {"table_names": {"logs_table": "t"}}),
        ("inference_table_config.sampling_fraction", {"inference_table_config": {"sampling_fraction": 0.5}}),
    ],
)
def test_telemetry_that_is_switched_on_is_refused_by_its_name(field: str, given: dict[str, object]) -> None:
    with pytest.raises(FeatureDisabled, match=rf"^telemetry_config\.{field}: "):
        details.read_telemetry(a_telemetry(**given), at="telemetry_config")


def test_telemetry_that_is_switched_off_is_kept() -> None:
    off = {"table_names": {}, "inference_table_config": {"sampling_fraction": 0.0}}
    assert details.read_telemetry(a_telemetry(**off), at="") == off


@pytest.mark.parametrize("address", ["", "ada", "a@", "@b", "a b@c", "a\0@c", "a@b@c", f"{'a' * 65}@b", "a@b\n"])
def test_what_is_no_address_is_refused_by_its_place(address: str) -> None:
    given = pb.EmailNotifications(on_update_success=["ada@example.com", address])
    with pytest.raises(InvalidParameter, match=r"^email_notifications\.on_update_success\[1\]: "):
        details.read_notifications(given, at="email_notifications")


@pytest.mark.parametrize("keys", [["a", "a"], [""]])
def test_a_tag_needs_a_key_of_its_own(keys: list[str]) -> None:
    with pytest.raises(InvalidParameter, match=r"^tags: "):
        details.read_tags([pb.EndpointTag(key=key) for key in keys], at="tags")


def test_a_tag_without_a_value_is_another_one_than_a_tag_with_an_empty_one() -> None:
    tags = details.read_tags([pb.EndpointTag(key="a"), pb.EndpointTag(key="b", value="")], at="tags")
    assert tags == (("a", None), ("b", ""))


def test_tags_keep_their_places_and_deleting_wins() -> None:
    changed = details.changed_tags(
        (("a", "1"), ("b", None)), added=(("c", "2"), ("a", "3"), ("d", "4")), deleted=["b", "d", "nowhere"]
    )
    assert changed == (("a", "3"), ("c", "2"))


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=700)
PLAIN_TAGS = st.lists(st.tuples(TEXTS, st.none() | TEXTS), max_size=1_200).map(tuple)
GATEWAYS = st.none() | st.builds(
    lambda names, words: {
        "inference_table_config": dict(zip(("catalog_name", "schema_name", "table_name_prefix"), names, strict=True)),
        "guardrails": {"input": {"valid_topics": words}},
    },
    st.tuples(TEXTS, TEXTS, TEXTS),
    st.lists(TEXTS, max_size=40),
)


def an_endpoint_of(names: list[str], **said: object) -> Endpoint:
    return an_endpoint("x" * 63, creator="c" * 255, active=None, pending=a_config(entities=names), **said)


@given(
    names=st.lists(TEXTS, min_size=1, max_size=10),
    description=TEXTS,
    tags=PLAIN_TAGS,
    ai_gateway=GATEWAYS,
    budget_policy_id=TEXTS,
)
@settings(max_examples=200)
@example(names=["n" * 255] * 10, description="", tags=(("", None),) * 1_000, ai_gateway=None, budget_policy_id="")
@example(names=["n"], description="d" * 16_000, tags=(), ai_gateway=None, budget_policy_id="")
def test_a_list_of_as_many_endpoints_as_there_can_be_fits_into_one_message(names: list[str], **said: object) -> None:
    endpoint = an_endpoint_of(names, **said)
    try:
        details.check_listed(endpoint)
    except InvalidParameter:
        return
    listed = pb.ListServingEndpointsResponse(endpoints=[messages.summary(View(endpoint, {}, {}, Level.CAN_VIEW, ""))])
    assert listed.ByteSize() * MAX_ENDPOINTS < MESSAGE_LIMIT


@pytest.mark.parametrize(
    "said",
    [
        {"description": "x"},
        {"tags": (("k", None),)},
        {"ai_gateway": {"inference_table_config": {"schema_name": "x"}}},
        {"telemetry_config": {"inference_table_config": {"name": "x"}}},
        {"budget_policy_id": "x"},
        {"pending": a_config(entities=["x" * 200])},
    ],
)
def test_everything_that_a_list_shows_counts(said: dict[str, Any]) -> None:
    spare = details.MAX_LISTED_BYTES - 150
    full: dict[str, Any] = {"tags": (("k" * spare, None),)} if "description" in said else {"description": "x" * spare}
    details.check_listed(an_endpoint(**full))
    with pytest.raises(InvalidParameter, match=r"^description, tags, .* more than the limit of 16384\. Shorten them"):
        details.check_listed(an_endpoint(**full, **{key: longer(value) for key, value in said.items()}))


def longer(value: Any) -> Any:
    """The same, with each `x` made so long that it does not fit into what is left."""
    if isinstance(value, dict):
        return {key: longer(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return (*value, ("x" * 150, "x"))
    return value.replace("x", "x" * 150) if isinstance(value, str) else value


def test_lists_of_people_to_tell_are_bounded() -> None:
    most = ["ada@example.com"] * details.MAX_ADDRESSES
    said = details.read_notifications(pb.EmailNotifications(on_update_failure=most), at="email_notifications")
    assert said == {"on_update_failure": most}
    with pytest.raises(InvalidParameter, match=r"^email_notifications\.on_update_success: give at most 100"):
        details.read_notifications(
            pb.EmailNotifications(on_update_success=[*most, "bob@example.com"]), at="email_notifications"
        )
